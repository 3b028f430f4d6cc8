"""Objectives, losses, corrections and divergences against loops that a reader can check by eye."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import get_args

import pytest
import torch

from rlhf.algorithms.divergence import DIVERGENCES
from rlhf.algorithms.logprobs import logprobs_of, processed_logprobs
from rlhf.algorithms.losses import OBJECTIVES, Tokens, policy_loss
from rlhf.algorithms.table import ALGORITHMS, GENERALISED, estimator_of, method_of
from rlhf.recipe import Rl
from rlhf.recipe.stages import Critic
from rlhf.types import Correction, Loss, Normalise

POLICIES = [name for name in OBJECTIVES if name != "nll"]
CASES = list(itertools.product(OBJECTIVES, get_args(Normalise)))
LOSS = Loss(clip_low=0.1, clip_high=0.15, longest=11)


def batch(num_rows: int = 7, length: int = 9, seed: int = 0, per_token: bool = False):
    """Random rows with ragged completions; row 2 has weight 0, row 3 weight 0.5."""
    torch.manual_seed(seed)
    pick = random.Random(seed)
    logprobs = -3 * torch.rand(num_rows, length, dtype=torch.float64)
    old = logprobs + 0.3 * torch.randn(num_rows, length, dtype=torch.float64)
    advantages = torch.randn(num_rows, length if per_token else 1, dtype=torch.float64)
    mask = torch.zeros(num_rows, length, dtype=torch.float64)
    for row in range(num_rows):
        start = pick.randrange(0, 3)
        mask[row, start : start + pick.randrange(2, length - 3)] = {2: 0.0, 3: 0.5}.get(row, 1.0)
    return logprobs.requires_grad_(), old, advantages, mask


def counts(mask) -> tuple[int, int]:
    return int((mask > 0).sum()), int((mask > 0).any(1).sum())


def bounded(ratio: float, advantage: float, loss: Loss) -> float:
    clipped = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
    objective = min(ratio * advantage, clipped * advantage)
    if loss.dual_clip is not None and advantage < 0:
        objective = max(objective, loss.dual_clip * advantage)
    return objective


def slow(logprobs, old, advantages, mask, loss: Loss, num_tokens: int, num_rows: int, fixed=None) -> float:
    """The loss by loops. `fixed` are the log-probabilities in a weight that takes no gradient (CISPO's)."""
    fixed = logprobs if fixed is None else fixed
    total = 0.0
    for row in range(len(mask)):
        tokens = [t for t in range(mask.shape[1]) if mask[row, t] > 0]
        if not tokens:
            continue
        log_ratios = {t: float(logprobs[row, t]) - float(old[row, t]) for t in tokens}
        mean = math.exp(sum(log_ratios.values()) / len(tokens))
        for t in tokens:
            advantage = float(advantages[row, t if advantages.shape[1] > 1 else 0])
            now = float(logprobs[row, t])
            if loss.kind == "nll":
                objective = now
            elif loss.kind == "reinforce":
                objective = now * advantage
            elif loss.kind == "ppo":
                objective = bounded(math.exp(log_ratios[t]), advantage, loss)
            elif loss.kind == "gspo":
                objective = bounded(mean, advantage, loss)
            else:
                weight = math.exp(float(fixed[row, t]) - float(old[row, t]))
                objective = min(max(weight, 1 - loss.clip_low), 1 + loss.clip_high) * advantage * now
            share = {
                "token": num_tokens,
                "row": num_rows,
                "row_mean": num_rows * len(tokens),
                "constant": num_rows * loss.longest,
            }[loss.normalise]
            total -= float(mask[row, t]) * objective / share
    return total


@pytest.mark.parametrize(("kind", "normalise"), CASES)
@pytest.mark.parametrize(("seed", "dual_clip", "per_token"), [(0, None, False), (1, 1.2, False), (2, 1.2, True)])
def test_loss_equals_the_loop(kind, normalise, seed, dual_clip, per_token) -> None:
    logprobs, old, advantages, mask = batch(seed=seed, per_token=per_token)
    loss = replace(LOSS, kind=kind, normalise=normalise, dual_clip=dual_clip)
    found, _ = policy_loss(Tokens(logprobs, old, advantages, mask, *counts(mask)), loss)
    expected = slow(logprobs.detach(), old, advantages, mask, loss, *counts(mask))
    assert float(found.detach()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("kind", "normalise"), CASES)
def test_gradient_equals_finite_differences_of_the_loop(kind, normalise) -> None:
    logprobs, old, advantages, mask = batch(num_rows=4, length=7)
    loss = replace(LOSS, kind=kind, normalise=normalise, dual_clip=1.2)
    value, _ = policy_loss(Tokens(logprobs, old, advantages, mask, *counts(mask)), loss)
    value.backward()
    step, now = 1e-6, logprobs.detach()
    for row in range(4):
        for t in range(7):
            shifted = [now.clone() for _ in range(2)]
            shifted[0][row, t] += step
            shifted[1][row, t] -= step
            up, down = (slow(s, old, advantages, mask, loss, *counts(mask), fixed=now) for s in shifted)
            assert float(logprobs.grad[row, t]) == pytest.approx((up - down) / (2 * step), abs=1e-6)


@pytest.mark.parametrize(("kind", "normalise"), CASES)
def test_loss_and_gradient_do_not_depend_on_the_cut(kind, normalise) -> None:
    logprobs, old, advantages, mask = batch()
    correction = Correction(2.0, (0.8, 1.3), (0.9, 1.1))
    loss = replace(LOSS, kind=kind, normalise=normalise, correction=correction, entropy=0.1)
    entropy = torch.rand_like(old)
    whole, metrics = policy_loss(Tokens(logprobs, old, advantages, mask, *counts(mask), entropy), loss)
    whole.backward()
    for cut in ([3, 4], [1, 1, 5], [2, 2, 2, 1]):
        again = logprobs.detach().clone().requires_grad_()
        losses, sums = [], {}
        for *part, spread in zip(*(t.split(cut) for t in (again, old, advantages, mask, entropy)), strict=True):
            one, found = policy_loss(Tokens(*part, *counts(mask), spread), loss)
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


def test_dapo_clips_by_hand() -> None:
    """One row of two tokens, advantage 2, ratios 1.5 and 0.5: the first is clipped at 1.28 and loses its gradient."""
    old = torch.log(torch.tensor([[0.2, 0.4]], dtype=torch.float64))
    logprobs = torch.log(torch.tensor([[0.3, 0.2]], dtype=torch.float64)).requires_grad_()
    tokens = Tokens(logprobs, old, torch.tensor([[2.0]]), torch.ones(1, 2, dtype=torch.float64), 2, 1)
    loss, metrics = policy_loss(tokens, Loss("ppo", "token", clip_low=0.2, clip_high=0.28))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-(1.28 * 2 + 0.5 * 2) / 2)
    assert logprobs.grad.tolist() == [[0.0, pytest.approx(-0.5)]]
    assert float(metrics["clip_fraction"]) == 1
    assert float(metrics["ratio_max"]) == pytest.approx(1.5)
    assert float(metrics["kl_k1"]) == pytest.approx(-(math.log(1.5) + math.log(0.5)))


