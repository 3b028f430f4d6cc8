"""The digits builder, its chains, and the program that verifies them."""

import io
import random
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from rlhf.data.chains import CATEGORIES, Chain, answer_of, check_chain, spoil, write_chain
from rlhf.data.critique import critique_of
from rlhf.data.digits import build, scans
from rlhf.data.judging import judge_question, parse_verdict
from rlhf.data.rows import DataError, read, write
from rlhf.data.tokenizer import train_tokenizer
from rlhf.recipe import Chat

TABLES = ["text", "single", "perception", "direct", "chains", "prompts", "judge", "judge_text"]


def reply(row) -> str:
    return row["messages"][-1]["content"][0]["text"]


def asked(row) -> str:
    return row["messages"][0]["content"][-1]["text"]


def truth(row) -> str:
    """The answer, worked out another way than the builder does."""
    digits, target = row["digits"], row["target"]
    return {
        "read": lambda: " ".join(str(d) for d in digits),
        "count": lambda: str(sum(target is None or d == target for d in digits)),
        "sum": lambda: str(sum(digits)),
        "difference": lambda: str(abs(digits[0] - digits[-1])),
        "larger": lambda: str(sorted(digits)[-1]),
        "sorted": lambda: " ".join(sorted(str(d) for d in digits)),
    }[row["category"]]()


@pytest.mark.parametrize("table", TABLES)
def test_tables_hold_the_truth_and_repeat_exactly(table, tmp_path):
    rows = build(table, 120, "train", 3, {})
    assert rows == build(table, 120, "train", 3, {})
    assert rows != build(table, 120, "train", 4, {})
    labels = load_digits().target
    for row in rows:
        assert row["digits"] == [labels[scan] for scan in row["scans"]]
        if not table.startswith("judge"):
            assert row["answer"] == truth(row)
        assert len(row["images"]) == (0 if "text" in table else 1)
    if table in {"text", "single", "perception", "direct", "chains"}:
        assert all(reply(row).endswith(f"\\boxed{{{row['answer']}}}") for row in rows)
        assert all(reply(row).startswith("<think>") == row["think"] for row in rows)
    assert (table == "prompts") == (rows[0]["messages"][-1]["role"] == "user")
    assert all(asked(row) == asked(row).lower() for row in rows)
    write(rows, tmp_path / "t.parquet")
    assert len(list(read(tmp_path / "t.parquet"))) == 120


def test_halves_are_exact():
    assert sum(row["think"] for row in build("text", 100, "train", 0, {})) == 50
    assert sum(row["sound"] for row in build("judge_text", 100, "train", 0, {})) == 50


@pytest.mark.parametrize("table", TABLES)
def test_held_out_scans_never_train(table):
    train = {scan for seed in range(2) for row in build(table, 120, "train", seed, {}) for scan in row["scans"]}
    held = {scan for seed in range(2) for row in build(table, 120, "heldout", seed, {}) for scan in row["scans"]}
    assert train <= set(scans("train"))
    assert held <= set(scans("heldout"))
    assert not set(scans("train")) & set(scans("heldout"))
    assert len(scans("train")) + len(scans("heldout")) == 1797


def test_options_narrow_what_is_asked_and_wrong_ones_are_named():
    rows = build("direct", 100, "train", 0, {"categories": ["sum", "larger"], "min_digits": 3, "max_digits": 3})
    assert {row["category"] for row in rows} == {"sum", "larger"}
    assert {len(row["digits"]) for row in rows} == {3}
    assert {row["kind"] for row in build("perception", 50, "train", 0, {})} == {"perception"}
    for table, options, message in [
        ("chain", {}, "no table 'chain' .did you mean 'chains'"),
        ("chains", {"max_digit": 2}, "no option 'max_digit' .did you mean 'max_digits'"),
        ("chains", {"categories": ["sums"]}, "no category 'sums' .did you mean 'sum'"),
        ("chains", {"categories": ["sum"], "max_digits": 1}, "no category of"),
        ("chains", {"max_digits": 5}, "1 ≤ min ≤ max ≤ 4"),
    ]:
        with pytest.raises(DataError, match=message):
            build(table, 1, "train", 0, options)


