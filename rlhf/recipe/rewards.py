"""Judges and rewards."""

from __future__ import annotations

from datetime import date, datetime, time
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from rewards.mixture import parsed
from rlhf.recipe.table import Finite, Fraction, Name, Positive, Table, UserPath


def _condition(text: str) -> str:
    parsed(text)
    return text


class Judging(Table):
    """How a judge is asked, and when its yes counts: a yes with a token of less than `confidence` on its way, of the
    probabilities the judge gave what it said, is a no. 0 counts every yes."""

    max_tokens: PositiveInt = 80
    confidence: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    def accepts(self, value: float | None) -> bool:
        """Whether a verdict of this value is a yes."""
        return value == 1.0


# what does nothing without an `endpoint`
OF_ENDPOINTS = ("model", "key_env", "extra", "concurrency", "retries", "deadline", "budget")


class JudgeTable(Judging):
    """A judge: the model of an earlier stage (`artifact`), or the `model` behind the `endpoint` of a server that speaks
    OpenAI's protocol ("https://api.example.com/v1"), asked with the key in the environment variable `key_env`.

    template     what it is asked: a built-in (rewards.templates), or a text file
    image        whether it sees the pictures; unless given as a built-in template says, and yes for a file
    grammar      how it answers: "yes_no"; "score", 1 to 5, of value (s − 1) / 4; "booleans", a JSON object of `fields`,
                 of which the value is the mean, and each a part of the score
    accept       the least value that is a yes where one is wanted: in rejection sampling, and measured as precision and
                 recall; 1 unless given, and a half, three of five, with "score" (SAIL-Caption2)
    missing      the value of a reply that lacks what the template shows of it, a chain, say: nobody is asked about it
    constrain    "structured_outputs": vLLM, ours or the endpoint's, lets it say nothing else than the grammar, so that
                 it cannot think first; "response_format": the endpoint is asked for JSON
    cache        keep what it said in the run's folder, and do not ask the same again
    extra        laid over the body of each request
    concurrency  calls at once; retries: tries of a call after the first; deadline: seconds of a call, all tries
    budget       the most calls that a stage makes; what comes after is a failure"""

    artifact: Name | None = None
    endpoint: str | None = None
    model: str | None = None
    key_env: str | None = None
    template: UserPath = "sound"
    image: bool | None = None
    grammar: Literal["yes_no", "score", "booleans"] = "yes_no"
    fields: list[Name] = []
    accept: Fraction | None = None
    missing: Fraction = 0.0
    constrain: Literal["structured_outputs", "response_format"] | None = None
    cache: bool = True
    extra: dict[str, Any] = {}
    concurrency: PositiveInt = 8
    retries: Annotated[int, Field(ge=0)] = 4
    deadline: Positive = 60.0
    budget: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_model(self) -> JudgeTable:
        if (self.artifact is None) == (self.endpoint is None):
            raise ValueError(
                "give either `artifact` (an earlier stage that made a model) or `endpoint` (a server's address), not "
                "both or none"
            )
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(f'`endpoint` = {self.endpoint!r} is no address: write "https://api.example.com/v1"')
        if self.endpoint is not None and self.model is None:
            raise ValueError("an `endpoint` serves several models: give `model`, the name of the one to ask")
        if self.artifact is not None and (idle := [key for key in OF_ENDPOINTS if key in self.model_fields_set]):
            raise ValueError(f"{', '.join(map(repr, idle))} are of an `endpoint`, and `artifact` is given: remove them")
        return self

    def accepts(self, value: float | None) -> bool:
        """Whether a verdict of this value is a yes."""
        least = self.accept if self.accept is not None else 0.5 if self.grammar == "score" else 1.0
        return value is not None and value >= least

    @model_validator(mode="after")
    def _fits_its_grammar(self) -> JudgeTable:
        if (self.grammar == "booleans") != bool(self.fields):
            raise ValueError('`fields` are the names of grammar = "booleans": give both, or none')
        if len(set(self.fields)) < len(self.fields):
            raise ValueError(f"`fields` = {self.fields} names one twice")
        if self.confidence and self.grammar != "yes_no":
            raise ValueError('`confidence` says when a yes counts, and is for grammar = "yes_no": remove it')
        if self.constrain == "response_format" and (self.endpoint is None or self.grammar != "booleans"):
            raise ValueError(
                'constrain = "response_format" asks an `endpoint` for the JSON of grammar = "booleans"; elsewhere take '
                '"structured_outputs", or leave it out'
            )
        return self


class Reward(Table):
    """One part of a reward, exactly one of four: a `function` ("module:function", "path/file.py:function", or the name
    under which an installed package offers one) with `options` as its keyword arguments; a `judge`, a [judges] table,
    or an earlier stage whose model is asked whether the chain is sound, with the settings of [judging]; a `scalar`,
    what an earlier reward_model stage learned, as it is, or with `sigmoid` between 0 and 1; or a `product` of other
    parts.

    weight   in the mean over all parts; 1 unless given, but none for a factor of a product, which counts through it
    only_if  a judge is asked only about rollouts to which that other part gave 1; the rest get 0 from it, since a chain
             that ends in a wrong answer is not sound
    when     the part is there only for prompts of which this is true, an expression over columns of the row and
             `source`, the name of its data: "source == 'stem' and level > 2"
    clip     [low, high], in which what it gives is kept"""

    function: str | None = None
    options: dict[str, Any] = {}
    judge: Name | None = None
    scalar: Name | None = None
    sigmoid: bool = False
    product: list[Name] | None = None
    weight: Positive | None = None
    only_if: Name | None = None
    when: Annotated[str, AfterValidator(_condition)] | None = None
    clip: tuple[Finite, Finite] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Reward:
        if sum(kind is not None for kind in (self.function, self.judge, self.scalar, self.product)) != 1:
            raise ValueError("give exactly one of `function`, `judge`, `scalar` and `product`")
        if self.only_if is not None and self.judge is None:
            raise ValueError("`only_if` saves asking a judge; for others take a `product` with that other part")
        if self.sigmoid and self.scalar is None:
            raise ValueError("`sigmoid` puts a `scalar` between 0 and 1; functions and judges say what they mean")
        if self.options and self.function is None:
            raise ValueError(
                "`options` are keyword arguments of a `function`; a judge has its settings in [judging] or [judges]"
            )
        for key, value in self.options.items():
            if isinstance(value, date | time | datetime):
                raise ValueError(f"options.{key} = {value} is a {type(value).__name__}; write it as text")  # noqa: TRY004
        if self.product is not None and (len(set(self.product)) < 2 or self.when is not None):
            raise ValueError("a `product` names two other parts or more, and is there where one of them is (`when`)")
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"`clip` = {list(self.clip)} must be [low, high], low below high")
        return self
