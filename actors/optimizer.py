"""What moves the weights: AdamW, and Muon for hidden matrices; which learning rate each parameter has, and when."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from rlhf.bridge import short_name
from rlhf.types import TrainSpec


def rate(step: int, steps: int, warmup: float, schedule: Literal["cosine", "linear", "constant"]) -> float:
    """The share of the learning rate for optimizer step `step` (from 0) of `steps`: up linearly over the first
    warmup · steps, then down to 0 after the last step (cosine, linear), or level."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - rising) / max(1, steps - rising))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def assign_rates(names: Sequence[str], train: Mapping[str, float]) -> dict[str, float]:
    """The learning rate of every parameter that trains; short names (`short_name`). Of several globs that match,
    the longest, being the most specific, decides. Raises ValueError for a glob that matches nothing."""
    for glob in train:
        if not any(fnmatchcase(name, glob) for name in names):
            parts = sorted({".".join(name.split(".")[:1]) for name in names})
            raise ValueError(
                f"train: no parameter matches {glob!r}. The model's parts are {', '.join(f'{p}.*' for p in parts)} "
                "(a tied lm_head trains with its embedding)"
            )
    rates: dict[str, float] = {}
    for glob in sorted(train, key=len):
        rates |= {name: train[glob] for name in names if fnmatchcase(name, glob)}
    return rates


def make_optimizer(model: nn.Module, spec: TrainSpec) -> tuple[torch.optim.Optimizer, list[float]]:
    """An optimizer with a group for each learning rate, decay and rule, and the full learning rates of its groups.
    Sets requires_grad. Norms and biases are not decayed. With LoRA only adapters train, whose globs match by the names
    of what they adapt, and what `spec.whole` names.

    With `spec.muon` hidden matrices learn by Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon; DeepSpeed's,
    which knows ZeRO's partitions): a step's spectral norm is `ratio` times their learning rate, times √(rows / columns)
    if there are more rows. Embeddings, the head, routers, norms and biases learn by AdamW."""
    named = {name: p for name, p in model.named_parameters() if spec.lora is None or ".lora_" in name}
    named |= dict(_whole(model, spec.whole))
    rates = assign_rates([short_name(base_name(name)) for name in named], spec.train)
    matrices = _hidden_matrices(model) if spec.muon is not None else set()
    tables = embeddings(model) if spec.rows_of else set()
    model.requires_grad_(False)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named.items():
        learning_rate = rates.get(short_name(base_name(name)))
        if learning_rate is not None:
            parameter.requires_grad_(True)
            # an embedding of which only some rows train must not lose the others to decay
            decay = spec.weight_decay if parameter.ndim > 1 and parameter not in tables else 0.0
            groups[learning_rate, decay, parameter in matrices].append(parameter)
    if spec.muon is None:
        listed = [{"params": params, "weight_decay": decay} for (_, decay, _), params in groups.items()]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(listed, lr=0.0, betas=spec.betas, fused=True)
        return optimizer, [full for full, _, _ in groups]
    ratio, momentum = spec.muon
    return _with_muon(groups, spec, momentum), [full * (ratio if by_muon else 1.0) for full, _, by_muon in groups]


def _whole(model: nn.Module, globs: Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of an adapted model that have no adapter and match. Raises ValueError for a glob that finds none."""
    plain = {name: p for name, p in model.named_parameters() if ".lora_" not in name and ".base_layer." not in name}
    for glob in globs:
        found = {name: p for name, p in plain.items() if fnmatchcase(short_name(base_name(name)), glob)}
        if not found:
            raise ValueError(f"lora.whole: no parameter without an adapter matches {glob!r}")
        yield from found.items()


def embeddings(model: nn.Module) -> set[nn.Parameter]:
    """The tables with a row for each token: what goes in, and the head's weight, often one and the same."""
    found = (getattr(model, f"get_{side}_embeddings")() for side in ("input", "output"))
    return {module.weight for module in found if module is not None}


def base_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The weights of linear layers and of experts (stacked, a matrix each), but not of the output head."""
    found = {
        parameter
        for name, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
        if parameter.ndim > 1 and (isinstance(module, nn.Linear) or name.endswith(".experts"))
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return found - set(head.parameters() if head is not None else ())


def _with_muon(
    groups: Mapping[tuple[float, float, bool], list[nn.Parameter]], spec: TrainSpec, momentum: float
) -> torch.optim.Optimizer:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
    from deepspeed.runtime.zero.muon.original_muon import muon_update

    class BatchedMuon(MuonWithAuxAdam):  # type: ignore[misc]  # deepspeed has no types
        """Without ZeRO the optimizer itself makes Muon's steps: here for all matrices of one shape in one call, since
        one after the other small matrices take half as long again."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            assert closure is None
            for group in self.param_groups:
                if group["use_muon"]:
                    shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
                    for parameter in group["params"]:
                        shapes[parameter.shape].append(parameter)
                    for alike in shapes.values():
                        self._move(group, alike)
            if self.aux_optimizer is not None:  # no parameter but hidden matrices trains without
                self.aux_optimizer.step()

        def _move(self, group: dict[str, Any], alike: Sequence[nn.Parameter]) -> None:
            for parameter in alike:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            buffers = torch.stack([self.state[parameter]["momentum_buffer"] for parameter in alike])
            # without a gradient its momentum goes on, as in DeepSpeed's own step
            gradients = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in alike])
            updates = muon_update(gradients, buffers, beta=group["momentum"], is_expert_group=True)
            for parameter, buffer, update in zip(alike, buffers, updates, strict=True):
                self.state[parameter]["momentum_buffer"].copy_(buffer)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])

    listed: list[dict[str, Any]] = []
    for (_, decay, by_muon), params in groups.items():
        for parameter in params:
            parameter.use_muon = by_muon  # type: ignore[attr-defined]  # ZeRO asks the parameter
        rule = {"momentum": momentum} if by_muon else {"betas": spec.betas, "eps": 1e-8}
        listed.append({"params": params, "use_muon": by_muon, "lr": 0.0, "weight_decay": decay, **rule})
    kind = BatchedMuon if spec.zero_stage == 0 else MuonWithAuxAdam  # under ZeRO it makes them from its partitions
    optimizer: torch.optim.Optimizer = kind(
        listed, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True}
    )
    return optimizer
