"""What routers do with tokens: numbers by hand, and the same however rows are laid out."""

from __future__ import annotations

import contextlib
import math
import random

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from rlhf import bridge
from rlhf.batching import BridgeVisual, collate
from rlhf.packing import attend_by_row
from rlhf.routing import Routing, Usage, _even, calibrate, routers
from rlhf.types import Sample
from tests.unit.test_bridge_model import MOE, tiny
from tests.unit.test_packing import rows

IMAGE = 7


def test_choices_and_margins_by_hand() -> None:
    routing = Routing(torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])), top_k=2)
    assert routing.choice().tolist() == [[0, 1], [2, 1]]
    torch.testing.assert_close(routing.margin(), torch.tensor([0.1, 0.1]))
    assert Routing(torch.zeros(1, 2), top_k=2).margin().tolist() == [math.inf]


def test_usage_by_hand() -> None:
    # layer 0: text on expert 0, pictures on 1; layer 1: all on expert 3
    chosen = torch.tensor([[[4, 0, 0, 0], [0, 4, 0, 0]], [[0, 0, 0, 4], [0, 0, 0, 4]]]).double()
    probable = torch.tensor([[4, 4, 0, 0], [0, 0, 0, 8]]).double()
    first = torch.tensor([[8, 0, 0, 0], [0, 0, 0, 8]]).double()
    usage = Usage(chosen, probable, first)
    assert usage.shares().tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0, 1]]
    assert usage.shares("first").tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    # by first choices: layer 0: 4 · 1 · ½ = 2; layer 1: 4
    assert float(usage.imbalance(usage.shares("first"), 8.0)) == pytest.approx(3)
    found = usage.metrics()
    # layer 0: 4 · (½ · ½ + ½ · ½) = 2; layer 1: 4 · 1 · 1 = 4
    assert found["router_aux"] == pytest.approx(3)
    assert found["router_dead"] == 5
    assert found["router_entropy"] == 0
    assert found["router_entropy.text.0"] == 0
    both = (usage + usage).metrics()
    assert both == found
    even = Usage(torch.ones(1, 2, 4).double(), torch.ones(1, 4).double(), torch.ones(1, 4).double()).metrics()
    assert (even["router_aux"], even["router_entropy"], even["router_dead"]) == (1, pytest.approx(1), 0)
    text = Usage(torch.tensor([[[1.0, 1], [0, 0]]]), torch.ones(1, 2), torch.ones(1, 2))
    assert [name for name in text.metrics() if "." in name] == ["router_entropy.text.0"]


@pytest.fixture
def mixture():
    """A mixture of experts with routers that have opinions, its processor, and rows."""
    model, processor = tiny(decoder=MOE)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter)
    return model, processor, rows(processor)


def usage(model, processor, samples, packs: bool = False) -> Usage:
    tensors = collate(samples, BridgeVisual(processor, packs=packs))
    with routers(model) as routed:
        model(**tensors.model_inputs(), use_cache=False)
    return Usage.of(routed, tensors, processor.image_token_id)


def test_usage_does_not_depend_on_how_rows_are_cut_or_packed(mixture) -> None:
    model, processor, samples = mixture
    whole = usage(model, processor, samples).detach()
    assert whole.chosen[:, 1].any(), "no picture"
    parts = [usage(model, processor, part).detach() for part in (samples[:1], samples[1:3], samples[3:])]
    summed = parts[0] + parts[1] + parts[2]
    attend_by_row(model.model.language_model)
    packed = usage(model, processor, samples, packs=True).detach()
    for other in (summed, packed):
        assert torch.equal(other.chosen, whole.chosen)
        torch.testing.assert_close(other.probable, whole.probable, atol=1e-4, rtol=1e-6)


def test_rows_that_weigh_nothing_and_padding_do_not_count(mixture) -> None:
    from dataclasses import replace

    model, processor, samples = mixture
    some = usage(model, processor, samples[1:]).detach()
    weightless = usage(model, processor, [replace(samples[0], weight=0.0), *samples[1:]]).detach()
    assert torch.equal(weightless.chosen, some.chosen)
    tokens = sum(len(sample.token_ids) for sample in samples[1:])
    assert some.probable.sum(-1).tolist() == pytest.approx([tokens] * len(some.probable), rel=1e-5)


