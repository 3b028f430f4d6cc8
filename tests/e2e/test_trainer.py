"""TrainerRank on real DeepSpeed and gloo: two ranks against one, resume, weights, export.

The ranks are processes that run this very file and take method calls through a pipe; they serve all tests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import math
import os
import pickle
import random
import select
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.nodes import port as free_port
from rlhf import bridge, reward_model
from rlhf.batching import make_batch
from rlhf.bridge import BridgeForConditionalGeneration
from rlhf.preference import weigh
from rlhf.recipe import Preference, RewardModel
from rlhf.types import Batch, Group, Loss, Media, Prompt, Rollout, Sample, Scalar, TrainSpec

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 240.0  # of a call; the first waits for the process to import its vendors
IMAGE = 3

pytestmark = pytest.mark.timeout(300)


def loss_of(trainer: Any, batch: Batch) -> float:
    """Nats a token, of all samples of the batch."""
    fits = [fit for _, found in trainer.all("losses", batch) for fit in found.values()]
    assert len(fits) == sum(sample.weight > 0 for mine in batch.micro_batches for part in mine for sample in part)
    return sum(fit.nll for fit in fits) / sum(fit.tokens for fit in fits)


def serve(rank: int, world_size: int, address: str) -> None:
    """Answer pickled (method, arguments) from stdin with (ok, result); vendors' prints go to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from deepspeed.utils import safe_get_full_grad

    from actors.trainer import TrainerRank
    from rlhf.algorithms import logprobs

    logprobs.LOGITS = 60 * 8  # every batch goes through the head in several parts

    class Spy(TrainerRank):
        """Keeps every parameter's gradient as the first optimizer step sees it, and how much of a model that was whole
        went to the device at once."""

        def begin(self, spec: TrainSpec) -> Any:
            self.moved = 0

            def to(module: Any, *args: Any, **options: Any) -> Any:
                self.moved = max(self.moved, sum(parameter.numel() for parameter in module.parameters()))
                return move(module, *args, **options)

            move = torch.nn.Module.to
            with patch.object(torch.nn.Module, "to", to):
                info = super().begin(spec)
            self.grads: dict[str, np.ndarray] = {}
            stage = self._begun
            apply = stage._apply

            def spied(batch: Batch) -> tuple[float, float]:
                if not self.grads:
                    for name, parameter in stage.model.named_parameters():
                        if parameter.requires_grad:
                            self.grads[name] = safe_get_full_grad(parameter).float().numpy().copy()
                found: tuple[float, float] = apply(batch)
                return found

            stage._apply = spied  # type: ignore[method-assign]
            return info

        def moved_at_once(self) -> int:
            return self.moved

        def first_gradients(self) -> dict[str, np.ndarray]:
            return self.grads

    trainer = Spy(rank, world_size, address, threads=1, timeout=120)
    while True:
        method, args = pickle.load(sys.stdin.buffer)
        if method == "close":
            trainer.close()
            return
        try:
            answer = (True, getattr(trainer, method)(*args))
        except Exception as error:  # noqa: BLE001 - the test sees it
            answer = (False, f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


class Ranks:
    """A trainer of `world_size` rank processes; calls reach all of them and return rank 0's result."""

    def __init__(self, world_size: int) -> None:
        address = f"127.0.0.1:{free_port()}"
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(world_size), address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
            )
            for rank in range(world_size)
        ]

    def all(self, method: str, *args: Any) -> list[tuple[bool, Any]]:
        for process in self.processes:
            assert process.stdin is not None
            pickle.dump((method, args), process.stdin)
            process.stdin.flush()
        answers = []
        for rank, process in enumerate(self.processes):
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], DEADLINE)
            assert ready, f"rank {rank} did not answer {method} within {DEADLINE} s"
            answers.append(pickle.load(process.stdout))
        return answers

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any) -> Any:
            answers = self.all(method, *args)
            for ok, result in answers:
                assert ok, result
            return answers[0][1]

        return call

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(10)
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()


