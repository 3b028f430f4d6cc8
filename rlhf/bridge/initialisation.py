"""Start some parameters afresh."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch

from rlhf.bridge.builder import begin, new
from rlhf.bridge.model import BridgeForConditionalGeneration
from rlhf.bridge.naming import short_name


def reset(model: BridgeForConditionalGeneration, globs: Iterable[str], seed: int) -> list[str]:
    """Re-initialise, in place, the parameters whose short names match one of `globs` (`connector.*`); the others keep
    their values. Returns the names. Raises `ValueError` for a glob that matches nothing."""
    parameters = dict(model.named_parameters())
    chosen = set()
    for glob in globs:
        matches = {name for name in parameters if fnmatchcase(short_name(name), glob)}
        if not matches:
            raise ValueError(f"no parameter matches {glob!r}; names look like {short_name(next(iter(parameters)))!r}")
        chosen |= matches
    fresh = dict(new(model.config, seed).named_parameters())
    with torch.no_grad():
        for name in chosen:
            parameters[name].copy_(fresh[name])
    begin(model, chosen)
    return sorted(chosen)
