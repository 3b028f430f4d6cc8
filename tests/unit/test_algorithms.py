"""Losses and advantages against loops that a reader can check by eye."""

from __future__ import annotations

import math
import random

import pytest
import torch

from rlhf.algorithms import LOSSES, Tokens, defaults, group_normalised, processed_logprobs
from rlhf.types import Loss

KINDS = [("nll", "token"), ("nll", "row"), ("grpo", "token"), ("dapo", "token"), ("gspo", "token")]


def batch(num_rows: int = 7, length: int = 9, seed: int = 0):
    """Random rows with ragged completions; row 2 has weight 0, row 3 weight 0.5."""
    torch.manual_seed(seed)
    pick = random.Random(seed)
    logprobs = -3 * torch.rand(num_rows, length, dtype=torch.float64)
    old = logprobs + 0.3 * torch.randn(num_rows, length, dtype=torch.float64)
    advantages = torch.randn(num_rows, dtype=torch.float64)
    mask = torch.zeros(num_rows, length, dtype=torch.float64)
    for row in range(num_rows):
        start = pick.randrange(0, 3)
        mask[row, start : start + pick.randrange(2, length - 3)] = {2: 0.0, 3: 0.5}.get(row, 1.0)
    return logprobs.requires_grad_(), old, advantages, mask


def counts(mask) -> tuple[int, int]:
    return int((mask > 0).sum()), int((mask > 0).any(1).sum())


def slow(kind: str, logprobs, old, advantages, mask, loss: Loss, num_tokens: int, num_rows: int) -> float:
    total = 0.0
    for row in range(len(mask)):
        tokens = [t for t in range(mask.shape[1]) if mask[row, t] > 0]
        if not tokens:
            continue
        weight, advantage = float(mask[row, tokens[0]]), float(advantages[row])
        low, high = 1 - loss.clip_low, 1 + loss.clip_high
        new = [float(logprobs[row, t]) for t in tokens]
        before = [float(old[row, t]) for t in tokens]
        if kind == "nll":
            total += weight * -sum(new) / (num_tokens if loss.normalise == "token" else num_rows)
        elif kind == "gspo":
            ratio = math.exp(sum(n - b for n, b in zip(new, before, strict=True)) / len(tokens))
            total -= weight * min(ratio * advantage, min(max(ratio, low), high) * advantage) / num_rows
        else:
            for n, b in zip(new, before, strict=True):
                ratio = math.exp(n - b)
                objective = min(ratio * advantage, min(max(ratio, low), high) * advantage)
                total -= weight * objective / (num_rows * len(tokens) if kind == "grpo" else num_tokens)
    return total


