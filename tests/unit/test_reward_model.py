"""Reward models: numbers by hand, the gradient of autograd, TRL's loss on the same rows, and scores at work."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from actors.scalar import HEAD, one_output, restore_head, rewarded, write_head
from actors.scorer import Scorer, ScorerSettings
from rlhf.batching import BridgeVisual, collate, make_batch
from rlhf.data.digits import build
from rlhf.data.rows import DataError
from rlhf.evaluation import preferred
from rlhf.packing import attend_by_row
from rlhf.recipe import Chat, Reward, RewardModel, Rl
from rlhf.reward_model import as_ranked, weigh
from rlhf.scoring import score
from rlhf.types import Batch, Group, Media, Pool, Prompt, Rollout, Sample, Scalar, Score
from tests.unit.test_bridge_build import MOE, tiny
from tests.unit.test_bridge_training import TEMPLATE, settings
from tests.unit.test_packing import media, rows

TRL = pytest.mark.filterwarnings("default")  # vendors warn of each other


def stage(**changes: Any) -> RewardModel:
    needed = {"kind": "reward_model", "name": "r", "data": {"rows": 1.0}, "steps": 1, "batch_size": 2}
    return RewardModel.model_validate(needed | changes)


class Said:
    """A trainer that says what it is given of each sample."""

    def __init__(self, said: dict[str, float]) -> None:
        self.said = said

    async def rewards(self, batch: Batch) -> dict[str, float]:
        return self.said


def pair(name: str, chosen: int = 2, rejected: int = 1, margin: float = 0.0) -> list[Sample]:
    return [
        Sample(f"{name}/chosen", (1, 2, *range(3, 3 + chosen)), 2, margin=margin),
        Sample(f"{name}/rejected", (1, 2, *range(9, 9 + rejected)), 2, margin=margin),
    ]


def advantages(batch: Batch) -> dict[str, float]:
    return {s.key: s.advantage for rank in batch.micro_batches for part in rank for s in part}


def test_slopes_and_metrics_by_hand() -> None:
    said = {"a/chosen": 1.5, "a/rejected": -0.5, "b/chosen": -1.0, "b/rejected": 0.0}
    batch = make_batch(pair("a", margin=1.0) + pair("b"), 1, 64)
    weighed, metrics = asyncio.run(weigh(stage(center=0.1), Said(said), batch))
    sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert advantages(weighed) == pytest.approx(
        {  # two rows a pair are what the step divides by
            "a/chosen": 2 * (sigma(-1.0) - 0.2 * 1.0),
            "a/rejected": 2 * (-sigma(-1.0) - 0.2 * 1.0),
            "b/chosen": 2 * (sigma(1.0) + 0.2 * 1.0),
            "b/rejected": 2 * (-sigma(1.0) + 0.2 * 1.0),
        }
    )
    assert metrics == pytest.approx(
        {
            "loss": -(math.log(sigma(1.0)) + math.log(sigma(-1.0))) / 2 + 0.1 * (1.0 + 1.0) / 2,
            "accuracy": 0.5,
            "margin": (2.0 - 1.0) / 2,
            "reward.chosen": 0.25,
            "reward.rejected": -0.25,
        }
    )


def test_what_holds_a_chosen_reply_up_is_one_more_slope() -> None:
    batch = make_batch(pair("a"), 1, 64)
    said = Said({"a/chosen": -2.0, "a/rejected": -3.0})
    plain, before = asyncio.run(weigh(stage(pool="likelihood"), said, batch))
    anchored, metrics = asyncio.run(weigh(stage(pool="likelihood", anchor=0.25), said, batch))
    assert metrics["loss"] == pytest.approx(before["loss"] + 0.25 * 2.0)
    assert advantages(anchored)["a/chosen"] == pytest.approx(advantages(plain)["a/chosen"] + 2 * 0.25)
    assert advantages(anchored)["a/rejected"] == advantages(plain)["a/rejected"]


def test_a_pair_that_comes_twice_counts_twice() -> None:
    said = {"a/chosen": 1.0, "a/rejected": 0.0, "b/chosen": 0.0, "b/rejected": 3.0}
    batch = make_batch(pair("a") + pair("b") + pair("b"), 1, 64)
    _, metrics = asyncio.run(weigh(stage(), Said(said), batch))
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["margin"] == pytest.approx((1.0 - 3.0 - 3.0) / 3)


def trls(chosen: Tensor, rejected: Tensor, margin: Tensor, center: float) -> Tensor:
    """As RewardTrainer.compute_loss has it."""
    return -logsigmoid(chosen - rejected - margin).mean() + center * ((chosen + rejected) ** 2).mean()


def valued(decoder: dict[str, Any], seed: int = 0, headed: bool = True) -> tuple[Any, Any]:
    """A tiny bridge, with a head of one output that is not zero or its own, and its processor."""
    model, processor = tiny(**decoder)
    if not headed:
        return model, processor
    head = one_output(model, bias=False)
    torch.nn.init.normal_(head.weight, std=0.5, generator=torch.Generator().manual_seed(seed))
    return model, processor


def read_off(logits: Tensor, sample: Sample, scalar: Scalar) -> Tensor:
    """What a reward model says, from what it gives at all tokens of a row [L, head]: at the last, at the reply's,
    or of each of these at the one before it."""
    begins, ids = sample.prompt_length, torch.tensor(sample.token_ids)
    if scalar.pool == "likelihood":
        each = logits[begins - 1 : -1].log_softmax(-1)
        return scalar.beta * each.gather(1, ids[begins:, None]).sum()
    return logits[-1, 0] if scalar.pool == "last" else logits[begins:, 0].mean()


@pytest.mark.parametrize("pool", get_args(Pool))
@pytest.mark.parametrize("decoder", [{}, {"decoder": MOE}])
def test_the_step_on_packed_rows_is_autograds_of_the_loss_row_by_row(decoder: dict[str, Any], pool: Pool) -> None:
    scalar = Scalar(pool, 0.3)
    model, processor = valued(decoder, headed=scalar.headed)
    shown = {sample.key: sample for sample in rows(processor)}
    samples = []
    for index, margin in ((2, 0.5), (0, 0.0)):  # one with two pictures, one of text alone
        for key, kind in ((f"row/{index}", "chosen"), (f"again/{index}", "rejected")):
            samples.append(dataclasses.replace(shown[key], key=f"{index}/{kind}", margin=margin))

    def alone(sample: Sample) -> Tensor:
        """The reward by a forward of this row only, read at the last of its logits, or at all of its reply."""
        inputs = collate([sample], BridgeVisual(processor)).model_inputs()
        return read_off(model(**inputs, use_cache=False).logits[0], sample, scalar)

    each = {sample.key: alone(sample) for sample in samples}
    chosen, rejected = (torch.stack([each[f"{index}/{kind}"] for index in (2, 0)]) for kind in ("chosen", "rejected"))
    loss = trls(chosen, rejected, torch.tensor([0.5, 0.0]), 0.3)
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    attend_by_row(model.model.language_model)
    visual = BridgeVisual(processor, packs=True)
    batch = make_batch(samples, 1, 400, packed=True)
    with torch.no_grad():
        said = {
            sample.key: value
            for part in batch.micro_batches[0]
            for sample, value in zip(part, rewarded(model, collate(part, visual), scalar).tolist(), strict=True)
        }
    weighed, metrics = asyncio.run(weigh(stage(center=0.3), Said(said), batch))
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-6, abs=1e-5)
    for part in weighed.micro_batches[0]:
        tensors = collate(part, visual)
        (
            -(tensors.advantages[:, 0] * tensors.weights * rewarded(model, tensors, scalar)).sum() / weighed.num_rows
        ).backward()
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, torch.zeros_like(parameter) if gradient is None else gradient, msg=name)
    assert model.lm_head.weight.grad.abs().max() > 1e-2


@TRL
@pytest.mark.parametrize("center", [None, 0.2])
def test_the_loss_is_trls_on_the_same_rows(tmp_path: Path, center: float | None) -> None:
    from trl import RewardConfig, RewardTrainer

    model, processor = valued({})
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template = TEMPLATE
    texts = [("one?", "two", "one two one", 0.7), ("two", "one", "three two", 0.0)]
    lines = [
        {
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": chosen}],
            "rejected": rejected,
            "margin": margin,
        }
        for asked, chosen, rejected, margin in texts
    ]
    samples = [s for i, row in enumerate(lines) for s in as_ranked(row, "rows", i, processor, Chat())]
    batch = make_batch(samples, 1, 200)
    with torch.no_grad():
        said = {
            sample.key: value
            for part in batch.micro_batches[0]
            for sample, value in zip(
                part, rewarded(model, collate(part, BridgeVisual(processor)), Scalar()).tolist(), strict=True
            )
        }
    _, metrics = asyncio.run(weigh(stage(center=center or 0.0), Said(said), batch))

    config = Qwen3Config(
        **model.config.text_config.to_dict() | {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    )
    theirs = Qwen3ForSequenceClassification(config).eval()
    theirs.model.load_state_dict(model.model.language_model.state_dict())
    theirs.score.weight.data.copy_(model.lm_head.weight.data)
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": asked}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "margin": margin,
            }
            for asked, chosen, rejected, margin in texts
        ]
    )
    arguments = RewardConfig(
        **settings(tmp_path, per_device_train_batch_size=2, max_length=None, center_rewards_coefficient=center)
    )
    trainer = RewardTrainer(model=theirs, args=arguments, train_dataset=data, processing_class=tokenizer)
    inputs = next(iter(trainer.get_train_dataloader()))
    ours = {sample.token_ids for sample in samples}
    assert {
        tuple(row[mask > 0].tolist()) for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    } == ours
    theirs.eval()
    with torch.no_grad():
        expected = float(trainer.compute_loss(theirs, inputs))
    assert abs(metrics["margin"]) > 1e-2
    assert metrics["loss"] == pytest.approx(expected, abs=1e-5)


def test_rows_may_say_by_how_much(tmp_path: Path) -> None:
    _, processor = tiny(loud=False)
    processor.tokenizer.chat_template = TEMPLATE
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rejected": "c"}
    for given, margin in (({}, 0.0), ({"margin": None}, 0.0), ({"margin": 2}, 2.0)):
        assert [s.margin for s in as_ranked(row | given, "x", 3, processor, Chat())] == [margin] * 2
    with pytest.raises(DataError, match=r"source 'x', row 3: its margin is 'much', not a number"):
        as_ranked(row | {"margin": "much"}, "x", 3, processor, Chat())


def test_held_out_pairs_are_counted_by_hand() -> None:
    samples = [sample for name in "abcd" for sample in pair(name)]
    margins = {"a": 2.0, "b": 0.1, "c": -0.1, "d": 0.0}
    said = {f"{name}/chosen": 1.0 + margin for name, margin in margins.items()} | dict.fromkeys(
        (f"{name}/rejected" for name in margins), 1.0
    )
    kinds = {"a/chosen": "misread", "b/chosen": "misread", "c/chosen": "wrong", "d/chosen": ""}
    found = preferred(samples, said, kinds, 100)
    sure = [1 / (1 + math.exp(-abs(margin))) for margin in margins.values()]
    assert found["reward_model.accuracy"] == 0.5  # of rewards that are equal, none is preferred
    assert found["reward_model.accuracy.misread"] == 1.0
    assert found["reward_model.accuracy.wrong"] == 0.0
    assert "reward_model.accuracy." not in found
    assert found["reward_model.margin"] == pytest.approx(0.5)
    assert found["reward_model.loss"] == pytest.approx(
        -sum(math.log(1 / (1 + math.exp(-margin))) for margin in margins.values()) / 4
    )
    assert found["reward_model.confidence"] == pytest.approx(sum(sure) / 4)
    # a is in a bin of its own; the others, of which one is right, in the lowest
    apart = abs(1 - sure[0]) + abs(1 - sum(sure[1:]))
    assert found["reward_model.calibration"] == pytest.approx(apart / 4)
    assert (found["reward_model.chosen"], found["reward_model.rejected"]) == (pytest.approx(1.5), 1.0)
    assert found["reward_model.accuracy.low"] <= 0.5 <= found["reward_model.accuracy.high"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """(folder, model, processor) of a reward model whose decoder is a mixture of experts."""
    folder = tmp_path_factory.mktemp("reward-model")
    model, processor = tiny(decoder=MOE)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    head = one_output(model, bias=False)
    torch.nn.init.normal_(head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    write_head(folder, head.weight.detach(), Scalar())
    return folder, model, processor


def settings_of(**changes: Any) -> ScorerSettings:
    return ScorerSettings(
        **{"precision": "float32", "token_budget": 300, "packed": True, "threads": 1, "device": "cpu"} | changes
    )


def groups(processor: Any) -> list[Group]:
    """The rows of a packing test as rollouts: of text, of one picture and of two; three of one prompt among them."""
    found = dict[tuple[int, ...], Group]()
    for sample in rows(processor):
        prompt = sample.token_ids[: sample.prompt_length]
        rollout = Rollout(sample.token_ids[sample.prompt_length :], (), (), "", "length")
        before = found.get(prompt)
        question = Prompt(sample.key, "rows", "?", _unexpanded(processor, prompt, sample), sample.media)
        found[prompt] = Group(question, prompt, (*(before.rollouts if before else ()), rollout))
    return list(found.values())


def _unexpanded(processor: Any, prompt: tuple[int, ...], sample: Sample) -> tuple[int, ...]:
    """The prompt before its pictures were expanded: they stand first in these rows."""
    shown = processor.expand([processor.image_token_id] * len(sample.media), [one.size for one in sample.media])
    assert prompt[: len(shown)] == tuple(shown)
    return (*[processor.image_token_id] * len(sample.media), *prompt[len(shown) :])


def values(scores: list[list[Score]]) -> list[float]:
    assert all(one.outcome == "scored" for row in scores for one in row)
    return [one.value for row in scores for one in row if one.value is not None]


@pytest.mark.parametrize("pool", get_args(Pool))
def test_scores_are_those_of_each_row_alone(artifact: tuple[Path, Any, Any], tmp_path: Path, pool: Pool) -> None:
    folder, model, processor = artifact
    scalar = Scalar(pool, 0.3)
    if pool != "last":  # the same model, asked otherwise
        folder = Path(shutil.copytree(folder, tmp_path / pool))
        write_head(folder, model.lm_head.weight.detach() if scalar.headed else None, scalar)
    said = model if scalar.headed else type(model).from_pretrained(folder)
    asked = groups(processor)
    expected = []
    for group in asked:
        for rollout in group.rollouts:
            row = Sample("x", group.prompt_ids + rollout.token_ids, len(group.prompt_ids), group.prompt.media)
            inputs = collate([row], BridgeVisual(processor)).model_inputs()
            with torch.no_grad():
                expected.append(float(read_off(said(**inputs, use_cache=False).logits[0], row, scalar)))
    assert max(expected) - min(expected) > 0.1
    packed, padded = Scorer(str(folder), settings_of()), Scorer(str(folder), settings_of(packed=False))
    for scorer in (packed, padded):
        assert values(scorer.score(asked)) == pytest.approx(expected, abs=1e-5)
    # whatever is asked beside it, to the last digit
    assert values(packed.score(asked[2:3])) == values([packed.score(asked)[2]])


def test_another_picture_is_another_score(artifact: tuple[Path, Any, Any]) -> None:
    folder, _, processor = artifact
    scorer = Scorer(str(folder), settings_of())
    group = next(group for group in groups(processor) if len(group.prompt.media) == 1)
    other = dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, media=(media(9, 40, 24),)))
    (one,), (two,) = (values(scorer.score([each]))[:1] for each in (group, other))
    assert abs(one - two) > 1e-2


def test_what_cannot_be_scored_fails_its_own_rollouts(artifact: tuple[Path, Any, Any]) -> None:
    folder, _, processor = artifact
    scorer = Scorer(str(folder), settings_of())
    good = next(group for group in groups(processor) if len(group.prompt.media) == 1)
    broken = Media(b"not a picture", good.prompt.media[0].size)
    bad = dataclasses.replace(good, prompt=dataclasses.replace(good.prompt, media=(broken,)))
    long = dataclasses.replace(good, rollouts=(dataclasses.replace(good.rollouts[0], token_ids=(9,) * 300),))
    unread, too_long, fine = scorer.score([bad, long, good])
    assert [one.outcome for one in unread] == ["failed"] * len(bad.rollouts)
    assert "cannot be read" in unread[0].note
    assert "more than the token budget of 300" in too_long[0].note
    assert fine == scorer.score([good])[0]
    scorer._model.lm_head.weight.fill_(math.nan)
    assert scorer.score([good])[0][0] == Score("failed", note="its reward is nan")


def test_only_a_reward_models_folder_is_taken(artifact: tuple[Path, Any, Any], tmp_path: Path) -> None:
    model, processor = tiny()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no reward model: name the artifact of a reward_model stage"):
        Scorer(str(tmp_path), settings_of())
    write_head(tmp_path, torch.zeros(1, 5), Scalar())
    with pytest.raises(ValueError, match=rf"{HEAD} is \[1, 5\], and the model beside it needs \[1, 32\]"):
        restore_head(one_output(model, bias=False), tmp_path)


def test_a_scalar_is_a_part_of_a_reward_as_it_is_or_between_0_and_1() -> None:
    class Scalars:
        async def scalar(self, model: str, asked: list[Group]) -> list[list[Score]]:
            assert model == "ranked"
            return [[Score("scored", 2.0), Score("failed", note="no picture")] for _ in asked]

    rollouts = tuple(Rollout((1,), (0.0,), (0,), "", "stop") for _ in range(2))
    group = Group(Prompt("k", "s", "?", (1,)), (1,), rollouts)
    for sigmoid, value in ((False, 2.0), (True, 1 / (1 + math.exp(-2.0)))):
        table = {"name": "s", "kind": "rl", "data": {"d": 1}, "steps": 1, "prompts_per_step": 1}
        table["rewards"] = {"liked": {"scalar": "ranked", "sigmoid": sigmoid}}
        (scored,) = asyncio.run(score([group], Rl.model_validate(table), Scalars(), {}))  # type: ignore[arg-type]
        assert scored.scores[0].value == pytest.approx(value)
        assert scored.scores[1].outcome == "failed"
        assert "no picture" in scored.scores[1].note


def test_a_reward_is_of_one_kind() -> None:
    with pytest.raises(ValueError, match="give exactly one of"):
        Reward(judge="a", scalar="b")
    with pytest.raises(ValueError, match="`sigmoid` puts a `scalar` between 0 and 1"):
        Reward(judge="a", sigmoid=True)
    with pytest.raises(ValueError, match="`only_if` saves asking a judge"):
        Reward(scalar="a", only_if="b")
    with pytest.raises(ValueError, match="the head of a reward model has one row"):
        stage(rows_of=["<think>"])
    with pytest.raises(ValueError, match='add pool = "likelihood", or remove it'):
        stage(anchor=0.1)


def test_digits_say_what_is_wrong_with_the_rejected_chain() -> None:
    from rlhf.data.chains import CORRUPTIONS

    assert {row["corruption"] for row in build("pairs", 60, "train", 0, {})} <= set(CORRUPTIONS)
