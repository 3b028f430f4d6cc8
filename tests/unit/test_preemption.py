"""Signals that ask a run to stop: its exit status, and how long it may take."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Awaitable, Callable

import pytest

from actors.security import JOB_STOP_SECONDS, job_stop_seconds, ray_environment
from rlhf.cli import REQUEUE, _explained, main
from rlhf.preemption import PreemptedError, Preemption, patience
from rlhf.recipe import ClusterTable

AGAIN = "the same command continues from the last checkpoint"


def ended(run: Callable[[Preemption], Awaitable[None]], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and complaint of a command that has 100 s to leave."""
    with Preemption(grace=100.0) as preemption:
        return asyncio.run(_explained(run, AGAIN, preemption)), capsys.readouterr().err


async def signalled(*numbers: int) -> None:
    """This process got these signals, and has looked at them."""
    for number in numbers:
        os.kill(os.getpid(), number)
        await asyncio.sleep(0.01)  # a signal is seen by the loop, not by the code that goes on


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_ends_after_its_step(capsys: pytest.CaptureFixture[str], number: int) -> None:
    async def run(preemption: Preemption) -> None:
        preemption.stage = "long-cot"
        with preemption.heeded():
            await signalled(number, number)  # as `timeout` does, which sends to its group, too
            preemption.leave(3)

    name = signal.Signals(number).name
    assert ended(run, capsys) == (75, f"rlhf: preempted ({name}) at step 3 of stage 'long-cot'; {AGAIN}\n")


def test_a_run_with_nothing_to_save_ends_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    async def run(_: Preemption) -> None:
        await signalled(signal.SIGTERM)
        await asyncio.sleep(60)

    assert ended(run, capsys) == (75, f"rlhf: preempted (SIGTERM) before its first stage; {AGAIN}\n")


def test_a_second_sigterm_waits_for_no_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.preemption.AGAIN_SECONDS", -1.0)

    async def run(preemption: Preemption) -> None:
        preemption.stage = "long-cot"
        with preemption.heeded():
            await signalled(signal.SIGTERM, signal.SIGTERM)
            await asyncio.sleep(60)

    status, said = ended(run, capsys)
    assert status == REQUEUE
    assert "its step was not waited for when asked again, so what it did since its last save is lost" in said


def test_an_interrupt_waits_for_no_step_and_is_no_preemption(capsys: pytest.CaptureFixture[str]) -> None:
    async def run(preemption: Preemption) -> None:
        with preemption.heeded():
            await signalled(signal.SIGTERM, signal.SIGINT)
            await asyncio.sleep(60)

    assert ended(run, capsys) == (130, f"rlhf: interrupted; {AGAIN}\n")


def test_of_a_short_notice_the_shorter_time_counts() -> None:
    preemption = Preemption(grace=100.0, stage="long-cot")

    async def run() -> None:
        preemption.task = asyncio.current_task()
        with preemption.heeded():
            preemption.ask("its machine is drained", 0.1)
            await asyncio.sleep(60)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert preemption.cancelled.startswith(
        "preempted (its machine is drained) in stage 'long-cot': its step did not end within 0 s"
    )


def test_a_stage_that_ends_when_asked_leads_to_no_other() -> None:
    async def run() -> None:
        with Preemption(stage="long-cot") as preemption, preemption.heeded():
            preemption.ask("SIGTERM")

    with pytest.raises(PreemptedError, match="after the last step of stage 'long-cot'"):
        asyncio.run(run())


def test_who_takes_too_long_to_leave_is_ended_and_nobody_else() -> None:
    async def asked(preemption: Preemption) -> None:
        with contextlib.suppress(PreemptedError), preemption.heeded():
            preemption.ask("SIGTERM")

    over = threading.Event()
    with Preemption(0.5, over.set) as preemption:
        asyncio.run(asked(preemption))
    assert not over.wait(1)
    with Preemption(0.5, over.set) as preemption:
        asyncio.run(asked(preemption))
        assert over.wait(30)


def test_of_a_grace_some_is_left_for_leaving() -> None:
    assert [patience(grace) for grace in (10, 60, 120)] == [5, 30, 90]


def test_ray_waits_for_a_job_as_long_as_the_job_thinks(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ray")
    for name in ("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_STOP_WAIT_TIME_S"):
        monkeypatch.delenv(name, raising=False)
    assert ClusterTable().grace_seconds == JOB_STOP_SECONDS
    assert ray_environment(folder)["RAY_JOB_STOP_WAIT_TIME_S"] == str(JOB_STOP_SECONDS)
    assert job_stop_seconds() == float("inf")  # of no job
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert job_stop_seconds() == 3.0  # Ray's own
    assert "RAY_JOB_STOP_WAIT_TIME_S" not in ray_environment(folder)
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    assert job_stop_seconds() == 60.0


def test_the_status_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"\n{REQUEUE} preempted: SIGTERM, SIGUSR1 or a drained node" in capsys.readouterr().out