def test_dual_clip_by_hand() -> None:
    """Advantage −1, ratios 5 and 2: PPO lets −5 through, dual clip stops at −3 and takes its gradient away."""
    old = torch.zeros(1, 2, dtype=torch.float64)
    logprobs = torch.log(torch.tensor([[5.0, 2.0]], dtype=torch.float64)).requires_grad_()
    tokens = Tokens(logprobs, old, torch.tensor([[-1.0]]), torch.ones(1, 2), 2, 1)
    loss, metrics = policy_loss(tokens, Loss("ppo", "token", dual_clip=3.0))
    loss.backward()
    assert float(loss.detach()) == pytest.approx((3 + 2) / 2)
    assert logprobs.grad.tolist() == [[0.0, pytest.approx(1.0)]]
    assert float(metrics["clip_fraction"]) == 1


def test_gspo_ratio_by_hand() -> None:
    """Ratios 1.21 and 1.0 over two tokens: the sequence ratio is 1.1, clipped at 1.0004 for a good row only."""
    old = torch.zeros(2, 2, dtype=torch.float64)
    logprobs = torch.log(torch.tensor([[1.21, 1.0], [1.21, 1.0]], dtype=torch.float64)).requires_grad_()
    gspo = ALGORITHMS["gspo"]
    tokens = Tokens(logprobs, old, torch.tensor([[1.0], [-1.0]]), torch.ones(2, 2), 4, 2)
    loss, metrics = policy_loss(tokens, Loss("gspo", gspo.normalise, clip_low=gspo.clip_low, clip_high=gspo.clip_high))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-(1.0004 - 1.1) / 2)
    assert logprobs.grad.tolist() == [[0, 0], [pytest.approx(1.1 / 4), pytest.approx(1.1 / 4)]]
    assert float(metrics["clip_fraction"]) == 2
    assert float(metrics["sequence_ratio_max"]) == pytest.approx(1.1)


