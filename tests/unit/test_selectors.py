"""Which rows a recipe's selectors leave, and how sources are mixed."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from rlhf.batching import BridgeVisual, collate
from rlhf.data.rows import DataError, Rows, read
from rlhf.data.selectors import SELECTORS, select
from rlhf.data.selectors.concepts import phrases
from rlhf.data.sources import open_source
from rlhf.data.stream import Alike, Stream, shares
from rlhf.offline import weighed
from rlhf.recipe import Source
from rlhf.types import Sample
from tests.unit.test_bridge_build import tiny

DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"


def rows(folder: Path, answers: list[str], **columns: list[object]) -> Rows:
    """One row for each answer, with these columns."""
    made = [
        {
            "messages": [{"role": "user", "content": f"row {i}"}, {"role": "assistant", "content": answer}],
            **{name: values[i] for name, values in columns.items()},
        }
        for i, answer in enumerate(answers)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return read(path)


def answers(found: Rows) -> list[str]:
    return [row["messages"][-1]["content"] for row in found]


def chosen(given: Rows, **table: object) -> list[str]:
    return answers(select(given, [table], seed=0))


def test_a_cap_keeps_at_most_so_many_of_each(tmp_path: Path) -> None:
    given = rows(tmp_path, [str(i) for i in range(100)], part=["a"] * 70 + ["b"] * 25 + ["c"] * 5)
    kept = chosen(given, type="cap", rows=20)
    assert len(set(kept)) == 20
    assert kept == sorted(kept, key=int)
    parts = Counter(row["part"] for row in select(given, [{"type": "cap", "rows": 20, "by": "part"}], 0))
    assert parts == {"a": 20, "b": 20, "c": 5}
    assert chosen(given, type="cap", rows=100) == answers(given)


def test_the_same_seed_chooses_the_same_rows(tmp_path: Path) -> None:
    given = rows(tmp_path, [str(i) for i in range(100)])
    tables = [{"type": "fraction", "share": 0.5}, {"type": "cap", "rows": 10}]
    first, again, other = (answers(select(given, tables, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 10


def test_fractions_and_numbers_of_rows(tmp_path: Path) -> None:
    given = rows(tmp_path, [str(i) for i in range(10)])
    assert len(set(chosen(given, type="fraction", share=0.3))) == 3
    assert Counter(Counter(chosen(given, type="resample", rows=23)).values()) == {2: 7, 3: 3}
    assert len(set(chosen(given, type="resample", rows=4))) == 4


@pytest.mark.parametrize("share", [0.5, 0.25, 1.0])
def test_yes_and_no_are_balanced_and_their_number_kept(tmp_path: Path, share: float) -> None:
    said = ["Yes, it is."] * 30 + ["no"] * 9 + ["yesterday", "nothing"] * 3 + ["**No**"]
    kept = chosen(rows(tmp_path, said), type="yes_no", share=share)
    yes, no = (sum(answer in words for answer in kept) for words in (["Yes, it is."], ["no", "**No**"]))
    assert (yes, no) == (round(40 * share), 40 - round(40 * share))
    assert sorted(set(kept) & {"yesterday", "nothing"}) == ["nothing", "yesterday"]
    assert len(kept) == len(said)


def test_levels_are_as_many_of_each(tmp_path: Path) -> None:
    """SAIL-Caption2's judges learn from uniform scores, of which most captions have high ones."""
    scores = [5] * 60 + [4] * 25 + [3] * 10 + [1] * 5
    given = rows(tmp_path, [str(i) for i in range(100)], score=scores)
    kept = select(given, [{"type": "levels", "column": "score"}], seed=0)
    assert Counter(row["score"] for row in kept) == {1: 25, 3: 25, 4: 25, 5: 25}
    assert len(set(answers(kept))) == 25 + 25 + 10 + 5  # what is rare is all there, the rest drawn without repeating
    with pytest.raises(DataError, match="row 0: no column 'stars'"):
        chosen(given, type="levels", column="stars")


def test_balancing_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no answer begins with 'no'"):
        chosen(rows(tmp_path, ["yes", "maybe"]), type="yes_no")


