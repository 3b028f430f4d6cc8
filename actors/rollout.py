"""One rollout worker: an engine that samples, scores probes, and takes new weights between two steps. The engine itself
is vLLM's (`actors.vllm_worker`) or, for what vLLM cannot serve, transformers (`actors.huggingface`).

A thread of its own owns the engine. It consumes commands (submit, load, abort, …) and produces finished calls; it
waits for a command when nothing runs or while paused, and is unblocked by any command. Callers' threads only post
commands and read counters, so `heartbeat`, `pause`, `resume` and `abort` answer at once, whatever the engine does.
"""

from __future__ import annotations

import hashlib
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from rlhf.recipe import Implementation
from rlhf.roles import ActorLostError
from rlhf.types import Finish, Group, Media, Probe, ProbeScores, Prompt, Publication, Rollout, Sampling

if TYPE_CHECKING:
    from rlhf.agreement import Fingerprints

IDLE_SECONDS = 0.5
DECODED_IMAGES = 1024


@dataclass(frozen=True)
class EngineSettings:
    """What one engine may use.

    masked_tokens   ids that are never sampled (the image placeholder, padding): their logits become -inf
    sleeps          whether `sleep` may be called, which needs a GPU
    deadline        seconds without a reply after which a call is given up and aborted, and TimeoutError raised
    start_deadline  seconds after which starting is given up
    """

    dtype: str = "float32"
    max_model_len: int = 256
    max_num_seqs: int = 256
    kv_cache_gib: float = 0.25
    threads: int = 1
    seed: int = 0
    implementation: Implementation = "auto"
    tensor_parallel: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    masked_tokens: tuple[int, ...] = ()
    sleeps: bool = False
    deadline: float = 300.0
    start_deadline: float = 300.0


@dataclass(frozen=True)
class LoadReport:
    """A finished weight load: the version now served, and the seconds it took."""

    version: int
    seconds: float


@dataclass(frozen=True)
class Heartbeat:
    """Liveness without waiting. `steps` grows while the engine works; `alive_error` tells why it no longer does."""

    steps: int
    running: int
    waiting: int
    version: int
    alive_error: str | None = None


@dataclass
class Request:
    """One sequence in the engine, for the prompt or probe `place` of its call."""

    call: Call
    place: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    prompt_logprobs: tuple[float, ...] = ()
    finish: Finish | None = None


@dataclass
class Call:
    """Requests that one caller waits for. ended: places of prompts all of whose requests are done, or the error that
    ended the engine."""

    requests: dict[str, Request] = field(default_factory=dict)
    by_place: defaultdict[int, list[Request]] = field(default_factory=lambda: defaultdict(list))
    open: Counter[int] = field(default_factory=Counter)  # requests by place
    ended: SimpleQueue[int | BaseException] = field(default_factory=SimpleQueue)