@pytest.fixture(scope="module")
def one():
    ranks = Ranks(1)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", "<image>", *(f"w{i}" for i in range(60))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def save_bridge(folder: Path, moe: bool, tied: bool = True, **slots: Any) -> str:
    decoder: dict[str, Any] = {
        "type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "tie_word_embeddings": tied,
    }
    if moe:
        decoder |= {
            "type": "qwen3_moe",
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        }
    spec = {
        "vision": {
            "type": "siglip",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        "tiler": {"type": "single", "size": [16, 16]},
        "decoder": decoder,
        **slots,
    }
    model, processor = bridge.build(spec, tokenizer(), seed=0)
    # the default initialisation leaves gradients too small to compare at 1e-5
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    return save_bridge(tmp_path_factory.mktemp("sparse"), moe=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return save_bridge(tmp_path_factory.mktemp("untied"), moe=False, tied=False)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_bridge(tmp_path_factory.mktemp("dense"), moe=False)


def picture(seed: int) -> Media:
    buffer = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return Media(buffer.getvalue(), (16, 16))


def rows(num: int, image: bool, seed: int = 0, logprobs: bool = False) -> list[Sample]:
    pick = random.Random(seed)
    made = []
    for i in range(num):
        # 16 × 16 pixels in patches of 8: four placeholders
        prompt = [IMAGE] * 4 * image + [pick.randrange(4, 60) for _ in range(3)]
        completion = [pick.randrange(4, 60) for _ in range(pick.randrange(2, 9))]
        made.append(
            Sample(
                key=f"{'image' if image else 'text'}/{seed}/{i}",
                token_ids=(*prompt, *completion),
                prompt_length=len(prompt),
                media=(picture(seed + i),) if image else (),
                advantage=pick.uniform(-1, 1) if logprobs else 1.0,
                logprobs=tuple(pick.uniform(-5, -3) for _ in completion) if logprobs else (),
            )
        )
    return made


def lopsided(step: int) -> tuple[Batch, Batch]:
    """The same rows for two ranks, the second with text only and one micro-batch fewer, and for one rank."""
    images, texts = rows(4, True, step * 10), rows(3, False, step * 10)
    tokens = sum(sample.num_completion for sample in images + texts)
    split = (tuple(images[:1]), tuple(images[1:])), (tuple(texts), ())
    together = (tuple(images + texts),)
    return Batch(split, tokens, 7), Batch((together,), tokens, 7)


def spec_of(model: str, **changes: Any) -> TrainSpec:
    values: dict[str, Any] = {"seed": 0, "loss": Loss(), "train": {"*": 1e-3}, "steps": 10, "packed": True}
    return TrainSpec(model, **values | changes)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_ranks_train_as_one(one, two, sparse, zero_stage):
    """On packed rows as on padded ones, with layers computed anew in backward as without."""
    one.begin(spec_of(sparse, packed=False, loss=Loss(router_aux=0.1)))
    two.begin(spec_of(sparse, zero_stage=zero_stage, checkpointing=True, loss=Loss(router_aux=0.1)))
    for step in range(10):
        split, together = lopsided(step)
        expected, found = one.step(together).metrics, two.step(split).metrics
        routed = {name: value for name, value in found.items() if name.startswith("router")}
        assert len(routed) == 3 + 2 * 2  # two layers, text and images
        assert routed == pytest.approx({name: expected[name] for name in routed}, abs=1e-5), step
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert found["tokens"] == expected["tokens"]
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], abs=1e-4)
    expected_grads, grads = one.first_gradients(), two.first_gradients()
    assert set(grads) == set(expected_grads)
    for name, gradient in grads.items():
        assert np.abs(gradient - expected_grads[name]).max() <= 1e-5, name
    moved = [name for name, gradient in grads.items() if np.abs(gradient).max() > 1e-4]
    assert any("vision" in name for name in moved)
    assert any("experts" in name for name in moved)
    held_out = lopsided(99)
    # ten optimizer steps of Adam apart, so no longer equal to rounding
    assert loss_of(two, held_out[0]) == pytest.approx(loss_of(one, held_out[1]), abs=1e-3)


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    """A bridge whose Q-Former has the heads of BLIP-2's first stage."""
    folder = tmp_path_factory.mktemp("reading")
    sizes = {"queries": 4, "layers": 2, "width": 16, "heads": 2, "intermediate": 32, "text_length": 12}
    return save_bridge(folder, moe=False, connector={"type": "qformer", **sizes, "aligned": 8})