def test_cispo_keeps_the_gradient_that_a_clip_loses_by_hand() -> None:
    """Ratio 8, advantage 1, bound 5: PPO's gradient is 0, CISPO's is that of 5 · log π."""
    old = torch.zeros(1, 1, dtype=torch.float64)
    for name, expected in (("dapo", 0.0), ("cispo", -5.0)):
        logprobs = torch.log(torch.tensor([[8.0]], dtype=torch.float64)).requires_grad_()
        method = ALGORITHMS[name]
        loss = Loss(method.objective, method.normalise, clip_low=method.clip_low, clip_high=method.clip_high)
        policy_loss(Tokens(logprobs, old, torch.ones(1, 1), torch.ones(1, 1), 1, 1), loss)[0].backward()
        assert logprobs.grad.tolist() == [[pytest.approx(expected)]]


@pytest.mark.parametrize("normalise", get_args(Normalise))
def test_on_policy_every_policy_gradient_is_plain_policy_gradient(normalise) -> None:
    logprobs, _, advantages, mask = batch()
    gradients = []
    for kind in POLICIES:
        again = logprobs.detach().clone().requires_grad_()
        loss = Loss(kind, normalise, longest=11)
        value, metrics = policy_loss(Tokens(again, again.detach(), advantages, mask, *counts(mask)), loss)
        value.backward()
        gradients.append(again.grad)
        assert float(metrics["kl_k3"]) == 0
    num_tokens, num_rows = counts(mask)
    lengths = (mask > 0).sum(1, keepdim=True).clamp(min=1)
    scale = {
        "token": num_tokens,
        "row": num_rows,
        "row_mean": lengths * num_rows,
        "constant": num_rows * 11,
    }[normalise]
    # GSPO's ratio is a mean, so each token's gradient is its row's spread evenly: the same with equal weights
    for gradient in gradients:
        assert torch.allclose(gradient, -advantages * mask / scale, atol=1e-12)


def test_a_row_of_weight_zero_changes_nothing() -> None:
    logprobs, old, advantages, mask = batch()
    keep = [0, 1, 3, 4, 5, 6]
    for kind, normalise in CASES:
        loss = replace(LOSS, kind=kind, normalise=normalise)
        full, metrics = policy_loss(Tokens(logprobs, old, advantages, mask, *counts(mask)), loss)
        part, fewer = policy_loss(Tokens(logprobs[keep], old[keep], advantages[keep], mask[keep], *counts(mask)), loss)
        assert float(full.detach()) == pytest.approx(float(part.detach()), abs=1e-12)
        assert {k: float(v) for k, v in metrics.items()} == pytest.approx({k: float(v) for k, v in fewer.items()})


