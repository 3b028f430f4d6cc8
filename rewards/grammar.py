"""How a judge says its verdict: what it is told, what it may say where that can be enforced, and how it is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.data.judging import parse_verdict
from rlhf.types import Score

LAST_WORD = re.compile(r"(?<!yes or )(?<!no or )\b(yes|no)[\s*_.!`\"')\]]*$", re.IGNORECASE)
LEVELS = 5
# the last line is the number and no other: "4", "Score: 4", "**4/5**", "4 out of 5."
NAMED = r"(?:(?:the |my )?(?:final |overall )?(?:score|rating|grade|verdict)(?: is)?[\s*_:=]*)?"
LEVEL = re.compile(
    rf"[\s*_#>`\"'(\[]*{NAMED}[\s*_`\"'(\[]*(?P<level>[1-{LEVELS}])\s*(?:(?:/|out of)\s*{LEVELS})?[\s*_.!`\"')\]]*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Grammar:
    """yes_no: 1.0 for yes, 0.0 for no. score: a whole number s of 1 to 5, (s − 1) / 4. booleans: a JSON object of
    `fields`, their mean, each field a part. anywhere: the last yes or no of a reply counts wherever it stands, as of a
    judge that was trained to say one; others write "yes, there is no fault"."""

    kind: Literal["yes_no", "score", "booleans"] = "yes_no"
    fields: tuple[str, ...] = ()
    anywhere: bool = False

    @property
    def words(self) -> str:
        """What a judge is told of it."""
        if self.kind == "yes_no":
            return "End your reply with one word: yes or no."
        if self.kind == "score":
            return (
                f"End your reply with a line that holds only a whole number: 1 for the worst to {LEVELS} for the best."
            )
        wanted = ", ".join(f'"{name}": true or false' for name in self.fields)
        return f"End your reply with a JSON object: {{{wanted}}}. true means that there is no fault."

    @property
    def regex(self) -> str:
        """Everything that says a verdict and nothing else, as a regular expression."""
        if self.kind == "yes_no":
            return "yes|no"
        if self.kind == "score":
            return f"[1-{LEVELS}]"
        names = [name.replace(".", r"\.") for name in self.fields]  # not re.escape: engines know few escapes
        return r"\{" + ", ".join(f'"{name}": (true|false)' for name in names) + r"\}"

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of the booleans."""
        wanted = {name: {"type": "boolean"} for name in self.fields}
        return {"type": "object", "properties": wanted, "required": list(wanted), "additionalProperties": False}

    def read(self, text: str) -> Score:
        """The verdict that a judge's reply ends in; a reply without one that is plain is a failure, never a 0."""
        if self.kind == "yes_no":
            said = parse_verdict(text) if self.anywhere or LAST_WORD.search(text) else None
            if said is None:
                where = "said" if self.anywhere else "ended in"
                return Score("failed", note=f"the judge {where} neither yes nor no: {text!r}")
            return Score("scored", float(said), note=f"the judge said {text!r}")
        if self.kind == "score":
            lines = text.strip().splitlines()
            found = LEVEL.fullmatch(lines[-1]) if lines else None
            if found is None:
                return Score("failed", note=f"the judge's last line is no number of 1 to {LEVELS}: {text!r}")
            return Score("scored", (int(found["level"]) - 1) / (LEVELS - 1), note=f"the judge said {text!r}")
        objects = list(_objects(text))
        given = objects[-1] if objects else {}
        if not all(isinstance(given.get(name), bool) for name in self.fields):
            wanted = ", ".join(self.fields)
            return Score("failed", note=f"the judge's reply ends in no JSON object of booleans {wanted}: {text!r}")
        return self.scored({name: float(given[name]) for name in self.fields}, f"the judge said {text!r}")

    def scored(self, parts: Mapping[str, float], note: str) -> Score:
        """The Score of booleans with these values."""
        return Score("scored", sum(parts.values()) / len(parts), parts, note)

    def flat(self, value: float, note: str) -> Score:
        """The Score that says `value`, in every field, where nobody is asked."""
        return self.scored(dict.fromkeys(self.fields, value), note) if self.fields else Score("scored", value, {}, note)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, those inside another left out; one that names a key twice says nothing."""
    decoder, place = json.JSONDecoder(object_pairs_hook=_plain), 0
    while (place := text.find("{", place)) >= 0:
        try:
            found, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
        else:
            yield found


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else {}
