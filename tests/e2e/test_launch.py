"""The driver and the signals it gets."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRIVER = """
import asyncio, os, sys
from pathlib import Path
from rlhf.cli import _explained, _private_ray
from rlhf.preemption import Preemption
_private_ray(Path(sys.argv[1]))
import ray
from actors.launch import _own_signals

async def work(_):
    with _own_signals():
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        print("ready", flush=True)
        await asyncio.sleep(300)
    finally:
        ray.shutdown()
        print("left", flush=True)

sys.exit(asyncio.run(_explained(work, "go on", Preemption())))
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGTERM, 75, "first stage"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_ends_the_driver_in_order(tmp_path: Path, number: signal.Signals, status: int, word: str) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    try:
        assert driver.stdout is not None
        assert select.select([driver.stdout], [], [], 120)[0], "Ray did not start in time"
        assert driver.stdout.readline() == "ready\n"
        driver.send_signal(number)
        said, complaint = driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert (driver.returncode, said) == (status, "left\n"), complaint
    assert f"{word}; go on" in complaint
