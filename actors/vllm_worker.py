"""A rollout worker whose engine is vLLM's.

The engine core is driven directly, one `get_output` a step: no detokeniser between, and the policy version of every
token is the one the step ran with.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from actors.rollout import Call, EngineSettings, Request, RolloutWorker, rollout_seed, stop_ids
from rlhf.types import Media, Probe, ProbeScores, Prompt, Publication, Sampling

if TYPE_CHECKING:
    from torch import nn
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.llm_engine import LLMEngine

    from rlhf.agreement import Fingerprints, Parts

PIXELS_GIB = 0.25  # of preprocessed pictures: both modes ask about the same, and a judge about a group's


class VllmWorker(RolloutWorker):
    """A vLLM engine."""

    def score(self, probes: Sequence[Probe]) -> ProbeScores:
        call = Call()
        expanded: list[tuple[int, ...]] = []
        for _ in self._ended(call, lambda: expanded.extend(self._submit_probes(call, probes)), len(probes)):
            pass
        if any(request.finish == "abort" for request in call.requests.values()):
            raise RuntimeError("scoring the probes was aborted")
        return ProbeScores(tuple(expanded), tuple(r.prompt_logprobs for r in call.requests.values()))

    def connect(self, address: str, size: int, timeout: float) -> None:
        init = {"address": address, "size": size, "timeout": timeout}
        rpc = self._engine.collective_rpc
        self._do(lambda: rpc("init_weight_transfer_engine", timeout=self.settings.deadline, args=(init,)))

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

    def _take(self, request: Request, output: EngineCoreOutput, version: int) -> None:
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

    def _submit(self, call: Call, prompts: Sequence[Prompt], sampling: Sampling) -> list[tuple[int, ...]]:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        expanded = []
        ready = []
        regex = sampling.regex
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
                        # one of each request: vLLM notes in it by what it is enforced
                        structured_outputs=None if regex is None else StructuredOutputsParams(regex=regex),
                    )
                    ready.append(self._process(rendered, params))
            except ValueError as error:
                raise ValueError(f"prompt {prompt.key!r}: {error}") from error
            expanded.append(tuple(rendered["prompt_token_ids"]))
        self._add(call, ready, sampling.num)
        return expanded

    def _submit_probes(self, call: Call, probes: Sequence[Probe]) -> list[tuple[int, ...]]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        rendered = [self._render(probe.token_ids, probe.media, fresh=True) for probe in probes]
        # before whatever waits: a publish is not to wait for rollouts
        self._add(call, [self._process(one, params, priority=-1) for one in rendered], 1)
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

    def _add(self, call: Call, requests: Sequence[Any], each: int) -> None:
        for request in requests:
            self._engine.engine_core.add_request(request)
        self._enter(call, [request.request_id for request in requests], each)

    def _drop(self, request_ids: Sequence[str]) -> None:
        self._engine.engine_core.abort_requests(list(request_ids))

    def _take_weights(self, publication: Publication, buckets: Sequence[Any]) -> None:
        from actors import weights

        rpc, deadline = self._engine.collective_rpc, self.settings.deadline
        rpc("start_weight_update", timeout=deadline)
        for bucket in buckets:
            data = weights.fetch(bucket, deadline)
            if self.settings.tensor_parallel > 1:  # vLLM's own messages between processes know few types
                data = pickle.dumps(data)
            update = {"weights": data, "names": publication.names}
            rpc("update_weights", timeout=deadline, args=(update,))
        rpc("finish_weight_update", timeout=deadline)

    def _rest(self) -> None:
        self._engine.reset_encoder_cache()
        self._engine.sleep(level=1)

    def _rise(self) -> None:
        self._engine.wake_up()

    def _shutdown(self) -> None:
        self._engine.engine_core.shutdown()

    def _forget(self) -> None:
        # keys and values, image features
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.reset_encoder_cache()

    def _fingerprints(self, probes: Sequence[Probe]) -> Fingerprints:
        from rlhf.agreement import Fingerprints, recording

        self._abort_all()
        (model,) = self._engine.apply_model(lambda model: model)
        with recording(model, fused_parts(model)) as prints:
            for probe in probes:  # one at a time, so that rows are a probe's tokens in order
                call = Call()
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
