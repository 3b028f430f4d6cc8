"""The engine that is transformers' own forward: it samples, loads and is probed in this process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.huggingface import HuggingFaceWorker
from actors.rollout import EngineSettings
from actors.weights import CoverageError
from rlhf.agreement import compare, make_probes, probe_model
from rlhf.batching import BridgeVisual
from rlhf.bridge import load
from rlhf.models import masked_ids
from rlhf.types import Publication, Rollout, Sampling
from tests.bridges.parity import difference, prompts
from tests.unit.systems import SYSTEMS, awake
from tests.unit.test_bridge_build import tiny
from tests.unit.test_packing import media

DEADLINE = 60.0
LONG = Sampling(num=2, temperature=0.8, max_tokens=40, seed=5)


@pytest.fixture(scope="module", params=["llava_uhd", "flamingo"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, Any]]:
    """A worker, the model it serves as the trainer opens it, and its processor."""
    folder = tmp_path_factory.mktemp("served")
    model, processor = tiny(**SYSTEMS[request.param])
    awake(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    settings = EngineSettings(max_model_len=256, masked_tokens=masked_ids(processor), deadline=DEADLINE)
    worker = HuggingFaceWorker(str(folder), settings)
    yield worker, load(folder)[0].eval(), processor
    worker.close()


def published(model: Any, version: int) -> tuple[Publication, list[Any]]:
    named = [(name, value.detach().numpy().copy()) for name, value in model.named_parameters()]
    return Publication(version, (), {name: value.shape for name, value in named}), [named[:5], named[5:]]


def tokens(found: list[Any]) -> list[tuple[int, ...]]:
    return [rollout.token_ids for group in found for rollout in group.rollouts]


def test_sampled_logprobs_are_the_trainers(served: tuple[Any, Any, Any]) -> None:
    worker, model, processor = served
    asked = prompts(processor.image_token_id)
    groups = worker.generate(asked, Sampling(num=2, max_tokens=12, seed=3))
    assert difference(model, processor, groups, masked_ids(processor)) <= 1e-5
    for group, prompt in zip(groups, asked, strict=True):
        assert list(group.prompt_ids) == processor.expand(prompt.token_ids, [one.size for one in prompt.media])
        assert not {token for rollout in group.rollouts for token in rollout.token_ids} & set(masked_ids(processor))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.model.connector.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert difference(other, processor, groups, masked_ids(processor)) > 1e-3  # the control


def test_it_refuses_what_it_cannot_hold_replies_to(served: tuple[Any, Any, Any]) -> None:
    worker, _, processor = served
    with pytest.raises(ValueError, match="leave `constrain` out"):
        worker.generate(prompts(processor.image_token_id), Sampling(regex="yes|no"))


def test_the_same_request_gives_the_same_tokens_alone_or_together(served: tuple[Any, Any, Any]) -> None:
    worker, _, processor = served
    asked = prompts(processor.image_token_id)
    together = worker.generate(asked, LONG)
    assert tokens(together) == [ids for prompt in asked for ids in tokens(worker.generate([prompt], LONG))]
    assert len(set(tokens(together)[:2])) == 2  # a group's replies are drawn apart
    greedy = Sampling(num=2, temperature=0.0, max_tokens=8, seed=1)
    first, second = tokens(worker.generate(asked[:1], greedy))
    assert first == second
    anew = [worker.generate(asked, Sampling(num=1, max_tokens=16, seed=None)) for _ in range(2)]
    assert tokens(anew[0]) != tokens(anew[1])


def test_temperature_draws_by_the_models_probabilities(served: tuple[Any, Any, Any]) -> None:
    """Of 2,000 first tokens, the share of each is its probability, to four standard errors."""
    worker, model, processor = served
    (prompt,) = prompts(processor.image_token_id)[2:3]
    draws = 2000
    found = worker.generate([prompt], Sampling(num=draws, temperature=0.5, max_tokens=1, seed=11))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1].float() / 0.5
    logits[list(masked_ids(processor))] = float("-inf")
    expected = logits.softmax(-1)
    counts = torch.bincount(torch.tensor([ids[0] for ids in tokens(found)]), minlength=len(expected)) / draws
    assert ((counts - expected).abs() <= 4 * (expected * (1 - expected) / draws).sqrt() + 2 / draws).all()


def test_every_token_is_of_the_weights_that_sampled_it(served: tuple[Any, Any, Any]) -> None:
    worker, model, processor = served
    asked, before = prompts(processor.image_token_id)[:3], worker.heartbeat()
    first = before.version
    calm = worker.generate(asked, LONG)
    with ThreadPoolExecutor(1) as pool:
        worker.pause()
        running = pool.submit(worker.generate, asked, LONG)
        steps = worker._do(lambda: worker._steps)
        worker.resume()
        limit = torch.tensor(0)
        while worker.heartbeat().steps < steps + 5 and not running.done():
            limit += 1
        start = {name: value.detach().clone() for name, value in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        worker.load(*published(model, first + 1))
        groups = running.result(timeout=DEADLINE)
    versions = {version for group in groups for rollout in group.rollouts for version in rollout.versions}
    assert versions == {first, first + 1}
    old = lambda rollout: rollout.versions.count(first)  # noqa: E731
    for quiet, disturbed in zip(calm, groups, strict=True):
        for one, other in zip(quiet.rollouts, disturbed.rollouts, strict=True):
            assert other.token_ids[: old(other)] == one.token_ids[: old(other)]
    late = [
        type(group)(group.prompt, (*group.prompt_ids, *r.token_ids[: old(r)]), (tail(r, old(r)),))
        for group in groups
        for r in group.rollouts
        if old(r) < len(r.token_ids)
    ]
    assert late
    assert difference(model, processor, late, masked_ids(processor), temperature=0.8) <= 1e-5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name])
    worker.load(*published(model, first + 2))


def tail(rollout: Rollout, start: int) -> Rollout:
    return Rollout(
        rollout.token_ids[start:], rollout.logprobs[start:], rollout.versions[start:], rollout.text, rollout.finish
    )


def test_probes_agree_until_a_weight_is_broken(served: tuple[Any, Any, Any]) -> None:
    worker, model, processor = served
    shown = [media(0, 40, 24), media(1, 9, 30)]
    probes = make_probes(200, processor.image_token_id, shown, num=4, length=12, forbidden=masked_ids(processor))
    scored = worker.score(probes)
    verdict = compare(probe_model(model, processor, BridgeVisual(processor), probes), scored)
    assert verdict.ok, verdict.message
    publication, buckets = published(model, worker.heartbeat().version + 1)
    buckets[1][-1] = (buckets[1][-1][0], buckets[1][-1][1] + 0.5)
    worker.load(publication, buckets)
    assert not compare(probe_model(model, processor, BridgeVisual(processor), probes), worker.score(probes)).ok
    prints = worker.fingerprints(probes[:1]).prints
    assert any(name.startswith("vision") for name in prints)
    worker.load(*published(model, publication.version + 1))


def test_what_is_aborted_comes_back_as_far_as_it_is(served: tuple[Any, Any, Any]) -> None:
    worker, _, processor = served
    asked = prompts(processor.image_token_id)[:2]
    with ThreadPoolExecutor(1) as pool:
        worker.pause()
        running = pool.submit(worker.generate, asked, LONG)
        while not worker.heartbeat().waiting and not running.done():
            pass
        worker.abort()
        found = running.result(timeout=DEADLINE)
        worker.resume()
    assert {rollout.finish for group in found for rollout in group.rollouts} == {"abort"}
    assert worker.heartbeat().waiting == worker.heartbeat().running == 0


def test_lengths_have_ends(served: tuple[Any, Any, Any]) -> None:
    worker, _, processor = served
    (prompt,) = prompts(processor.image_token_id)[2:3]
    (group,) = worker.generate([prompt], Sampling(num=8, max_tokens=300, seed=1))
    for rollout in group.rollouts:
        ended = rollout.finish == "stop"
        assert ended == (rollout.token_ids[-1] in worker._stop_ids)
        assert ended or len(prompt.token_ids) + len(rollout.token_ids) == 256
    long = type(prompt)("long", "toy", "?", (30,) * 256, ())
    with pytest.raises(ValueError, match=r"prompt 'long': 256 tokens leave no room for a reply"):
        worker.generate([long], LONG)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda names, parts: parts[1].pop(), "are not what was published: missing"),
        (
            lambda names, parts: parts[0].append(("more", parts[0][0][1])),
            "more .*the engine's model has no such parameter",
        ),
        (lambda names, parts: names.pop(parts[1].pop()[0]), "leave parameters of the engine's model unfilled"),
    ],
)
def test_weights_that_do_not_cover_the_model_end_the_engine(tmp_path: Path, spoil: Any, says: str) -> None:
    model, processor = tiny(**SYSTEMS["llava"])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    worker = HuggingFaceWorker(str(tmp_path), EngineSettings(max_model_len=256, deadline=DEADLINE))
    try:
        publication, buckets = published(model, 1)
        names = dict(publication.names)
        spoil(names, buckets)
        with pytest.raises(CoverageError, match=says):
            worker.load(Publication(1, (), names), buckets)
        with pytest.raises(Exception, match="ended with CoverageError"):
            worker.generate(prompts(processor.image_token_id), LONG)
        assert "CoverageError" in str(worker.heartbeat().alive_error)
    finally:
        worker.close()
