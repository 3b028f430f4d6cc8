"""Judges behind an address, against a real server that misbehaves: no reply is scored wrongly, no call lasts."""

from __future__ import annotations

import asyncio
import base64
import email.utils
import io
import socket
import time
from typing import Any

import pytest
from PIL import Image

from rewards.endpoint import Endpoint, EndpointError
from rewards.judge import Question, verdict
from rlhf.recipe import JudgeTable
from rlhf.types import Media, Prompt, Rollout, Score
from tests.unit.judge_server import Answer, Server, said

FAST = 0.01  # seconds of the first pause


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def prompt(text: str, media: tuple[Media, ...] = ()) -> Prompt:
    return Prompt(text, "s", text, (), media)


def ask(address: str, *questions: str, media: tuple[Media, ...] = (), **settings: Any) -> list[Rollout | Score]:
    table = JudgeTable(endpoint=address, model="m", **{"deadline": 10.0, "template": "logic"} | settings)

    async def go() -> list[Rollout | Score]:
        async with Endpoint(table, Question.of(table).grammar, FAST) as endpoint:
            return await asyncio.wait_for(
                endpoint.ask([prompt(one, media) for one in questions or ("so?",)]), timeout=30
            )

    return asyncio.run(go())


def texts(replies: list[Rollout | Score]) -> list[str]:
    return [reply.text if isinstance(reply, Rollout) else f"{reply.outcome} {reply.note}" for reply in replies]


def test_each_question_gets_its_own_reply_whatever_the_order_they_come_in() -> None:
    def slow_first(number: int, body: dict[str, Any]) -> Answer:
        return said(f"{body['messages'][0]['content']} yes")

    with Server(slow_first) as server:
        asked = [f"q{number}" for number in range(30)]
        assert texts(ask(server.address, *asked, concurrency=7)) == [f"{one} yes" for one in asked]
        assert server.most <= 7
    assert server.bodies[0] | {"messages": 0} == {"model": "m", "messages": 0, "temperature": 0.0, "max_tokens": 80}


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    encoded = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(encoded, "JPEG")
    media = (Media(encoded.getvalue(), (3, 2)),)
    fields = ["logic", "care"]
    settings = {"grammar": "booleans", "fields": fields, "constrain": "response_format", "extra": {"top_k": 1}}
    with Server(lambda n, body: said("{}")) as server:
        ask(server.address + "/", media=media, key_env="A_KEY", max_tokens=9, **settings)
        ask(server.address, constrain="structured_outputs", grammar="score")
    first, second = server.bodies
    shown, text = first["messages"][0]["content"]
    assert base64.b64decode(shown["image_url"]["url"].removeprefix("data:image/jpeg;base64,")) == media[0].data
    assert text == {"type": "text", "text": "so?"}
    assert (first["max_tokens"], first["top_k"]) == (9, 1)
    assert first["response_format"]["json_schema"]["schema"]["required"] == fields
    assert second["structured_outputs"] == {"regex": "[1-5]"}
    assert server.headers[0]["authorization"] == "Bearer secret"
    assert "authorization" not in server.headers[1]


@pytest.mark.parametrize("wait", ["0.3", "date"])
def test_a_busy_server_is_asked_again_when_it_says(wait: str) -> None:
    begun = time.time()
    # a date has whole seconds: two from now are at least one
    later = "0.3" if wait == "0.3" else email.utils.formatdate(begun + 2, usegmt=True)
    busy = Answer(429, b"slow down", {"Retry-After": later})
    with Server(lambda n, body: busy if n == 0 else said("yes")) as server:
        assert texts(ask(server.address)) == ["yes"]
    assert len(server.bodies) == 2
    assert time.time() - begun >= (0.3 if wait == "0.3" else 0.9)


def test_a_server_that_asks_for_longer_than_the_deadline_is_given_up_at_once() -> None:
    begun = time.monotonic()
    with Server(lambda n, body: Answer(429, b"slow down", {"Retry-After": "3600"})) as server:
        (found,) = ask(server.address)
    assert isinstance(found, Score)
    assert found.outcome == "timed_out"
    assert "429 'slow down'" in found.note
    assert time.monotonic() - begun < 5


