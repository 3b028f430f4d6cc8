"""Every row once, no micro-batch over the budget, every rank in step; tensors as a reader would fill them."""

from __future__ import annotations

import io
import itertools
import random
from dataclasses import replace

import pytest
import torch
from PIL import Image

from rlhf.batching import APART, CALL_COST, PADDED, Cached, collate, concatenate, make_batch
from rlhf.types import Media, Sample


def rows(num: int, seed: int = 0) -> list[Sample]:
    pick = random.Random(seed)
    return [
        Sample(f"row/{i}", tuple(pick.randrange(1, 50) for _ in range(pick.randrange(4, 40))), prompt_length=2)
        for i in range(num)
    ]


def keys(batch) -> list[str]:
    return [sample.key for mine in batch.micro_batches for part in mine for sample in part]


@pytest.mark.parametrize(("num", "ranks"), [(1, 1), (40, 2), (41, 3), (64, 4), (3, 4)])
def test_batch_holds_every_row_once_within_the_budget(num, ranks):
    samples = rows(num)
    batch = make_batch(samples, ranks, 100)
    assert sorted(keys(batch)) == sorted(s.key for s in samples)
    assert len(batch.micro_batches) == ranks
    assert len({len(mine) for mine in batch.micro_batches}) == 1
    for part in (part for mine in batch.micro_batches for part in mine if part):
        assert len(part) * max(len(s.token_ids) for s in part) <= 100
    assert batch.num_tokens == sum(len(s.token_ids) - 2 for s in samples)
    assert batch.num_rows == num


def test_the_cut_is_the_cheapest_one():
    """Against every way of cutting eight rows, sorted longest first, into runs."""
    budget = 120
    for seed in range(20):
        samples = rows(8, seed)
        lengths = sorted((len(sample.token_ids) for sample in samples), reverse=True)
        costs = []
        for cuts in itertools.product([False, True], repeat=7):
            ends = [*(place + 1 for place, cut in enumerate(cuts) if cut), 8]
            padded = [(end - start) * lengths[start] for start, end in itertools.pairwise([0, *ends])]
            if max(padded) <= budget:
                costs.append(sum(padded) + CALL_COST * budget * len(padded))
        parts = make_batch(samples, 1, budget).micro_batches[0]
        found = sum(len(part) * len(part[0].token_ids) + CALL_COST * budget for part in parts)
        assert found == pytest.approx(min(costs))


def tokens(part) -> int:
    """A prompt that several of them share once."""
    prompts = {sample.token_ids[: sample.prompt_length] for sample in part}
    return sum(map(len, prompts)) + sum(sample.num_completion for sample in part)


def test_replies_to_one_prompt_stay_together_as_far_as_the_budget_goes():
    prompts = [tuple(range(length)) for length in (20, 30, 10)]
    samples = [
        Sample(f"{place}.{reply}", (*prompt, *range(reply + 1)), len(prompt))
        for reply in range(8)
        for place, prompt in enumerate(prompts)
    ]
    batch = make_batch(samples, 2, 80, packed=True)
    whole = [part for mine in batch.micro_batches for part in mine if part]
    assert sorted(keys(batch)) == sorted(s.key for s in samples)
    assert sum(map(tokens, whole)) == 20 + 30 + 10 + 3 * 36
    tight = make_batch(samples, 1, 40, packed=True)
    assert sorted(keys(tight)) == sorted(s.key for s in samples)
    assert max(tokens(part) for part in tight.micro_batches[0]) <= 40


def test_attention_bounds_how_many_replies_to_a_long_prompt_stay_together():
    """Apart, each of them has its prompt, which the tokens of the micro-batch count once."""
    samples = [Sample(f"{reply}", (*range(100), reply), 100) for reply in range(40)]
    batch = make_batch(samples, 1, 200, packed=True)
    assert sorted(keys(batch)) == sorted(s.key for s in samples)
    assert [len(part) for part in batch.micro_batches[0]] == [7] * 5 + [5]
    assert 7 * 101 <= APART * 200 < 8 * 101


