"""The tokenizer, and rows as prompts and samples."""

import re

import pytest
from transformers import AutoTokenizer

from rlhf.data.formatting import as_prompt, as_prompts, as_sample
from rlhf.data.rows import DataError
from rlhf.data.tokenizer import train_tokenizer
from rlhf.recipe import Chat
from rlhf.types import Media

CHAT = Chat(think_suffix="think first.")
TEXTS = ["i see 3, 5 and 8. 3 + 5 = 8. 8 + 8 = 16. so 16.", "what is the sum?", "\\boxed{16}"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320, CHAT)


class Doubling:
    """A processor whose every image takes width // 10 placeholders."""

    def __init__(self, tokenizer):
        self.tokenizer, self.image_token_id = tokenizer, tokenizer.image_token_id

    def expand(self, token_ids, sizes):
        left = list(sizes)
        image = self.tokenizer.image_token_id
        return [t for token in token_ids for t in ([image] * (left.pop(0)[0] // 10) if token == image else [token])]


def picture(width: int) -> Media:
    return Media(b"", (width, 10))


def row(images=1, reply="<think>3 + 5 = 8.</think>\\boxed{8}", **columns):
    parts = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": "what is the sum?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "images": [picture(20 + 10 * i) for i in range(images)], **columns}


def test_tokenizer_splits_digits_and_round_trips(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS[:3], "<think>12 is 345</think>\\boxed{3 5 8}<eos>", "héllo ∑ 🙂\n\ttab  two"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert loaded(text)["input_ids"] == ids
        assert all(len(re.findall(r"\d", token)) <= 1 for token in tokenizer.convert_ids_to_tokens(ids))
    assert len(tokenizer) <= 320
    assert loaded.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert (loaded.eos_token, loaded.pad_token) == ("<eos>", "<pad>")
    assert loaded.chat_template == tokenizer.chat_template
    with pytest.raises(ValueError, match="need at least 264"):
        train_tokenizer(TEXTS, 200, CHAT)


def test_training_makes_words_tokens(tokenizer):
    assert len(tokenizer("what is the sum?")["input_ids"]) <= 6
    assert len(tokenizer(" think first.")["input_ids"]) <= 4


@pytest.mark.parametrize("think", [False, True])
def test_prompt_renders_the_question(tokenizer, think):
    prompt = as_prompt(row(images=2, answer="8", digits=[3, 5]), "digits", 4, tokenizer, think, CHAT)
    suffix = " think first." if think else ""
    assert tokenizer.decode(prompt.token_ids) == f"<user><image><image>what is the sum?{suffix}<assistant>"
    assert prompt.key == "digits/4" + ("#think" if think else "")
    assert prompt.question == "what is the sum?"
    assert prompt.columns == {"answer": "8", "digits": [3, 5]}
    assert (prompt.think, [media.size for media in prompt.media]) == (think, [(20, 10), (30, 10)])


def test_earlier_turns_stay_and_only_the_last_question_gets_the_suffix(tokenizer):
    turns = [
        {"role": "system", "content": "sum."},
        {"role": "user", "content": "3 + 5?"},
        {"role": "assistant", "content": "8"},
        {"role": "user", "content": "8 + 8?"},
    ]
    prompt = as_prompt({"messages": turns}, "s", 0, tokenizer, True, CHAT)
    shown = "<system>sum.<user>3 + 5?<assistant>8<eos><user>8 + 8? think first.<assistant>"
    assert tokenizer.decode(prompt.token_ids) == shown


@pytest.mark.parametrize("images", [0, 1, 3])
def test_sample_is_expanded_prompt_and_answer_joined_as_ids(tokenizer, images):
    sample = as_sample(row(images), "s", 1, Doubling(tokenizer), False, CHAT)
    pictures = "<image>" * sum(2 + i for i in range(images))
    assert tokenizer.decode(sample.token_ids[: sample.prompt_length]) == f"<user>{pictures}what is the sum?<assistant>"
    assert tokenizer.decode(sample.token_ids[sample.prompt_length :]) == "<think>3 + 5 = 8.</think>\\boxed{8}<eos>"
    answer = tokenizer("<think>3 + 5 = 8.</think>\\boxed{8}")["input_ids"]
    assert list(sample.token_ids[sample.prompt_length :]) == [*answer, tokenizer.eos_token_id]


def test_think_follows_the_argument_then_the_column(tokenizer):
    processor = Doubling(tokenizer)
    keys = [
        as_sample(row(**columns), "s", 0, processor, think, CHAT).key
        for columns, think in [({}, None), ({"think": None}, None), ({"think": True}, None), ({"think": True}, False)]
    ]
    assert keys == ["s/0", "s/0", "s/0#think", "s/0"]


def test_images_without_marks_stand_before_the_question(tokenizer):
    bare = {"messages": [{"role": "user", "content": "what?"}], "images": [picture(20)]}
    assert (
        tokenizer.decode(as_prompt(bare, "s", 0, tokenizer, False, CHAT).token_ids) == "<user><image>what?<assistant>"
    )


def test_a_row_drawn_twice_is_two_prompts(tokenizer):
    row = {"messages": [{"role": "user", "content": "how many?"}]}
    made = as_prompts([("a", 3, row), ("b", 3, row), ("a", 3, row)], tokenizer, True, CHAT)
    assert [prompt.key for prompt in made] == ["a/3#think", "b/3#think", "a/3#think~1"]
    assert made[0].token_ids == made[2].token_ids


def test_bad_rows_are_named(tokenizer):
    processor = Doubling(tokenizer)
    short = row(2) | {"images": [picture(20)]}
    with pytest.raises(DataError, match="source 's', row 3: 2 image marks in the messages, but 1 images"):
        as_prompt(short, "s", 3, tokenizer, False, CHAT)
    spelled = {"messages": [{"role": "user", "content": "what is <image>?"}]}
    with pytest.raises(DataError, match="row 3: 1 image placeholders after rendering, but 0 images"):
        as_prompt(spelled, "s", 3, tokenizer, False, CHAT)
    with pytest.raises(DataError, match="row 3: no assistant message"):
        as_sample(spelled, "s", 3, processor, False, CHAT)
    with pytest.raises(DataError, match="row 3: the answer spells the end token"):
        as_sample(row(reply="8<eos>"), "s", 3, processor, False, CHAT)
    with pytest.raises(DataError, match="row 3: the question must end in a user message"):
        as_prompt({"messages": [{"role": "assistant", "content": "8"}]}, "s", 3, tokenizer, False, CHAT)


# T19: what of a conversation is learned


def learned(sample, tokenizer):
    """The text of the tokens that the loss covers, runs of them apart."""
    skipped = {place for start, end in sample.skipped for place in range(start, end)} | set(range(sample.prompt_length))
    runs, before = [], -2
    for place in range(len(sample.token_ids)):
        if place not in skipped:
            if place != before + 1:
                runs.append([])
            runs[-1].append(sample.token_ids[place])
            before = place
    return [tokenizer.decode(run) for run in runs]


def user(text, images=0):
    return {"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


def said(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be short."}
CONVERSATIONS = {  # messages, and what is learned of them with supervise = "all" (with "last": the last of these)
    "one turn": ([user("sum?", 1), said("16")], ["16<eos>"]),
    "a system's word": ([SYSTEM, user("sum?", 1), said("16")], ["16<eos>"]),
    "several turns about one picture": (
        [user("sum?", 1), said("16"), user("and the first?"), said("3"), user("last?"), said("8")],
        ["16<eos>", "3<eos>", "8<eos>"],
    ),
    "examples with pictures of their own": (
        [user("sum?", 1), said("16"), user("sum?", 2), said("11")],
        ["16<eos>", "11<eos>"],
    ),
    "an interleaved page": (
        [user("", 1), said("a three."), user("", 1), said("then a five."), user("", 1), said("")],
        ["a three.<eos>", "then a five.<eos>", "<eos>"],
    ),
    "text alone": ([user("sum of 3 and 5?"), said("8"), user("sure?"), said("yes")], ["8<eos>", "yes<eos>"]),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_is_learned_of_a_conversation(name, tokenizer):
    messages, wanted = CONVERSATIONS[name]
    count = sum(part["type"] == "image" for m in messages if m["role"] == "user" for part in m["content"])
    given = {"messages": messages, "images": [picture(20 + 10 * i) for i in range(count)]}
    every = as_sample(given, "s", 0, Doubling(tokenizer), None, Chat(supervise="all"))
    last = as_sample(given, "s", 0, Doubling(tokenizer), None, Chat())
    assert learned(every, tokenizer) == wanted
    assert learned(last, tokenizer) == wanted[-1:]
    assert every.num_learned == sum(len(tokenizer(text)["input_ids"]) for text in wanted)
    assert last.num_learned == last.num_completion
    spelt = tokenizer.apply_chat_template(messages, tokenize=False)
    both = [tokenizer.decode([t for t in s.token_ids if t != tokenizer.image_token_id]) for s in (every, last)]
    assert both == [spelt.replace("<image>", "")] * 2  # the same words, whatever is learned of them
    assert every.token_ids.count(tokenizer.image_token_id) == sum(2 + i for i in range(count))


def test_the_thinking_suffix_stands_on_the_last_question_alone(tokenizer):
    messages = [user("sum?", 1), said("16"), user("sum of the first two?"), said("<think>3 + 5.</think>8")]
    given = {"messages": messages, "images": [picture(20)]}
    sample = as_sample(given, "s", 0, Doubling(tokenizer), True, CHAT.model_copy(update={"supervise": "all"}))
    assert tokenizer.decode(sample.token_ids).count("think first.") == 1
    assert learned(sample, tokenizer) == ["16<eos>", "<think>3 + 5.</think>8<eos>"]


def test_a_template_that_rewrites_history_is_refused(tokenizer, monkeypatch):
    """As Qwen3's, which takes the thinking out of earlier replies."""
    forgetful = tokenizer.chat_template.replace(
        "{{- message['content'] -}}", "{{- message['content'] if loop.last else message['content'][:1] -}}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", forgetful)
    given = {"messages": [user("sum?"), said("16"), user("sure?"), said("yes"), user("?"), said("y")], "images": []}
    with pytest.raises(DataError, match=r'set chat\.supervise = "last"'):
        as_sample(given, "s", 0, Doubling(tokenizer), None, Chat(supervise="all"))
    assert learned(as_sample(given, "s", 0, Doubling(tokenizer), None, Chat()), tokenizer) == ["y<eos>"]