def test_every_sound_chain_passes_and_every_corruption_fails():
    for row in build("chains", 3000, "train", 5, {}):
        check = check_chain(row["category"], row["digits"], reply(row), row["answer"], row["target"])
        assert check.sound, (check.reason, reply(row))
    seen: Counter = Counter()
    for row in build("judge_text", 6000, "train", 5, {}):
        text = asked(row)
        body, _, boxed = text.partition("reply: ")[2].removesuffix(" sound?").rpartition(" \\boxed")
        right = answer_of(row["category"], row["digits"], row["target"])
        check = check_chain(
            row["category"], row["digits"], f"<think>{body}</think>\\boxed{boxed}", right, row["target"]
        )
        assert check.sound == row["sound"] == (row["answer"] == "yes"), (row["corruption"], check.reason, text)
        seen[row["category"], row["corruption"]] += 1
    for category in CATEGORIES:
        steps = set() if category == "read" else {"wrong_arithmetic", "missing_step"}
        kinds = {kind for named, kind in seen if named == category}
        assert kinds == {"none", "wrong_digit", "wrong_conclusion"} | steps


@pytest.mark.parametrize(
    ("category", "digits", "text", "fault"),
    [
        ("sum", [3, 5, 8], "i see 3, 5 and 8. 3 + 5 = 8. 8 + 8 = 16. so 16.|16", ""),
        ("sum", [3, 5, 8], "i see 3, 5 and 8. 8 + 5 = 13. 13 + 3 = 16. so 16.|16", ""),
        ("sum", [3, 5, 8], "I see 3, 5, and 8.  3 + 5 + 8 = 16. total 16.|16", ""),
        ("sum", [3, 5, 8], "i see 3, 5 and 8. 3 + 5 = 8. so 8.|8", "leave out 8"),
        ("sum", [3, 5, 8], "i see 3, 5 and 8. 3 + 5 = 8. so 16.|16", "leave out 8"),
        ("sum", [3, 5, 8], "i see 3, 5 and 8. 3 + 5 = 9. 9 + 8 = 17. so 17.|17", "is false"),
        ("sum", [3, 5, 8], "i see 3, 5 and 8. 3 + 3 = 6. 6 + 8 = 14. so 14.|14", "not left"),
        ("sum", [3, 5, 8], "i see 3, 5 and 8. 3 + 5 = 8. 7 + 8 = 15. so 15.|15", "not left"),
        ("sum", [3, 4, 8], "i see 3, 4 and 8. 3 + 4 = 7. 6 + 8 = 14. so 14.|14", "go on from 7"),
        ("sum", [3, 5, 8], "i see 3, 8 and 5. 3 + 8 = 11. 11 + 5 = 16. so 16.|16", "reads 3 8 5"),
        ("sum", [3, 5, 8], "i see 3, 5 and 8. 3 + 5 = 8. 8 + 8 = 16. so 17.|17", "concludes 17"),
        ("sum", [3, 5, 8], "i see 3, 5 and 8. 3 + 5 = 8. 8 + 8 = 16. so 16.|17", "boxes '17'"),
        ("sum", [3, 5, 8], "i see 3, 5 and 8. it must be 16. so 16.|16", "cannot parse the step"),
        ("sum", [3, 5, 8], "so 16.|16", "at least a reading"),
        ("sum", [3, 5], "i see cats. 3 + 5 = 8. so 8.|8", "cannot parse the reading"),
        ("difference", [3, 8], "i see 3 and 8. 8 - 3 = 5. so 5.|5", ""),
        ("difference", [3, 8], "i see 3 and 8. 3 - 8 = 5. so 5.|5", "does not subtract"),
        ("larger", [3, 8, 5], "i see 3, 8 and 5. 3 or 8: 8. 8 or 5: 8. so 8.|8", ""),
        ("larger", [3, 8, 5], "i see 3, 8 and 5. 3 or 8: 3. 3 or 5: 5. so 5.|5", "is false"),
        ("larger", [3, 8, 5], "i see 3, 8 and 5. 3 or 8: 8. so 8.|8", "1 comparisons"),
        ("sorted", [8, 3], "i see 8 and 3. smallest 3, then 8. in order 3 8.|3 8", ""),
        ("sorted", [8, 3], "i see 8 and 3. smallest 8, then 3. in order 8 3.|8 3", "in order"),
        ("read", [8, 3], "i see 8 and 3. so 8 3.|83", "boxes '83'"),
    ],
)
def test_the_checker_names_the_first_fault(category, digits, text, fault):
    chain, _, boxed = text.partition("|")
    check = check_chain(category, digits, f"<think>{chain}</think>\\boxed{{{boxed}}}", answer_of(category, digits))
    assert check.sound == (not fault)
    assert fault in check.reason