def test_imbalance_is_that_of_transformers_on_one_layer(mixture) -> None:
    model, processor, samples = mixture
    tensors = collate(samples, BridgeVisual(processor))
    with routers(model) as routed:
        model(**tensors.model_inputs(), use_cache=False)
    name = next(iter(routed))
    found = Usage.of({name: routed[name]}, tensors, processor.image_token_id)
    mine = found.imbalance(found.shares(), float(tensors.attention_mask.sum()))
    logits, top_k = routed[name].logits, routed[name].top_k
    theirs = load_balancing_loss_func((logits,), logits.shape[-1], top_k, tensors.attention_mask)
    torch.testing.assert_close(mine, theirs / top_k)  # their shares add up to top_k
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (mine * top_k, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-4)


def test_by_first_choices_imbalance_is_deepspeeds() -> None:
    """That of MoE-LLaVA, which sums it over layers."""
    from deepspeed.moe.sharded_moe import top2gating

    logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) * 2
    theirs = top2gating(logits, 40.0, 0, drop_tokens=True, top2_2nd_expert_sampling=False)[0]
    routing = Routing(logits, 2)
    first = torch.bincount(routing.choice()[:, 0], minlength=4)[None].double()
    found = Usage(torch.zeros(1, 2, 4), logits.softmax(-1).sum(0)[None], first)
    mine = found.imbalance(found.shares("first"), 40.0)
    torch.testing.assert_close(float(mine), float(theirs), atol=1e-6, rtol=0)
    both = torch.bincount(routing.choice().flatten(), minlength=4)[None].double()
    assert abs(float(found.imbalance(both / both.sum(), 40.0)) - float(theirs)) > 1e-3  # the control: both choices


def test_calibration_spreads_the_tokens_of_an_upcycled_decoder_and_leaves_its_output() -> None:
    dense, processor = tiny()
    model = bridge.upcycle(dense, num_experts=4, top_k=2, layers="all", seed=3)
    samples = sentences(processor, 24)
    seen, unseen = samples[:16], samples[16:]
    tensors = collate(unseen, BridgeVisual(processor))
    with torch.no_grad():
        before = model(**tensors.model_inputs(), use_cache=False).logits
        with contextlib.ExitStack() as stack:  # one expert of each layer becomes what all tokens want
            for router in (module for name, module in model.named_modules() if name.endswith("mlp.gate")):
                stack.callback(router.register_forward_pre_hook(favour).remove)
            model(**tensors.model_inputs(), use_cache=False)
        worst = usage(model, processor, unseen).detach().metrics()["router_entropy"]
        calibrate(model, collate(seen, BridgeVisual(processor)))
        after = model(**tensors.model_inputs(), use_cache=False).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert usage(model, processor, unseen).detach().metrics()["router_entropy"] > 0.95 > worst


def favour(router, args) -> None:
    router.weight[0] = 5 * args[0].flatten(0, -2).mean(0)


def sentences(processor, count: int) -> list[Sample]:
    """Rows of random words."""
    pick = random.Random(0)
    words = [i for i in range(5, len(processor.tokenizer)) if i != processor.image_token_id]
    return [Sample(f"row/{index}", tuple(pick.choices(words, k=20)), 4) for index in range(count)]


def test_calibrated_logits_are_centred_and_white() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(500, 8).double() @ torch.randn(8, 8).double() + 3
    weight = torch.randn(4, 8).double()
    logits = inputs @ _even(weight, inputs).T
    covariance = logits.T.cov(correction=0)
    assert logits.mean(0).abs().max() < 1e-9
    torch.testing.assert_close(covariance, covariance.diagonal().mean() * torch.eye(4).double())
    alike = _even(weight[:1].repeat(4, 1), inputs)  # nothing to tell apart, and nothing blown up
    assert alike.abs().max() < 40 * weight.abs().max()