def test_a_long_row_takes_few_short_ones_along():
    """Losses see rows × longest, which the tokens alone do not bound."""
    samples = [Sample("long", (1,) * 100, 1), *(Sample(f"short/{i}", (2 + i, 3), 1) for i in range(40))]
    batch = make_batch(samples, 1, 150, packed=True)
    assert sorted(keys(batch)) == sorted(s.key for s in samples)
    assert [len(part) for part in batch.micro_batches[0]] == [PADDED * 150 // 100, 41 - PADDED * 150 // 100]


def test_no_rank_holds_a_family_of_several_shares():
    samples = [Sample(f"{i}", (1, 2, 3, 10 + i), 3) for i in range(16)]
    batch = make_batch(samples, 4, 1000, packed=True)
    assert [sum(map(len, mine)) for mine in batch.micro_batches] == [4] * 4


@pytest.mark.parametrize("ranks", [1, 3])
def test_packed_micro_batches_hold_every_row_and_are_full(ranks):
    for seed in range(10):
        samples = rows(60, seed)
        batch = make_batch(samples, ranks, 120, packed=True)
        assert sorted(keys(batch)) == sorted(s.key for s in samples)
        assert len({len(mine) for mine in batch.micro_batches}) == 1
        for mine in batch.micro_batches:
            loads = [tokens(part) for part in mine]
            assert max(loads) <= 120
            # no two of them would have fitted into one
            assert all(a + b > 120 for a, b in itertools.combinations([load for load in loads if load], 2))


def test_ranks_are_balanced_by_tokens():
    batch = make_batch(rows(200), 4, 400)
    loads = [sum(len(s.token_ids) for part in mine for s in part) for mine in batch.micro_batches]
    assert max(loads) - min(loads) <= 40


IMAGE = 99


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_get_like_shares_of_tokens_and_of_visual_tokens(ranks: int, packed: bool):
    """Long rows of text beside short ones that are nearly all picture: by tokens alone some ranks would get few."""
    for seed in range(10):
        pick = random.Random(seed)
        sizes = [pick.choice([4, 8, 16]) for _ in range(60)]
        pictures = [Sample(f"image/{i}", (IMAGE,) * size + (i, 2, 3), size + 1) for i, size in enumerate(sizes)]
        samples = [*pictures, *(replace(row, token_ids=row.token_ids * 3) for row in rows(60, seed))]
        batch = make_batch(samples, ranks, 400, packed=packed, image_token=IMAGE)
        assert sorted(keys(batch)) == sorted(s.key for s in samples)
        mine = [[s for part in parts for s in part] for parts in batch.micro_batches]
        visual = [sum(s.token_ids.count(IMAGE) for s in samples) for samples in mine]
        assert max(visual) - min(visual) <= 16
        every = [sum(len(s.token_ids) for s in samples) for samples in mine]
        assert max(every) - min(every) <= 120


@pytest.mark.parametrize("pictures", [1, 3])
def test_few_pictures_do_not_keep_text_from_a_rank(pictures: int):
    some = [Sample(f"image/{i}", (IMAGE,) * 16 + (i, 2, 3), 17) for i in range(pictures)]
    batch = make_batch([*some, *rows(100)], 2, 400, image_token=IMAGE)
    loads = [sum(len(s.token_ids) for part in parts for s in part) for parts in batch.micro_batches]
    assert max(loads) < 1.1 * min(loads)


def test_visual_tokens_change_nothing_for_one_rank_or_where_there_are_none():
    for ranks, samples in ((1, [replace(s, token_ids=(IMAGE, *s.token_ids)) for s in rows(40)]), (3, rows(40))):
        assert make_batch(samples, ranks, 100, image_token=IMAGE) == make_batch(samples, ranks, 100)


def test_rows_of_weight_zero_stay_but_count_for_nothing():
    samples = rows(4)
    batch = make_batch([*samples[:3], replace(samples[3], weight=0.0)], 1, 400)
    assert len(keys(batch)) == 4
    assert batch.num_rows == 3
    assert batch.num_tokens == sum(s.num_completion for s in samples[:3])


def test_errors_name_the_sample():
    good = rows(3)
    with pytest.raises(ValueError, match="row/long has 70 tokens"):
        make_batch([*good, Sample("row/long", (1,) * 70, 3)], 1, 60)
    with pytest.raises(ValueError, match="row/bare"):
        make_batch([*good, Sample("row/bare", (1, 2, 3), 3)], 1, 60)
    with pytest.raises(ValueError, match="row/odd has 1 logprobs for 2 completion tokens"):
        make_batch([*good, Sample("row/odd", (1, 2, 3), 1, logprobs=(-1.0,))], 1, 60)
    with pytest.raises(ValueError, match="at least one rank and one sample, got 1 and 0"):
        make_batch([], 1, 60)


class Grey:
    """A visual whose picture becomes its mean grey; counts what it decodes."""

    pad_id = 9
    packs = False
    reads = False
    blank_row: Sample | None = None

    def __init__(self) -> None:
        self.decoded = 0

    def read(self, media):
        self.decoded += 1
        return {"pixel_values": torch.tensor([float(media.open().getpixel((0, 0))[0])])}

    def join(self, items, input_ids):
        return concatenate(items)

    def positions(self, input_ids):
        return torch.arange(input_ids.shape[1]).expand(input_ids.shape)

    def blank(self):
        return self.blank_row


def picture(grey: int) -> Media:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (grey,) * 3).save(buffer, "PNG")
    return Media(buffer.getvalue(), (4, 4))


