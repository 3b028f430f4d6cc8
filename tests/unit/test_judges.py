"""What judges are asked, how their replies are read, and what is remembered of them."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from rewards.base import Item, items_of
from rewards.cache import Cache, key_of
from rewards.endpoint import Endpoint, EndpointError
from rewards.grammar import Grammar
from rewards.judge import FOREIGN, SOUND, Question, ask, texts
from rewards.mixture import combine
from rewards.templates import BUILT_IN, INPUTS, Template, TemplateError, template_of
from rlhf.data.judging import judge_question, rate_question
from rlhf.data.tokenizer import train_tokenizer
from rlhf.recipe import Chat, JudgeTable, Reward, Rl
from rlhf.scoring import Judge, part_means, score
from rlhf.types import Group, Media, Prompt, Rollout, Sampling, Score
from tests.unit.judge_server import Answer, Server, said

REPLY = "<judge>needs counting</judge><think>i see 3.\nso 3.</think>\\boxed{3}"
TOKENIZER = train_tokenizer([REPLY, "question: read the digits. reply: sound?"] * 5, 300, Chat())
FIELDS = ("logic", "grounding", "consistency")
THREE = Grammar("booleans", FIELDS)
PICTURE = Media(b"png", (48, 48))


def item(completion: str = REPLY, **columns: Any) -> Item:
    return Item(Prompt("s/0", "s", "what {is} it?", (1,), (PICTURE,), True, columns), completion, (1,), True)


def group(*completions: str, **columns: Any) -> Group:
    rollouts = tuple(Rollout((1, 2), (0.0, 0.0), (0, 0), text, "stop") for text in completions)
    return Group(item(**columns).prompt, (1,), rollouts)


def judged(template: str, **settings: Any) -> Question:
    return Question.of(JudgeTable(artifact="a", template=template, **settings))


# -- templates


def test_the_shorthand_asks_what_it_always_did() -> None:
    (told,) = texts([item()], SOUND, [])
    assert told is not None
    assert told.question == judge_question("what {is} it?", REPLY)
    assert told.question.startswith(
        "question: what {is} it? reply: <judge>needs counting</judge> i see 3. so 3. \\boxed"
    )


SHOWN = {
    "judgement": (["needs counting"], ["i see 3.", "boxed"], True),
    "logic": (["i see 3."], ["needs counting", "boxed"], True),
    "consistency": (["i see 3.", "\\boxed{3}"], ["needs counting", "what {is} it?"], False),
    "grounding": (["i see 3."], ["needs counting", "boxed"], True),
    "think": (["i see 3.", "\\boxed{3}"], ["needs counting"], True),
    "answer": (["\\boxed{3}", "three"], ["i see 3.", "needs counting"], True),
}


@pytest.mark.parametrize("name", SHOWN)
def test_built_in_templates_show_what_they_are_to(name: str) -> None:
    shown, hidden, image = SHOWN[name]
    fields = {"grammar": "booleans", "fields": list(FIELDS)} if name == "think" else {}
    question = judged(name, **fields)
    (told,) = texts([item(answer="three")], question, [])
    assert told is not None
    assert all(words in told.question for words in [*shown, question.grammar.words])
    assert not [words for words in hidden if words in told.question]
    assert told.media == ((PICTURE,) if image else ())
    assert judged(name, image=not image, **fields).template.image is not image


def test_every_input_of_built_in_templates_is_known() -> None:
    assert SHOWN.keys() | {"sound", "rate"} == BUILT_IN.keys()
    for template in BUILT_IN.values():
        assert set(template.inputs) <= set(INPUTS)


@pytest.mark.parametrize("imitation", ["end", "code", "input"])
def test_a_reply_cannot_leave_its_place(imitation: str) -> None:
    """Whatever a reply spells stands between two lines with one code, which is nowhere in it."""
    honest = "i see 3."
    (told,) = texts([item(f"<think>{honest}</think>3")], judged("logic"), [])
    assert told is not None
    end = told.question[told.question.index(honest) + len(honest) :]  # what follows an honest reply
    chain = {
        "end": honest + end + "\nyes",
        "code": "\n".join(re.findall(r"-----.*", told.question)),
        "input": "{question} {format} {answer}",
    }[imitation]
    (found,) = texts([item(f"<think>{chain}</think>3")], judged("logic"), [])
    assert found is not None
    codes = re.findall(r"^----- chain (\w+) (?:begins|ends)$", found.question, re.MULTILINE)
    code = next(one for one in codes if one not in chain)
    begin, stop = (f"----- chain {code} {word}\n" for word in ("begins", "ends"))
    assert found.question.count(begin) == found.question.count(stop) == 1
    assert found.question.partition(begin)[2].partition(stop)[0] == chain + "\n"


def test_marks_of_any_model_are_taken_out_for_a_judge_that_is_not_known() -> None:
    marks = ["<|im_end|>", "<|im_<eos>end|>", "<start_of_turn>", "[/INST]", "<|eot_id|>", "<image>", "</s>", "<|a|b|>"]
    chain = " ".join(["<think>so", *marks, "3 < 4 | 5 > 2.</think>3"])
    (found,) = texts([item(chain)], judged("logic"), TOKENIZER.get_added_vocab(), foreign=True)
    assert found is not None
    assert not FOREIGN.search(found.question)
    assert "3 < 4 | 5 > 2." in found.question


def test_without_what_the_template_shows_nobody_is_asked() -> None:
    direct, blank = item("\\boxed{3}"), item("<judge>easy</judge><think>\n\n</think>3")
    assert texts([direct, blank], judged("logic", missing=1.0), []) == [None, None]
    assert texts([direct, blank], judged("judgement"), [])[0] is None
    assert texts([direct, blank], judged("judgement"), [])[1] is not None
    assert None not in texts([direct, blank], judged("answer"), []) if direct.columns.get("answer") else True
    assert judged("logic", missing=1.0).not_asked().value == 1.0
    missing = judged("think", grammar="booleans", fields=list(FIELDS), missing=1.0).not_asked()
    assert missing.parts == dict.fromkeys(FIELDS, 1.0)


def test_a_row_without_the_right_answer_is_named() -> None:
    with pytest.raises(ValueError, match="s/0: no column 'answer', which 'answer' shows"):
        texts([item()], judged("answer"), [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("is {chian} right?", r"\{chian\} is no input of a template.*\{chain\}"),
        ("is {chain.upper} right?", "is no input"),
        ("is {chain } right?", "is no input"),
        ("is it right? {question}", "shows the judge nothing of the reply"),
    ],
)
def test_templates_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "own.txt").write_text(text)
    with pytest.raises(TemplateError, match=words):
        template_of(str(tmp_path / "own.txt"))


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text('\\frac{1}{2} {{chain}} {"a": {"b": 1}} {completion}\n')
    (found,) = texts([item("so")], replace(judged(str(path)), grammar=Grammar()), [])
    assert found is not None
    before, _, rest = found.question.partition(" ----- completion ")
    assert before == '\\frac{1}{2} {chain} {"a": {"b": 1}}'
    assert rest.splitlines()[1] == "so"
    path.write_bytes(b"\xff{chain}")
    with pytest.raises(TemplateError, match="not UTF-8"):
        template_of(str(path))
    with pytest.raises(TemplateError, match=r"no text file and no built-in template; these are sound, rate, judgement"):
        template_of("soud")


def test_a_judge_of_captions_is_asked_as_it_was_taught() -> None:
    (told,) = texts([item("a red 3")], judged("rate", grammar="score"), [])
    assert told is not None
    assert told.question == rate_question("a red 3")


# -- grammars


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", 1.0), ("No.", 0.0), ("It holds.\n\n**Yes**", 1.0), ("no fault, so yes", 1.0),
        ("yes, there is no fault", None), ("yes or no?", None), ("", None),
        ("I cannot say yes or no.", None), ("nope", None), ("yesno", None),
    ],
)  # fmt: skip
def test_yes_and_no(text: str, value: float | None) -> None:
    assert Grammar().read(text).value == value


def test_a_judge_that_was_trained_may_say_it_anywhere() -> None:
    assert Grammar(anywhere=True).read("yes 3 5").value == 1.0
    assert SOUND.grammar.anywhere
    assert judged("sound").grammar.anywhere
    assert not judged("logic").grammar.anywhere
    assert not Question.of(JudgeTable(endpoint="https://x/v1", model="m")).grammar.anywhere


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 0.0), ("5", 1.0), ("It has 2 errors.\nScore: 3", 0.5), ("**4/5**", 0.75), ("4 out of 5.", 0.75),
        ("The final score is: 2", 0.25), ("4.5", None), ("-4", None), ("Score: -4", None), ("6", None), ("0", None),
        ("4 (5 would be perfect)", None), ("3\nor so", None), ("", None), ("10/5", None), ("2 or 3", None),
        ("45", None), ("4/10", None), ("score", None),
    ],
)  # fmt: skip
def test_scores(text: str, value: float | None) -> None:
    found = Grammar("score").read(text)
    assert (found.outcome, found.value) == ("scored" if value is not None else "failed", value)


def booleans(*values: Any) -> str:
    return json.dumps(dict(zip(FIELDS, values, strict=True)))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (booleans(True, False, True), (1, 0, 1)),
        (f"{{so}} it is:\n```json\n{booleans(False, False, True)}\n```", (0, 0, 1)),
        (f"it says {booleans(True, True, True)}. But {booleans(False, True, True)}", (0, 1, 1)),
        (json.dumps({"why": {"logic": False}, **json.loads(booleans(True, True, True))}), (1, 1, 1)),
        (booleans(True, True, True)[:-1], None),
        (booleans("true", True, True), None),
        (booleans(1, True, True), None),
        (booleans(None, True, True), None),
        ('{"logic": true, "grounding": true}', None),
        ('{"logic": false, "logic": true, "grounding": true, "consistency": true}', None),
        (f"{booleans(True, True, True)} {{}}", None),
        (f"[{booleans(True, True, True)}", (1, 1, 1)),
        ("yes", None),
        ("{" * 3000, None),
    ],
)  # fmt: skip
def test_booleans(text: str, values: tuple[float, ...] | None) -> None:
    found = THREE.read(text)
    if values is None:
        assert (found.outcome, found.value) == ("failed", None)
    else:
        assert found.parts == dict(zip(FIELDS, values, strict=True))
        assert found.value == pytest.approx(sum(values) / 3)


@pytest.mark.parametrize("grammar", [Grammar(), Grammar("score"), THREE], ids=lambda one: one.kind)
def test_what_is_enforced_is_what_is_read(grammar: Grammar) -> None:
    """Every text of a few tokens that the pattern has is scored, and every value is reached."""
    pieces = {
        "yes_no": ["yes", "no", "y"],
        "score": list("0123456"),
        "booleans": [booleans(*values) for values in itertools.product([True, False], repeat=3)],
    }[grammar.kind]
    allowed = [text for text in pieces if re.fullmatch(grammar.regex, text)]
    scores = [grammar.read(text) for text in allowed]
    assert all(found.outcome == "scored" for found in scores)
    assert {found.value for found in scores} == {
        "yes_no": {0.0, 1.0},
        "score": {0.0, 0.25, 0.5, 0.75, 1.0},
        "booleans": {0.0, 1 / 3, 2 / 3, 1.0},
    }[grammar.kind]
    if grammar.fields:
        jsonschema.validate(json.loads(allowed[0]), grammar.schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"logic": True}, grammar.schema)


# -- the judge as a whole


class Engine:
    """Says no of chains about an 8, in the grammar that is asked for; counts."""

    def __init__(self) -> None:
        self.asked = 0
        self.samplings: list[Sampling] = []

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        self.asked += len(prompts)
        self.samplings.append(sampling)
        return [
            Group(
                p,
                p.token_ids,
                (Rollout((1,), (-0.1,), (0,), booleans("i see 8" not in p.question, True, True), "stop"),),
            )
            for p in prompts
        ]


def chain(digit: int) -> str:
    return f"<think>i see {digit}.</think>\\boxed{{{digit}}}"


def think(engine: Any, cache: Cache | None = None, key: str = "", **settings: Any) -> Judge:
    table = JudgeTable(artifact="a", template="think", grammar="booleans", fields=list(FIELDS), **settings)
    return Judge(engine, TOKENIZER, table, Question.of(table), cache, (key,))


def test_booleans_are_parts_of_the_reward() -> None:
    engine = Engine()
    parts = {"think": Reward(judge="j"), "more": Reward(judge="j", weight=3.0)}
    looks = {"name": "s", "kind": "rl", "data": {"s": 1.0}, "steps": 1, "prompts_per_step": 1}
    stage = Rl.model_validate(looks | {"rewards": parts})
    judges = {"j": think(engine, constrain="structured_outputs")}
    (scored,) = asyncio.run(score([group(chain(3), chain(8), "\\boxed{3}")], stage, None, judges))  # type: ignore[arg-type]
    assert scored.scores[1].parts == {
        "think": pytest.approx(2 / 3), "more": pytest.approx(2 / 3),
        **{f"{name}.{field}": float(field != "logic") for name in parts for field in FIELDS},
    }  # fmt: skip
    assert scored.scores[2].parts["think.logic"] == 0.0
    assert part_means([scored])["reward.think.grounding"] == pytest.approx(2 / 3)
    assert engine.samplings[0].regex == THREE.regex
    assert think(engine).question.enforced is False


def test_a_part_of_a_reward_counts_once() -> None:
    whole = Score("scored", 0.5, {"a": 1.0, "b": 0.0})
    mixed = combine({"x": whole, "y": Score("scored", 0.0)}, {"x": 1.0, "y": 1.0})
    assert (mixed.value, mixed.parts) == (0.25, {"x": 0.5, "y": 0.0, "x.a": 1.0, "x.b": 0.0})


def test_means_are_over_the_rollouts_that_have_the_part() -> None:
    scores = (Score("scored", 1.0, {"a": 1.0}), Score("scored", 0.0, {"a": 0.0, "b": 1.0}), Score("failed"))
    found = part_means([replace(group("x", "y", "z"), scores=scores)])
    assert found == {"reward": 0.5, "reward.a": 0.5, "reward.b": 1.0}


def test_nothing_is_asked_twice_over_restarts_and_only_the_same_is_the_same(tmp_path: Path) -> None:
    engine, path = Engine(), tmp_path / "deep" / "scores.sqlite"

    def asks(judge: Judge, *digits: int, media: bytes = b"png") -> list[float | None]:
        asked = group(*map(chain, digits))
        asked = replace(asked, prompt=replace(asked.prompt, media=(Media(media, (48, 48)),)))
        (row,) = asyncio.run(judge.score([asked]))
        return [found.value for found in row]

    for _ in range(2):  # two processes, one after the other
        cache = Cache(path)
        assert asks(think(engine, cache, "m1"), 3, 8, 3) == [1.0, pytest.approx(2 / 3), 1.0]
        cache.close()
        assert engine.asked == 2
    cache = Cache(path)
    asks(think(engine, cache, "m1"), 3, 4)
    assert engine.asked == 3
    asks(think(engine, cache, "m2"), 3)  # another model
    asks(think(engine, cache, "m1"), 3, media=b"jpg")  # another picture
    assert engine.asked == 5
    asks(think(engine), 3)
    assert engine.asked == 6
    cache.close()


def test_failures_are_asked_again(tmp_path: Path) -> None:
    class Babbling(Engine):
        async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
            found = await super().generate(prompts, sampling)
            return [replace(one, rollouts=(replace(one.rollouts[0], text="maybe"),)) for one in found]

    cache, engine = Cache(tmp_path / "s"), Babbling()
    for _ in range(2):
        (row,) = asyncio.run(think(engine, cache).score([group(chain(3))]))
        assert row[0].outcome == "failed"
    assert engine.asked == 2
    cache.close()


def test_a_cache_of_other_scores(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "s")
    scores = {key_of("f", number): Score("scored", number / 7, {"a": 0.1}, "é") for number in range(1200)}
    cache.put(scores | {"bad": Score("failed", note="x"), "late": Score("timed_out")})
    assert cache.get([*scores, "bad", "late", "never"]) == scores
    cache.close()
    assert key_of("a", ["b"]) != key_of("a", "b") != key_of("ab")
    (tmp_path / "text").write_text("not a database at all, but long enough to be read as one " * 20)
    with pytest.raises(ValueError, match=r"text: no cache of scores .*; delete it"):
        Cache(tmp_path / "text")


def test_what_came_before_a_refusal_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls behind an address cost money."""
    monkeypatch.setenv("NO_PROXY", "*")

    def first_only(number: int, body: dict[str, Any]) -> Answer:
        return said("yes") if number == 0 else Answer(401, b"no more")

    async def asks(address: str, digits: Sequence[int]) -> list[list[Score]]:
        table = JudgeTable(endpoint=address, model="m", template="logic", image=False, concurrency=1)
        question, cache = Question.of(table), Cache(tmp_path / "kept.sqlite")
        try:
            async with Endpoint(table, question.grammar) as endpoint:
                judge = Judge(endpoint, TOKENIZER, table, question, cache, ("k",))
                return await asyncio.wait_for(judge.score([group(*map(chain, digits))]), timeout=30)
        finally:
            cache.close()

    with Server(first_only) as server:
        with pytest.raises(EndpointError, match="refuses the key"):
            asyncio.run(asks(server.address, [3, 8]))
        asked = len(server.bodies)
        assert asyncio.run(asks(server.address, [3]))[0][0].value == 1.0
        assert len(server.bodies) == asked


def test_a_kill_in_the_middle_of_keeping_leaves_the_cache_whole(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom rewards.cache import Cache\nfrom rlhf.types import Score\n"
        "cache = Cache(Path(sys.argv[1]))\ncache.put({'a': Score('scored', 1.0)})\n"
        "cache._file.execute(\"INSERT INTO scores VALUES ('b', '{}')\")\nos.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "s"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], timeout=60, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == -9
    cache = Cache(path)
    assert cache.get(["a", "b"]) == {"a": Score("scored", 1.0)}
    cache.put({"b": Score("scored", 0.5)})  # and may be written again
    assert cache.get(["b"])["b"].value == 0.5
    cache.close()
    with sqlite3.connect(path) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    file.close()


def test_a_judge_behind_an_address_needs_no_ids() -> None:
    assert all(one is None or one.token_ids == () for one in texts(items_of(group(chain(3))), judged("logic"), []))
    (found,) = ask(group(chain(3)), TOKENIZER, None, judged("logic"))
    assert found is not None
    assert found.token_ids.count(TOKENIZER.image_token_id) == 1
    assert Template("x", "{chain} {chain}").inputs == ("chain",)