@pytest.fixture(scope="module")
def comparing(tmp_path_factory):
    """A bridge with a text encoder to compare pictures with."""
    sizes = {"width": 16, "heads": 2, "layers": 1, "feed": 32, "length": 12, "space": 8}
    return save_bridge(tmp_path_factory.mktemp("comparing"), moe=False, head={"type": "contrast", **sizes})


ALIGNING = {
    "reading": {"train": {"connector.reader.*": 1e-3}, "objectives": {"itc": 1.0, "itg": 0.5}},
    "comparing": {"train": {"vision.*": 1e-3, "head.*": 1e-3}, "objectives": {"contrast": 1.0}},
}


@pytest.mark.parametrize(("name", "zero_stage"), [("reading", 2), ("reading", 3), ("comparing", 2), ("comparing", 3)])
def test_pairs_are_compared_over_all_ranks(one, two, name, zero_stage, request):
    """Contrast and generation of BLIP-2, and Flamingo's contrast, on two ranks as on one, gradients of what was
    compared included; a rank may have no pair. (Matching draws its false pairs, of a rank's own.)"""
    folder, changes = request.getfixturevalue(name), ALIGNING[name]
    one.begin(spec_of(folder, **changes))
    two.begin(spec_of(folder, zero_stage=zero_stage, **changes))
    for step in range(4):
        pairs = rows(5, True, step * 10)
        mine = (pairs[:3], pairs[3:]) if step % 2 else (pairs, [])
        tokens = sum(sample.num_completion for sample in pairs)
        expected = one.step(Batch(((tuple(pairs),),), tokens, 5)).metrics
        found = two.step(Batch(tuple((tuple(part),) for part in mine), tokens, 5)).metrics
        for measure in (*changes["objectives"], "loss"):
            assert found[measure] == pytest.approx(expected[measure], abs=1e-5), (step, measure)
    gradients, wanted = two.first_gradients(), one.first_gradients()
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert np.abs(gradient - wanted[name]).max() <= 1e-5, name
    with pytest.raises(Exception, match="text/0/0 has 0 pictures"):
        one.step(Batch(((tuple(rows(2, False)),),), 9, 2))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_muon_on_two_ranks_steps_as_on_one(one, two, sparse, zero_stage):
    one.begin(spec_of(sparse, muon=(20.0, 0.9), zero_stage=0))  # there matrices of one shape move together
    two.begin(spec_of(sparse, muon=(20.0, 0.9), zero_stage=zero_stage))
    for step in range(6):
        split, together = lopsided(step)
        assert two.step(split).metrics["loss"] == pytest.approx(one.step(together).metrics["loss"], abs=1e-5)


def test_muon_moves_hidden_matrices_by_their_rate_and_the_rest_by_adam(one, sparse):
    before, _ = bridge.load(sparse)
    one.begin(spec_of(sparse, train={"language_model.*": 1e-3}, warmup=0.0, schedule="constant", muon=(20.0, 0.9)))
    one.step(lopsided(0)[1])
    after = dict(pair for bucket in one.weights(1 << 20) for pair in bucket)
    steps = {name: after[name] - parameter.detach().numpy() for name, parameter in before.named_parameters()}
    for name, step in steps.items():
        if "language_model" not in name:
            assert not step.any(), name
        elif ".experts." in name or name.endswith("_proj.weight"):
            tall = max(1.0, step.shape[-2] / step.shape[-1]) ** 0.5
            singular = np.linalg.svd(step, compute_uv=False)[..., :3] / (0.02 * tall)
            # five Newton-Schulz iterations bring the singular values of a gradient near 1, but for the smallest
            assert singular.min() > 0.6, name
            assert singular.max() < 1.3, name
        else:
            assert np.abs(step).max() <= 1.01e-3, name
    assert steps["model.language_model.embed_tokens.weight"].any()


