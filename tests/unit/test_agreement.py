"""Probes, verdicts and blame, on small torch models without any engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from rlhf.agreement import (
    Fingerprints,
    compare,
    localise,
    make_probes,
    probe_model,
    recording,
    sketch,
)
from rlhf.batching import collate
from rlhf.roles import SyncReport
from rlhf.routing import group_name, lowest_margins
from rlhf.statistics import Totals
from rlhf.types import Media, Probe, ProbeScores, Sample, StepStats

MEDIA = [Media(b"a", (4, 4)), Media(b"b", (4, 4))]


def scores(rows: list[list[float]], margins: list[list[float]] | None = None) -> ProbeScores:
    ids = tuple(tuple(range(len(row) + 1)) for row in rows)
    return ProbeScores(ids, tuple(map(tuple, rows)), tuple(map(tuple, margins or [])))


def test_probes_are_fixed_and_avoid_forbidden_ids() -> None:
    probes = make_probes(20, 3, MEDIA, num=4, length=50, seed=1, forbidden=(0, 1))
    assert probes == make_probes(20, 3, MEDIA, num=4, length=50, seed=1, forbidden=(0, 1))
    assert probes != make_probes(20, 3, MEDIA, num=4, length=50, seed=2, forbidden=(0, 1))
    shown = [tuple(replace(item, question=()) for item in probe.media) for probe in probes]
    assert shown == [(MEDIA[0],), (), (MEDIA[1],), ()]
    assert probes[0].media[0].question == probes[0].token_ids[1:9]  # for bridges whose connector reads
    for probe in probes:
        text = probe.token_ids[len(probe.media) :]
        assert probe.token_ids.count(3) == len(probe.media)
        assert len(text) == 50
        assert set(text) <= set(range(20)) - {0, 1, 3}
    with pytest.raises(ValueError, match="0 ids"):
        make_probes(3, 2, MEDIA, forbidden=(0, 1))


def test_compare_judges_every_position() -> None:
    good = scores([[-1.0, -2.0], [-3.0]])
    assert compare(good, good) == replace(compare(good, good), ok=True, max_gap=0.0, checked=3, skipped=0)
    off = scores([[-1.0, -2.0], [-3.0002]])
    verdict = compare(good, off)
    assert not verdict.ok
    assert math.isclose(verdict.max_gap, 2e-4, rel_tol=1e-6)
    assert math.isclose(verdict.mean_gap, 2e-4 / 3, rel_tol=1e-6)
    assert compare(good, off, max_gap=3e-4).ok


def test_compare_fails_on_nan_other_ids_and_nothing_checked() -> None:
    good = scores([[-1.0, -2.0]])
    assert not compare(good, scores([[-1.0, float("nan")]])).ok
    assert not compare(good, replace(good, expanded_ids=((0, 1, 9),))).ok
    assert not compare(good, replace(good, logprobs=((-1.0,),))).ok
    near_ties = scores([[-1.0, -2.0]], [[0.0, 0.0]])
    verdict = compare(near_ties, good)
    assert not verdict.ok
    assert (verdict.checked, verdict.skipped) == (0, 2)


class Text:
    """A visual of rows without pictures."""

    pad_id = 0

    def __init__(self, packs: bool = False) -> None:
        self.packs, self.reads = packs, False

    def join(self, items: object, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(input_ids.shape[1]).expand(input_ids.shape)

    def blank(self) -> None:
        return None


def test_the_lowest_margin_is_that_of_any_router_there_or_before() -> None:
    margins = torch.tensor([[5, 4, 9, 1, 7, 7], [8, 8, 3, 2, 0.5, 8]])
    full = [Sample("a", (1, 2, 3), 1), Sample("b", (1, 2, 3), 1)]
    assert lowest_margins(margins, collate(full, Text())).tolist() == [[5, 4, 3], [1, 0.5, 0.5]]
    assert lowest_margins([], collate([Sample("a", (1, 2), 1)], Text())).tolist() == [[math.inf, math.inf]]
    uneven = [Sample("a", (1, 2), 1), Sample("b", (9, 2, 3, 4), 1)]
    found = lowest_margins(margins, collate(uneven, Text(packs=True)))
    assert found.tolist() == [[5, 4, 4, 4], [3, 1, 0.5, 0.5]]
    shared = [Sample("a", (9, 1, 2, 3), 2), Sample("b", (9, 1, 4, 5), 2)]
    found = lowest_margins(margins, collate(shared, Text(packs=True)))
    assert found.tolist() == [[5, 4, 3, 1], [5, 4, 0.5, 0.5]]


class TiedRouter(nn.Module):
    """Two experts; the second is a tie away where the token's id is 5."""

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.stack([torch.ones(ids.numel()), (ids.flatten() == 5).float()], dim=-1)
        return logits, logits.argmax(-1, keepdim=True)


class TiedMixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.gate, self.mlp.experts = TiedRouter(), nn.Linear(1, 1)

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        self.mlp.gate(input_ids)
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 8))


