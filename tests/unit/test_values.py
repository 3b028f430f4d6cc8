"""The critic's loss against a loop, and its metrics by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf.algorithms.values import explained, value_loss


def test_the_loss_equals_the_loop_however_it_is_cut() -> None:
    torch.manual_seed(0)
    values, returns = torch.randn(6, 5), torch.randn(6, 5)
    mask = torch.randint(0, 2, (6, 5)) * torch.tensor([1.0, 1, 0, 2, 1, 0.5])[:, None]
    whole, metrics = value_loss(values, returns, mask, 17)
    tokens = zip(*(part.flatten().tolist() for part in (values, returns, mask)), strict=True)
    assert float(whole) == pytest.approx(sum(0.5 * weight * (v - r) ** 2 for v, r, weight in tokens) / 17, rel=1e-5)
    parts = [value_loss(values[cut], returns[cut], mask[cut], 17) for cut in (slice(0, 2), slice(2, 6))]
    assert float(sum(loss for loss, _ in parts)) == pytest.approx(float(whole), abs=1e-6)
    for name, value in metrics.items():
        assert float(sum(part[name] for _, part in parts)) == pytest.approx(float(value)), name


def test_explained_variance_by_hand() -> None:
    """Returns 0 and 2, values 0.5 and 1.5: variance 1, that of what is missed 0.25. A constant explains nothing."""

    def share(*said: float) -> dict[str, float]:
        _, sums = value_loss(torch.tensor([said]), torch.tensor([[0.0, 2.0]]), torch.ones(1, 2), 2)
        count = float(sums["tokens"])
        return explained({name: float(value) / count for name, value in sums.items()})

    assert share(0.5, 1.5)["explained_variance"] == pytest.approx(0.75)
    assert share(7.0, 7.0)["explained_variance"] == pytest.approx(0.0)
    assert share(2.0, 0.0)["explained_variance"] < 0
    assert share(0.5, 1.5)["return"] == 1.0
    assert set(share(0.5, 1.5)) == {"tokens", "value", "return", "explained_variance"}
    equal = {"return": 1.0, "return_squared": 1.0, "value": 0.5, "missed_squared": 0.25}
    assert explained(equal) == {"return": 1.0, "value": 0.5}