def test_the_checker_knows_what_is_counted():
    text = "<think>i see 7, 5 and 7. 7 yes, 5 no, 7 yes. so 2.</think>\\boxed{2}"
    assert check_chain("count", [7, 5, 7], text, "2", target=7).sound
    assert "is a 5" in check_chain("count", [7, 5, 7], text, "1", target=5).reason
    for form in ["\\boxed{2}", text + " and more", text.replace("</think>", ""), "<think>" + text]:
        assert "not of the form" in check_chain("count", [7, 5, 7], form, "2", target=7).reason


def test_pictures_are_readable():
    """3-nearest neighbours on cell crops of train pictures reads held-out ones."""

    def cells(split, count):
        crops, labels = [], []
        for row in build("direct", count, split, 0, {}):
            pixels = np.asarray(Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("L"), dtype=np.float32)
            assert pixels.shape == (48, 48)
            for place, digit in enumerate(row["digits"]):
                top, left = (24 * part for part in divmod(place, 2))
                crops.append(pixels[top : top + 24, left : left + 24].ravel())
                labels.append(digit)
        return np.stack(crops), labels

    model = KNeighborsClassifier(3).fit(*cells("train", 2500))
    assert model.score(*cells("heldout", 300)) >= 0.95


def test_chains_and_answers_are_short():
    tables = {table: build(table, 600, "train", 0, {}) for table in ("text", "chains", "direct", "judge")}
    texts = [part for rows in tables.values() for row in rows for part in (asked(row), reply(row))]
    tokenizer = train_tokenizer(texts, 512, Chat(think_suffix="think first."))
    lengths = {table: [len(tokenizer(reply(row))["input_ids"]) + 1 for row in rows] for table, rows in tables.items()}
    assert max(lengths["direct"]) <= 10
    assert max(lengths["chains"]) <= 49
    assert np.mean(lengths["chains"]) <= 32


@pytest.mark.parametrize("options", [{}, {"faults": 0.4}])
def test_a_judge_can_go_through_the_chain_before_its_verdict(options):
    shares = Counter()
    for row in build("judge", 400, "train", 0, {"critique": True, **options}):
        *findings, verdict = reply(row).split(".")
        seen = [finding.removeprefix("see ").split()[0] for finding in findings][: len(row["digits"])]
        assert seen == list(map(str, row["digits"]))
        faults = 0
        for finding in findings:
            words = finding.removesuffix(" bad").split()
            assert (words[-2] != words[-1]) == finding.endswith(" bad"), finding
            faults += finding.endswith(" bad")
        assert (faults == 0) == row["sound"]
        assert verdict.strip() == ("yes" if row["sound"] else "no")
        assert parse_verdict(reply(row)) == row["sound"]
        shares[row["corruption"]] += 1
    assert len(shares) == (2 if options else 5)
    assert shares["none"] == pytest.approx(200, abs=40)


