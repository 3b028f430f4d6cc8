"""A judge behind the address of a server that speaks OpenAI's protocol: every call ends by its deadline, and none is
scored wrongly. What does not come back as a whole reply is a Score that failed or timed out, and says why."""

from __future__ import annotations

import asyncio
import base64
import email.utils
import io
import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx
from PIL import Image

from rewards.grammar import Grammar
from rlhf.recipe import JudgeTable
from rlhf.types import Media, Prompt, Rollout, Score

PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds before the second try, and at most; each pause twice the last
AGAIN = (408, 409, 425, 429)  # statuses that another try may mend, beside 500 and more
REFUSED = (401, 403)
SHOWN = 200  # characters of a server's words in a note


class EndpointError(RuntimeError):
    """An endpoint that will answer nothing; the message says what to change."""


class _FailedError(Exception):
    """A try that came to nothing; `pause`: the seconds that the server asks to wait, if it says so."""

    def __init__(self, reason: str, again: bool = True, pause: float | None = None) -> None:
        super().__init__(reason)
        self.again, self.pause = again, pause


class Endpoint:
    """The model of a judge's table, asked over HTTP while the context lasts, in one event loop.

    Of a table's `concurrency` calls at once each has `deadline` seconds from its first try, so n calls end within
    n / concurrency times that. 401 and 403 end the stage; so do addresses at which there is no such service.
    """

    def __init__(
        self,
        table: JudgeTable,
        grammar: Grammar,
        pause: float = PAUSE,
        spent: int = 0,
        spend: Callable[[], None] = lambda: None,
    ) -> None:
        """`spent`: calls of the budget that were made before; `spend` is told of each one more."""
        assert table.endpoint is not None
        self._table, self._grammar, self._pause = table, grammar, pause
        self._address = table.endpoint.rstrip("/") + "/chat/completions"
        self._key = os.environ.get(table.key_env, "").strip() if table.key_env is not None else ""
        if not self._key.isascii() or not self._key.isprintable():
            raise EndpointError(f"the environment variable {table.key_env} holds no key: a key is one line of ASCII")
        self._left = None if table.budget is None else max(0, table.budget - spent)
        self._spend = spend
        self._refusal: EndpointError | None = None
        self._client: httpx.AsyncClient | None = None
        self._places = asyncio.Semaphore(table.concurrency)

    async def __aenter__(self) -> Endpoint:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=self._table.concurrency)
        # a try's time is bounded as a whole: a server that sends a byte a second must not hold it
        self._client = httpx.AsyncClient(headers=headers, limits=limits, timeout=None)  # noqa: S113
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._client is not None
        await self._client.aclose()

    async def sleep(self) -> None:
        """It has no memory of this machine's to give back."""

    async def ask(self, prompts: Sequence[Prompt]) -> list[Rollout | Score]:
        """What the model says to each question and its pictures, in order, as a rollout without token ids; or the
        Score that failed or timed out. Raises EndpointError where no call can succeed."""
        calls = [asyncio.ensure_future(self._call(prompt)) for prompt in prompts]
        try:
            return await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    async def _call(self, prompt: Prompt) -> Rollout | Score:
        async with self._places:
            if self._refusal is not None:
                raise self._refusal
            if self._left == 0:
                return Score("failed", note=f"not asked: the stage's budget of {self._table.budget} calls is spent")
            if self._left is not None:
                self._left -= 1
                self._spend()
            try:
                body = self._body(prompt)
            except OSError as error:
                return Score("failed", note=f"not asked: {prompt.key} has a picture that cannot be read ({error})")
            clock, tries = asyncio.get_running_loop().time, 0
            end = clock() + self._table.deadline
            while True:
                tries += 1
                try:
                    async with asyncio.timeout_at(end):
                        return await self._try(body)
                except EndpointError as error:
                    self._refusal = error
                    raise
                except TimeoutError:
                    return Score("timed_out", note=self._note("no reply", tries))
                except _FailedError as failed:
                    if not failed.again or tries > self._table.retries:
                        return Score("failed", note=self._note(str(failed), tries))
                    pause = min(self._pause * 2 ** (tries - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
                    pause = max(pause, failed.pause or 0.0)
                    if clock() + pause >= end:
                        return Score("timed_out", note=self._note(f"last: {failed}", tries))
                    await asyncio.sleep(pause)

    def _note(self, reason: str, tries: int) -> str:
        reason = reason.replace(self._key, "(the key)") if self._key else reason
        return f"{self._table.model} at {self._address}: {reason} (try {tries}, within {self._table.deadline:g} s)"

    async def _try(self, body: Mapping[str, Any]) -> Rollout:
        assert self._client is not None
        try:
            answer = await self._client.post(self._address, json=body)
        except httpx.InvalidURL as error:
            raise EndpointError(f"{self._address} is no address ({error}); correct `endpoint`") from error
        except httpx.RequestError as error:
            raise _FailedError(f"{type(error).__name__}: {error}") from error
        if answer.status_code != 200:
            self._refuse(answer)
        try:
            found = json.loads(answer.content)
            choice = found["choices"][0]
            text, ended = choice["message"]["content"], choice["finish_reason"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise _FailedError(f"no completion but {self._said(answer)!r} ({type(error).__name__})") from error
        if ended != "stop":
            cut = f"cut off at {self._table.max_tokens} tokens" if ended == "length" else f"ended by {ended!r}"
            raise _FailedError(f"the judge's reply was {cut}: {text!r:.{SHOWN}}", again=False)
        if not isinstance(text, str):
            raise _FailedError(f"no words but {self._said(answer)!r}", again=False)
        logprobs = _logprobs(choice) if self._table.confidence else ()
        return Rollout((), logprobs, (), text, "stop")

    def _refuse(self, answer: httpx.Response) -> None:
        """Raise what a status that is not 200 means."""
        status, said = answer.status_code, f"{answer.status_code} {self._said(answer)!r}"
        if status in REFUSED:
            name = self._table.key_env
            advice = (
                f"give the right key in the environment variable {name}"
                if name is not None
                else "name the environment variable with the key in `key_env`"
            )
            raise EndpointError(f"{self._address} refuses the key: {said}; {advice}")
        if status in (404, 405) or 300 <= status < 400:
            raise EndpointError(
                f"{self._address} does not serve {self._table.model!r}: {said}; correct `endpoint` (it ends before "
                "/chat/completions) or `model`"
            )
        raise _FailedError(said, status in AGAIN or status >= 500, _seconds(answer.headers.get("Retry-After")))

    def _said(self, answer: httpx.Response) -> str:
        """The beginning of what the server says, without the key, which some repeat."""
        said = answer.text[: SHOWN + len(self._key)]
        return (said.replace(self._key, "(the key)") if self._key else said)[:SHOWN]

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        table = self._table
        shown = [{"type": "image_url", "image_url": {"url": data_url(media)}} for media in prompt.media]
        content = [*shown, {"type": "text", "text": prompt.question}] if shown else prompt.question
        body: dict[str, Any] = {
            "model": table.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "max_tokens": table.max_tokens,
        }
        if table.confidence:
            body["logprobs"] = True
        if table.constrain == "structured_outputs":
            body["structured_outputs"] = {"regex": self._grammar.regex}
        elif table.constrain == "response_format":
            schema = {"name": "verdict", "strict": True, "schema": self._grammar.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if "max_completion_tokens" in table.extra:  # what some servers take instead, and not beside
            del body["max_tokens"]
        return body | table.extra


def data_url(media: Media) -> str:
    """The picture's own bytes as a URL. Raises OSError where they are none."""
    with Image.open(io.BytesIO(media.data)) as image:
        kind = Image.MIME.get(str(image.format), "image/png")
    return f"data:{kind};base64,{base64.b64encode(media.data).decode()}"


def _logprobs(choice: Mapping[str, Any]) -> tuple[float, ...]:
    try:
        found = tuple(float(token["logprob"]) for token in choice["logprobs"]["content"])
    except (LookupError, TypeError, ValueError) as error:
        raise _FailedError("the reply has no log-probs, which `confidence` needs; set it to 0", again=False) from error
    if not found:
        raise _FailedError("the reply has no log-probs, which `confidence` needs; set it to 0", again=False)
    return found


def _seconds(header: str | None) -> float | None:
    """Of a Retry-After: a number of seconds, or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