def test_an_empty_micro_batch_is_zero_with_a_gradient() -> None:
    for kind in OBJECTIVES:
        logprobs = torch.zeros(1, 1, requires_grad=True)
        zero = torch.zeros(1, 1)
        loss, metrics = policy_loss(Tokens(logprobs, zero, torch.ones(1, 1), zero, 5, 2), Loss(kind))
        loss.backward()
        assert float(loss.detach()) == 0
        assert logprobs.grad.tolist() == [[0.0]]
        assert float(metrics["tokens"]) == 0


@pytest.mark.parametrize("kind", POLICIES)
def test_the_correction_equals_the_loop(kind) -> None:
    """The trainer's own probabilities before the step are `old`, the engine's `sampled`."""
    logprobs, old, advantages, mask = batch(seed=5)
    sampled = old + 0.4 * torch.randn_like(old)
    how = Correction(truncate=1.5, mask=(0.6, 1.8), rows=(0.85, 1.2))
    loss = replace(LOSS, kind=kind, correction=how)
    tokens = Tokens(logprobs, old, advantages, mask, *counts(mask), sampled=sampled)
    found, metrics = policy_loss(tokens, loss)
    weights = torch.zeros_like(mask)
    truncated = dropped = rows = 0
    for row in range(len(mask)):
        present = [t for t in range(mask.shape[1]) if mask[row, t] > 0]
        if not present:
            continue
        ratios = {t: math.exp(float(old[row, t] - sampled[row, t])) for t in present}
        mean = math.exp(sum(math.log(r) for r in ratios.values()) / len(present))
        for t, ratio in ratios.items():
            weights[row, t] = min(ratio, 1.5)
            truncated += ratio > 1.5
            if not 0.6 <= ratio <= 1.8:
                weights[row, t], dropped = 0.0, dropped + 1
            if not 0.85 <= mean <= 1.2:
                weights[row, t], rows = 0.0, rows + 1
    assert min(truncated, dropped, rows) > 0
    assert (weights > 0).any()
    objective, _ = OBJECTIVES[kind](tokens, loss)
    assert float(found.detach()) == pytest.approx(float(-(objective.detach() * mask * weights).sum() / counts(mask)[0]))
    shares = [metrics[f"mismatch_{name}"] for name in ("truncated", "masked", "masked_rows")]
    assert [int(value) for value in shares] == [truncated, dropped, rows]


def test_where_the_ratio_spans_the_mismatch_it_is_masked_and_not_weighed_twice() -> None:
    logprobs, old, advantages, mask = batch()
    loss = replace(LOSS, kind="ppo")
    plain, _ = policy_loss(Tokens(logprobs, old, advantages, mask, *counts(mask)), loss)
    capped, metrics = policy_loss(
        Tokens(logprobs, old, advantages, mask, *counts(mask)), replace(loss, correction=Correction(truncate=1.01))
    )
    assert torch.equal(capped, plain)
    assert "mismatch_truncated" not in metrics
    masked, metrics = policy_loss(
        Tokens(logprobs, old, advantages, mask, *counts(mask)), replace(loss, correction=Correction(mask=(0.9, 1.1)))
    )
    assert not torch.equal(masked, plain)
    assert 0 < int(metrics["mismatch_masked"]) < counts(mask)[0]


def test_the_entropy_bonus_is_normalised_as_the_objective() -> None:
    logprobs, old, advantages, mask = batch()
    for normalise in get_args(Normalise):
        loss = replace(LOSS, kind="ppo", normalise=normalise)
        entropy = torch.rand_like(old).requires_grad_()
        tokens = Tokens(logprobs, old, advantages, mask, *counts(mask), entropy)
        plain, _ = policy_loss(tokens, loss)
        rewarded, _ = policy_loss(tokens, replace(loss, entropy=0.3))
        (rewarded - plain).backward()
        expected = replace(loss, kind="nll")
        as_objective, _ = policy_loss(Tokens(entropy, old, advantages, mask, *counts(mask)), expected)
        assert float((rewarded - plain).detach()) == pytest.approx(0.3 * float(as_objective.detach()))
        assert (entropy.grad[mask > 0] < 0).all()


