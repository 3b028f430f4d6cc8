"""AdaLRS (2506.13274): the learning rate is searched for while a stage trains, by how fast its loss falls.

Between two shares of a stage's steps the loss's velocity, nats a step, is measured over windows of steps. Trial t of
a rate λ^t α times as high begins from a saved state. If the loss falls faster by more than twice the error of the
velocities, the rate stays; if slower, weights and optimizer go back to the saved state and the rate is divided by
λ^t β; else the trial's steps stay and the rate is what it was. Neither factor is ever below 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rlhf.recipe import Search


class Verdict(Enum):
    """What a loop is to do after a step: go on; save, since a trial begins; in a trial, neither log nor save; or go
    back to what was saved."""

    GO_ON = "go on"
    TRY = "save"
    UNDECIDED = "wait"
    GO_BACK = "go back"


@dataclass(frozen=True)
class Velocity:
    """How fast a loss falls, in nats a step, and its standard error."""

    value: float
    error: float


def velocity(losses: Sequence[float]) -> Velocity:
    """Minus the slope of the least-squares line through losses of consecutive steps, three or more."""
    count = len(losses)
    middle, mean = (count - 1) / 2, math.fsum(losses) / count
    spread = math.fsum((step - middle) ** 2 for step in range(count))
    slope = math.fsum((step - middle) * loss for step, loss in enumerate(losses)) / spread
    missed = math.fsum((loss - mean - slope * (step - middle)) ** 2 for step, loss in enumerate(losses))
    return Velocity(-slope, math.sqrt(missed / (count - 2) / spread))


def factors(settings: Search, trial: int) -> tuple[float, float]:
    """What trial `trial`, from 0, multiplies the rate by, and what the rate is divided by if it fails."""
    decayed = settings.decay**trial
    return max(1.0, decayed * settings.up), max(1.0, decayed * settings.down)


@dataclass
class RateSearch:
    """The search of a stage of `steps` steps, none without settings: by what the schedule's rate is multiplied
    (`scale`), how many trials there were, the losses of the window that is being measured, and the velocity before a
    trial, while there is one."""

    settings: Search | None
    steps: int
    scale: float = 1.0
    trials: int = 0
    losses: list[float] = field(default_factory=list)
    before: Velocity | None = None

    def saw(self, step: int, loss: float) -> Verdict:
        """Of the loss of optimizer step `step`, counted from 1. One that is not finite ends a trial."""
        if self.settings is None:
            return Verdict.GO_ON
        first, last = (share * self.steps for share in self.settings.span)
        if self.before is None and not first < step <= last:
            self.losses.clear()
            return Verdict.GO_ON
        if self.before is not None and not math.isfinite(loss):
            return self._failed(self.settings)
        self.losses.append(loss)
        if len(self.losses) < self.settings.window:
            return Verdict.GO_ON if self.before is None else Verdict.UNDECIDED
        measured, before = velocity(self.losses), self.before
        self.losses.clear()
        if before is not None:
            verdict, self.before = self._judge(before, measured, self.settings), None
            if verdict is not Verdict.TRY:
                return verdict
        # what was measured is the velocity at this rate, from which the next trial starts if there is time for one
        if step + self.settings.window > last:
            return Verdict.GO_ON
        self.before = measured
        self.scale *= factors(self.settings, self.trials)[0]
        return Verdict.TRY

    def _judge(self, before: Velocity, now: Velocity, settings: Search) -> Verdict:
        """Of a trial that has ended: TRY where it is kept, and a higher rate may be better still."""
        error = math.hypot(now.error, before.error) / math.sqrt(2)
        gained = now.value - before.value
        if gained < -2 * error:
            return self._failed(settings)
        if gained <= 2 * error:
            self.scale /= factors(settings, self.trials)[0]
        self.trials += 1
        return Verdict.TRY if gained > 2 * error else Verdict.GO_ON

    def _failed(self, settings: Search) -> Verdict:
        self.scale /= math.prod(factors(settings, self.trials))
        self.losses, self.before, self.trials = [], None, self.trials + 1
        return Verdict.GO_BACK

    def state(self) -> dict[str, Any]:
        before = None if self.before is None else [self.before.value, self.before.error]
        return {"scale": self.scale, "trials": self.trials, "losses": list(self.losses), "before": before}

    def restore(self, state: Mapping[str, Any]) -> None:
        before = state["before"]
        self.scale, self.trials, self.losses = state["scale"], state["trials"], list(state["losses"])
        self.before = None if before is None else Velocity(*before)
