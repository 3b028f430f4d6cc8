"""What a node of an allocation asks while a Ray cluster forms: its own address, and whether all have joined.

python -m actors.nodes address PEER                the address by which this machine reaches PEER
python -m actors.nodes join FILE COUNT SECONDS PID wait for the head's address in FILE, then for COUNT nodes
"""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path


class JoinError(RuntimeError):
    """A cluster that did not form; the message says how far it came."""


def address(peer: str) -> str:
    """Of the interface that leads to `peer`: a machine's name for itself may be a loopback address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # sends nothing
        return str(probe.getsockname()[0])


def port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def join(file: Path, count: int, seconds: float, pid: int) -> None:
    """Wait until the head has written its address to `file` and `count` nodes are alive; `pid`: of what starts them,
    without which nothing is waited for. Raises JoinError."""
    import ray  # seconds, which the other question need not wait for

    deadline = time.monotonic() + seconds

    def waited(how_far: str) -> None:
        if not Path(f"/proc/{pid}").exists():
            raise JoinError(f"what starts Ray on the nodes has ended: {how_far}")
        if time.monotonic() > deadline:
            raise JoinError(f"{how_far} within {seconds:g} s")
        time.sleep(0.5)

    while not file.exists():
        waited("the head did not come up")
    ray.init(address=file.read_text().strip(), log_to_driver=False, configure_logging=False)
    try:
        while len(alive := [str(node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"]]) < count:
            waited(f"{len(alive)} of {count} nodes joined ({', '.join(alive)})")
    finally:
        ray.shutdown()


def main(arguments: list[str]) -> int:
    match arguments:
        case ["address", peer]:
            print(address(peer))
        case ["port"]:
            print(port())
        case ["join", file, count, seconds, pid]:
            try:
                join(Path(file), int(count), float(seconds), int(pid))
            except (JoinError, ConnectionError) as error:
                print(f"rlhf: {error}", file=sys.stderr)
                return 1
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
