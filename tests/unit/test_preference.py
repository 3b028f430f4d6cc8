"""Preferences: numbers by hand, the gradient of autograd, and TRL's loss on the same rows."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch
from datasets import Dataset

from rlhf.batching import BridgeVisual, collate, make_batch
from rlhf.data.digits import build
from rlhf.data.formatting import as_pair
from rlhf.data.rows import DataError, read
from rlhf.preference import log_sigmoid, sigmoid, weigh
from rlhf.recipe import Chat, Preference
from rlhf.types import Batch, Sample
from tests.unit.test_bridge_build import picture, tiny
from tests.unit.test_bridge_training import TEMPLATE, settings


def stage(**changes) -> Preference:
    needed = {"kind": "preference", "name": "p", "data": {"rows": 1.0}, "steps": 1, "batch_size": 2}
    return Preference.model_validate(needed | changes)


class Said:
    """A trainer that says what it is given of each sample: (policy's, reference's) log-probabilities."""

    def __init__(self, said: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]) -> None:
        self.said = said

    async def logprobs(self, batch: Batch):
        return self.said


def pair(name: str, chosen: int, rejected: int) -> list[Sample]:
    return [
        Sample(f"{name}/chosen", (1, 2, *range(3, 3 + chosen)), 2),
        Sample(f"{name}/rejected", (1, 2, *range(9, 9 + rejected)), 2),
    ]


def test_weights_and_metrics_by_hand() -> None:
    batch = make_batch(pair("a", 2, 1) + pair("b", 1, 1), 1, 64)
    said = {
        "a/chosen": ((-1.0, -1.0), (-2.0, -1.5)),  # 1.5 nats above the reference
        "a/rejected": ((-2.0,), (-1.5,)),  # 0.5 below: a margin of 2 · beta
        "b/chosen": ((-3.0,), (-2.0,)),
        "b/rejected": ((-1.0,), (-1.0,)),  # margin -1 · beta
    }
    weighed, metrics = asyncio.run(weigh(stage(beta=0.5), Said(said), batch))
    samples = {s.key: s for rank in weighed.micro_batches for part in rank for s in part}
    sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert samples["a/chosen"].advantage == pytest.approx(2 * 0.5 * sigma(-1.0))
    assert samples["a/rejected"].advantage == pytest.approx(-2 * 0.5 * sigma(-1.0))
    assert samples["b/chosen"].advantage == pytest.approx(2 * 0.5 * sigma(0.5))
    assert samples["a/chosen"].logprobs == (-1.0, -1.0)
    assert metrics == pytest.approx(
        {
            "loss": -(math.log(sigma(1.0)) + math.log(sigma(-0.5))) / 2,
            "accuracy": 0.5,
            "margin": (1.0 - 0.5) / 2,
            "reward.chosen": (0.75 - 0.5) / 2,
            "reward.rejected": (-0.25 + 0.0) / 2,
        }
    )
    assert weighed.num_rows == 4
    for value in (-800.0, -1.0, 0.0, 1.0, 800.0):
        assert sigmoid(value) == pytest.approx(float(torch.sigmoid(torch.tensor(value, dtype=torch.float64))))
        assert log_sigmoid(value) == pytest.approx(float(torch.nn.functional.logsigmoid(torch.tensor(value).double())))


KNOWN = (("a", "chosen", 0.0), ("a", "rejected", -2.0), ("b", "chosen", -1.0), ("b", "rejected", 0.0))


def test_a_pair_that_comes_twice_counts_twice() -> None:
    said = {f"{name}/{kind}": ((value,), (0.0,)) for name, kind, value in KNOWN}
    batch = make_batch(pair("a", 1, 1) + pair("b", 1, 1) + pair("b", 1, 1), 1, 64)
    _, metrics = asyncio.run(weigh(stage(beta=1.0), Said(said), batch))
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["margin"] == pytest.approx((2.0 - 1.0 - 1.0) / 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_gradient_is_that_of_the_loss(smoothing) -> None:
    torch.manual_seed(0)
    batch = make_batch(pair("a", 3, 2) + pair("b", 1, 4), 1, 64)
    samples = [sample for part in batch.micro_batches[0] for sample in part]
    logprobs = {s.key: torch.randn(s.num_completion, dtype=torch.float64, requires_grad=True) for s in samples}
    reference = {s.key: torch.randn(s.num_completion, dtype=torch.float64) for s in samples}
    said = {key: (tuple(logprobs[key].tolist()), tuple(reference[key].tolist())) for key in logprobs}
    weighed, metrics = asyncio.run(weigh(stage(beta=0.3, smoothing=smoothing), Said(said), batch))
    rewards = {key: 0.3 * (logprobs[key] - reference[key]).sum() for key in logprobs}
    margins = torch.stack([rewards[f"{name}/chosen"] - rewards[f"{name}/rejected"] for name in ("a", "b")])
    log_sigma = torch.nn.functional.logsigmoid
    loss = (-(1 - smoothing) * log_sigma(margins) - smoothing * log_sigma(-margins)).mean()
    expected = torch.autograd.grad(loss, list(logprobs.values()))
    assert metrics["loss"] == pytest.approx(float(loss.detach()))
    advantages = {s.key: s.advantage for part in weighed.micro_batches[0] for s in part}
    for (key, values), gradient in zip(logprobs.items(), expected, strict=True):
        # REINFORCE, summed by row over the number of rows
        torch.testing.assert_close(torch.full_like(values, -advantages[key] / weighed.num_rows), gradient)


def rows(tmp_path):
    """Two rows in TRL's form."""
    for index, size in enumerate(((40, 24), (16, 16))):
        picture(index, *size).save(tmp_path / f"{index}.png")
    lines = [
        '{"prompt": [{"role": "user", "content": "one?"}], "image": "0.png",'
        ' "chosen": [{"role": "assistant", "content": "two"}],'
        ' "rejected": [{"role": "assistant", "content": "one two one"}]}',
        '{"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "one"}], "image": "1.png",'
        ' "rejected": "three two"}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return read(tmp_path / "rows.jsonl")


def logprobs(model, samples, processor) -> dict[str, tuple[float, ...]]:
    tensors = collate(samples, BridgeVisual(processor))
    with torch.no_grad():
        logits = model(**tensors.model_inputs(), use_cache=False).logits.log_softmax(-1)
    found = logits[:, :-1].gather(-1, tensors.input_ids[:, 1:, None])[..., 0]
    return {s.key: tuple(found[i][tensors.completion[i]].tolist()) for i, s in enumerate(samples)}


def test_the_loss_is_trls_on_the_same_rows(tmp_path) -> None:
    from trl import DPOConfig, DPOTrainer

    model, processor = tiny(loud=False)
    reference, _ = tiny(loud=False)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    processor.tokenizer.chat_template = processor.chat_template = TEMPLATE
    found = rows(tmp_path)
    samples = [s for i in range(2) for s in as_pair(found[i], "rows", i, processor, Chat())]
    model.eval(), reference.eval()
    own, other = (logprobs(one, samples, processor) for one in (model, reference))
    said = {key: (own[key], other[key]) for key in own}
    _, metrics = asyncio.run(weigh(stage(beta=0.7), Said(said), make_batch(samples, 1, 200)))
    texts = [(s.prompt_length, processor.tokenizer.decode(s.token_ids[s.prompt_length :])) for s in samples]
    assert all(text for _, text in texts)
    data = Dataset.from_list(
        [
            {
                "images": [picture(0, 40, 24)],
                "prompt": [{"role": "user", "content": "one?"}],
                "chosen": [{"role": "assistant", "content": "two"}],
                "rejected": [{"role": "assistant", "content": "one two one"}],
            },
            {
                "images": [picture(1, 16, 16)],
                "prompt": [{"role": "user", "content": "two"}],
                "chosen": [{"role": "assistant", "content": "one"}],
                "rejected": [{"role": "assistant", "content": "three two"}],
            },
        ]
    )
    arguments = DPOConfig(**settings(tmp_path, per_device_train_batch_size=2, max_length=None, beta=0.7))
    trainer = DPOTrainer(
        model=model, ref_model=reference, args=arguments, train_dataset=data, processing_class=processor
    )
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    with torch.no_grad():
        theirs = float(trainer.compute_loss(model, batch))
    assert abs(metrics["margin"]) > 1e-2, "the policy is where its reference is"
    assert metrics["loss"] == pytest.approx(theirs, abs=1e-5)


def test_rows_without_two_replies_are_named(tmp_path) -> None:
    _, processor = tiny(loud=False)
    processor.tokenizer.chat_template = TEMPLATE
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match=r"source 'x', row 3: no `rejected` reply"):
        as_pair(row, "x", 3, processor, Chat())
    with pytest.raises(DataError, match="no `rejected` reply"):
        as_pair({**row, "rejected": [{"role": "user", "content": "c"}]}, "x", 3, processor, Chat())
    with pytest.raises(DataError, match="the chosen and the rejected reply are the same"):
        as_pair({**row, "rejected": "b"}, "x", 3, processor, Chat())


def test_digits_have_pairs_of_a_sound_and_a_corrupted_chain() -> None:
    from rlhf.data.chains import check_chain

    made = build("pairs", 20, "train", 0, {})
    for row in made:
        sound, spoilt = (
            check_chain(row["category"], row["digits"], text, row["answer"], row["target"]).sound
            for text in (row["messages"][-1]["content"][0]["text"], row["rejected"])
        )
        assert (sound, spoilt) == (True, False)