def test_the_core_holds_most_of_the_wanted_words(tmp_path: Path) -> None:
    said = ["a red car", "the sky", "red and blue cars", "a red bus by a tree", "blue", "a rare okapi", "reddish"]
    given = rows(tmp_path, said)
    words = {"colour": ["red", "blue"], "things": ["car", "bus", "tree", "okapi"]}
    assert chosen(given, type="concepts", rows=3, keywords=words) == [
        "a red car",
        "red and blue cars",
        "a red bus by a tree",
    ]
    # words that few rows hold do not count: then colours alone do, and of equals the first
    rare = chosen(given, type="concepts", rows=2, keywords=words, least=2)
    assert rare == ["a red car", "red and blue cars"]


def test_a_core_covers_more_concepts_than_chance(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = [f"thing{i}" for i in range(30)]
    said = [" ".join(draw.sample(words, draw.choice([0, 0, 1, 2, 6]))) for _ in range(300)]
    given = rows(tmp_path, said)
    core = chosen(given, type="concepts", rows=20, keywords={"things": words})
    chance = [select(given, [{"type": "cap", "rows": 20}], seed) for seed in range(5)]
    assert all(len(set(" ".join(core).split())) >= len(set(" ".join(answers(one)).split())) for one in chance)


def test_captions_of_frequent_phrases_are_capped_and_rare_ones_skipped(tmp_path: Path) -> None:
    said = ["a red car on the road"] * 50 + ["the old boat"] * 4 + ["a lone okapi"] * 2
    kept = Counter(chosen(rows(tmp_path, said), type="noun_phrases", cap=10, least=3))
    assert kept["the old boat"] == 4
    assert kept["a lone okapi"] == 0
    assert 10 <= kept["a red car on the road"] <= 20  # ten for "red car", ten for "road"
    named = rows(tmp_path, said, nouns=[["car"]] * 50 + [["boat"]] * 4 + [["okapi"]] * 2)
    kept = Counter(chosen(named, type="noun_phrases", cap=10, least=1, column="nouns"))
    assert kept == {"a red car on the road": 10, "the old boat": 4, "a lone okapi": 2}


def test_noun_phrases_are_runs_of_words() -> None:
    assert phrases("A man's red car, and the tall palm-tree in Rome!") == {"man's red car", "tall palm-tree", "rome"}


def test_a_source_selects_and_says_what_is_wrong(tmp_path: Path) -> None:
    given = rows(tmp_path, [str(i) for i in range(10)])
    source = Source(path=given.origin, select=[{"type": "cap", "rows": 3}])
    found = open_source("captions", source, 0, tmp_path)
    assert len(found) == 3
    assert found.digest != given.digest
    with pytest.raises(ValueError, match=r"unknown selector type 'cep' \(did you mean 'cap'\?\)"):
        open_source("captions", Source(path=given.origin, select=[{"type": "cep"}]), 0, tmp_path)
    with pytest.raises(DataError, match=r"`select` number 2 \(noun_phrases\) leaves no row"):
        select(given, [{"type": "cap", "rows": 3}, {"type": "noun_phrases", "least": 99}], 0)


def test_mistakes_in_selectors_are_named(tmp_path: Path) -> None:
    given = rows(tmp_path, ["a", "b"], part=["x", "y"])
    with pytest.raises(DataError, match="no row has the column 'prat'"):
        chosen(given, type="cap", rows=1, by="prat")
    with pytest.raises(ValueError, match="for each concept a list of words"):
        SELECTORS.make({"type": "concepts", "rows": 1, "keywords": {"animal": "dog"}})
    with pytest.raises(DataError, match="has no rows; remove it"):
        Alike({"a": given, "b": given.select([])}, {"a": 1, "b": 1}, 0)


def test_an_error_names_the_row_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good, bad = ({"messages": [{"role": role, "content": "a"}]} for role in ("user", "nobody"))
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, good, bad)))
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: unknown role 'nobody'"):
        read(path).select([2, 0])[0]


# T20


def test_shares_of_sources() -> None:
    sizes = {"a": 400, "b": 100}
    assert shares({"a": 1.0, "b": 1.0}, sizes, "weights") == {"a": 1, "b": 1}
    assert shares({"a": 1.0, "b": 1.0}, sizes, "size") == {"a": 400, "b": 100}
    assert shares({"a": 1.0, "b": 2.0}, sizes, "sqrt_size") == {"a": 20, "b": 20}
    assert shares({"a": 1.0, "b": 9.0}, sizes, "loss") == {"a": 1, "b": 1}


