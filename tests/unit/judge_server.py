"""A real server on this machine that answers as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

PATIENCE = 10.0  # seconds after which a server that never answers lets go


@dataclass(frozen=True)
class Answer:
    """A status, a body, and headers. hangs: nothing is ever sent; trickles: the body comes a byte at a time, without
    end; lies: the body is shorter than its header says."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    hangs: bool = False
    trickles: bool = False
    lies: bool = False


def said(text: Any, finish: Any = "stop", **choice: Any) -> Answer:
    """A completion as OpenAI's protocol has it."""
    whole = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish, **choice}
    return Answer(body=json.dumps({"object": "chat.completion", "choices": [whole]}).encode())


class Server:
    """Answers the n-th request (from 0) with `answer(n, body)`; keeps bodies, headers, and the most at once."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], Answer]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most, self._open, self._lock, self._over = 0, 0, threading.Lock(), threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner._lock:
                    number = len(owner.bodies)
                    owner.bodies.append(body)
                    owner.headers.append({name.lower(): value for name, value in self.headers.items()})
                    owner._open += 1
                    owner.most = max(owner.most, owner._open)
                try:
                    owner._send(self, answer(number, body))
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client had waited long enough
                finally:
                    with owner._lock:
                        owner._open -= 1

            def log_message(self, *arguments: Any) -> None:
                """Tests are silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        if answer.hangs:
            self._over.wait(PATIENCE)
            handler.close_connection = True
            return
        handler.send_response(answer.status)
        length = len(answer.body) + (1000 if answer.lies or answer.trickles else 0)
        for name, value in ({"Content-Length": str(length)} | answer.headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(answer.body)
        while answer.trickles and not self._over.wait(0.02):
            handler.wfile.write(b" ")
            handler.wfile.flush()
        handler.close_connection = answer.lies or answer.trickles

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(PATIENCE)
