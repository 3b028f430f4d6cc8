"""Stages in order: each continues an artifact, leaves one with its lineage, and must pass its gates.

    runs/NAME/
      recipe.toml            as resolved
      model/  model.json     the bridge built from [model], before any stage; a digest of what it is built from
      data/NAME.parquet      rows made by builders
      judgements.sqlite      what judges of [judges] said, that nobody is asked twice
      stages/03-align/       inputs.json (digest of all that determines the stage), checkpoints/, steps.jsonl,
                             artifact/ (appears when whole), eval.json, answers.json, result.json (last: it is done)
      summary.json  report.html

Running a finished or killed run again skips the stages whose inputs are unchanged and continues the one in progress
from its last checkpoint; a synthesize or evaluate stage has none and begins anew. A run that is asked to stop
(`rlhf.preemption`) leaves a checkpoint of the step it was in.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.cache import Cache, key_of
from rewards.endpoint import Endpoint
from rewards.judge import Question
from rewards.mixture import holds
from rlhf import evaluation, offline, online, remaking, replay, synthesis
from rlhf.agreement import make_probes
from rlhf.algorithms.table import method_of
from rlhf.architecture import algorithm_of, from_folder
from rlhf.checkpoint import digest, latest, read_json, whole, write_json
from rlhf.data.formatting import as_sample
from rlhf.data.rows import Rows, read, write
from rlhf.data.sources import open_source, open_sources
from rlhf.footprint import Footprint
from rlhf.models import build_model, load_processor, local_folder, masked_ids
from rlhf.preemption import PreemptedError, Preemption
from rlhf.provenance import deciding, inputs_of, measured_on, model_digest, trained_on
from rlhf.recipe import (
    Evaluate,
    Gate,
    JudgeTable,
    Merge,
    Optimised,
    Pairs,
    Part,
    Preference,
    Rebuild,
    Recipe,
    RewardModel,
    Rl,
    Sft,
    Stage,
    Synthesize,
    makes_model,
)
from rlhf.reward_model import HEAD, as_ranked, with_head
from rlhf.roles import ActorLostError, Actors, Engine
from rlhf.scoring import Judge
from rlhf.stage import Context, GateError, derive, packs
from rlhf.tasks import beside
from rlhf.tracking import Tracker, stage_folder
from rlhf.types import Correction, Loss, Media, Sample, Scalar, TrainSpec

NUM_PROBES, PROBE_LENGTH = 12, 48
PROBE_ROWS = 1000  # of a source, in which to look for pictures
RENEWALS = 2  # times one stage may lose the trainer
JUDGEMENTS = "judgements.sqlite"  # of a run: what judges said
ANSWERS = "answers.json"  # mode → question → share of right samples, for paired differences between stages


@dataclass
class Curriculum:
    """One run of a recipe in `folder`."""

    recipe: Recipe
    folder: Path
    tracker: Tracker | None = None
    footprint: Footprint = field(default_factory=Footprint)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: dict[str, Rows] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    earlier: dict[str, Any] = field(default_factory=dict)  # the summary of the processes before this one
    idle: bool = True
    held: Path | None = None  # the model that the trainer has, where that is a finished one
    preemption: Preemption = field(default_factory=Preemption)
    actors: Actors = field(init=False)

    async def run(self, actors: Actors) -> None:
        """Run every stage that is not done yet. Raises GateError at the first failed gate."""
        self.actors = actors
        self.earlier = read_json(self.folder / "summary.json") or {}
        self.prepare()
        with self._summarised():
            for index, stage in enumerate(self.recipe.stages):
                folder = stage_folder(self.folder, index, stage.name)
                inputs = inputs_of(stage, self.recipe, self.made, self.rows)
                result = self._finished(folder, inputs)
                if result is None:
                    result = await self._survive(stage, index, folder, inputs)
                result["gates"] = [check(gate, result["metrics"]) for gate in stage.gates]
                result["status"] = "done" if all(gate["passed"] for gate in result["gates"]) else "gate failed"
                self.results[stage.name] = result
                self._summarise()
                for gate in result["gates"]:
                    if not gate["passed"]:
                        raise GateError(explain(stage, gate))

    @contextmanager
    def _summarised(self) -> Iterator[None]:
        """However it ends, the summary says how, and counts the time of a stage that was not finished."""
        status, reason = "interrupted", ""
        try:
            yield
            status = "done"
        except Exception as error:
            if not isinstance(error, PreemptedError):
                status, reason = "failed", f"{type(error).__name__}: {error}"
            raise
        finally:
            if status == "interrupted" and self.preemption.asked:
                status, reason = "preempted", self.preemption.asked
            if not self.idle or status != self.earlier.get("status"):
                self._summarise(status, reason)

    async def _survive(self, stage: Stage, index: int, folder: Path, inputs: dict[str, Any]) -> dict[str, Any]:
        """The stage, continued from its last checkpoint when it loses the trainer; RENEWALS times at most."""
        self.idle = False
        for attempt in itertools.count():
            try:
                return await self._stage(stage, index, folder, inputs)
            except ActorLostError as error:
                if self.preemption.asked:  # its machine went before its time was up
                    raise PreemptedError(self.preemption.lost(f"a process of it was lost ({error})")) from error
                if attempt == RENEWALS:
                    raise
                await self.actors.renew_trainer()
                self.held = None
        raise AssertionError("unreachable")

    async def _stage(self, stage: Stage, index: int, folder: Path, inputs: dict[str, Any]) -> dict[str, Any]:
        self.preemption.stage = stage.name
        _clear(folder, inputs)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "inputs.json", inputs)
        spent, started = float((read_json(folder / "clock.json") or {}).get("seconds", 0.0)), time.monotonic()
        steps = stage.steps if isinstance(stage, Optimised) else None
        last = stage.prompts if isinstance(stage, Synthesize) else steps  # its steps are chunks of prompts
        found = latest(folder / "checkpoints")
        gathered = (read_json(folder / replay.POSITION) or {}).get("step")  # by a stage that only samples
        resumed = last if (folder / "artifact").exists() else found.step if found else gathered
        assert self.tracker is not None
        with self.tracker.stage(
            stage.name,
            stage.kind,
            index,
            len(self.recipe.stages),
            steps=steps,
            resumed=resumed,
            budget_minutes=stage.budget_minutes,
        ) as log:
            context = Context(
                recipe=self.recipe,
                folder=folder,
                model=self.model_before(stage),
                processor=load_processor(self.model_before(stage)),
                actors=self.actors,
                rows=self.rows,
                log=log,
                preemption=self.preemption,
            )
            try:
                metrics = await self._make(stage, context)
                report = await self._evaluate(stage, context)
            finally:
                seconds = spent + time.monotonic() - started
                write_json(folder / "clock.json", {"seconds": seconds})
            metrics |= report.metrics
            artifact = folder / "artifact"
            lineage = {
                "path": str(artifact.relative_to(self.folder)) if artifact.exists() else None,
                "digest": digest(artifact) if artifact.exists() else None,
                "bytes": _bytes(artifact),
                **inputs,
            }
            log.metrics(metrics, report.examples)
            log.artifact(lineage)
        result = {
            "name": stage.name,
            "kind": stage.kind,
            "seconds": seconds,
            "budget_minutes": stage.budget_minutes,
            "metrics": metrics,
            "artifact": lineage,
        }
        write_json(folder / "result.json", result)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return result

    async def _make(self, stage: Stage, context: Context) -> dict[str, float]:
        """Train or synthesise, unless the artifact is there already (killed between training and evaluation)."""
        artifact = context.folder / "artifact"
        if artifact.exists():
            return dict(read_json(context.folder / "made.json") or {})
        if isinstance(stage, Sft | Pairs | Rl):
            return await self._improve(stage, context)
        if isinstance(stage, Synthesize):
            judges = {name: self.artifact(name) for name in self.recipe.judge_models(stage)}
            async with (
                self.actors.serving({"policy": context.model, **judges}) as engines,
                self._judges(stage, context, engines) as asked,
            ):
                judge = asked.get(stage.judge or "")
                rows, metrics = await synthesis.run(stage, context, engines["policy"], judge)
            write_json(context.folder / "made.json", metrics)
            with whole(artifact) as partial:
                write(rows, partial / "rows.parquet")
            return metrics
        if isinstance(stage, Rebuild):
            parts = {slot: self._home(part) for slot, part in stage.parts.items()}
            return await asyncio.to_thread(remaking.rebuild, stage, context, parts)
        if isinstance(stage, Merge):
            folders = {name: self.artifact(name) for name in stage.of}
            fit = functools.partial(self._fit_of, stage.on, context)
            found = await remaking.merge(stage, context, folders, fit)
            self.held = None  # what the trainer has lies elsewhere now
            return found
        return {}

    async def _improve(self, stage: Sft | Preference | RewardModel | Rl, context: Context) -> dict[str, float]:
        """Work through the stage's steps, for which a preemption waits until the artifact is there."""
        artifact = context.folder / "artifact"
        with ExitStack() as heeding:
            if isinstance(stage, Rl):
                judges = {name: self.artifact(name) for name in self.recipe.judge_models(stage)}
                models = {} if stage.replay is not None else {"policy": context.model, **judges}
                scalars = {name: self.artifact(name) for name in stage.scalars}
                # at once: a process that starts has one core busy, with imports
                async with (
                    self.actors.scoring(scalars),
                    beside(self._begin_rl(stage), self.actors.serving(models)) as (facts, engines),
                    self._judges(stage, context, engines) as asked,
                ):
                    heeding.enter_context(self.preemption.heeded())
                    loop = online.run if stage.learn else replay.gather
                    metrics = await loop(stage, context, engines.get("policy"), asked)
                if not stage.learn:
                    return metrics
            else:
                facts = await self.begin(stage)
                heeding.enter_context(self.preemption.heeded())
                metrics = await offline.run(stage, context)
            metrics |= {f"model.{name}": float(value) for name, value in facts.items()}
            write_json(context.folder / "made.json", metrics)
            with whole(artifact) as partial:
                await self.actors.trainer.export(partial)
        self.held = artifact
        return metrics

    def _home(self, part: Part) -> Path:
        if part.artifact is not None:
            return self.artifact(part.artifact)
        assert part.path is not None
        return local_folder(part.path)

    async def _begin_rl(self, stage: Rl) -> Mapping[str, float]:
        return await self.begin(stage) if stage.learn else {}

    async def begin(self, stage: Sft | Preference | RewardModel | Rl, model: Path | None = None) -> Mapping[str, float]:
        """Give the trainer the stage, beginning from its parent's model unless from another, with the probes every
        later publish and export is proven on; none for a reward model, which gives tokens no probabilities."""
        self.held = None
        model = self.model_before(stage) if model is None else model
        processor = load_processor(model)
        masked = masked_ids(processor)
        seed = derive(self.recipe.seed, "probes")
        probes = make_probes(
            len(processor.tokenizer), processor.image_token_id, self._pictures(), NUM_PROBES, PROBE_LENGTH, seed, masked
        )
        spec = train_spec(self.recipe, stage, model, masked)
        probes = [] if isinstance(stage, RewardModel) else probes
        for name, count in stage.calibrating.items():
            spec = dataclasses.replace(spec, calibration=tuple(self._samples(name, count, processor)))
        return await self.actors.trainer.begin(spec, probes)

    def _pictures(self) -> list[Media]:
        """A few images for the probes, of the held-out questions or else of the first rows that have any: without one
        nothing would prove the vision encoder."""
        for name in dict.fromkeys([self.recipe.evaluation.data, *self.recipe.data]):
            if name is None:
                continue
            rows = self.rows(name)
            # a source may begin with rows of text alone
            shown = (images[0] for i in range(min(PROBE_ROWS, len(rows))) if (images := rows[i].get("images")))
            if found := list(itertools.islice(shown, NUM_PROBES)):
                return found
        return []

    async def _evaluate(self, stage: Stage, context: Context) -> evaluation.Report:
        if stage.evaluate == "none":
            return evaluation.Report({})
        artifact = context.folder / "artifact"
        model = artifact if makes_model(stage) or isinstance(stage, RewardModel) else context.model
        if stage.evaluate == "pairs":
            assert stage.eval_data is not None
            return evaluation.Report(await self._preferred(stage.eval_data, context, model, stage))
        if stage.evaluate == "loss":
            assert stage.eval_data is not None
            return evaluation.Report(await self._fit_of(stage.eval_data, context, model, stage))
        async with self.actors.serving({"policy": model}) as engines:
            engine = engines["policy"]
            if stage.evaluate == "judge":
                assert stage.eval_data is not None
                table = self.recipe.measured(stage)
                return await evaluation.judge_quality(context, engine, stage.eval_data, table)
            if stage.evaluate == "rank":
                assert stage.eval_data is not None
                return evaluation.Report(await evaluation.ranked(context, engine, stage.eval_data))
            report = await evaluation.both_modes(context, engine, self._earlier_answers(stage))
            if stage.eval_data is not None:
                report.metrics.update(await evaluation.extra_questions(context, engine, stage.eval_data))
            if isinstance(stage, Evaluate) and stage.temperatures:
                report.metrics.update(await evaluation.temperatures(context, engine, stage.temperatures))
        write_json(context.folder / ANSWERS, report.correct)
        return report

    async def _fit_of(self, source: str, context: Context, model: Path, stage: Stage | None = None) -> dict[str, float]:
        """How well a model fits the first rows of a source, by the trainer; with the memory of the `stage` that made
        it."""
        await self._look(Sft, source, model, stage)
        samples = self._samples(source, self.recipe.evaluation.prompts, context.processor)
        rows = self.rows(source)
        kinds = {sample.key: str(rows.bare(place).get("category") or "") for place, sample in enumerate(samples)}
        return evaluation.fitted(await self.actors.trainer.losses(context.batch(samples)), kinds)

    async def _preferred(self, source: str, context: Context, model: Path, stage: Stage) -> dict[str, float]:
        """How well a reward model tells the chosen replies of a source's first pairs, by the trainer."""
        name = stage.name if isinstance(stage, RewardModel) else self.recipe.parent_of(stage)
        maker = next(one for one in self.recipe.stages if one.name == name and isinstance(one, RewardModel))
        await self._look(RewardModel, source, model, stage, pool=maker.pool, beta=maker.beta)
        rows, settings = self.rows(source), self.recipe.evaluation
        samples, kinds = list[Sample](), dict[str, str]()
        for index in range(min(settings.prompts, len(rows))):
            pair = as_ranked(rows[index], source, index, context.processor, self.recipe.chat)
            kinds[pair[0].key] = str(rows.bare(index).get("corruption") or "")
            samples += pair
        said = await self.actors.trainer.rewards(context.batch(samples))
        return evaluation.preferred(samples, said, kinds, settings.bootstrap)

    async def _look(
        self, kind: type[Sft | RewardModel], source: str, model: Path, stage: Stage | None, **asked: object
    ) -> None:
        """Give the trainer a model to look at, unless it has it; with the memory of the `stage` that made it, and
        `asked` as that was."""
        if self.held == model:
            return
        trained = {"train": stage.train, "lora": stage.lora} if isinstance(stage, Optimised) else {}
        named = "sft" if kind is Sft else "reward_model"
        looks = {"name": "measured", "kind": named, "data": {source: 1.0}, "steps": 1, "batch_size": 1}
        await self.begin(kind.model_validate(looks | trained | asked), model)
        self.held = model

    def _samples(self, name: str, count: int, processor: Any) -> list[Sample]:
        """The first `count` rows of a source, as a trainer takes them."""
        rows = self.rows(name)
        return [as_sample(rows[i], name, i, processor, None, self.recipe.chat) for i in range(min(count, len(rows)))]

    @asynccontextmanager
    async def _judges(
        self, stage: Stage, context: Context, engines: Mapping[str, Engine]
    ) -> AsyncIterator[dict[str, Judge]]:
        """The stage's judges by name: of engines by the stages whose models these serve, or of endpoints."""
        found = dict[str, Judge]()
        async with AsyncExitStack() as opened:
            cache: Cache | None = None
            for name in stage.judges:
                table = self.recipe.judge(name)
                question = Question.of(table)
                if remembers(table) and cache is None:  # one for all
                    cache = Cache(self.folder / JUDGEMENTS)
                    opened.callback(cache.close)
                engine: Engine | Endpoint
                if table.artifact is not None:
                    engine, tokenizer = engines[table.artifact], load_processor(self.artifact(table.artifact)).tokenizer
                else:
                    endpoint = self._endpoint(name, table, question, context, cache if remembers(table) else None)
                    engine = await opened.enter_async_context(endpoint)
                    tokenizer = context.tokenizer
                kept = cache if remembers(table) else None
                spared = {"budget", "missing"}  # which change nothing that was said
                key = deciding(name, self.recipe, self.made, spared)
                found[name] = Judge(engine, tokenizer, table, question, kept, (key,))
            yield found

    def _endpoint(
        self, name: str, table: JudgeTable, question: Question, context: Context, cache: Cache | None
    ) -> Endpoint:
        """A judge's; its budget is the stage's, however often that is killed, where its calls are kept."""
        if cache is None or table.budget is None:
            return Endpoint(table, question.grammar)
        key = key_of("budget", context.folder.name, name, read_json(context.folder / "inputs.json"))
        return Endpoint(table, question.grammar, spent=cache.calls(key), spend=functools.partial(cache.count, key))

    def rows(self, name: str) -> Rows:
        """Rows of a [data] source, or of an earlier synthesize stage."""
        if name not in self.sources:
            if name in self.recipe.data:
                source = self.recipe.data[name]
                self.sources[name] = open_source(name, source, self.recipe.seed, self.folder / "data")
            else:
                self.sources[name] = read(self.artifact(name) / "rows.parquet")
        return self.sources[name]

    def made(self, stage: str) -> str:
        """Digest of what an earlier stage left."""
        return str(self.results[stage]["artifact"]["digest"])

    def artifact(self, stage: str) -> Path:
        """Folder of what an earlier stage left."""
        return self.folder / str(self.results[stage]["artifact"]["path"])

    def model_before(self, stage: Stage) -> Path:
        """The model a stage continues: the one it names, or the policy as the stages before it left it."""
        name = self.recipe.parent_of(stage)
        if name is not None:
            return self.artifact(name)
        return self.folder / "model" if self.recipe.model.path is None else local_folder(self.recipe.model.path)

    def prepare(self) -> None:
        """Make the rows, and the model of [model] where it is one to build and what it is built from has changed."""
        bridge = self.recipe.model.bridge is not None
        used = {name for stage in self.recipe.stages for name in [*trained_on(stage), *measured_on(stage, self.recipe)]}
        # the tokenizer of a bridge to build learns from all
        wanted = {n: s for n, s in self.recipe.data.items() if n not in self.sources and (bridge or n in used)}
        self.sources |= open_sources(wanted, self.recipe.seed, self.folder / "data")
        for stage in self.recipe.stages:
            if stage.evaluate == "judge" and stage.eval_data in self.sources:
                evaluation.require_verdicts(self.sources[stage.eval_data], stage.eval_data)
            if isinstance(stage, Rl):
                require_conditions(stage, {name: self.sources[name] for name in stage.data if name in self.sources})
        if bridge:
            model, inputs = self.folder / "model", {"digest": model_digest(self.recipe, self.rows)}
            if not model.exists() or read_json(self.folder / "model.json") != inputs:
                with whole(model) as partial:
                    build_model(self.recipe, {name: self.rows(name) for name in self.recipe.data}, partial)
                write_json(self.folder / "model.json", inputs)
        if any(isinstance(stage, Rebuild) for stage in self.recipe.stages):
            path = self.recipe.model.path
            remaking.require_rebuildable(self.recipe, self.folder / "model" if path is None else local_folder(path))

    def _finished(self, folder: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
        result = read_json(folder / "result.json")
        if result is None or read_json(folder / "inputs.json") != inputs:
            return None
        lineage, artifact = result["artifact"], folder / "artifact"
        whole_still = artifact.is_dir() and lineage.get("bytes") in (None, _bytes(artifact))
        if lineage["path"] is not None and not whole_still:
            print(f"{artifact} is not as its stage left it, so the stage is run again")
            shutil.rmtree(folder)
            return None
        return result

    def _earlier_answers(self, stage: Stage) -> dict[str, dict[str, float]] | None:
        """Which questions the parent stage answered right, where it was asked."""
        name = self.recipe.parent_of(stage)
        if name is None:
            return None
        index = next(i for i, other in enumerate(self.recipe.stages) if other.name == name)
        return read_json(stage_folder(self.folder, index, name) / ANSWERS)

    def _summarise(self, status: str = "running", reason: str = "") -> None:
        before = self.earlier
        write_json(
            self.folder / "summary.json",
            {
                "name": self.recipe.name,
                "seed": self.recipe.seed,
                "status": status,
                "error": reason,
                # looking at finished stages again is not part of the run
                "wall_seconds": before.get("wall_seconds", 0.0)
                + (0.0 if self.idle else time.monotonic() - self.started),
                "peak_rss_gib": max(before.get("peak_rss_gib", 0.0), self.footprint.peak_gib),
                "engine_cold_starts": before.get("engine_cold_starts", 0) + self.actors.cold_starts,
                "stages": list(self.results.values()),
                **self.footprint.machine(),
            },
        )


def train_spec(
    recipe: Recipe, stage: Sft | Preference | RewardModel | Rl, model: Path, masked: tuple[int, ...]
) -> TrainSpec:
    """What the trainer needs to know of a stage. The clip belongs to the algorithm unless the recipe gives one."""
    balance: dict[str, Any] = {key: getattr(stage, key) for key in ("router_aux", "router_count", "router_layers")}
    if isinstance(stage, Rl):
        name = algorithm_of(stage, from_folder(model))
        assert name is not None  # a model that can be trained has a configuration
        method = method_of(stage, name)
        loss = Loss(
            kind=method.objective,
            normalise=method.normalise,
            longest=stage.max_tokens,
            compare=stage.compare,
            clip_low=method.clip_low,
            clip_high=method.clip_high,
            dual_clip=stage.dual_clip,
            correction=Correction(stage.correction.truncate, stage.correction.mask, stage.correction.rows),
            entropy=stage.entropy,
            kl=(stage.kl.chosen, stage.kl.weight) if stage.kl is not None and stage.kl.place == "loss" else None,
            temperature=stage.temperature,
            masked_ids=masked,
            **balance,
        )
        updates, upcycle = stage.updates_per_step, None
    elif isinstance(stage, Pairs):
        loss, updates, upcycle = Loss(kind="reinforce", normalise="row", **balance), 1, None
    else:
        loss = Loss(kind="nll", normalise=stage.normalise, **balance)
        updates = 1
        made = stage.upcycle
        upcycle = (made.num_experts, made.top_k, made.layers) if made else None
    resources, train = recipe.resources, stage.train or {"*": stage.lr}
    scalar = Scalar(stage.pool, stage.beta) if isinstance(stage, RewardModel) else None
    headed = scalar is not None and scalar.headed
    return TrainSpec(
        model=str(model),
        seed=derive(recipe.seed, stage.name, "trainer") % 2**31,
        loss=loss,
        train=with_head(train) if headed else train,
        steps=stage.steps * updates,
        schedule=stage.schedule,
        warmup=stage.warmup,
        weight_decay=stage.weight_decay,
        betas=stage.betas,
        clip_grad=stage.clip_grad,
        zero_stage=resources.zero_stage,
        offload=resources.offload,
        precision=resources.precision,
        reset=tuple(stage.reset) if isinstance(stage, Sft) else (),
        upcycle=upcycle,
        lora=(stage.lora.rank, stage.lora.alpha, tuple(stage.lora.target_modules)) if stage.lora else None,
        rows_of=tuple(stage.rows_of),
        whole=(*stage.lora.whole, *([f"{HEAD}.*"] if headed else [])) if stage.lora else (),
        muon=(stage.muon.ratio, stage.muon.momentum) if stage.muon else None,
        objectives={str(name): weight for name, weight in stage.objectives.items()} if isinstance(stage, Sft) else {},
        signals=stage.signals if isinstance(stage, Sft) else 0.0,
        beside=resources.trainer_threads_beside,
        checkpointing=resources.checkpointing,
        packed=packs(recipe, model),
        reference=isinstance(stage, Preference) or (isinstance(stage, Rl) and stage.kl is not None),
        critic=stage.foretelling.lr if isinstance(stage, Rl) and stage.foretelling else None,
        scalar=scalar,
    )


def remembers(table: JudgeTable) -> bool:
    """Whether what a judge said is kept: one that draws its words by chance may say something else next time."""
    return table.cache and table.extra.get("temperature", 0) == 0


def require_conditions(stage: Rl, sources: Mapping[str, Rows]) -> None:
    """Raise ValueError that names part and row unless every `when` can be evaluated on all rows of these sources: the
    first row of a kind may come after hours."""
    for part, condition in ((name, part.when) for name, part in stage.rewards.items() if part.when is not None):
        for name, rows in sources.items():
            for index in range(len(rows)):
                try:
                    holds(condition, name, rows.bare(index), f"{rows.origin}, row {index}")
                except ValueError as error:
                    raise ValueError(f"stage {stage.name!r}: rewards.{part}: {error}") from error


def _clear(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Take away what was made from other inputs; a trained artifact stays when only its measuring has changed."""
    before = read_json(folder / "inputs.json")
    if before is None or before == inputs:
        return
    changed = {name for name in inputs if before.get(name) != inputs[name]}
    if changed == {"evaluation_digest"}:
        (folder / "result.json").unlink(missing_ok=True)
    else:
        if (folder / "artifact").exists():
            print(f"{folder.name}: {' and '.join(sorted(changed))} changed, so what it made before goes")
        shutil.rmtree(folder)


def check(gate: Gate, metrics: Mapping[str, float]) -> dict[str, Any]:
    """A gate beside its value; a metric that was not measured fails."""
    value = metrics.get(gate.metric)
    passed = value is not None and (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)
    return {"metric": gate.metric, "min": gate.min, "max": gate.max, "value": value, "passed": passed}


def explain(stage: Stage, gate: Mapping[str, Any]) -> str:
    if gate["value"] is None:
        return f"stage {stage.name!r}: its gate wants {gate['metric']!r}, which the stage does not measure"
    low = gate["min"] is not None and gate["value"] < gate["min"]
    bound = f"at least {gate['min']:g}" if low else f"at most {gate['max']:g}"
    return (
        f"stage {stage.name!r} missed its gate: {gate['metric']} is {gate['value']:.4g}, wanted {bound}. "
        "Its artifact is kept; change the stage (more steps, another rate) or the gate, and run the same command again"
    )


def _bytes(folder: Path) -> int:
    """Of all files in a folder: what tells a lost or cut file without reading a large model."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