def test_roots_of_sizes_are_what_is_drawn(tmp_path: Path) -> None:
    parts = {}
    for name, size in (("small", 4), ("middle", 25), ("large", 81)):
        (tmp_path / name).mkdir()
        parts[name] = rows(tmp_path / name, ["a"] * size)
    weights = shares(dict.fromkeys(parts, 1.0), {name: len(part) for name, part in parts.items()}, "sqrt_size")
    drawn = Counter(name for name, _, _ in Stream(parts, weights, 0).take(1600))
    assert all(abs(drawn[name] - 1600 * root / 16) <= 3 for name, root in (("small", 2), ("middle", 5), ("large", 9)))


def test_a_batch_of_one_modality(tmp_path: Path) -> None:
    parts = {}
    for name, pictures in (("mixed", [[DOT], []] * 10), ("text", [[]] * 20)):
        (tmp_path / name).mkdir()
        parts[name] = rows(tmp_path / name, [str(i) for i in range(20)], images=pictures)
    weights = {"mixed": 3.0, "text": 1.0}
    stream = Alike(parts, weights, seed=1)
    batches = [stream.take(4) for _ in range(40)]
    seen = Counter()
    for batch in batches:
        kinds = {bool(row["images"]) for _, _, row in batch}
        assert len(kinds) == 1
        seen.update((name, *kinds) for name, _, _ in batch)
        assert all(row["messages"][-1]["content"] == str(index) for _, index, row in batch)
    assert {key: round(count / 160, 2) for key, count in seen.items()} == {
        ("mixed", True): 0.38,
        ("mixed", False): 0.38,
        ("text", False): 0.25,
    }
    again = Alike(parts, weights, seed=1)
    head = [again.take(4) for _ in range(7)]
    resumed = Alike(parts, weights, seed=1)
    resumed.restore(json.loads(json.dumps(again.state())))
    assert head + [resumed.take(4) for _ in range(33)] == batches


@pytest.mark.parametrize("normalise", ["token", "row"])
def test_a_step_of_weighed_losses_is_the_sum_of_the_sources_steps(normalise: str) -> None:
    """Flamingo: the gradient is Σ λ_m ∇ mean loss of source m."""
    model, processor = tiny()
    draw = random.Random(0)
    parts = {
        name: [
            Sample(f"{name}/{i}", tuple(draw.randrange(5, 200) for _ in range(4 + length)), 4)
            for i, length in enumerate(lengths)
        ]
        for name, lengths in (("a", [3, 9]), ("b", [1, 2]), ("c", [12, 5]))
    }
    weights = {"a": 1.0, "b": 0.2, "c": 0.03}

    def gradient(samples: list[Sample], total: float) -> dict[str, torch.Tensor]:
        model.zero_grad()
        tensors = collate(samples, BridgeVisual(processor))
        logits = model(**tensors.model_inputs()).logits[:, :-1].log_softmax(-1)
        losses = -logits.gather(-1, tensors.input_ids[:, 1:, None])[..., 0]
        ((losses * tensors.mask).sum() / total).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def size(samples: list[Sample]) -> int:
        return sum(s.num_completion for s in samples) if normalise == "token" else len(samples)

    flat = [(name, sample) for place in range(2) for name in parts for sample in [parts[name][place]]]
    together = weighed([sample for _, sample in flat], [name for name, _ in flat], weights, normalise)
    found = gradient(together, size([sample for _, sample in flat]))
    alone = {name: gradient(samples, size(samples)) for name, samples in parts.items()}
    for name, value in found.items():
        expected = sum(weights[source] * alone[source][name] for source in parts)
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-4)
    plain = gradient([sample for _, sample in flat], size([sample for _, sample in flat]))  # the control
    assert max((plain[name] - value).abs().max() for name, value in found.items()) > 1e-3


def test_every_selector_is_found() -> None:
    assert SELECTORS.types() == ("cap", "concepts", "fraction", "levels", "noun_phrases", "resample", "yes_no")