@pytest.mark.parametrize(("zero_stage", "muon"), [(2, None), (3, None), (2, (20.0, 0.9)), (0, (20.0, 0.9))])
def test_resume_is_bit_exact(two, sparse, tmp_path, zero_stage, muon):
    spec = spec_of(sparse, zero_stage=zero_stage, loss=Loss("gspo", router_aux=0.1), muon=muon)
    batches = [make_batch(rows(6, True, i, True) + rows(2, False, i, True), 2, 40) for i in range(3)]
    two.begin(spec)
    two.step(batches[0])
    two.save(str(tmp_path / "checkpoint"))
    straight = [two.step(batch).metrics for batch in batches[1:]]
    weights = two.weights(1 << 12)
    two.begin(spec)
    two.restore(str(tmp_path / "checkpoint"))
    assert [two.step(batch).metrics for batch in batches[1:]] == straight
    for part, again in zip(weights, two.weights(1 << 12), strict=True):
        for (name, value), (other, resumed) in zip(part, again, strict=True):
            assert name == other
            assert value.tobytes() == resumed.tobytes(), name


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_zero_3_splits_a_model_before_it_is_on_the_device(two, dense, zero_stage):
    """DeepSpeed by itself moves it whole, and a GPU need not have room for that."""
    two.begin(spec_of(dense, zero_stage=zero_stage))
    parameters = BridgeForConditionalGeneration.from_pretrained(dense).num_parameters()
    assert two.moved_at_once() == (0 if zero_stage == 3 else parameters)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_weights_and_export_are_the_model(two, sparse, tmp_path, zero_stage):
    two.begin(spec_of(sparse, zero_stage=zero_stage))
    two.step(lopsided(0)[0])
    buckets = two.weights(1 << 12)
    weights = dict(pair for bucket in buckets for pair in bucket)
    assert len(buckets) > 3
    two.export(str(tmp_path))
    model, _ = bridge.load(tmp_path)
    named = dict(model.named_parameters())
    assert set(weights) == set(named)
    for name, parameter in named.items():
        assert np.array_equal(weights[name], parameter.detach().numpy()), name


def test_what_greedy_decoding_gives_is_exact(one, dense):
    """Replies of the model's own, word for word, and with another last word."""
    one.begin(spec_of(dense))
    model = bridge.load(dense)[0].eval()
    samples = list[Sample]()
    for row in range(4, 40):
        ids = torch.tensor([[row, 20, row]])
        with torch.no_grad():
            while ids.shape[1] < 8 and IMAGE not in ids:
                ids = torch.cat((ids, model(input_ids=ids).logits[:, -1].argmax(1, keepdim=True)), 1)
        own = tuple(ids[0].tolist())
        if IMAGE in (*own, own[-1] + 1):  # whose picture there is none of
            continue
        samples += [Sample(f"own/{row}", own, 3, ()), Sample(f"other/{row}", (*own[:-1], (own[-1] + 1) % 60), 3, ())]
    assert len(samples) > 8
    found = one.losses(make_batch(samples, 1, 64))
    assert {key: fit.exact for key, fit in found.items()} == {s.key: s.key.startswith("own") for s in samples}
    assert {fit.tokens for fit in found.values()} == {5}


