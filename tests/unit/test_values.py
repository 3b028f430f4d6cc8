"""The critic's loss against a loop, and its metrics by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf.algorithms.values import explained, value_loss


def slow(values, old, returns, mask, num_tokens, clip) -> float:
    total = 0.0
    for v, o, r, weight in zip(*(t.flatten().tolist() for t in (values, old, returns, mask)), strict=True):
        errors = [(v - r) ** 2]
        if clip is not None:
            errors.append((o + max(-clip, min(clip, v - o)) - r) ** 2)
        total += 0.5 * weight * max(errors)
    return total / num_tokens


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_loss_equals_the_loop_however_it_is_cut(clip) -> None:
    torch.manual_seed(0)
    values, old, returns = (torch.randn(6, 5) for _ in range(3))
    mask = torch.randint(0, 2, (6, 5)) * torch.tensor([1.0, 1, 0, 2, 1, 0.5])[:, None]
    whole, metrics = value_loss(values, old, returns, mask, 17, clip)
    assert float(whole) == pytest.approx(slow(values, old, returns, mask, 17, clip), rel=1e-5)
    parts = [value_loss(values[cut], old[cut], returns[cut], mask[cut], 17, clip) for cut in (slice(0, 2), slice(2, 6))]
    assert float(sum(loss for loss, _ in parts)) == pytest.approx(float(whole), abs=1e-6)
    for name, value in metrics.items():
        assert float(sum(part[name] for _, part in parts)) == pytest.approx(float(value)), name


def test_a_value_that_moved_beyond_the_clip_towards_its_return_has_no_gradient() -> None:
    """Old 0, return 1: at 0.5 the clipped value 0.2 is farther off and counts; at 2 the value itself is."""
    values = torch.tensor([[0.5, 2.5]], requires_grad=True)
    loss, metrics = value_loss(values, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), 2, 0.2)
    loss.backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0, 0.75]]
    assert float(loss.detach()) == pytest.approx(0.5 * (0.8**2 + 1.5**2) / 2)
    assert float(metrics["clip_fraction"]) == 1


def test_explained_variance_by_hand() -> None:
    """Returns 0 and 2, values 0.5 and 1.5: variance 1, that of what is missed 0.25. A constant explains nothing."""

    def share(*said: float) -> dict[str, float]:
        returns = torch.tensor([[0.0, 2.0]])
        _, sums = value_loss(torch.tensor([said]), torch.zeros(1, 2), returns, torch.ones(1, 2), 2, None)
        count = float(sums["tokens"])
        return explained({name: float(value) / count for name, value in sums.items()})

    assert share(0.5, 1.5)["explained_variance"] == pytest.approx(0.75)
    assert share(7.0, 7.0)["explained_variance"] == pytest.approx(0.0)
    assert share(2.0, 0.0)["explained_variance"] < 0
    assert share(0.5, 1.5)["return"] == 1.0
    assert set(share(0.5, 1.5)) == {"tokens", "clip_fraction", "value", "return", "explained_variance"}
    equal = {"return": 1.0, "return_squared": 1.0, "missed": 0.5, "missed_squared": 0.25}
    assert explained(equal) == {"return": 1.0}
