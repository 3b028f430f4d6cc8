"""A rollout worker whose engine is transformers' own forward, for models that vLLM cannot serve.

Each step computes all running rows whole, pictures included, by the trainer's own path (`rlhf.batching.collate`): there
is no cache that a load of weights could leave stale, and nothing to disagree with the trainer about. That is its use
and its price: a reply of n tokens costs n forwards of its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from actors.rollout import Call, RolloutWorker, rollout_seed, stop_ids
from actors.weights import CoverageError, Receiver, fetch, some
from rlhf.types import Media, Probe, ProbeScores, Prompt, Publication, Sample, Sampling

if TYPE_CHECKING:
    from rlhf.agreement import Fingerprints


@dataclass
class _Row:
    """One sequence: what it began with, expanded, and how to go on."""

    prompt: tuple[int, ...]
    media: tuple[Media, ...]
    sampling: Sampling
    chance: torch.Generator


class HuggingFaceWorker(RolloutWorker):
    """transformers, row after row in the order of their coming, max_num_seqs at a time. One process: it has no
    tensor_parallel."""

    def connect(self, address: str, size: int, timeout: float) -> None:
        self._do(lambda: self._receiver.join(address, 1, size, timeout))

    def score(self, probes: Sequence[Probe]) -> ProbeScores:
        from rlhf.agreement import probe_model

        found: ProbeScores = self._do(lambda: probe_model(self._net, self._processor, self._visual, probes))
        return found

    def _start(self) -> None:
        torch.set_num_threads(self.settings.threads)
        from rlhf.batching import Cached
        from rlhf.foreign import loop_over_experts, mixes_experts, open_model

        if self.settings.tensor_parallel > 1:
            raise ValueError("the Hugging Face engine is one process: set resources.tensor_parallel = 1")
        model, self._processor, visual = open_model(self._model)
        self._device = torch.device(self.settings.device)
        if self.settings.device == "cpu" and mixes_experts(model):
            loop_over_experts(model)
        self._net: Any = model.to(self._device, getattr(torch, self.settings.dtype)).eval().requires_grad_(False)
        self._visual = Cached(visual)
        self._tokenizer = self._processor.tokenizer
        self._stop_ids = stop_ids(self._tokenizer, model.config)
        self._receiver = Receiver(self._device)
        self._rows: dict[str, _Row] = {}

    @torch.no_grad()
    def _step(self) -> None:
        from rlhf.batching import collate

        running = list(self._rows.items())[: self.settings.max_num_seqs]
        ends = self._tokenizer.eos_token_id
        samples = []
        for name, row in running:
            ids = (*row.prompt, *self._requests[name].token_ids)
            samples.append(Sample(name, (*ids, ends), len(ids), row.media))  # a token after the row, to be foretold
        tensors = collate(samples, self._visual).to(self._device)
        kept, places = tensors.predictions()
        out = self._net(**tensors.model_inputs(), use_cache=False, logits_to_keep=kept)
        logits = out.logits.flatten(0, -2)[places].float()
        logits[:, list(self.settings.masked_tokens)] = float("-inf")
        for (name, row), line in zip(running, logits, strict=False):  # a blank row may follow
            self._sampled(name, row, line)
        self._steps += 1

    def _sampled(self, name: str, row: _Row, logits: torch.Tensor) -> None:
        """The row's next token, drawn by the inverse of the distribution's sum: one random number each."""
        request, heat = self._requests[name], row.sampling.temperature
        logprobs = (logits / (heat or 1.0)).log_softmax(-1)
        if heat:
            drawn = torch.rand((), generator=row.chance, dtype=torch.float64)
            sums = logprobs.double().exp().cumsum(-1)
            token = int(torch.searchsorted(sums, drawn.to(sums.device) * sums[-1], right=True))
        else:
            token = int(logprobs.argmax())
        if not request.token_ids:
            self._started += 1
        request.token_ids.append(token)
        request.logprobs.append(float(logprobs[token]))
        request.versions.append(self._version)
        ended = token in self._stop_ids
        full = len(row.prompt) + len(request.token_ids) >= self.settings.max_model_len
        if ended or full or len(request.token_ids) >= row.sampling.max_tokens:
            del self._rows[name]
            self._close_request(name, "stop" if ended else "length")

    def _submit(self, call: Call, prompts: Sequence[Prompt], sampling: Sampling) -> list[tuple[int, ...]]:
        if sampling.regex is not None:
            raise ValueError(
                "the Hugging Face engine cannot hold replies to a pattern: leave `constrain` out of the judge's table"
            )
        expanded = []
        for prompt in prompts:
            try:
                expanded.append(tuple(self._processor.expand(prompt.token_ids, [one.size for one in prompt.media])))
            except ValueError as error:
                raise ValueError(f"prompt {prompt.key!r}: {error}") from error
            if len(expanded[-1]) >= self.settings.max_model_len:
                raise ValueError(
                    f"prompt {prompt.key!r}: {len(expanded[-1])} tokens leave no room for a reply in max_model_len = "
                    f"{self.settings.max_model_len}"
                )
        names = []
        for prompt, ids in zip(prompts, expanded, strict=True):
            for index in range(sampling.num):
                self._serial += 1
                names.append(str(self._serial))
                chance = torch.Generator()
                if sampling.seed is None:
                    chance.seed()
                else:
                    chance.manual_seed(rollout_seed(sampling.seed, prompt.key, index))
                self._rows[names[-1]] = _Row(ids, prompt.media, sampling, chance)
        self._enter(call, names, sampling.num)
        return expanded

    def _drop(self, request_ids: Sequence[str]) -> None:
        for name in request_ids:
            self._rows.pop(name, None)

    @torch.no_grad()
    def _take_weights(self, publication: Publication, buckets: Sequence[Any]) -> None:
        own = dict(self._net.named_parameters())
        self._receiver.begin()
        for bucket in buckets:
            for name, value in self._receiver.take(fetch(bucket, self.settings.deadline), publication.names):
                if name not in own or own[name].shape != value.shape:
                    shape = "no such parameter" if name not in own else f"{list(own[name].shape)}"
                    raise CoverageError(f"{name} {list(value.shape)}: the engine's model has {shape}")
                own[name].copy_(value)
        self._receiver.check()
        if left := [name for name in own if name not in publication.names]:
            raise CoverageError(
                f"the published weights leave parameters of the engine's model unfilled: {some(left)}; publish every "
                "parameter of the policy under its checkpoint name"
            )
        self._receiver.finish()

    def _forget(self) -> None:
        """Nothing is kept but pictures as they are cut, which no weight changes."""

    def _rest(self) -> None:
        self._net.to("cpu")

    def _rise(self) -> None:
        self._net.to(self._device)

    def _fingerprints(self, probes: Sequence[Probe]) -> Fingerprints:
        from rlhf.agreement import fingerprint_model

        self._abort_all()
        return fingerprint_model(self._net, self._processor, self._visual, probes)

    def _shutdown(self) -> None:
        self._rows.clear()