def test_lora_leaves_the_base_alone(one, dense, tmp_path):
    before = (Path(dense) / "model.safetensors").read_bytes()
    info = one.begin(spec_of(dense, lora=(4, 8.0, ("q_proj", "v_proj")), train={"*": 1e-2}))
    assert 0 < info.num_trainable < info.num_parameters / 4
    batch = lopsided(0)[1]
    first = one.step(batch).metrics["loss"]
    one.step(batch)
    weights = dict(pair for bucket in one.weights(1 << 20) for pair in bucket)
    loss = loss_of(one, batch)
    assert loss < first
    one.export(str(tmp_path))
    assert (Path(dense) / "model.safetensors").read_bytes() == before
    assert (tmp_path / "adapter_model.safetensors").is_file()
    base = dict(bridge.load(dense)[0].named_parameters())
    changed = {name for name, value in weights.items() if not np.array_equal(value, base[name].detach().numpy())}
    assert set(weights) == set(base)
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    # the exported adapter opens as the merged model
    one.begin(spec_of(str(tmp_path)))
    assert loss_of(one, batch) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_rows_of_named_tokens_train_alone(one, two, dense, zero_stage, tmp_path):
    tokenizer = bridge.load(dense)[1].tokenizer
    split, together = lopsided(0)
    learned = sorted({i for part in together.micro_batches[0] for s in part for i in s.token_ids[s.prompt_length :]})[
        :3
    ]
    tokens = tuple(tokenizer.convert_ids_to_tokens(learned))
    change = {"train": {"language_model.embed_tokens.*": 1e-2}, "weight_decay": 0.1, "warmup": 0.0}
    one.begin(spec_of(dense, rows_of=tokens, **change))
    two.begin(spec_of(dense, rows_of=tokens, zero_stage=zero_stage, **change))
    for _ in range(2):
        assert two.step(split).metrics["loss"] == pytest.approx(one.step(together).metrics["loss"], abs=1e-5)
    two.export(str(tmp_path))
    before, after = (bridge.load(folder)[0].get_input_embeddings().weight for folder in (dense, tmp_path))
    moved = (before != after).any(1).nonzero().flatten().tolist()
    assert moved == learned
    with pytest.raises(Exception, match=r"does not know 'nosuchtoken' as one token"):
        one.begin(spec_of(dense, rows_of=("nosuchtoken",), **change))
    with pytest.raises(Exception, match=r"says which rows of embeddings train, and no embedding does"):
        one.begin(spec_of(dense, rows_of=tokens, train={"connector.*": 1e-3}))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_what_is_named_trains_whole_beside_adapters(one, two, dense, zero_stage, tmp_path):
    """Two ranks as one, the artifact a whole model, and a reference that stays what it was."""
    lora = {"lora": (4, 8.0, ("q_proj",)), "whole": ("connector.*",), "train": {"*": 1e-2, "connector.*": 1e-3}}
    spec = spec_of(dense, **lora, reference=True, warmup=0.0)
    one.begin(spec)
    two.begin(dataclasses.replace(spec, zero_stage=zero_stage))
    split, together = lopsided(0)
    for _ in range(2):
        assert two.step(split).metrics["loss"] == pytest.approx(one.step(together).metrics["loss"], abs=1e-5)
    loss = loss_of(two, split)
    two.export(str(tmp_path))
    base, made = (dict(bridge.load(folder)[0].named_parameters()) for folder in (dense, tmp_path))
    changed = {bridge.short_name(name) for name, value in made.items() if not torch.equal(value, base[name])}
    assert {name for name in changed if name.startswith("connector.")} == {
        bridge.short_name(name) for name in base if ".connector." in name
    }
    assert {name.split(".")[-2] for name in changed if not name.startswith("connector.")} == {"q_proj"}
    one.begin(spec_of(str(tmp_path)))
    assert loss_of(one, together) == pytest.approx(loss, abs=1e-5)
    with pytest.raises(Exception, match=r"no parameter without an adapter matches 'language_model\.\*q_proj"):
        one.begin(spec_of(dense, **lora | {"whole": ("language_model.*q_proj.weight",)}))


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_loss_that_is_not_finite_stops_every_rank_and_names_the_row(two, sparse, zero_stage):
    two.begin(spec_of(sparse, zero_stage=zero_stage, loss=Loss("ppo")))
    good = rows(4, True, 0, True)
    spoilt = [*good[:3], dataclasses.replace(good[3], advantage=float("nan"), key="spoilt/7")]
    before = two.weights(1 << 30)
    answers = two.all("step", make_batch(spoilt, 2, 64))
    assert [ok for ok, _ in answers] == [False, False]
    assert all("spoilt/7" in message and "step 0" in message for _, message in answers)
    for (name, old), (_, new) in zip(before[0], two.weights(1 << 30)[0], strict=True):
        assert np.array_equal(old, new), name
    assert np.isfinite(two.step(make_batch(good, 2, 64)).metrics["grad_norm"])


