"""Does the live engine compute what the trainer computes? Probes, the comparison, and who is to blame if not.

A weight sync is proven on fixed probes: `make_probes` draws them, `probe_model` scores them with the trainer's model,
the engine scores them with its live weights, `compare` judges. On disagreement both sides take fingerprints of every
parameterised module, and `localise` names the first one that turns equal inputs into different outputs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rlhf.batching import Tensors, Visual, collate
from rlhf.routing import group_name, is_experts, lowest_margins, routers
from rlhf.types import Media, Probe, ProbeScores, Sample

SKETCH_WIDTH = 8
# router margin under which trainer and engine may choose different experts, in float32
NEAR_TIE = 1e-5
Parts = Sequence[tuple[str, slice]]
Floats = NDArray[np.float32]


class ProbeProcessor(Protocol):
    """What probing asks of a bridge's processor."""

    def expand(self, token_ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[int]: ...


@dataclass(frozen=True)
class Agreement:
    """The verdict on one sync. Gaps are |trainer - engine| log-prob differences over the `checked` positions.

    skipped     positions left out: there, or earlier in the probe, a router was within `min_margin` of a tie
    unreached   "layer: experts …" the probes never visit; their weights are not proven
    """

    max_gap: float
    mean_gap: float
    checked: int
    skipped: int
    unreached: tuple[str, ...]
    ok: bool
    message: str


@dataclass(frozen=True)
class Print:
    """A module's inputs and outputs, each row (token, patch) sketched to SKETCH_WIDTH numbers: [rows, SKETCH_WIDTH]."""

    inputs: Floats
    outputs: Floats


@dataclass(frozen=True)
class Fingerprints:
    """Prints by parameter-group name, in forward order. Trainer side only: for every experts module, the experts each
    row visits [rows, top_k] and its margin to the next expert [rows]."""

    prints: Mapping[str, Print]
    routing: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    margins: Mapping[str, Floats] = field(default_factory=dict)


def make_probes(
    vocab_size: int,
    image_token_id: int,
    media: Sequence[Media],
    num: int = 8,
    length: int = 32,
    seed: int = 0,
    forbidden: Sequence[int] = (),
) -> list[Probe]:
    """`num` sequences of `length` random ids, un-expanded; every second one, the first included, opens with a picture.

    `forbidden` ids and the image id never appear as text. The same arguments give the same probes.
    """
    allowed = sorted(set(range(vocab_size)) - set(forbidden) - {image_token_id})
    if not allowed or length < 2 or num < 1:
        raise ValueError(f"{num} probes of {length} tokens from {len(allowed)} ids: give at least 1, 2 and 1")
    draw = random.Random(seed)
    probes = []
    for index in range(num):
        ids = tuple(draw.choice(allowed) for _ in range(length))
        # with a question, for bridges whose connector reads
        shown = (replace(media[(index // 2) % len(media)], question=ids[:8]),) if media and index % 2 == 0 else ()
        probes.append(Probe((image_token_id,) * len(shown) + ids, shown))
    return probes


def compare(
    trainer: ProbeScores, engine: ProbeScores, max_gap: float = 1e-4, min_margin: float = NEAR_TIE
) -> Agreement:
    """Judge an engine's scores by the trainer's.

    A mixture of experts is discontinuous where two experts tie, so a position whose smallest router margin so far is
    under `min_margin` is not judged; `trainer.margins` holds running minima, which skips the rest of the probe too.
    Not ok when a checked gap exceeds `max_gap` or is NaN, when nothing could be checked, or when the two sides did not
    see the same expanded ids.
    """
    for index, (ids, seen) in enumerate(zip(trainer.expanded_ids, engine.expanded_ids, strict=True)):
        if tuple(ids) != tuple(seen):
            return _verdict([], 0, (), f"probe {index}: trainer and engine saw different token ids", max_gap)
    gaps: list[float] = []
    skipped = 0
    for index, (left, right) in enumerate(zip(trainer.logprobs, engine.logprobs, strict=True)):
        if len(left) != len(right):
            return _verdict([], 0, (), f"probe {index}: {len(left)} against {len(right)} log-probs", max_gap)
        margins = trainer.margins[index] if trainer.margins else (float("inf"),) * len(left)
        for ours, theirs, margin in zip(left, right, margins, strict=True):
            if margin < min_margin:
                skipped += 1
            else:
                gaps.append(abs(ours - theirs))
    unreached = tuple(
        f"{layer}: experts {', '.join(map(str, missing))}"
        for layer, reached in trainer.experts_reached.items()
        if (missing := sorted(set(range(trainer.experts_total)) - set(reached)))
    )
    problem = "" if gaps else f"no position could be checked: all {skipped} are near a router tie"
    return _verdict(gaps, skipped, unreached, problem, max_gap)


def _verdict(gaps: list[float], skipped: int, unreached: tuple[str, ...], problem: str, max_gap: float) -> Agreement:
    values = np.asarray(gaps if gaps else [np.nan])
    worst, mean = float(values.max()), float(values.mean())
    ok = not problem and worst <= max_gap
    told = problem or f"log-probs differ by up to {worst:.2e} (mean {mean:.2e}) over {len(gaps)} probe positions"
    if not ok and not problem:
        told += f"; allowed is {max_gap:.0e}"
    if unreached:
        told += f"; not reached by any probe: {'; '.join(unreached)}"
    return Agreement(worst, mean, len(gaps), skipped, unreached, ok, told)


def probe_model(model: nn.Module, processor: ProbeProcessor, visual: Visual, probes: Sequence[Probe]) -> ProbeScores:
    """Score probes with the trainer's model: unmasked log-probs at temperature 1 in float32, and router margins."""
    with routers(model) as routed:
        expanded, tensors, logits = _forward(model, processor, visual, probes)
    logprobs, margins = [], []
    reached: dict[str, set[int]] = {name: set() for name in routed}
    lowest = lowest_margins((routing.margin() for routing in routed.values()), tensors)
    chosen = {name: tensors.in_rows(routing.choice().cpu()) for name, routing in routed.items()}
    for index, ids in enumerate(expanded):
        values = logits[index, : len(ids) - 1].float().log_softmax(-1)
        targets = torch.tensor(ids[1:], device=logits.device)[:, None]
        logprobs.append(tuple(values.gather(-1, targets)[:, 0].tolist()))
        for name, experts in chosen.items():
            reached[name].update(experts[index, : len(ids)].flatten().tolist())
        margins.append(tuple(lowest[index, : len(ids) - 1].tolist()))
    visited = {name: tuple(sorted(experts)) for name, experts in reached.items()}
    total = max((routing.logits.shape[-1] for routing in routed.values()), default=0)
    return ProbeScores(tuple(map(tuple, expanded)), tuple(logprobs), tuple(margins), visited, total)


def fingerprint_model(
    model: nn.Module, processor: ProbeProcessor, visual: Visual, probes: Sequence[Probe]
) -> Fingerprints:
    """Fingerprints of the trainer's model on the probes, one probe at a time."""
    routing: dict[str, list[NDArray[np.int64]]] = {}
    margins: dict[str, list[Floats]] = {}
    with recording(model) as prints:
        for probe in probes:
            with routers(model) as routed:
                _forward(model, processor, visual, [probe])
            for name, said in routed.items():
                routing.setdefault(name, []).append(said.choice().cpu().numpy())
                margins.setdefault(name, []).append(said.margin().cpu().numpy())
    return Fingerprints(
        prints(),
        {name: np.concatenate(rows) for name, rows in routing.items()},
        {name: np.concatenate(rows) for name, rows in margins.items()},
    )


def _forward(
    model: nn.Module, processor: ProbeProcessor, visual: Visual, probes: Sequence[Probe]
) -> tuple[list[list[int]], Tensors, torch.Tensor]:
    """Expanded ids of the probes, their tensors and logits [rows, longest, vocabulary], by the path of training. A row
    with a picture may come after the probes' own (`Visual.blank`): routers see it too."""
    expanded = [processor.expand(probe.token_ids, [media.size for media in probe.media]) for probe in probes]
    # all but the last id is prompt: what is packed once for two rows must hold their pictures whole
    rows = [Sample("probe", tuple(ids), len(ids) - 1, probe.media) for ids, probe in zip(expanded, probes, strict=True)]
    tensors = collate(rows, visual).to(next(model.parameters()).device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(**tensors.model_inputs(), use_cache=False).logits
        return expanded, tensors, tensors.in_rows(logits.flatten(0, 1))
    finally:
        model.train(training)


def _whole(name: str, _module: nn.Module) -> Parts:
    return [(group_name(name), slice(None))]


@contextmanager
def recording(
    model: nn.Module, parts: Callable[[str, nn.Module], Parts] = _whole
) -> Iterator[Callable[[], dict[str, Print]]]:
    """Record prints while the context lasts; call what it yields to get them, in order of first use.

    Every module with parameters of its own is recorded, and mixtures of experts as a whole. `parts` names the slices
    of a module's output that are groups of their own (a fused q, k and v), or none.
    """
    seen: dict[str, tuple[list[Floats], list[Floats]]] = {}
    waiting: dict[int, Floats] = {}
    handles = []

    def listen(name: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            # before the call, for kernels that work in place
            waiting[id(module)] = sketch(_first_tensor([*args, *kwargs.values()]))

        def after(module: nn.Module, _args: Any, output: Any) -> None:
            inputs, value = waiting.pop(id(module)), _first_tensor([output])
            for part, columns in parts(name, module):
                into = seen.setdefault(part, ([], []))
                into[0].append(inputs)
                into[1].append(sketch(value[..., columns]))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    for name, module in model.named_modules():
        own = next(module.parameters(recurse=False), None) is not None
        inside = any(is_experts(".".join(name.split(".")[:cut])) for cut in range(1, name.count(".") + 1))
        if is_experts(name) or (own and (not inside or name.endswith(".experts.gate"))):
            listen(name, module)
    try:
        yield lambda: {name: Print(np.concatenate(i), np.concatenate(o)) for name, (i, o) in seen.items()}
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(values: Sequence[Any]) -> torch.Tensor:
    for value in values:
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, tuple | list) and value and isinstance(value[0], torch.Tensor):
            return value[0]
    raise ValueError("a recorded module takes or gives no tensor")


def sketch(value: torch.Tensor) -> Floats:
    """[..., width] -> [rows, SKETCH_WIDTH]: a fixed random projection of every row, the same in every process."""
    rows = value.detach().float().cpu().reshape(-1, value.shape[-1] if value.is_floating_point() else 1)
    width = rows.shape[-1]
    projection = np.random.default_rng(width).standard_normal((width, SKETCH_WIDTH)).astype(np.float32)
    return np.asarray(rows.numpy() @ (projection / np.float32(np.sqrt(width))), dtype=np.float32)


def localise(
    trainer: Fingerprints,
    engine: Fingerprints,
    tolerances: Sequence[float] = (1e-3, 1e-4, 1e-5),
    min_margin: float = NEAR_TIE,
) -> str:
    """Name the first parameter group, in forward order, that makes different outputs of equal inputs.

    For a mixture of experts the single expert is named too, found from the rows that differ and the trainer's routing.
    The head is named when every module agrees, since no module of the engine runs it. `tolerances` are relative
    differences, tried from coarse to fine; they suit float32.
    """
    for tolerance in tolerances:
        for name, ours in trainer.prints.items():
            theirs = engine.prints.get(name)
            if theirs is None:
                continue
            if theirs.outputs.shape != ours.outputs.shape:
                return f"{name}: {len(ours.outputs)} rows in the trainer, {len(theirs.outputs)} in the engine"
            same_input = _agreeing(ours, theirs, tolerance / 10)
            if name in trainer.margins:
                same_input &= trainer.margins[name] >= min_margin
            difference = _difference(ours.outputs, theirs.outputs)
            if (same_input & ~(difference <= tolerance)).any():
                # which rows an expert touched shows best at the finest tolerance
                differs = same_input & ~(difference <= min(tolerances))
                return name + _expert(trainer.routing.get(name), differs, same_input)
    return "lm_head" if "lm_head" in trainer.prints and "lm_head" not in engine.prints else "no parameter group"


def _agreeing(ours: Print, theirs: Print, tolerance: float) -> NDArray[np.bool_]:
    """[output rows] whose inputs agree: row by row, or all or none where rows in are not rows out (a convolution)."""
    if ours.inputs.shape != theirs.inputs.shape:
        return np.zeros(len(ours.outputs), dtype=bool)
    same = _difference(ours.inputs, theirs.inputs) <= tolerance
    return same if len(same) == len(ours.outputs) else np.full(len(ours.outputs), same.all())


def _difference(ours: Floats, theirs: Floats) -> NDArray[np.float64]:
    """Relative difference of each row, against the row's size or a hundredth of the largest, whichever is more."""
    size = np.abs(ours).max(axis=1)
    return np.asarray(np.abs(ours - theirs).max(axis=1) / np.maximum(size, size.max() / 100 + 1e-30), dtype=np.float64)


def _expert(routing: NDArray[np.int64] | None, differs: NDArray[np.bool_], judged: NDArray[np.bool_]) -> str:
    """ ", expert 3": experts whose judged rows (nearly) all differ, and without which some differing row is
    unexplained."""
    if routing is None:
        return ""
    visits = {int(expert): (routing == expert).any(axis=1) & judged for expert in np.unique(routing)}
    guilty = [expert for expert, rows in visits.items() if rows.any() and differs[rows].mean() >= 0.9]
    for expert in sorted(guilty, key=lambda expert: int(visits[expert].sum())):
        others = [visits[other] for other in guilty if other != expert]
        if others and (differs <= np.logical_or.reduce(others)).all():
            guilty.remove(expert)
    if not guilty:
        return ""
    return f", expert{'s' if len(guilty) > 1 else ''} {', '.join(map(str, guilty))}"