def test_collate_by_hand():
    samples = [
        Sample("a", (1, 2, 3, 4, 5), 3, (picture(10), picture(20)), 0.5, -2.0, (-0.1, -0.2)),
        Sample("b", (6, 7), 1, (picture(30),)),
    ]
    found = collate(samples, Grey())
    assert found.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 9, 9, 9]]
    assert found.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert found.mask.tolist() == [[0, 0, 0.5, 0.5], [1, 0, 0, 0]]
    assert found.completion.tolist() == [[False, False, True, True], [True, False, False, False]]
    assert found.old_logprobs[0].tolist() == pytest.approx([0, 0, -0.1, -0.2])
    assert found.advantages[:, 0].tolist() == [-2.0, 1.0]
    assert found.sampled.tolist() == [True, False]
    assert found.media["pixel_values"].tolist() == [10, 20, 30]
    assert set(found.model_inputs()) == {"input_ids", "attention_mask", "position_ids", "pixel_values"}


def test_an_empty_micro_batch_is_a_dummy_row_of_weight_zero():
    found = collate((), Grey())
    assert found.input_ids.shape == (1, 2)
    assert found.mask.sum() == 0
    assert not found.completion.any()
    assert found.media == {}


def test_a_blank_picture_joins_rows_without_any():
    visual = Grey()
    visual.blank_row = Sample("blank", (3, 9), 1, (picture(0),))
    text = Sample("b", (6, 7, 8), 1)
    found = collate([text], visual)
    assert found.input_ids.tolist() == [[6, 7, 8], [3, 9, 9]]
    assert found.completion.tolist() == [[True, True], [False, False]]
    assert found.mask.tolist() == [[1, 1], [0, 0]]
    assert len(found.media["pixel_values"]) == 1
    assert len(collate([text, replace(text, media=(picture(1),))], visual).input_ids) == 2


def test_pictures_are_decoded_once_and_forgotten_in_order_of_use():
    inner = Grey()
    visual = Cached(inner, size=2)
    for grey, decoded in ((1, 1), (1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        assert visual.read(picture(grey))["pixel_values"].tolist() == [grey]
        assert inner.decoded == decoded


def test_an_unreadable_picture_names_the_sample():
    with pytest.raises(ValueError, match="sample x/3: its image cannot be read"):
        collate([Sample("x/3", (1, 2), 1, (Media(b"not a picture", (4, 4)),))], Grey())


def test_what_is_skipped_is_read_and_not_learned():
    """A conversation of two replies: packed and padded, and in the denominators."""
    talk = Sample("a", (1, 2, 3, 4, 5, 6, 7, 8), 2, skipped=((4, 6),))
    other = Sample("b", (1, 2, 9), 2)
    found = collate([talk, other], Grey())
    #                                    3     4     5      6      7     8
    assert found.mask.tolist()[0] == [0, 1, 1, 0, 0, 1, 1]
    assert found.completion[0].tolist() == [False, True, True, False, False, True, True]
    assert make_batch([talk, other], 1, 60).num_tokens == 4 + 1
    assert make_batch([talk, other], 1, 60, packed=True).num_tokens == 4 + 1
    assert (talk.num_completion, talk.num_learned) == (6, 4)
    kept, which = found.predictions()
    assert len(which) == 5
    assert kept.tolist() == [1, 2, 5, 6]


def test_a_conversation_drawn_twice_brings_its_pictures_twice():
    """They may stand after the first reply, where rows share nothing."""
    shown = (picture(10), picture(20))
    talk = Sample("a", (1, 2, 3, 4, 2, 5, 6), 2, shown, skipped=((3, 5),))
    batch = make_batch([talk, replace(talk, key="b"), Sample("c", (1, 2, 9), 2, shown)], 1, 60, packed=True)
    ((part,),) = batch.micro_batches

    class Packs(Grey):
        packs = True

    found = collate(part, Packs())
    assert sorted(found.media["pixel_values"].tolist()) == [10, 10, 10, 20, 20, 20]
    assert int(found.packing.owned.sum()) == 7 + 7 + 3