@pytest.mark.parametrize(("kind", "normalise"), KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_loss_equals_the_loop(kind, normalise, seed):
    logprobs, old, advantages, mask = batch(seed=seed)
    loss = Loss(kind, normalise, 0.1, 0.15)
    found, _ = LOSSES[kind](Tokens(logprobs, old, advantages, mask, *counts(mask)), loss)
    expected = slow(kind, logprobs.detach(), old, advantages, mask, loss, *counts(mask))
    assert float(found.detach()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("kind", "normalise"), KINDS)
def test_gradient_equals_finite_differences_of_the_loop(kind, normalise):
    logprobs, old, advantages, mask = batch(num_rows=4, length=7)
    loss = Loss(kind, normalise, 0.1, 0.15)
    value, _ = LOSSES[kind](Tokens(logprobs, old, advantages, mask, *counts(mask)), loss)
    value.backward()
    step = 1e-6
    for row in range(4):
        for t in range(7):
            shifted = [logprobs.detach().clone() for _ in range(2)]
            shifted[0][row, t] += step
            shifted[1][row, t] -= step
            up, down = (slow(kind, s, old, advantages, mask, loss, *counts(mask)) for s in shifted)
            assert float(logprobs.grad[row, t]) == pytest.approx((up - down) / (2 * step), abs=1e-6)


@pytest.mark.parametrize(("kind", "normalise"), KINDS)
def test_loss_and_gradient_do_not_depend_on_the_cut(kind, normalise):
    logprobs, old, advantages, mask = batch()
    loss = Loss(kind, normalise, 0.1, 0.15)
    whole, metrics = LOSSES[kind](Tokens(logprobs, old, advantages, mask, *counts(mask)), loss)
    whole.backward()
    for cut in ([3, 4], [1, 1, 5], [2, 2, 2, 1]):
        again = logprobs.detach().clone().requires_grad_()
        losses, sums = [], {}
        for part in zip(*(t.split(cut) for t in (again, old, advantages, mask)), strict=True):
            one, found = LOSSES[kind](Tokens(*part, *counts(mask)), loss)
            losses.append(one)
            for name, value in found.items():
                sums[name] = (
                    max(sums.get(name, 0.0), float(value))
                    if name.endswith("_max")
                    else (sums.get(name, 0.0) + float(value))
                )
        total = torch.stack(losses).sum()
        total.backward()
        assert float(total.detach()) == pytest.approx(float(whole.detach()), abs=1e-12)
        assert torch.allclose(again.grad, logprobs.grad, atol=1e-12)
        assert sums == pytest.approx({name: float(value) for name, value in metrics.items()})


def test_dapo_clips_by_hand():
    """One row of two tokens, advantage 2, ratios 1.5 and 0.5: the first is clipped at 1.28 and loses its gradient."""
    old = torch.log(torch.tensor([[0.2, 0.4]], dtype=torch.float64))
    logprobs = torch.log(torch.tensor([[0.3, 0.2]], dtype=torch.float64)).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.float64)
    loss, metrics = LOSSES["dapo"](Tokens(logprobs, old, torch.tensor([2.0]), mask, 2, 1), Loss("dapo"))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-(1.28 * 2 + 0.5 * 2) / 2)
    assert logprobs.grad.tolist() == [[0.0, pytest.approx(-0.5)]]
    assert float(metrics["clip_fraction"]) == 1
    assert float(metrics["ratio_max"]) == pytest.approx(1.5)
    assert float(metrics["kl_k1"]) == pytest.approx(-(math.log(1.5) + math.log(0.5)))


def test_gspo_ratio_by_hand():
    """Ratios 1.21 and 1.0 over two tokens: the sequence ratio is 1.1, clipped at 1.0004 for a good row only."""
    old = torch.zeros(2, 2, dtype=torch.float64)
    logprobs = torch.log(torch.tensor([[1.21, 1.0], [1.21, 1.0]], dtype=torch.float64)).requires_grad_()
    low, high = defaults("gspo")
    loss, metrics = LOSSES["gspo"](
        Tokens(logprobs, old, torch.tensor([1.0, -1.0]), torch.ones(2, 2), 4, 2),
        Loss("gspo", clip_low=low, clip_high=high),
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-(1.0004 - 1.1) / 2)
    assert logprobs.grad.tolist() == [[0, 0], [pytest.approx(1.1 / 4), pytest.approx(1.1 / 4)]]
    assert float(metrics["clip_fraction"]) == 2
    assert float(metrics["sequence_ratio_max"]) == pytest.approx(1.1)


def test_on_policy_every_policy_gradient_is_plain_policy_gradient():
    logprobs, _, advantages, mask = batch()
    for kind in ("grpo", "dapo", "gspo"):
        again = logprobs.detach().clone().requires_grad_()
        loss, metrics = LOSSES[kind](Tokens(again, again.detach(), advantages, mask, *counts(mask)), Loss(kind))
        loss.backward()
        lengths = (mask > 0).sum(1, keepdim=True).clamp(min=1)
        scale = 1 / counts(mask)[0] if kind == "dapo" else 1 / (lengths * counts(mask)[1])
        assert torch.allclose(again.grad, -advantages[:, None] * mask * scale, atol=1e-12)
        assert float(metrics["kl_k3"]) == 0