BROKEN = {
    "500 for ever": (Answer(500, b"oops"), "500 'oops'", 4),
    "garbage": (Answer(body=b"<html>"), "no completion but '<html>'", 4),
    "truncated JSON": (Answer(body=said("yes").body[:-20]), "no completion but", 4),
    "a connection that ends in the middle": (Answer(body=said("yes").body, lies=True), "RemoteProtocolError", 4),
    "bytes that are no gzip": (Answer(body=b"yes", headers={"Content-Encoding": "gzip"}), "DecodingError", 4),
    "no choices": (Answer(body=b'{"choices": []}'), "no completion but", 4),
    "a list": (Answer(body=b"[]"), "no completion but", 4),
    "no words": (said(None), "no words", 1),
    "words that are a list": (said(["yes"]), "no words", 1),
    "cut off": (said("so the answer is yes", "length"), "cut off at 80 tokens", 1),
    "filtered": (said("yes", "content_filter"), "ended by 'content_filter'", 1),
    "never ended": (said("yes", None), "ended by None", 1),
    "a question it refuses": (Answer(400, b"too long"), "400 'too long'", 1),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_whole_reply_is_a_failure_with_its_reason(case: str) -> None:
    answer, reason, tries = BROKEN[case]
    with Server(lambda n, body: answer) as server:
        (found,) = ask(server.address, retries=3)
    assert isinstance(found, Score)
    assert (found.outcome, found.value) == ("failed", None)
    assert reason in found.note
    assert len(server.bodies) == tries


@pytest.mark.parametrize("answer", [Answer(hangs=True), Answer(trickles=True)], ids=["silent", "a byte at a time"])
def test_every_call_ends_by_its_deadline(answer: Answer) -> None:
    begun = time.monotonic()
    with Server(lambda n, body: answer if body["messages"][0]["content"] != "b" else said("no")) as server:
        found = ask(server.address, "a", "b", "c", deadline=0.5, concurrency=3)
        assert time.monotonic() - begun < 5
    assert [one.outcome for one in found if isinstance(one, Score)] == ["timed_out", "timed_out"]
    assert texts(found)[1] == "no"


def test_where_nothing_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        (found,) = ask(f"http://127.0.0.1:{taken.getsockname()[1]}/v1", retries=2)
    assert isinstance(found, Score)
    assert found.outcome == "failed"
    assert "ConnectError" in found.note
    assert "try 3" in found.note


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "environment variable A_KEY"), (403, "A_KEY"), (404, "correct `endpoint`"), (302, "302")],
)
def test_what_no_call_can_mend_stops_the_stage(monkeypatch: pytest.MonkeyPatch, status: int, words: str) -> None:
    monkeypatch.setenv("A_KEY", "sk-123")
    wrong = Answer(status, b"Incorrect API key provided: sk-123")
    with (
        Server(lambda n, body: wrong if n else said("yes")) as server,
        pytest.raises(EndpointError, match=words) as raised,
    ):
        ask(server.address, *"abcdefgh", key_env="A_KEY", concurrency=1)
    assert len(server.bodies) == 2  # the rest is not asked
    assert "sk-123" not in str(raised.value)


def test_the_budget_of_a_stage() -> None:
    with Server(lambda n, body: said("yes")) as server:
        found = texts(ask(server.address, *"abcde", budget=3, concurrency=1))
    assert found[:3] == ["yes"] * 3
    assert found[3:] == ["failed not asked: the stage's budget of 3 calls is spent"] * 2
    assert len(server.bodies) == 3


def test_confidence_needs_log_probs() -> None:
    told = {"logprobs": {"content": [{"token": "y", "logprob": -0.1}, {"token": "es", "logprob": -0.5}]}}
    with Server(lambda n, body: said("yes", **told) if n == 0 else said("yes")) as server:
        first, second = ask(server.address, "a", "b", confidence=0.7, concurrency=1)
    assert server.bodies[0]["logprobs"] is True
    assert isinstance(first, Rollout)
    assert verdict(first, 0.7).value == 0.0  # exp(-0.5) = 0.61
    assert verdict(first, 0.6).value == 1.0
    assert isinstance(second, Score)
    assert "no log-probs" in second.note


def test_a_picture_that_is_none_is_not_sent() -> None:
    with Server(lambda n, body: said("yes")) as server:
        (found,) = ask(server.address, media=(Media(b"nothing", (1, 1)),))
    assert "picture that cannot be read" in texts([found])[0]
    assert not server.bodies


def test_the_key_is_told_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "sk-secret\n")  # as an editor leaves it
    with Server(lambda number, body: Answer(500, b"you sent sk-secret")) as server:
        (reply,) = ask(server.address, key_env="A_KEY", retries=0)
    assert isinstance(reply, Score)
    assert "sk-secret" not in reply.note
    monkeypatch.setenv("A_KEY", "sk\nsecret")
    with pytest.raises(EndpointError, match="A_KEY holds no key"):
        ask(server.address, key_env="A_KEY")


def test_servers_that_count_completion_tokens() -> None:
    with Server(lambda number, body: said("yes")) as server:
        ask(server.address, extra={"max_completion_tokens": 50})
    assert server.bodies[0]["max_completion_tokens"] == 50
    assert "max_tokens" not in server.bodies[0]