def test_probes_without_pictures_are_scored_beside_the_row_that_brings_one() -> None:
    """Of an ordinary model, whose vision tower every rank must run."""

    class Blank:
        pad_id, packs, reads = 0, False, False

        def join(self, items: object, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {}

        def positions(self, input_ids: torch.Tensor) -> None:
            return None

        def blank(self) -> Sample:
            return Sample("blank", (5, 5, 5, 5, 5), 1)

    class Plain:
        def expand(self, token_ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[int]:
            return list(token_ids)

    found = probe_model(TiedMixture(), Plain(), Blank(), [Probe((1, 2, 3, 4)), Probe((1, 5, 3))])
    assert [len(row) for row in found.logprobs] == [3, 2]
    assert found.margins[0] == pytest.approx([0.4621] * 3, abs=1e-3)
    assert found.margins[1] == pytest.approx([0.4621, 0.0], abs=1e-3)


def test_a_large_gap_at_a_tie_is_a_flip() -> None:
    totals, sync = Totals(), SyncReport(0.1, 0.1, {})
    totals.add({}, StepStats({}, [1e-6, 2e-4, 3e-4, 1e-6], [True, True, False, False]), sync)
    totals.add({}, StepStats({}, [1.0], [True]), sync)
    found = totals.metrics()
    assert found["logprob_gap.flips"] == 2
    assert found["logprob_gap.share_tied"] == 3 / 5
    with pytest.raises(ValueError, match="1 gaps and 0 ties"):
        StepStats({}, [1e-6])
    assert found["logprob_gap.share_above_1e-4"] == 3 / 5
    assert found["logprob_gap.max"] == 1.0


def test_compare_skips_from_the_first_router_tie_on() -> None:
    ours = scores([[-1.0, -2.0, -3.0]], [[1e-2, 1e-6, 1e-6]])
    verdict = compare(ours, scores([[-1.0, -9.0, -9.0]]))
    assert verdict.ok
    assert (verdict.checked, verdict.skipped) == (1, 2)


def test_compare_tells_unreached_experts() -> None:
    ours = replace(scores([[-1.0]]), experts_reached={"layers.0.mlp.experts": (0, 2)}, experts_total=4)
    verdict = compare(ours, scores([[-1.0]]))
    assert verdict.unreached == ("layers.0.mlp.experts: experts 1, 3",)
    assert "1, 3" in verdict.message


class Router(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = super().forward(x)
        return logits, logits.topk(2).indices


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return torch.stack([sum(self.weight[e] @ row for e in picks) for row, picks in zip(x, chosen, strict=True)])


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = Router(6, 4), Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.experts(x, self.gate(x)[1])


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mlp, self.last = nn.Linear(6, 6), Mixture(), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.mlp(self.first(x)))


ROWS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def take(model: Toy) -> Fingerprints:
    with torch.no_grad(), recording(model) as prints:
        model(ROWS)
        choice = model.mlp.gate(model.first(ROWS))[1].numpy()
    # the second calls of `first` and `gate` are recorded too, alike on both sides
    return Fingerprints(prints(), {"mlp.experts": choice})


@pytest.mark.parametrize(
    ("spoiled", "named"),
    [
        ("first.weight", "first"),
        ("first.bias", "first"),
        ("mlp.gate.weight", "mlp.gate"),
        ("last.weight", "last"),
        ("last.bias", "last"),
        *((f"mlp.experts.weight.{e}", f"mlp.experts, expert {e}") for e in range(4)),
    ],
)
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_the_spoiled_group_is_named(spoiled: str, named: str, size: float) -> None:
    torch.manual_seed(0)
    model = Toy()
    ours = take(model)
    assert localise(ours, take(model)) == "no parameter group"
    name, _, expert = spoiled.rpartition(".") if spoiled[-1].isdigit() else (spoiled, "", "")
    value = model.get_parameter(name)
    with torch.no_grad():
        part = value[int(expert)] if expert else value
        part.add_(torch.randn(part.shape, generator=torch.Generator().manual_seed(1)) * size)
    assert localise(ours, take(model)) == named


def test_two_spoiled_experts_are_both_named() -> None:
    torch.manual_seed(0)
    model = Toy()
    ours = take(model)
    with torch.no_grad():
        model.mlp.experts.weight[1] += 1
        model.mlp.experts.weight[3] += 1
    assert localise(ours, take(model)) == "mlp.experts, experts 1, 3"


def test_a_convolution_is_named_though_its_rows_differ_in_number() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 4, 4), nn.Flatten(2), nn.Linear(4, 6))
    pixels = torch.randn(2, 3, 8, 8)

    def prints() -> Fingerprints:
        with torch.no_grad(), recording(model) as found:
            model(pixels)
            return Fingerprints(found())

    ours = prints()
    with torch.no_grad():
        model[0].weight[2] += 0.1
    assert localise(ours, prints()) == "0"


def test_fused_outputs_are_recorded_by_part() -> None:
    torch.manual_seed(0)
    fused = nn.Sequential(nn.Linear(6, 8))
    apart = {"q": fused[0].weight[:5], "k": fused[0].weight[5:]}

    def parts(name: str, module: nn.Module) -> list[tuple[str, slice]]:
        return [("q", slice(0, 5)), ("k", slice(5, 8))]

    with torch.no_grad(), recording(fused, parts) as prints:
        fused(ROWS)
        found = prints()
        for name, columns in (("q", slice(0, 5)), ("k", slice(5, 8))):
            wanted = sketch(ROWS @ apart[name].T + fused[0].bias[columns])
            np.testing.assert_allclose(found[name].outputs, wanted, atol=1e-6)


def test_group_names_are_those_of_both_sides() -> None:
    assert group_name("model.language_model.layers.0.mlp.experts.gate") == "language_model.layers.0.mlp.gate"
    assert group_name("module.model.vision.x") == "vision.x"
    assert group_name("lm_head") == "lm_head"