def test_gap_is_the_distance_to_the_engine_where_it_is_asked_for(one, sparse, tmp_path):
    one.begin(spec_of(sparse, loss=Loss("ppo", masked_ids=(0, IMAGE), temperature=0.7)))
    batch = make_batch(rows(6, True, 0, True), 1, 64)
    stats = one.step(batch, True)
    assert len(stats.gap) == batch.num_tokens
    assert one.step(batch).gap == []
    model, processor = bridge.load(sparse)
    expected = []
    for sample in (s for part in batch.micro_batches[0] for s in part):
        ids = torch.tensor([sample.token_ids])
        shown = processor.image_inputs([item.open() for item in sample.media])
        with torch.no_grad():
            logits = model(input_ids=ids, **shown).logits[0].float() / 0.7
        logits[:, [0, IMAGE]] = -torch.inf
        found = logits.log_softmax(-1)
        for t, engine in enumerate(sample.logprobs, sample.prompt_length):
            expected.append(abs(float(found[t - 1, sample.token_ids[t]]) - engine))
    assert sorted(stats.gap) == pytest.approx(sorted(expected), abs=1e-5)
    assert stats.tied == [False] * len(stats.gap)
    model.model.language_model.layers[0].mlp.gate.weight.data.zero_()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    one.begin(spec_of(tmp_path, loss=Loss("ppo", masked_ids=(0, IMAGE), temperature=0.7)))
    assert one.step(batch, True).tied == [True] * batch.num_tokens


def foreseen(batch: Batch) -> Batch:
    """The same rows with returns of 1 where they have a picture, 0 elsewhere, and nothing for the policy to learn."""

    def returns(sample: Sample) -> Sample:
        count = sample.num_completion
        worth = float(bool(sample.media))
        return dataclasses.replace(sample, logprobs=(0.0,) * count, advantage=0.0, returns=(worth,) * count)

    parts = tuple(tuple(tuple(map(returns, part)) for part in mine) for mine in batch.micro_batches)
    return dataclasses.replace(batch, micro_batches=parts)


def spoiled(batch: Batch) -> Batch:
    """The same with a return that is not finite."""
    (first, *others), *parts = batch.micro_batches[0]
    first = dataclasses.replace(first, returns=(float("nan"),) * first.num_completion)
    return dataclasses.replace(batch, micro_batches=(((first, *others), *parts), *batch.micro_batches[1:]))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_critic_learns_what_rollouts_are_worth(one, two, sparse, tmp_path, zero_stage):
    changes = {"loss": Loss("ppo"), "critic": 3e-3, "warmup": 0.0, "schedule": "constant"}
    one.begin(spec_of(sparse, zero_stage=0, packed=False, **changes))
    two.begin(spec_of(sparse, zero_stage=zero_stage, **changes))
    split, together = map(foreseen, lopsided(0))

    def values(ranks: Ranks, batch: Batch) -> dict[str, tuple[float, ...]]:
        answers = ranks.all("values", batch)
        assert all(ok for ok, _ in answers), answers
        return {key: found for _, part in answers for key, found in part.items()}

    assert {value for found in values(one, together).values() for value in found} == {0.0}
    before = dict(pair for bucket in one.weights(1 << 20) for pair in bucket)
    for step in range(5):
        expected, found = one.step(together).metrics, two.step(split).metrics
        for name in ("critic.loss", "critic.value", "critic.return", "critic.explained_variance"):
            assert found[name] == pytest.approx(expected[name], abs=1e-4), (step, name)
    ours, theirs = values(one, together), values(two, split)
    assert ours.keys() == theirs.keys() == {sample.key for sample in together.micro_batches[0][0]}
    for key, row in ours.items():
        assert theirs[key] == pytest.approx(row, abs=2e-3)
    two.save(tmp_path / "checkpoint")
    kept, following = values(two, split), two.step(split).metrics
    for _ in range(25):
        metrics = two.step(split).metrics
    assert metrics["critic.explained_variance"] > 0.9
    assert metrics["grad_norm"] == 0.0  # an advantage of 0 teaches the policy nothing
    after = dict(pair for bucket in two.weights(1 << 20) for pair in bucket)
    assert all(np.array_equal(before[name], value) for name, value in after.items())
    two.begin(spec_of(sparse, zero_stage=zero_stage, **changes))
    two.restore(tmp_path / "checkpoint")
    assert values(two, split) == kept
    assert two.step(split).metrics == following
    with pytest.raises(AssertionError, match=r"FloatingPointError: .*the critic of .*lower critic\.lr"):
        two.step(spoiled(split))