def test_divergences_equal_the_loop_and_their_means_the_kl() -> None:
    torch.manual_seed(0)
    policy, reference = (torch.randn(5, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = sum(math.exp(p) * (p - q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    by_hand = {
        "k1": lambda p, q: p - q,
        "k2": lambda p, q: (p - q) ** 2 / 2,
        "k3": lambda p, q: math.exp(q - p) - 1 - (q - p),
    }
    assert by_hand.keys() == DIVERGENCES.keys()
    for name, estimate in DIVERGENCES.items():
        found = estimate(policy, reference)
        expected = [by_hand[name](p, q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True)]
        assert found.tolist() == pytest.approx(expected)
        mean = float((policy.exp() * found).sum())
        if name == "k2":
            assert mean != pytest.approx(exact, rel=1e-3)
        else:
            assert mean == pytest.approx(exact)
    # k2's gradient under the policy's own samples is that of the KL
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(0)
    (true,) = torch.autograd.grad((log_p.exp() * (log_p - reference)).sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad((log_p.detach().exp() * DIVERGENCES["k2"](log_p, reference)).sum(), logits)
    assert torch.allclose(found, true)


def test_processed_logprobs_equal_the_loop() -> None:
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


@pytest.mark.parametrize("masked", [(), (0, 3)])
def test_entropy_has_the_gradient_of_finite_differences_when_asked(masked) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 7, dtype=torch.float32).requires_grad_(), torch.tensor([1, 2])
    assert not processed_logprobs(logits, targets, 0.7, masked)[1].requires_grad
    processed_logprobs(logits, targets, 0.7, masked, entropy_gradient=True)[1].sum().backward()
    assert torch.isfinite(logits.grad).all()
    for row in range(2):
        for i in range(7):
            moved = [logits.detach().clone() for _ in range(2)]
            moved[0][row, i] += 1e-2
            moved[1][row, i] -= 1e-2
            up, down = (float(processed_logprobs(m, targets, 0.7, masked)[1].sum()) for m in moved)
            assert float(logits.grad[row, i]) == pytest.approx((up - down) / 2e-2, abs=2e-3)


def test_logprobs_over_few_tokens_at_a_time_equal_those_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(5, 11, bias=False), torch.randn(7, 5, requires_grad=True)
    targets, held = torch.tensor([1, 2, 4, 5, 8, 10, 1]), list[int]()

    def counting(part: torch.Tensor) -> torch.Tensor:
        held.append(len(part))
        return head(part)

    def outcome(logits: int) -> list[torch.Tensor]:
        monkeypatch.setattr("rlhf.algorithms.logprobs.LOGITS", logits)
        found = logprobs_of(counting, hidden, targets, 0.7, (0, 3), True, vocab_size=11)
        (found[0].sum() + 0.1 * found[1].sum()).backward()
        gradients = [part.grad.clone() for part in (hidden, head.weight)]
        hidden.grad = head.weight.grad = None
        return [*found, *gradients]

    whole = outcome(7 * 11)
    assert held == [7]
    held.clear()
    for mine, theirs in zip(outcome(3 * 11 + 5), whole, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
    assert held[:3] == [3, 3, 1]
    assert max(held) == 3  # in backward too
    assert [len(part) for part in logprobs_of(counting, hidden[:0], targets[:0], vocab_size=11)] == [0, 0]


def rl(**changes) -> Rl:
    needed = {"kind": "rl", "name": "b", "data": {"q": 1.0}, "steps": 1, "prompts_per_step": 1}
    return Rl.model_validate(needed | {"rewards": {"r": {"function": "m:f"}}} | changes)


def test_the_recipe_names_every_algorithm_and_every_part() -> None:
    from rlhf.algorithms.advantages import ESTIMATORS

    def options(field: str) -> set[str]:
        found = get_args(Rl.model_fields[field].annotation)
        return {name for option in found for name in (get_args(option) or (option,)) if isinstance(name, str)}

    assert options("algorithm") == {"auto", *ALGORITHMS}
    assert options("advantage") == {*ESTIMATORS, GENERALISED}
    assert options("objective") == set(POLICIES)
    assert options("normalise") == set(get_args(Normalise))
    for method in ALGORITHMS.values():
        assert method.advantage in {*ESTIMATORS, GENERALISED}
        assert method.objective in POLICIES


def test_a_recipe_may_change_a_part_of_an_algorithm() -> None:
    assert method_of(rl(), "dapo") == ALGORITHMS["dapo"]
    changed = method_of(rl(advantage="leave_one_out", clip_high=0.5, normalise="constant"), "dapo")
    assert changed == replace(ALGORITHMS["dapo"], advantage="leave_one_out", clip_high=0.5, normalise="constant")


def test_a_critic_goes_with_an_advantage_for_every_token() -> None:
    for name in ("auto", *ALGORITHMS):
        for part in (None, GENERALISED, "group_centred"):
            stage = rl(algorithm=name, advantage=part)
            assert (estimator_of(stage) is None) == (stage.foretelling is not None)
    assert rl(algorithm="ppo").foretelling == Critic()
    assert rl(algorithm="cispo", advantage="generalised", critic={"lr": 0.1}).foretelling == Critic(lr=0.1)
    assert rl(algorithm="ppo", advantage="group_centred").foretelling is None
    assert rl().foretelling is None
    for changes in ({}, {"algorithm": "ppo", "advantage": "batch_normalised"}):
        with pytest.raises(ValueError, match="`critic` does nothing with algorithm = "):
            rl(critic={"lr": 0.1}, **changes)


def test_a_correction_must_keep_tokens_on_which_both_agree() -> None:
    assert rl(correction={"mask": [0.5, 5.0]}).correction.mask == (0.5, 5.0)
    with pytest.raises(ValueError, match=r"`mask` = \[1.5, 5.0\] must be \[low, high\] around 1"):
        rl(correction={"mask": [1.5, 5.0]})


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("normalise", get_args(Normalise))
def test_the_divergence_in_the_loss_equals_the_loop(estimator, normalise) -> None:
    logprobs, old, advantages, mask = batch(seed=4)
    reference = old + 0.2 * torch.randn_like(old)
    loss = replace(LOSS, kind="ppo", normalise=normalise)
    tokens = Tokens(logprobs, old, advantages, mask, *counts(mask), reference=reference)
    plain, _ = policy_loss(tokens, loss)
    held, metrics = policy_loss(tokens, replace(loss, kl=(estimator, 0.3)))
    expected = total = 0.0
    for row in range(len(mask)):
        present = [t for t in range(mask.shape[1]) if mask[row, t] > 0]
        for t in present:
            gap = float(reference[row, t] - logprobs[row, t].detach())
            each = gap**2 / 2 if estimator == "k2" else math.exp(gap) - 1 - gap
            share = {"token": counts(mask)[0], "row": counts(mask)[1], "constant": counts(mask)[1] * 11}
            share["row_mean"] = counts(mask)[1] * len(present)
            expected += 0.3 * float(mask[row, t]) * each / share[normalise]
            total += each
    assert float((held - plain).detach()) == pytest.approx(expected)
    assert float(metrics["kl_reference"]) == pytest.approx(total)


def test_a_divergence_has_an_estimator_that_works_where_it_is() -> None:
    assert rl(kl={"weight": 0.1}).kl.chosen == "k3"
    assert rl(kl={"weight": 0.1, "place": "reward"}).kl.chosen == "k1"
    with pytest.raises(ValueError, match="k1 in the loss has a gradient of mean zero"):
        rl(kl={"weight": 0.1, "estimator": "k1"})
