"""One rollout worker: a vLLM engine that samples, scores probes, and takes new weights between two steps.

A thread of its own owns the engine. It consumes commands (submit, load, abort, …) and produces finished calls; it
waits for a command when nothing runs or while paused, and is unblocked by any command. Callers' threads only post
commands and read counters, so `heartbeat`, `pause`, `resume` and `abort` answer at once, whatever the engine does.

vLLM's engine core is driven directly, one `get_output` a step: no detokeniser between, and the policy version of every
token is the one the step ran with.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, cast

from PIL import Image

from rlhf.recipe import Implementation
from rlhf.roles import ActorLostError
from rlhf.types import Finish, Group, Media, Probe, ProbeScores, Prompt, Publication, Rollout, Sampling

if TYPE_CHECKING:
    from torch import nn
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.llm_engine import LLMEngine

    from rlhf.agreement import Fingerprints, Parts

IDLE_SECONDS = 0.5
DECODED_IMAGES = 1024
PIXELS_GIB = 0.25  # of preprocessed pictures: both modes ask about the same, and a judge about a group's


@dataclass(frozen=True)
class EngineSettings:
    """What one engine may use.

    masked_tokens   ids that are never sampled (the image placeholder, padding): their logits become -inf
    sleeps          whether `sleep` may be called, which needs a GPU
    deadline        seconds without a reply after which a call is given up and aborted, and TimeoutError raised
    start_deadline  seconds after which starting is given up
    """

    dtype: str = "float32"
    max_model_len: int = 256
    max_num_seqs: int = 256
    kv_cache_gib: float = 0.25
    threads: int = 1
    seed: int = 0
    implementation: Implementation = "auto"
    tensor_parallel: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    masked_tokens: tuple[int, ...] = ()
    sleeps: bool = False
    deadline: float = 300.0
    start_deadline: float = 300.0


@dataclass(frozen=True)
class LoadReport:
    """A finished weight load: the version now served, and the seconds it took."""

    version: int
    seconds: float


@dataclass(frozen=True)
class Heartbeat:
    """Liveness without waiting. `steps` grows while the engine works; `alive_error` tells why it no longer does."""

    steps: int
    running: int
    waiting: int
    version: int
    alive_error: str | None = None


@dataclass
class _Request:
    """One sequence in the engine, for the prompt or probe `place` of its call."""

    call: _Call
    place: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    prompt_logprobs: tuple[float, ...] = ()
    finish: Finish | None = None


@dataclass
class _Call:
    """Requests that one caller waits for. ended: places of prompts all of whose requests are done, or the error that
    ended the engine."""

    requests: dict[str, _Request] = field(default_factory=dict)
    by_place: defaultdict[int, list[_Request]] = field(default_factory=lambda: defaultdict(list))
    open: Counter[int] = field(default_factory=Counter)  # requests by place
    ended: SimpleQueue[int | BaseException] = field(default_factory=SimpleQueue)


class RolloutWorker:
    """A vLLM engine in this process (its own ranks above tensor_parallel 1). Thread-safe.

    Starting takes seconds; errors of starting are raised here. An error inside a step or a load ends the engine:
    pending and later calls raise that error, and the worker serves no more.
    """

    def __init__(self, model: str, settings: EngineSettings) -> None:
        self.settings = settings
        self._model = model
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._requests: dict[str, _Request] = {}
        self._calls: dict[str, _Call] = {}
        self._steps = 0
        self._started = 0
        self._version = 0
        self._serial = 0
        self._paused = False
        self._closed = False
        self._error: BaseException | None = None
        self._decoded = lru_cache(maxsize=DECODED_IMAGES)(_decode)
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="engine", daemon=True)
        self._thread.start()
        try:
            ready.result(timeout=settings.start_deadline)
        except TimeoutError:
            raise TimeoutError(
                f"the engine for {model} did not start within {settings.start_deadline:g} s; raise deadlines.start if "
                "it is only slow"
            ) from None

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Sample `sampling.num` rollouts of every prompt, in order; see `stream`."""
        groups = {place: group for found in self.stream(prompts, sampling) for place, group in found}
        return [groups[place] for place in range(len(prompts))]

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, name: str = ""
    ) -> Iterator[list[tuple[int, Group]]]:
        """Sample `sampling.num` rollouts of every prompt; lists of (place among the prompts, group) of those that were
        finished meanwhile. By its name it can be aborted.

        With a seed every rollout has its own, made from (sampling.seed, prompt.key, index): the same request gives the
        same tokens whatever runs beside it. Log-probs are those of the sampled distribution: after temperature and
        token mask. Raises ValueError naming the prompt that cannot be served.
        """
        call = self._calls[name] = _Call()
        expanded: list[tuple[int, ...]] = []
        for places in self._ended(call, lambda: expanded.extend(self._submit(call, prompts, sampling)), len(prompts)):
            yield [
                (place, Group(prompts[place], expanded[place], tuple(map(self._rollout, call.by_place[place]))))
                for place in places
            ]

    def score(self, probes: Sequence[Probe]) -> ProbeScores:
        """Log-probs of the probes under the live weights: temperature 1, unmasked, never from a cache."""
        call = _Call()
        expanded: list[tuple[int, ...]] = []
        for _ in self._ended(call, lambda: expanded.extend(self._submit_probes(call, probes)), len(probes)):
            pass
        if any(request.finish == "abort" for request in call.requests.values()):
            raise RuntimeError("scoring the probes was aborted")
        return ProbeScores(tuple(expanded), tuple(r.prompt_logprobs for r in call.requests.values()))

    def load(self, publication: Publication, buckets: Sequence[Any]) -> LoadReport:
        """Take new weights between two steps; requests may be running.

        `buckets` are those of the publication, or data. Requests in flight are computed anew under
        the new weights from their next token on (their text so far stays), so each token's log-prob is exactly its
        version's. Raises CoverageError when the weights do not cover the model.
        """
        return self._do(lambda: self._load(publication, buckets))

    def connect(self, address: str, size: int, timeout: float) -> None:
        """Join the trainer's line of `size` processes at "host:port", by which weights that are sent come."""
        init = {"address": address, "size": size, "timeout": timeout}
        rpc = self._engine.collective_rpc
        self._do(lambda: rpc("init_weight_transfer_engine", timeout=self.settings.deadline, args=(init,)))

    def fingerprints(self, probes: Sequence[Probe]) -> Fingerprints:
        """Prints of every parameter group on the probes, under the trainer's names. For diagnosis: requests still
        running are aborted. Needs tensor_parallel 1."""
        if self.settings.tensor_parallel != 1:
            raise ValueError("fingerprints need tensor_parallel = 1: with more, no process holds whole modules")
        return self._do(lambda: self._fingerprints(probes))

    def heartbeat(self) -> Heartbeat:
        """Counters as they stand; never waits."""
        started = self._started
        error = None if self._error is None else f"{type(self._error).__name__}: {self._error}"
        return Heartbeat(self._steps, started, max(0, len(self._requests) - started), self._version, error)

    def pause(self) -> None:
        """Stop stepping after the current step. Requests keep their state; loads still work, scores wait."""
        self._set_paused(True)

    def resume(self) -> None:
        """Step again."""
        self._set_paused(False)

    def sleep(self) -> None:
        """Give the GPU's memory back: the weights go to the host, keys and values are dropped, and what still runs is
        aborted. Ask nothing before `wake`."""
        self._do(self._sleep)

    def wake(self) -> None:
        """Take the memory again, with the weights of before."""
        self._do(self._engine.wake_up)

    def abort(self, name: str | None = None) -> None:
        """End all requests, or those of the stream of that name: what was sampled so far is returned, with finish
        "abort"."""
        if name is None:
            self._post(self._abort_all)
        elif name in self._calls:
            call = self._calls[name]
            self._post(lambda: self._abort(list(call.requests)))

    def close(self) -> None:
        """Abort what runs, end the engine and its thread."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join(timeout=self.settings.deadline)

    # Callers' side: post a command, wait with a deadline.

    def _post(self, command: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._wake:
            if self._error is not None:
                raise self._error
            if self._closed:
                raise RuntimeError("the rollout worker is closed")
            self._commands.append((command, future))
            self._wake.notify_all()
        return future

    def _do(self, command: Callable[[], Any]) -> Any:
        return self._post(command).result(timeout=self.settings.deadline)

    def _ended(self, call: _Call, submit: Callable[[], Any], count: int) -> Iterator[list[int]]:
        """Submit a call's requests; the places that are done, those of one moment together. Each before a deadline."""
        try:
            self._do(submit)
            while count:
                found = [call.ended.get(timeout=self.settings.deadline)]
                while not call.ended.empty():
                    found.append(call.ended.get_nowait())
                places = [place for place in found if isinstance(place, int)]
                for error in found:
                    if isinstance(error, BaseException):
                        raise error
                count -= len(places)
                yield places
        except Empty:
            steps, left = self._steps, sum(call.open.values())
            raise TimeoutError(
                f"{left} of {len(call.requests)} requests unfinished after {self.settings.deadline:g} s "
                f"({steps} engine steps so far, {'paused' if self._paused else 'running'})"
            ) from None
        finally:
            self._calls = {name: other for name, other in self._calls.items() if other is not call}
            if call.open.total() and self._error is None and not self._closed:  # nobody waits for the rest any more
                self._post(lambda: self._abort(list(call.requests)))

    def _set_paused(self, paused: bool) -> None:
        with self._wake:
            self._paused = paused
            self._wake.notify_all()

    # The engine's thread.

    def _run(self, ready: Future[None]) -> None:
        try:
            self._start()
        except BaseException as error:  # noqa: BLE001 - handed to the constructor, which raises it
            ready.set_exception(error)
            return
        ready.set_result(None)
        try:
            while self._next():
                if self._requests and not self._paused:
                    self._step()
        except BaseException as error:  # noqa: BLE001 - handed to every caller
            lost = ActorLostError(f"the engine of this rollout worker ended with {type(error).__name__}: {error}")
            lost.__cause__ = error
            self._fail(lost)
        else:
            self._fail(RuntimeError("the rollout worker was closed"))
        finally:
            self._engine.engine_core.shutdown()

    def _next(self) -> bool:
        """Run the commands that wait; without work, wait for one. False when closed."""
        with self._wake:
            while not self._closed and not self._commands and (self._paused or not self._requests):
                self._wake.wait(IDLE_SECONDS)
            commands = list(self._commands)
            self._commands.clear()
        for place, (command, future) in enumerate(commands):
            try:
                result = command()
            except Exception as error:
                future.set_exception(error)
                if self._error is not None:
                    for _, waiting in commands[place + 1 :]:
                        waiting.set_exception(error)
                    raise
            else:
                future.set_result(result)
        return not self._closed

    def _fail(self, error: BaseException) -> None:
        with self._wake:
            self._error = error
            commands = list(self._commands)
            self._commands.clear()
        for _, future in commands:
            future.set_exception(error)
        for call in {id(request.call): request.call for request in self._requests.values()}.values():
            call.ended.put(error)
        self._requests.clear()

    def _start(self) -> None:
        settings = self.settings
        set_environment(settings)
        import torch

        torch.set_num_threads(settings.threads)
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        from actors import vllm_plugin
        from rlhf.models import load_processor

        vllm_plugin.register()
        self._processor = load_processor(Path(self._model))
        self._tokenizer = self._processor.tokenizer
        on_cpu = settings.device == "cpu"
        self._engine: LLMEngine = LLMEngine.from_engine_args(
            EngineArgs(
                model=self._model,
                dtype=settings.dtype,
                seed=settings.seed,
                max_model_len=settings.max_model_len,
                max_num_seqs=settings.max_num_seqs,
                model_impl=settings.implementation,
                tensor_parallel_size=settings.tensor_parallel,
                kv_cache_memory_bytes=int(settings.kv_cache_gib * 2**30),
                enforce_eager=on_cpu,
                ir_op_priority={"rms_norm": [vllm_plugin.CPU_NORM]} if on_cpu else {},
                logprobs_mode="processed_logprobs",
                logits_processors=["actors.masking:TokenMask"] if settings.masked_tokens else None,
                additional_config={"masked_tokens": list(settings.masked_tokens)},
                # a seeded request whose prefill is chunked kills the engine on the CPU (vLLM 0.32)
                enable_chunked_prefill=not on_cpu,
                max_num_batched_tokens=max(8192, settings.max_model_len),
                # the version of a token must be known when its step returns
                async_scheduling=False,
                enable_prefix_caching=True,
                scheduling_policy="priority",
                mm_processor_cache_gb=PIXELS_GIB,
                generation_config="vllm",
                enable_sleep_mode=settings.sleeps,
                # else vLLM wants nearly all of the GPU to be free, though the cache has its size
                **({"gpu_memory_utilization": 0.01} if settings.sleeps else {}),
                weight_transfer_config=WeightTransferConfig(backend=vllm_plugin.TRANSFER),
                disable_log_stats=True,
            )
        )
        self._stop_ids = stop_ids(self._tokenizer, self._engine.model_config.hf_config)

    def _step(self) -> None:
        outputs = self._engine.engine_core.get_output().outputs
        version = self._version
        for output in outputs:
            request = self._requests.get(output.request_id)
            if request is not None:  # else aborted in this very step
                self._take(request, output, version)
        self._steps += 1

    def _take(self, request: _Request, output: EngineCoreOutput, version: int) -> None:
        if output.new_prompt_logprobs_tensors is not None:
            request.prompt_logprobs = tuple(output.new_prompt_logprobs_tensors.logprobs[:, 0].tolist())
        if output.new_token_ids:
            if not request.token_ids:
                self._started += 1
            request.token_ids.extend(output.new_token_ids)
            request.versions.extend([version] * len(output.new_token_ids))
            if output.new_logprobs is not None:
                # the sampled token's own log-prob comes first in every row
                request.logprobs.extend(output.new_logprobs.logprobs[:, 0].tolist())
        if output.finish_reason is not None:
            reason = str(output.finish_reason)
            if reason not in ("stop", "length", "abort"):
                raise RuntimeError(f"the engine ended a request with {reason!r}")
            self._close_request(output.request_id, reason)  # type: ignore[arg-type]

    def _close_request(self, request_id: str, finish: Finish) -> None:
        request = self._requests.pop(request_id)
        request.finish = finish
        if request.token_ids:
            self._started -= 1
        call = request.call
        call.open[request.place] -= 1
        if call.open[request.place] == 0:
            call.ended.put(request.place)

    def _abort(self, request_ids: Sequence[str]) -> None:
        known = [request_id for request_id in request_ids if request_id in self._requests]
        self._engine.engine_core.abort_requests(known)
        for request_id in known:
            self._close_request(request_id, "abort")

    def _abort_all(self) -> None:
        self._abort(list(self._requests))

    def _submit(self, call: _Call, prompts: Sequence[Prompt], sampling: Sampling) -> list[tuple[int, ...]]:
        from vllm import SamplingParams

        expanded = []
        ready = []
        for prompt in prompts:
            try:
                rendered = self._render(prompt.token_ids, prompt.media, fresh=False)
                for index in range(sampling.num):
                    params = SamplingParams(
                        temperature=sampling.temperature,
                        max_tokens=sampling.max_tokens,
                        seed=None if sampling.seed is None else rollout_seed(sampling.seed, prompt.key, index),
                        stop_token_ids=self._stop_ids,
                        logprobs=0,
                        detokenize=False,
                    )
                    ready.append(self._process(rendered, params))
            except ValueError as error:
                raise ValueError(f"prompt {prompt.key!r}: {error}") from error
            expanded.append(tuple(rendered["prompt_token_ids"]))
        self._enter(call, ready, sampling.num)
        return expanded

    def _submit_probes(self, call: _Call, probes: Sequence[Probe]) -> list[tuple[int, ...]]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        rendered = [self._render(probe.token_ids, probe.media, fresh=True) for probe in probes]
        # before whatever waits: a publish is not to wait for rollouts
        self._enter(call, [self._process(one, params, priority=-1) for one in rendered], 1)
        return [tuple(one["prompt_token_ids"]) for one in rendered]

    def _render(self, token_ids: Sequence[int], media: Sequence[Media], fresh: bool) -> Mapping[str, Any]:
        """The engine's input of un-expanded ids and pictures. `fresh` keeps encoder outputs out of every cache."""
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        prompt: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
        if salt := self._processor.salt(token_ids):
            prompt["cache_salt"] = salt
        if media:
            seen = media if self._processor.reads else [replace(one, question=()) for one in media]
            digests, images = zip(*map(self._decoded, seen), strict=True)
            if fresh:
                self._serial += 1
                digests = tuple(f"{digest}#{self._serial}.{place}" for place, digest in enumerate(digests))
            prompt["multi_modal_data"] = {"image": list(images)}
            prompt["multi_modal_uuids"] = {"image": list(digests)}
        # "skip": of vLLM's two caches the one that hands pixels out with every request; the other assumes that the
        # engine has got whatever was ever rendered, which one refused prompt of a call makes untrue
        parsed = parse_model_prompt(self._engine.model_config, prompt)
        (rendered,) = self._engine.renderer.render_cmpl([parsed], skip_mm_cache=True)
        wanted = self._processor.expand(token_ids, [one.size for one in media])
        if list(rendered["prompt_token_ids"]) != list(wanted):
            raise ValueError(
                f"the engine expanded {len(token_ids)} ids to {len(rendered['prompt_token_ids'])}, the processor "
                f"to {len(wanted)}: send un-expanded ids, one placeholder for each image"
            )
        return rendered  # type: ignore[no-any-return]

    def _process(self, rendered: Mapping[str, Any], params: Any, priority: int = 0) -> Any:
        self._serial += 1
        processor = self._engine.input_processor
        request = processor.process_inputs(
            str(self._serial),
            rendered,
            params,
            supported_tasks=self._engine.get_supported_tasks(),
            priority=priority,
        )
        processor.assign_request_id(request)
        return request

    def _enter(self, call: _Call, requests: Sequence[Any], each: int) -> None:
        """Give the engine a call's requests, `each` of them for one place."""
        call.open.update(index // each for index in range(len(requests)))
        for index, request in enumerate(requests):
            self._engine.engine_core.add_request(request)
            entered = _Request(call, index // each)
            call.requests[request.request_id] = self._requests[request.request_id] = entered
            call.by_place[entered.place].append(entered)

    def _rollout(self, request: _Request) -> Rollout:
        ids = request.token_ids
        shown = ids[:-1] if request.finish == "stop" and ids and ids[-1] in self._stop_ids else ids
        assert request.finish is not None
        return Rollout(
            tuple(ids),
            tuple(request.logprobs),
            tuple(request.versions),
            self._tokenizer.decode(shown, skip_special_tokens=False),
            request.finish,
        )

    def _load(self, publication: Publication, buckets: Sequence[Any]) -> LoadReport:
        from actors import weights

        start = time.perf_counter()
        rpc, deadline = self._engine.collective_rpc, self.settings.deadline
        try:
            rpc("start_weight_update", timeout=deadline)
            for bucket in buckets:
                data = weights.fetch(bucket, deadline)
                if self.settings.tensor_parallel > 1:  # vLLM's own messages between processes know few types
                    data = pickle.dumps(data)
                update = {"weights": data, "names": publication.names}
                rpc("update_weights", timeout=deadline, args=(update,))
            rpc("finish_weight_update", timeout=deadline)
        except Exception as error:
            self._error = error  # half of the weights are new: this engine must not answer again
            raise
        self._forget()
        self._version = publication.version
        return LoadReport(publication.version, time.perf_counter() - start)

    def _sleep(self) -> None:
        self._abort_all()
        self._engine.reset_encoder_cache()
        self._engine.sleep(level=1)

    def _forget(self) -> None:
        """Drop everything computed with the weights of before: keys and values, image features."""
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.reset_encoder_cache()

    def _fingerprints(self, probes: Sequence[Probe]) -> Fingerprints:
        from rlhf.agreement import Fingerprints, recording

        self._abort_all()
        (model,) = self._engine.apply_model(lambda model: model)
        with recording(model, fused_parts(model)) as prints:
            for probe in probes:  # one at a time, so that rows are a probe's tokens in order
                call = _Call()
                self._submit_probes(call, [probe])
                while call.open.total():
                    self._step()
            return Fingerprints(prints())


def set_environment(settings: EngineSettings) -> None:
    """The process-wide settings vLLM reads on import; the one place that sets them."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if settings.tensor_parallel == 1 else "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    if settings.device == "cpu":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def rollout_seed(seed: int, key: str, index: int) -> int:
    """The seed of one rollout: a 63-bit hash, the same in every process and Python version."""
    digest = hashlib.sha256(f"{seed}\0{key}\0{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stop_ids(tokenizer: Any, config: Any) -> list[int]:
    """Ids that end a completion: the tokenizer's end of text and those the model's config names."""
    found = {tokenizer.eos_token_id}
    for part in (config, config.get_text_config()):
        named = getattr(part, "eos_token_id", None)
        found.update(named if isinstance(named, list) else [named])
    return sorted(found - {None})


def fused_parts(model: nn.Module) -> Callable[[str, nn.Module], Parts]:
    """Which output columns of vLLM's fused linears (q, k, v; gate, up) are which of the trainer's modules."""
    from rlhf.routing import group_name

    fused: dict[str, dict[Any, str]] = {}
    mapper = cast(Any, model).hf_to_vllm_mapper
    for original, (into, shard) in mapper.orig_to_new_stacked.items():
        fused.setdefault(into, {})[shard] = group_name(original)

    def parts(name: str, module: nn.Module) -> Parts:
        shards = fused.get(name)
        if shards is None:
            return [(group_name(name), slice(None))]
        order = [shard for shard in ("q", "k", "v", 0, 1) if shard in shards]
        edges = [0]
        for size in cast(Any, module).output_partition_sizes:
            edges.append(edges[-1] + size)
        return [(shards[shard], slice(edges[i], edges[i + 1])) for i, shard in enumerate(order)]

    return parts


def _decode(media: Media) -> tuple[str, Image.Image]:
    return media.digest(reads=True), media.open()