def test_a_row_of_weight_zero_changes_nothing():
    logprobs, old, advantages, mask = batch()
    keep = [0, 1, 3, 4, 5, 6]
    for kind, normalise in KINDS:
        loss = Loss(kind, normalise)
        full, metrics = LOSSES[kind](Tokens(logprobs, old, advantages, mask, *counts(mask)), loss)
        part, fewer = LOSSES[kind](Tokens(logprobs[keep], old[keep], advantages[keep], mask[keep], *counts(mask)), loss)
        assert float(full.detach()) == pytest.approx(float(part.detach()), abs=1e-12)
        assert {k: float(v) for k, v in metrics.items()} == pytest.approx({k: float(v) for k, v in fewer.items()})


def test_an_empty_micro_batch_is_zero_with_a_gradient():
    logprobs = torch.zeros(1, 1, requires_grad=True)
    for kind in LOSSES:
        zero = torch.zeros(1, 1)
        loss, metrics = LOSSES[kind](Tokens(logprobs, zero, torch.ones(1), zero, 5, 2), Loss(kind))
        loss.backward()
        assert float(loss.detach()) == 0
        assert float(metrics["tokens"]) == 0


def test_advantages_by_hand():
    assert group_normalised([1.0, 0.0, 0.0, 1.0]) == pytest.approx([0.866024, -0.866024, -0.866024, 0.866024], abs=1e-5)
    assert group_normalised([0.1, 0.1, 0.1]) == [0.0, 0.0, 0.0]
    assert group_normalised([None, None]) == [0.0, 0.0]
    assert group_normalised([3.0, None]) == [0.0, 0.0]
    assert group_normalised([]) == []


def test_an_unscored_rollout_is_left_out_and_not_a_zero():
    with_gap = group_normalised([1.0, None, 3.0, 2.0])
    without = group_normalised([1.0, 3.0, 2.0])
    assert [with_gap[0], *with_gap[2:]] == without
    assert with_gap[1] == 0.0
    assert with_gap[0] != group_normalised([1.0, 0.0, 3.0, 2.0])[0]


def test_advantages_equal_the_loop():
    pick = random.Random(3)
    for _ in range(50):
        scores = [pick.choice([None, 0.0, 1.0, pick.random()]) for _ in range(8)]
        known = [s for s in scores if s is not None]
        mean = sum(known) / len(known)
        std = math.sqrt(sum((s - mean) ** 2 for s in known) / (len(known) - 1))
        expected = [0.0 if s is None else (s - mean) / (std + 1e-6) for s in scores]
        assert group_normalised(scores) == pytest.approx(expected, abs=1e-6)


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="rollout 1"):
        group_normalised([0.0, math.nan])


def test_processed_logprobs_equal_the_loop():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 11) * 4, torch.tensor([1, 2, 4, 5, 8, 10])
    found, entropy = processed_logprobs(logits, targets, 0.7, (0, 3))
    for row in range(6):
        scaled = {i: float(logits[row, i]) / 0.7 for i in range(11) if i not in (0, 3)}
        total = math.log(sum(math.exp(v) for v in scaled.values()))
        assert float(found[row]) == pytest.approx(scaled[int(targets[row])] - total, abs=1e-5)
        surprise = -sum(math.exp(v - total) * (v - total) for v in scaled.values())
        assert float(entropy[row]) == pytest.approx(surprise, abs=1e-5)
    masked, _ = processed_logprobs(logits[:1], torch.tensor([3]), 0.7, (0, 3))
    assert float(masked) == -math.inf
    plain, _ = processed_logprobs(logits, targets)
    assert torch.allclose(plain, logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], atol=1e-6)


def test_algorithms_by_name():
    assert [defaults(name) for name in ("grpo", "dapo", "gspo")] == [(0.2, 0.2), (0.2, 0.28), (3e-4, 4e-4)]
    with pytest.raises(ValueError, match="grpo, dapo, gspo"):
        defaults("ppo")