@pytest.mark.parametrize(
    ("category", "digits", "target", "text", "critique"),
    [
        (
            "sum",
            [3, 5],
            None,
            "i see 3 and 6. 3 + 6 = 8. so 8.|8",
            "see 3 3. 5 6 bad. 3 + 6 = 9 8 bad. so 8 8. box 8 8. no",
        ),
        ("sum", [3, 5], None, "i see 3 and 5. 5 + 3 = 8. so 8.|8", "see 3 3. 5 5. 3 + 5 = 8 8. so 8 8. box 8 8. yes"),
        ("sum", [3, 5], None, "reading 3 5. so 8.|8", "see 3 3. 5 5. 3 + 5 = 8 - bad. so 8 8. box 8 8. no"),
        ("sum", [3, 5], None, "reading 3. so 3.|3", "see 3 3. 5 - bad. so 3 3. box 3 3. no"),
        (
            "difference",
            [3, 5],
            None,
            "reading 3 5. 3 - 5 = 2. so 2.|2",
            "see 3 3. 5 5. 5 - 3 = 2 - bad. so 2 2. box 2 2. no",
        ),
        (
            "larger",
            [3, 5],
            None,
            "i see 3 and 5. 3 or 5: 3. so 5.|5",
            "see 3 3. 5 5. 3 or 5: 5 3 bad. so 3 5 bad. box 5 5. no",
        ),
        (
            "sorted",
            [5, 3],
            None,
            "reading 5 3. smallest 3. so 3 5.|3 5",
            "see 5 5. 3 3. order 3 3. 5 - bad. so 3 3. - 5 bad. box 3 3. 5 5. no",
        ),
        (
            "count",
            [5, 3],
            3,
            "reading 5 3. 3 yes. so 1.|1",
            "see 5 5. 3 3. 5 no - bad. 3 yes - bad. so 1 1. box 1 1. no",
        ),
        ("count", [5, 3], None, "reading 5 3. so 3.|2", "see 5 5. 3 3. so 2 3 bad. box 3 2 bad. no"),
        ("read", [5], None, "it is 5. so 5.|5", "see 5 - bad. so - 5 bad. box 5 5. no"),
        ("read", [5], None, "reading 5. so 5. so 5.|5", "see 5 5. so 5 - bad. box 5 5. no"),
    ],
)
def test_a_judge_says_what_is_wrong_with_any_chain(category, digits, target, text, critique):
    chain, _, boxed = text.partition("|")
    assert critique_of(category, digits, f"<think>{chain}</think>\\boxed{{{boxed}}}", target) == critique
    assert critique_of(category, digits, chain, target) == "no"


def test_judge_and_verifier_agree_on_spoiled_and_on_garbled_chains():
    rng = random.Random(0)
    verdicts: Counter = Counter()
    for row in build("prompts", 4000, "train", 3, {}):
        category, digits, target = row["category"], row["digits"], row["target"]
        words = write_chain(spoil(Chain(category, tuple(digits), target), 0.1, rng), rng).split()
        for _ in range(rng.randrange(3)):
            place = rng.randrange(len(words))
            words[place : place + rng.randrange(2)] = [rng.choice(words)] * rng.randrange(2)
            words = words or ["."]
        text = " ".join(words)
        check = check_chain(category, digits, text, row["answer"], target)
        assert parse_verdict(critique_of(category, digits, text, target)) == check.sound, (text, check.reason)
        verdicts[check.sound] += 1
    assert min(verdicts.values()) > 500


def test_facts_are_true():
    bad = 0
    for row in build("facts", 100, "train", 0, {}):
        for fact in reply(row).rstrip(".").split(". "):
            if finding := re.fullmatch(r"(\d+) (\d+)( bad)?", fact):
                assert (finding[1] == finding[2]) == (finding[3] is None), fact
                bad += finding[3] is not None
    assert bad > 50
    for row in build("facts", 100, "train", 0, {}):
        for fact in reply(row).rstrip(".").split(". "):
            if re.fullmatch(r"\d+ \d+( bad)?", fact):
                continue
            left, right = re.fullmatch(r"(.*)(?: =|:|,) (\d+)", fact).groups()
            one, other = map(int, re.findall(r"\d+", left))
            assert int(right) == (one + other if "+" in left else one - other if "-" in left else max(one, other)), fact


def test_judging_words():
    asked_of_judge = judge_question("what is the sum?", "<think>i see 3.\n so 3.</think>\\boxed{3}")
    assert asked_of_judge == "question: what is the sum? reply: i see 3. so 3. \\boxed{3} sound?"
    verdicts = {"yes": True, "3 5 . no": False, "No, wait: YES.": True, "maybe": None, "": None, "nobody": None}
    assert {said: parse_verdict(said) for said in verdicts} == verdicts


def test_captions_are_rated_by_what_is_right():
    rows = build("rated", 400, "train", 0, {"min_digits": 4, "faults": 0.4})
    for row in rows:
        caption = asked(row).removeprefix("caption: ").removesuffix(" score?").split()
        right = sum(str(digit) == said for digit, said in zip(row["digits"], caption, strict=True))
        assert row["score"] == right + 1 == int(reply(row).splitlines()[-1]) == int(row["answer"])
        assert row["sound"] == (right >= 2) == (row["corruption"] == "none")
        assert reply(row).count("bad") == 4 - right
    assert set(Counter(row["score"] for row in rows)) == {1, 2, 3, 4, 5}
    assert all(row["score"] == 5 for row in build("rated", 50, "train", 0, {"faults": 0.0}))
