"""Flamingo's contrast of pictures and captions, against a loop over pairs."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.bridge.alignment import contrast
from rlhf.bridge.heads import HEADS
from rlhf.bridge.layers.contrast import ContrastHead

WIDTH = 12


@pytest.fixture
def head() -> ContrastHead:
    torch.manual_seed(0)
    sizes = {"width": 16, "heads": 2, "layers": 2, "feed": 32, "length": 4, "space": 8}
    settings = HEADS.make({"type": "contrast", **sizes})
    made = settings.build(WIDTH, 24, 50)
    assert sum(parameter.numel() for parameter in made.parameters()) == settings.parameters(WIDTH, 24, 50)
    assert isinstance(made, ContrastHead)
    return made.double()


FEATURES = torch.randn(3, 9, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
CAPTIONS = torch.tensor([[3, 4, 5, 6], [7, 8, -1, -1], [9, 4, 2, -1]])


def by_hand(head: ContrastHead, features: torch.Tensor, captions: torch.Tensor) -> float:
    """Each pair by itself, each caption without its padding."""
    seen, told = [], []
    for picture, caption in zip(features, captions, strict=True):
        seen.append(head.vision.weight @ picture.mean(0))
        words = caption[caption >= 0]
        states = head.encoder((head.words(words) + head.places.weight[: len(words)])[None])[0]
        told.append(head.text.weight @ states.mean(0))

    def alike(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(one @ other / one.norm() / other.norm() * head.inverse_temperature)

    pairs, total = range(len(features)), 0.0
    for place in pairs:
        of_captions = [math.exp(alike(seen[place], text)) for text in told]
        of_pictures = [math.exp(alike(picture, told[place])) for picture in seen]
        total -= math.log(of_captions[place] / sum(of_captions)) + math.log(of_pictures[place] / sum(of_pictures))
    return total / len(features)


@torch.no_grad()
def test_both_directions_summed(head: ContrastHead) -> None:
    found = float(contrast(head, FEATURES, CAPTIONS, 3))
    assert found == pytest.approx(by_hand(head, FEATURES, CAPTIONS), abs=1e-6)  # the loss itself is in float32
    assert float(contrast(head, FEATURES.flip(0), CAPTIONS, 3)) != pytest.approx(found, abs=1e-3)  # other pairs


@torch.no_grad()
def test_what_does_not_count_changes_nothing(head: ContrastHead) -> None:
    two = float(contrast(head, FEATURES[:2], CAPTIONS[:2], 2))
    assert two == pytest.approx(by_hand(head, FEATURES[:2], CAPTIONS[:2]), abs=1e-6)
    longer = torch.cat((CAPTIONS, torch.tensor([[11], [12], [13]])), dim=1)  # beyond the length that is read
    assert float(contrast(head, FEATURES, longer, 3)) == float(contrast(head, FEATURES, CAPTIONS, 3))


def test_a_rank_without_pairs_runs_backward_through_the_whole_head(head: ContrastHead) -> None:
    none = contrast(head, FEATURES[:1], CAPTIONS[:1], 0)
    assert float(none.detach()) == 0.0
    none.backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    head.zero_grad()
    contrast(head, FEATURES, CAPTIONS, 3).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters() if parameter.grad is not None)