class Asked:
    """Rank processes as the loop sees a trainer."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    async def logprobs(self, batch: Batch) -> dict[str, Any]:
        return self._each("logprobs", batch)

    async def rewards(self, batch: Batch) -> dict[str, float]:
        return self._each("rewards", batch)

    def _each(self, method: str, batch: Batch) -> dict[str, Any]:
        answers = self.ranks.all(method, batch)
        assert all(ok for ok, _ in answers), answers
        return {key: value for _, part in answers for key, value in part.items()}


def pairs(step: int) -> list[Sample]:
    """Three pairs, two of them about a picture."""
    made = []
    for index, sample in enumerate(rows(2, True, step * 10) + rows(1, False, step * 10)):
        asked, reply = sample.token_ids[: sample.prompt_length], sample.token_ids[sample.prompt_length :]
        worse = (*asked, *reversed(reply), 4 + index)
        made.append(dataclasses.replace(sample, key=f"{sample.key}/chosen"))
        made.append(dataclasses.replace(sample, key=f"{sample.key}/rejected", token_ids=worse))
    return made


@pytest.mark.parametrize(("lora", "zero_stage"), [(None, 2), (None, 3), ((4, 8.0, ("q_proj", "v_proj")), 2)])
def test_preferences_are_learned_alike_on_two_ranks_and_one(one, two, dense, lora, zero_stage):
    stage = Preference(kind="preference", name="p", data={"rows": 1.0}, steps=8, batch_size=3, beta=0.5)
    spec = spec_of(dense, loss=Loss("reinforce", normalise="row"), reference=True, lora=lora, warmup=0.0)
    one.begin(dataclasses.replace(spec, train={"*": 1e-2}))
    two.begin(dataclasses.replace(spec, train={"*": 1e-2}, zero_stage=zero_stage))
    losses = []
    for step in range(8):
        found = []
        for ranks, number in ((one, 1), (two, 2)):
            batch = make_batch(pairs(step % 2), number, 64, step, packed=True)
            weighed, metrics = asyncio.run(weigh(stage, Asked(ranks), batch))
            ranks.step(weighed)
            found.append(metrics)
        assert found[1] == pytest.approx(found[0], abs=2e-4), step
        losses.append(found[0]["loss"])
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)  # the policy is its reference
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("model", "lora", "zero_stage", "scalar"),
    [
        ("sparse", None, 0, Scalar()),
        ("untied", None, 3, Scalar()),
        ("sparse", None, 3, Scalar("mean")),
        ("untied", (4, 8.0, ("q_proj", "v_proj")), 2, Scalar()),
        ("sparse", None, 3, Scalar("likelihood", 0.5)),
        ("untied", (4, 8.0, ("q_proj", "v_proj")), 2, Scalar("likelihood", 0.5)),
    ],
)
def test_a_reward_model_is_learned_alike_on_two_ranks_and_one_and_scores_as_it_did(
    one, two, request, tmp_path, model, lora, zero_stage, scalar
):
    from actors.scorer import Scorer, ScorerSettings

    begun = request.getfixturevalue(model)
    center = 0.01 if scalar.headed else 0.0  # a likelihood is far from 0
    stage = RewardModel(kind="reward_model", name="r", data={"rows": 1.0}, steps=8, batch_size=3, center=center)
    rates = {"*": 1e-2} | ({"lm_head.*": 3e-2} if scalar.headed else {})
    loss = Loss("reinforce", normalise="row", router_aux=0.01 if model == "sparse" else 0.0)
    more: dict[str, Any] = {"lora": lora, "whole": ("lm_head.*",) if lora and scalar.headed else ()}
    spec = spec_of(begun, loss=loss, train=rates, warmup=0.0, scalar=scalar, **more)
    one.begin(dataclasses.replace(spec, zero_stage=0 if zero_stage == 0 else 2))
    two.begin(dataclasses.replace(spec, zero_stage=zero_stage))
    losses = []
    for step in range(8):
        found = []
        for ranks, number in ((one, 1), (two, 2)):
            batch = make_batch(pairs(step % 2), number, 64, step, packed=True)
            weighed, metrics = asyncio.run(reward_model.weigh(stage, Asked(ranks), batch))
            moved = ranks.step(weighed).metrics
            assert math.isfinite(moved["grad_norm"])
            found.append(metrics)
        assert found[1] == pytest.approx(found[0], abs=1e-3), step
        losses.append(found[0]["loss"])
    if scalar.headed:
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # it begins by saying 0
    assert losses[-2] < (0.9 if lora and not scalar.headed else 0.5) * losses[0]  # of the same pairs

    two.export(tmp_path / "artifact")
    last = make_batch(pairs(0), 2, 64, packed=True)
    said = asyncio.run(Asked(two).rewards(last))
    samples = [sample for mine in last.micro_batches for part in mine for sample in part]
    scorer = Scorer(str(tmp_path / "artifact"), ScorerSettings("float32", 64, True, 1, "cpu"))
    for sample in samples:
        asked, reply = sample.token_ids[: sample.prompt_length], sample.token_ids[sample.prompt_length :]
        prompt = Prompt(sample.key, "s", "?", (*([IMAGE] if sample.media else []), *asked[4 * len(sample.media) :]))
        prompt = dataclasses.replace(prompt, media=sample.media)
        ((score,),) = scorer.score([Group(prompt, asked, (Rollout(reply, (), (), "", "stop"),))])
        assert score.value == pytest.approx(said[sample.key], abs=1e-5)
    # a language head that it was not asked by is the one it began with, and training goes on from the artifact
    before, after = (bridge.load(folder)[0] for folder in (begun, tmp_path / "artifact"))
    if model == "untied" and (scalar.headed or lora):
        assert torch.equal(before.lm_head.weight, after.lm_head.weight)
    one.begin(dataclasses.replace(spec, model=str(tmp_path / "artifact"), lora=None, whole=()))
    again = asyncio.run(Asked(one).rewards(make_batch(pairs(0), 1, 64, packed=True)))
    assert again == pytest.approx(said, abs=1e-5)


def test_only_a_reward_model_is_asked_for_rewards(one, dense):
    one.begin(spec_of(dense))
    ok, message = one.all("rewards", make_batch(pairs(0), 1, 64, packed=True))[0]
    assert not ok
    assert "this stage trains no reward model" in message


@pytest.mark.parametrize("lora", [None, (4, 8.0, ("q_proj", "v_proj"))])
def test_the_reference_stays_while_the_policy_moves(one, sparse, lora):
    loss = Loss("ppo", masked_ids=(0, IMAGE), temperature=0.7, kl=("k3", 0.5))
    one.begin(spec_of(sparse, loss=loss, reference=True, lora=lora, train={"*": 1e-2}))
    batch = make_batch(rows(6, True, 0, True) + rows(2, False, 0, True), 1, 64)
    before = one.divergences(batch, "k1")
    moved = [one.step(batch).metrics["kl_reference"] for _ in range(3)]
    assert moved[0] == pytest.approx(0, abs=1e-9)  # it is where it starts from
    assert min(moved[1:]) > 1e-6
    # of the rows as they were sampled: the policy has no part in it
    assert one.divergences(batch, "k1") == pytest.approx(before, abs=1e-6)
    model, processor = bridge.load(sparse)
    sample = batch.micro_batches[0][0][0]
    shown = processor.image_inputs([item.open() for item in sample.media]) if sample.media else {}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sample.token_ids]), **shown).logits[0].float() / 0.7
    logits[:, [0, IMAGE]] = -torch.inf
    found = logits.log_softmax(-1)
    ours = [float(found[t - 1, sample.token_ids[t]]) for t in range(sample.prompt_length, len(sample.token_ids))]
    assert before[sample.key] == pytest.approx(sum(sample.logprobs) - sum(ours), abs=1e-4)


def test_globs_choose_what_trains(one, dense):
    info = one.begin(spec_of(dense, train={"connector.*": 1e-2}, reset=("connector.*",)))
    before = dict(pair for bucket in one.weights(1 << 30) for pair in bucket)
    one.step(lopsided(0)[1])
    after = dict(pair for bucket in one.weights(1 << 30) for pair in bucket)
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in after if "connector" in name}
    assert info.num_trainable == sum(after[name].size for name in changed)
    ok, message = one.all("begin", spec_of(dense, train={"conector.*": 1e-2}))[0]
    assert not ok
    assert "connector.*" in message


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
