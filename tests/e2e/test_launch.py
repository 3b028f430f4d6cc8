"""The driver, the signals it gets, and its machine that is to go."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
DRIVER = """
import asyncio, os, sys, time
from pathlib import Path
from rlhf.cli import _explained, _private_ray
from rlhf.preemption import Preemption
_private_ray(Path(sys.argv[1]))
import psutil
import ray
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
from ray.util import placement_group
from actors.drain import watched
from actors.launch import _apart, _own_signals

async def signalled(_):
    ours = os.getpgrp()
    assert ours == os.getpid()
    with _own_signals(), _apart():
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        family = psutil.Process().children(recursive=True)
        assert {"raylet", "gcs_server"} <= {process.name() for process in family}
        assert os.getpgrp() == ours
        assert ours not in {os.getpgid(process.pid) for process in family}
        print("ready", flush=True)
        await asyncio.sleep(300)
    finally:
        ray.shutdown()
        print("left", flush=True)

async def drained(preemption):
    with _own_signals():
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        group = placement_group([{"CPU": 1}])
        ray.get(group.ready(), timeout=60)
        here = ray.get_runtime_context()
        async with watched(group, preemption):
            print("ready", flush=True)
            await asyncio.sleep(3)
            assert not preemption.asked
            client, soon = ray._raylet.GcsClient(address=here.gcs_address), int(1000 * (time.time() + 60))
            client.drain_node(here.get_node_id(), DRAIN_NODE_REASON_PREEMPTION, "maintenance", soon)
            await asyncio.sleep(300)
    finally:
        ray.shutdown()
        print("left", flush=True)

with Preemption(grace=100.0) as preemption:
    sys.exit(asyncio.run(_explained(globals()[sys.argv[2]], "go on", preemption)))
"""


def driven(folder: Path, what: str, number: signal.Signals | None = None) -> str:
    """What the driver said in the end, with its status; `number` is sent to its process group when it is ready."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
        process_group=0,
    )
    try:
        assert driver.stdout is not None
        assert select.select([driver.stdout], [], [], 120)[0], "Ray did not start in time"
        assert driver.stdout.readline() == "ready\n"
        if number is not None:
            os.killpg(driver.pid, number)
        said, complaint = driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert said == "left\n", complaint
    return f"{driver.returncode} {complaint.splitlines()[-1]}"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGTERM, "75 rlhf: preempted (SIGTERM) before its first stage; go on"),
        (signal.SIGINT, "130 rlhf: interrupted; go on"),
    ],
)
def test_a_signal_ends_the_driver_in_order(tmp_path: Path, number: signal.Signals, said: str) -> None:
    assert driven(tmp_path, "signalled", number) == said


def test_a_machine_that_is_drained_asks_the_driver_to_stop(tmp_path: Path) -> None:
    assert driven(tmp_path, "drained") == "75 rlhf: preempted (its machine is drained) before its first stage; go on"
