"""Running counts of a batch on its way: shown as a bar, handed to a callback that may end the run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from gdjax.engine.program import CONVERGED, DIVERGED

PERIOD = 1.0
"""Seconds of work between two looks at the counts: a look costs about a hundredth of that."""

FIRST = 512
"""Updates before the first look: so many that one more pass over memory is lost in them."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a batch is.

    Attributes:
        problems: problems in the batch.
        done: how many of them have ended.
        converged: how many have met the stop rule.
        diverged: how many have diverged.
        updates: updates that lanes have run, all together: those of problems that wait for others included, so that
            `solution.steps.sum() / updates` at the end is the share of them that was of use.
        seconds: since the run began, compiling included.
        seconds_left: estimated from the updates or the problems that are left; None before there is anything to go by.

    >>> Progress(problems=10, done=5, converged=4, diverged=1, updates=800, seconds=2.0, seconds_left=2.0).rate
    400.0
    """

    problems: int
    done: int
    converged: int
    diverged: int
    updates: int
    seconds: float
    seconds_left: float | None

    @property
    def rate(self) -> float:
        """Updates per second, over all problems."""
        return self.updates / self.seconds if self.seconds else 0.0


class Watch:
    """Keeps the counts of one run. The engines tell it what happened; it says when to look and whether to go on."""

    def __init__(self, problems: int, callback: Callable[[Progress], Any] | None, shown: bool):
        self.problems, self.callback = problems, callback
        self.began = self.looked = time.perf_counter()
        self.ended = {CONVERGED: 0, DIVERGED: 0}
        self.before = 0
        self.updates = 0
        self.stopped = False
        self.bar: Any = bar() if shown else None

    def took(self, updates: int) -> None:
        """So many updates more were taken, over all problems."""
        self.updates += updates

    def affordable(self, lanes: int) -> int:
        """Updates that so many lanes can take until the next look, by the speed so far."""
        if not self.updates:
            return FIRST
        speed = self.updates / (time.perf_counter() - self.began)
        return max(1, int(speed * PERIOD / lanes))

    @property
    def due(self) -> bool:
        """Whether it is time for a look."""
        return time.perf_counter() - self.looked >= PERIOD

    def settle(self, status: Any) -> None:
        """Problems that have ended for good, by their statuses."""
        for kind in self.ended:
            self.ended[kind] += int(np.count_nonzero(np.asarray(status) == kind))
        self.before += len(np.asarray(status))

    def share(self, count: int, done: float) -> float:
        """The share of all work that is done where `count` problems are at hand, a share `done` of their work."""
        return (self.before + count * done) / self.problems

    def tell(self, status: Any = (), done: int = 0, share: float | None = None) -> bool:
        """Show the counts, `status` and `done` being of the problems at hand; returns whether to end the run."""
        self.looked = time.perf_counter()
        seconds = self.looked - self.began
        here = {kind: int(np.count_nonzero(np.asarray(status) == kind)) for kind in self.ended}
        finished = self.before + done
        share = self.share(done, 1.0) if share is None else share
        left = seconds * (1 - share) / share if share > 0 else None
        counts = Progress(
            problems=self.problems,
            done=finished,
            converged=self.ended[CONVERGED] + here[CONVERGED],
            diverged=self.ended[DIVERGED] + here[DIVERGED],
            updates=self.updates,
            seconds=seconds,
            seconds_left=left,
        )
        if self.bar is not None:
            show(self.bar, counts, share)
        if self.callback is not None and not self.stopped:
            self.stopped = bool(self.callback(counts))
        return self.stopped

    def end(self, status: Any) -> None:
        """The last look, when all problems have ended with these statuses; there is nothing left to stop."""
        self.before, self.ended = 0, dict.fromkeys(self.ended, 0)
        self.tell(status, self.problems, share=1.0)
        self.stopped = False

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()


def check_watch(callback: Any, progress: Any) -> None:
    """What a user may ask for: a function to be told, and yes or no to a bar."""
    if callback is not None and not callable(callback):
        raise TypeError(
            f"callback is a {type(callback).__name__}; pass a function of a gdjax.progress.Progress that returns "
            "whether to end the run"
        )
    if not isinstance(progress, bool | np.bool_):
        raise TypeError(f"progress is {progress!r}, a {type(progress).__name__}; pass True for a bar, False for none")


def bar() -> Any:
    """A bar on the terminal or in the notebook; None where nobody would see it."""
    try:
        from rich import console, progress
    except ImportError:
        raise ImportError("progress=True draws with rich: pip install rich, or leave progress out") from None
    screen = console.Console(stderr=True)
    if not (screen.is_terminal or screen.is_jupyter):
        return None
    columns = (
        progress.BarColumn(bar_width=24),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[counts]}"),
        progress.TimeRemainingColumn(compact=True),
        progress.TextColumn("left"),
    )
    made = progress.Progress(*columns, console=screen, transient=True)
    made.add_task("", total=1.0, counts="", visible=False)
    return made


def show(bar: Any, counts: Progress, share: float) -> None:
    """Bring the bar up to date; it appears with the first look, so that short runs show none."""
    from rich.filesize import pick_unit_and_suffix

    unit, prefix = pick_unit_and_suffix(int(counts.rate), ["", "k", "M", "G"], 1000)
    said = [f"{counts.done:,} of {counts.problems:,} done", f"{counts.rate / unit:.3g} {prefix} steps/s"]
    if counts.done:
        said.append(f"{100 * counts.converged / counts.done:.0f}% converged")
    if counts.diverged:
        said.append(f"{counts.diverged:,} diverged")
    bar.start()
    bar.update(bar.task_ids[0], completed=share, counts=", ".join(said), visible=True)
