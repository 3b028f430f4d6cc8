"""What the model said: rollouts as cards, and held-out questions followed through the stages."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Sequence
from html import escape

from PIL import Image, UnidentifiedImageError

from rewards.answer import last_boxed
from rlhf.report.run import Record, StageView

_URI = re.compile(r"data:image/(png|jpeg|gif|webp);base64,([A-Za-z0-9+/]+={0,2})")
_MAX_SIDE = 384
_TITLES = {True: "thinking first", False: "answering at once"}


def card(record: Record) -> str:
    """One rollout: picture, question, chain, boxed answer, right or wrong, reward parts, the judge's verdict."""
    chain, rest = split(str(record.get("completion", "")))
    right = is_right(record)
    mark = {True: "right", False: "wrong", None: "unscored"}[right]
    step = f", asked at step {escape(str(record['step']))}" if record.get("step") else ""
    parts = "".join(_part(name, value) for name, value in (record.get("parts") or {}).items())
    outcome = str(record.get("outcome", "scored"))
    trouble = (
        ""
        if outcome == "scored"
        else f'<p class="trouble">reward {escape(outcome.replace("_", " "))}, row left out</p>'
    )
    note = f'<p class="note">{escape(str(record["note"]))}</p>' if record.get("note") else ""
    asked = record.get("verdict") is not None and not _judges(record) and "not judged" not in str(record.get("note"))
    verdict = f'<p class="verdict"><b>Judge</b> {escape(_verdict(record["verdict"]))}</p>' if asked else ""
    return (
        f'<article class="sample {mark}"><header>{_verdict_mark(right)}'
        f'<span class="chip mode-{_mode(record)}">{_TITLES[bool(record.get("think"))]}</span></header>'
        f"{picture(record)}"
        f'<p class="question">{escape(str(record.get("question", "")))}</p>'
        f"{_said(chain, rest, boxes=not _judges(record))}"
        f'<p class="truth">expected <b>{escape(str(record.get("answer", "?")))}</b>{step}</p>'
        f'<div class="parts">{parts}</div>{verdict}{trouble}{note}</article>'
    )


def split(completion: str) -> tuple[str, str]:
    """The chain inside <think> … </think> (an unclosed one runs to the end), and what comes after it."""
    before, opened, after = completion.partition("<think>")
    if not opened:
        return "", completion.strip()
    chain, _, rest = after.partition("</think>")
    return chain.strip(), (before + rest).strip()


def is_right(record: Record) -> bool | None:
    """Whether the answer was right: its reward part if there is one, a judge's verdict against what it should be, else
    the box against the expected answer. None if scoring failed."""
    if record.get("outcome", "scored") != "scored":
        return None
    parts = record.get("parts") or {}
    if _judges(record):
        return bool(parts["judge"] >= 0.5) == (record.get("answer") == "yes")
    for name in ("answer", "accuracy", "correct"):
        if isinstance(parts.get(name), (int, float)):
            return bool(parts[name] >= 0.5)
    if record.get("answer") is None:
        return None
    found = last_boxed(split(str(record.get("completion", "")))[1])
    return found is not None and found[0] == str(record["answer"])


def _judges(record: Record) -> bool:
    """Whether the record is a judge at work, whose reply is a verdict and no boxed answer."""
    parts = record.get("parts") or {}
    return set(parts) == {"judge"} and parts["judge"] is not None and record.get("answer") in ("yes", "no")


def picture(record: Record, extra: str = "") -> str:
    """The record's image, large; nothing if it has none; a plain notice if what it holds is no image."""
    uri = record.get("image")
    if not uri:
        return ""
    found = _URI.fullmatch(str(uri))
    small = _shrink(found.group(2), str(uri)) if found else None
    if small is None:
        return '<p class="trouble">the image of this sample cannot be read</p>'
    alt = f"The picture the question is about: {record.get('question', '')}"
    return f'<img class="picture {extra}" src="{small}" alt="{escape(alt)}" loading="lazy">'


def _shrink(data: str, uri: str) -> str | None:
    try:
        image: Image.Image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        if max(image.size) <= _MAX_SIDE:
            image.verify()
            return uri
        image = image.convert("RGB")
    except (binascii.Error, UnidentifiedImageError, OSError, SyntaxError):
        return None
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def gallery(stages: Sequence[StageView], shown: int = 12) -> str:
    """Samples grouped by stage, latest first and open: training rollouts if a stage has them, else held-out ones."""
    groups: list[str] = []
    for stage in reversed(stages):
        # the end of a stage says more about it than its start
        records = list(stage.rollouts[-shown:]) or list(stage.examples[:shown])
        if not records:
            continue
        right = sum(is_right(record) is True for record in records)
        source = "held-out questions"
        if stage.rollouts:
            source = "sampled while training" if stage.kind == "rl" else "of its own answers"
        groups.append(
            f'<details class="group"{"" if groups else " open"}><summary><b>{stage.number}. {escape(stage.name)}</b>'
            f"<span>{len(records)} {source}, {right} right</span></summary>"
            f'<div class="gallery">{"".join(map(card, records))}</div></details>'
        )
    return "".join(groups)