class RolloutWorker(ABC):
    """An engine in this process (its own ranks above tensor_parallel 1). Thread-safe.

    Starting takes seconds; errors of starting are raised here. An error inside a step or a load ends the engine:
    pending and later calls raise that error, and the worker serves no more.
    """

    _tokenizer: Any
    _stop_ids: list[int]

    def __init__(self, model: str, settings: EngineSettings) -> None:
        self.settings = settings
        self._model = model
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._requests: dict[str, Request] = {}
        self._calls: dict[str, Call] = {}
        self._steps = 0
        self._started = 0
        self._version = 0
        self._serial = 0
        self._paused = False
        self._closed = False
        self._error: BaseException | None = None
        self._decoded = lru_cache(maxsize=DECODED_IMAGES)(_decode)
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="engine", daemon=True)
        self._thread.start()
        try:
            ready.result(timeout=settings.start_deadline)
        except TimeoutError:
            raise TimeoutError(
                f"the engine for {model} did not start within {settings.start_deadline:g} s; raise deadlines.start if "
                "it is only slow"
            ) from None

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Sample `sampling.num` rollouts of every prompt, in order; see `stream`."""
        groups = {place: group for found in self.stream(prompts, sampling) for place, group in found}
        return [groups[place] for place in range(len(prompts))]

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, name: str = ""
    ) -> Iterator[list[tuple[int, Group]]]:
        """Sample `sampling.num` rollouts of every prompt; lists of (place among the prompts, group) of those that were
        finished meanwhile. By its name it can be aborted.

        With a seed every rollout has its own, made from (sampling.seed, prompt.key, index): the same request gives the
        same tokens whatever runs beside it. Log-probs are those of the sampled distribution: after temperature and
        token mask. Raises ValueError naming the prompt that cannot be served.
        """
        call = self._calls[name] = Call()
        expanded: list[tuple[int, ...]] = []
        for places in self._ended(call, lambda: expanded.extend(self._submit(call, prompts, sampling)), len(prompts)):
            yield [
                (place, Group(prompts[place], expanded[place], tuple(map(self._rollout, call.by_place[place]))))
                for place in places
            ]

    @abstractmethod
    def score(self, probes: Sequence[Probe]) -> ProbeScores:
        """Log-probs of the probes under the live weights: temperature 1, unmasked, never from a cache."""

    def load(self, publication: Publication, buckets: Sequence[Any]) -> LoadReport:
        """Take new weights between two steps; requests may be running.

        `buckets` are those of the publication, or data. Requests in flight are computed anew under
        the new weights from their next token on (their text so far stays), so each token's log-prob is exactly its
        version's. Raises CoverageError when the weights do not cover the model.
        """
        return self._do(lambda: self._load(publication, buckets))

    @abstractmethod
    def connect(self, address: str, size: int, timeout: float) -> None:
        """Join the trainer's line of `size` processes at "host:port", by which weights that are sent come."""

    def fingerprints(self, probes: Sequence[Probe]) -> Fingerprints:
        """Prints of every parameter group on the probes, under the trainer's names. For diagnosis: requests still
        running are aborted. Needs tensor_parallel 1."""
        if self.settings.tensor_parallel != 1:
            raise ValueError("fingerprints need tensor_parallel = 1: with more, no process holds whole modules")
        return self._do(lambda: self._fingerprints(probes))

    def heartbeat(self) -> Heartbeat:
        """Counters as they stand; never waits."""
        started = self._started
        error = None if self._error is None else f"{type(self._error).__name__}: {self._error}"
        return Heartbeat(self._steps, started, max(0, len(self._requests) - started), self._version, error)

    def pause(self) -> None:
        """Stop stepping after the current step. Requests keep their state; loads still work, scores wait."""
        self._set_paused(True)

    def resume(self) -> None:
        """Step again."""
        self._set_paused(False)

    def sleep(self) -> None:
        """Give the GPU's memory back: the weights go to the host, keys and values are dropped, and what still runs is
        aborted. Ask nothing before `wake`."""
        self._do(self._sleep)

    def wake(self) -> None:
        """Take the memory again, with the weights of before."""
        self._do(self._rise)

    def abort(self, name: str | None = None) -> None:
        """End all requests, or those of the stream of that name: what was sampled so far is returned, with finish
        "abort"."""
        if name is None:
            self._post(self._abort_all)
        elif name in self._calls:
            call = self._calls[name]
            self._post(lambda: self._abort(list(call.requests)))

    def close(self) -> None:
        """Abort what runs, end the engine and its thread."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join(timeout=self.settings.deadline)

    # Callers' side: post a command, wait with a deadline.

    def _post(self, command: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._wake:
            if self._error is not None:
                raise self._error
            if self._closed:
                raise RuntimeError("the rollout worker is closed")
            self._commands.append((command, future))
            self._wake.notify_all()
        return future

    def _do(self, command: Callable[[], Any]) -> Any:
        return self._post(command).result(timeout=self.settings.deadline)

    def _ended(self, call: Call, submit: Callable[[], Any], count: int) -> Iterator[list[int]]:
        """Submit a call's requests; the places that are done, those of one moment together. Each before a deadline."""
        try:
            self._do(submit)
            while count:
                found = [call.ended.get(timeout=self.settings.deadline)]
                while not call.ended.empty():
                    found.append(call.ended.get_nowait())
                places = [place for place in found if isinstance(place, int)]
                for error in found:
                    if isinstance(error, BaseException):
                        raise error
                count -= len(places)
                yield places
        except Empty:
            steps, left = self._steps, sum(call.open.values())
            raise TimeoutError(
                f"{left} of {len(call.requests)} requests unfinished after {self.settings.deadline:g} s "
                f"({steps} engine steps so far, {'paused' if self._paused else 'running'})"
            ) from None
        finally:
            self._calls = {name: other for name, other in self._calls.items() if other is not call}
            if call.open.total() and self._error is None and not self._closed:  # nobody waits for the rest any more
                self._post(lambda: self._abort(list(call.requests)))

    def _set_paused(self, paused: bool) -> None:
        with self._wake:
            self._paused = paused
            self._wake.notify_all()

    # What an engine does, in its thread.

    @abstractmethod
    def _start(self) -> None:
        """Load the model, with `_tokenizer` and `_stop_ids`."""

    @abstractmethod
    def _step(self) -> None:
        """One token of what runs, counted in `_steps`; `_close_request` those that end."""

    @abstractmethod
    def _submit(self, call: Call, prompts: Sequence[Prompt], sampling: Sampling) -> list[tuple[int, ...]]:
        """`_enter` the requests of prompts, whose expanded ids it returns."""

    @abstractmethod
    def _drop(self, request_ids: Sequence[str]) -> None:
        """Forget requests that nobody waits for."""

    @abstractmethod
    def _take_weights(self, publication: Publication, buckets: Sequence[Any]) -> None:
        """Raises CoverageError unless the buckets hold all weights of the model."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop everything computed with the weights of before."""

    @abstractmethod
    def _rest(self) -> None:
        """Give the GPU's memory back."""

    @abstractmethod
    def _rise(self) -> None:
        """Take it again."""

    @abstractmethod
    def _fingerprints(self, probes: Sequence[Probe]) -> Fingerprints: ...

    @abstractmethod
    def _shutdown(self) -> None: ...

    # The engine's thread.

    def _run(self, ready: Future[None]) -> None:
        try:
            self._start()
        except BaseException as error:  # noqa: BLE001 - handed to the constructor, which raises it
            ready.set_exception(error)
            return
        ready.set_result(None)
        try:
            while self._next():
                if self._requests and not self._paused:
                    self._step()
        except BaseException as error:  # noqa: BLE001 - handed to every caller
            lost = ActorLostError(f"the engine of this rollout worker ended with {type(error).__name__}: {error}")
            lost.__cause__ = error
            self._fail(lost)
        else:
            self._fail(RuntimeError("the rollout worker was closed"))
        finally:
            self._shutdown()

    def _next(self) -> bool:
        """Run the commands that wait; without work, wait for one. False when closed."""
        with self._wake:
            while not self._closed and not self._commands and (self._paused or not self._requests):
                self._wake.wait(IDLE_SECONDS)
            commands = list(self._commands)
            self._commands.clear()
        for place, (command, future) in enumerate(commands):
            try:
                result = command()
            except Exception as error:
                future.set_exception(error)
                if self._error is not None:
                    for _, waiting in commands[place + 1 :]:
                        waiting.set_exception(error)
                    raise
            else:
                future.set_result(result)
        return not self._closed

    def _fail(self, error: BaseException) -> None:
        with self._wake:
            self._error = error
            commands = list(self._commands)
            self._commands.clear()
        for _, future in commands:
            future.set_exception(error)
        for call in {id(request.call): request.call for request in self._requests.values()}.values():
            call.ended.put(error)
        self._requests.clear()

    def _close_request(self, request_id: str, finish: Finish) -> None:
        request = self._requests.pop(request_id)
        request.finish = finish
        if request.token_ids:
            self._started -= 1
        call = request.call
        call.open[request.place] -= 1
        if call.open[request.place] == 0:
            call.ended.put(request.place)

    def _abort(self, request_ids: Sequence[str]) -> None:
        known = [request_id for request_id in request_ids if request_id in self._requests]
        self._drop(known)
        for request_id in known:
            self._close_request(request_id, "abort")

    def _abort_all(self) -> None:
        self._abort(list(self._requests))

    def _enter(self, call: Call, request_ids: Sequence[str], each: int) -> None:
        """The engine has a call's requests, `each` of them for one place."""
        call.open.update(index // each for index in range(len(request_ids)))
        for index, request_id in enumerate(request_ids):
            entered = Request(call, index // each)
            call.requests[request_id] = self._requests[request_id] = entered
            call.by_place[entered.place].append(entered)

    def _load(self, publication: Publication, buckets: Sequence[Any]) -> LoadReport:
        start = time.perf_counter()
        try:
            self._take_weights(publication, buckets)
        except Exception as error:
            self._error = error  # half of the weights are new: this engine must not answer again
            raise
        self._forget()
        self._version = publication.version
        return LoadReport(publication.version, time.perf_counter() - start)

    def _sleep(self) -> None:
        self._abort_all()
        self._rest()

    def _rollout(self, request: Request) -> Rollout:
        ids = request.token_ids
        shown = ids[:-1] if request.finish == "stop" and ids and ids[-1] in self._stop_ids else ids
        assert request.finish is not None
        return Rollout(
            tuple(ids),
            tuple(request.logprobs),
            tuple(request.versions),
            self._tokenizer.decode(shown, skip_special_tokens=False),
            request.finish,
        )


def rollout_seed(seed: int, key: str, index: int) -> int:
    """The seed of one rollout: a 63-bit hash, the same in every process and Python version."""
    digest = hashlib.sha256(f"{seed}\0{key}\0{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stop_ids(tokenizer: Any, config: Any) -> list[int]:
    """Ids that end a completion: the tokenizer's end of text and those the model's config names."""
    found = {tokenizer.eos_token_id}
    for part in (config, config.get_text_config()):
        named = getattr(part, "eos_token_id", None)
        found.update(named if isinstance(named, list) else [named])
    return sorted(found - {None})


def _decode(media: Media) -> tuple[str, Image.Image]:
    return media.digest(reads=True), media.open()