def followed(stages: Sequence[StageView], limit: int = 6) -> list[tuple[str, list[tuple[StageView, list[Record]]]]]:
    """Held-out questions asked after at least two stages: (key without its mode, [(stage, its answers)]).

    First those whose thinking answer went from wrong to right: they show what was learned.
    """
    trails: dict[str, list[tuple[StageView, list[Record]]]] = {}
    for stage in stages:
        asked: dict[str, list[Record]] = {}
        for record in stage.examples:
            asked.setdefault(str(record.get("key", "")).partition("#")[0], []).append(record)
        for key, records in asked.items():
            # one answer a mode, thinking first
            modes = {_mode(record): record for record in reversed(records)}
            trails.setdefault(key, []).append((stage, [modes[mode] for mode in ("think", "direct") if mode in modes]))
    long = [(key, trail) for key, trail in trails.items() if key and len(trail) > 1]

    def interest(trail: list[tuple[StageView, list[Record]]]) -> tuple[int, int]:
        first, last = is_right(trail[0][1][0]), is_right(trail[-1][1][0])
        misses = sum(is_right(records[0]) is False for _, records in trail)
        # a turn in the middle of the run tells more than one at its very end
        return (len(trail) + 4 * (last is True and first is not True), -abs(2 * misses - len(trail)))

    return sorted(long, key=lambda item: interest(item[1]), reverse=True)[:limit]


def watch(stages: Sequence[StageView]) -> str:
    """One held-out question, stage by stage, with a picker for a few others. Empty if none was asked twice."""
    trails = followed(stages)
    pickers, panels, rules = [], [], []
    for index, (_, trail) in enumerate(trails):
        record = trail[-1][1][0]
        checked = " checked" if index == 0 else ""
        pickers.append(
            f'<input type="radio" name="watch" id="watch{index}"{checked}>'
            f'<label for="watch{index}">{picture(record, "thumb") or f"question {index + 1}"}</label>'
        )
        rules.append(f".watch #watch{index}:checked~.panels>:nth-child({index + 1}){{display:grid}}")
        rows = "".join(_moment(stage, records) for stage, records in trail)
        panels.append(
            f'<div class="panel"><aside>{picture(record, "big")}<p '
            f'class="question">{escape(str(record.get("question")))}</p>'
            f'<p class="truth">expected <b>{escape(str(record.get("answer")))}</b></p></aside><ol>{rows}</ol></div>'
        )
    if not trails:
        return ""
    return (
        f'<style>{"".join(rules)}</style><div class="watch" role="group" aria-label="Pick a '
        f'question">{"".join(pickers)}'
        f'<div class="panels">{"".join(panels)}</div></div>'
    )


def _moment(stage: StageView, records: Sequence[Record]) -> str:
    answers = []
    for record in records:
        chain, rest = split(str(record.get("completion", "")))
        answers.append(
            f'<div class="answer mode-{_mode(record)}"><span class="mode">{_TITLES[bool(record.get("think"))]}</span>'
            f"{_said(chain, rest)}{_verdict_mark(is_right(record))}</div>"
        )
    return (
        f'<li><h4><i class="kind-{stage.family}"></i>{stage.number}. {escape(stage.name)}</h4>{"".join(answers)}</li>'
    )


def _said(chain: str, rest: str, boxes: bool = True) -> str:
    thought = f'<p class="chain">{escape(chain)}</p>' if chain else ""
    found = last_boxed(rest)
    if found is None and not boxes:
        return f'{thought}<p class="said">{escape(rest)}</p>'
    if found is None and last_boxed(chain) is not None:
        return f'{thought}<p class="said">{escape(rest)} <small>the box is among its thoughts</small></p>'
    if found is None:
        return f'{thought}<p class="said">{escape(rest) or "<i>no answer</i>"} <small>no box</small></p>'
    answer, end = found
    around = escape((rest[: rest.rindex("\\boxed", 0, end)] + rest[end:]).strip())
    return f'{thought}<p class="said">{around + " " if around else ""}<span class="box">{escape(answer)}</span></p>'


def _verdict(value: object) -> str:
    """A judge's words; a bare truth value is put into words."""
    return (
        {0.0: "not sound", 1.0: "sound"}.get(float(value), str(value))
        if isinstance(value, (int, float))
        else str(value)
    )


def _verdict_mark(right: bool | None) -> str:
    if right is None:
        return '<span class="mark none"><b aria-hidden="true">–</b> not scored</span>'
    return (
        '<span class="mark yes"><b aria-hidden="true">✓</b> right</span>'
        if right
        else '<span class="mark no"><b aria-hidden="true">✗</b> wrong</span>'
    )


def _part(name: str, value: object) -> str:
    if not isinstance(value, (int, float)):
        return ""
    share = min(max(float(value), 0.0), 1.0)
    return (
        f'<span class="part"><span>{escape(str(name))}</span><span class="meter"><i '
        f'style="width:{100 * share:.0f}%"></i></span>'
        f"<b>{float(value):.3g}</b></span>"
    )


def _mode(record: Record) -> str:
    return "think" if record.get("think") else "direct"
