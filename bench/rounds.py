"""How it is timed: all programs of a case in one process, one after another, round after round (A B C A B C
...).

A machine's speed drifts by more than the programs differ; within a round they meet the same weather, so the
ratio of two programs is taken in each round and its median reported. A run begins with NumPy arrays on the
host and ends with NumPy arrays on the host; the first run of a program compiles and is kept apart."""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench import exact
from bench.cases import Case, Inputs
from bench.peers import Answer, Program, Run, Skip, own, programs

ENOUGH = 0.05  # a program shorter than this many seconds is repeated within its turn until it has had them
MOST_REPEATS = 20
LONG = 5.0  # a program that takes so many seconds does not depend on the state it finds the memory in
PAUSE = 0.05  # lets the spinning threads of the program before fall asleep
SLOW = ((2, 20.0), (1, 60.0))  # at most so many rounds for a program that takes longer than so many seconds
LIMITS = ("c loop", "multiply-adds")  # no programs that a user could use


@dataclass
class Row:
    """One program on one case."""

    case: str
    program: str
    problems: int
    ran: int  # problems actually run; the times are scaled to all of them
    seconds: list[float | None] = field(default_factory=list)  # one per round
    first_seconds: float | None = None  # of the run that compiles
    peak_bytes: int | None = None  # memory on top of what was there before the run
    useful_steps: int | None = None  # steps that the problems needed, all together
    lane_share: float | None = None  # useful steps / steps the lanes went through
    error: float | None = None  # of the weights; with a stop rule the gradient / tolerance
    converged: float | None = None  # share, with a stop rule
    work: int | None = None  # multiply-adds of one run, for the limit of that name
    bit_equal: bool | None = None  # gdjax: some problems run alone gave the same bits
    notes: str = ""
    missing: str = ""  # why there is no time

    @property
    def times(self) -> list[float]:
        """Seconds of the rounds it ran in."""
        return [value for value in self.seconds if value is not None]

    @property
    def median(self) -> float | None:
        """Median seconds."""
        return statistics.median(self.times) if self.times else None

    @property
    def compile_seconds(self) -> float | None:
        """What the first run took longer than the others."""
        if self.first_seconds is None or self.median is None:
            return None
        return max(self.first_seconds - self.median, 0.0)

    @property
    def steps_per_second(self) -> float | None:
        """Useful steps per second, median."""
        return self.useful_steps / self.median if self.useful_steps and self.median else None


@dataclass(frozen=True)
class Result:
    """All programs on one case; `limit` is the seconds of the limit in each round."""

    case: str
    title: str
    problems: int
    steps: int
    limit_name: str
    limit: list[float | None]
    rows: list[Row]
    targets: list[dict[str, Any]]
    sweep: str | None = None
    error_means: str = "largest error of the weights"

    def row(self, program: str) -> Row | None:
        """The row of this program, None if it was not asked for or has no time."""
        return next((row for row in self.rows if row.program == program and row.times), None)

    def ratio(self, program: str, to: str = "gdjax") -> tuple[float, float, float] | None:
        """How many times longer `program` takes than `to`: median, least and most over the rounds."""
        a, b = self.row(program), self.row(to)
        return None if a is None or b is None else per_round(a.seconds, b.seconds)

    def share(self, program: str) -> tuple[float, float, float] | None:
        """Speed as a share of the limit: median, least and most."""
        row = self.row(program)
        return None if row is None else per_round(self.limit, row.seconds)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """And back."""
        return cls(**{**data, "rows": [Row(**row) for row in data["rows"]]})


def per_round(over: list[float | None], under: list[float | None]) -> tuple[float, float, float] | None:
    """Median, least and most of the quotient over the rounds that have both."""
    pairs = zip(over, under, strict=False)
    ratios = [a / b for a, b in pairs if a is not None and b is not None and b > 0]
    return (statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


class Memory:
    """Peak memory of a stretch of code: of the device where it keeps count, else of this process."""

    def __init__(self, device: Any) -> None:
        self.device = device if device is not None and device.platform != "cpu" else None
        with suppress(OSError):
            # Linux: sets the high-water mark back to what is resident now.
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self.now()

    def now(self) -> int:
        """Bytes at the high-water mark."""
        if self.device is not None:
            return int((self.device.memory_stats() or {}).get("peak_bytes_in_use", 0))
        try:
            line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        except (OSError, StopIteration):
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def grown(self) -> int | None:
        """Bytes that the high-water mark rose by since; None where it cannot tell, below an older mark."""
        grown = max(self.now() - self.before, 0)
        return None if self.device is not None and grown == 0 else grown


def timed(run: Run, repeat: bool = True) -> tuple[float, Answer]:
    """Run undisturbed, short programs several times over; returns the median seconds and the last answer.

    The first run of a turn does not count, unless it is a long one or the only one: memory that was free while others
    ran has gone back to the system, a virtual machine's to its host, and to ask for it anew may take longer than the
    run.
    """
    gc.collect()
    time.sleep(PAUSE)
    seconds: list[float] = []
    while True:
        answer = None  # its memory is for the next run
        start = time.perf_counter()
        answer = run()
        seconds.append(time.perf_counter() - start)
        if repeat and len(seconds) == 1 and seconds[0] < LONG:
            continue
        if not repeat or sum(seconds) > ENOUGH or len(seconds) > MOST_REPEATS:
            return statistics.median(seconds[1:] or seconds), answer


def part_for(program: Program, case: Case, inputs: Inputs) -> Inputs:
    """The problems this program runs: all, or an even sample of them."""
    if program.sample is None or program.sample >= len(inputs):
        return inputs
    return inputs.take(np.linspace(0, len(inputs) - 1, program.sample).astype(np.int64), case.shared)


def scale(inputs: Inputs, part: Inputs) -> float:
    """By how much all problems are more work than this part."""
    if inputs.useful_steps is not None and part.useful_steps is not None:
        return float(inputs.useful_steps.sum() / part.useful_steps.sum())
    return len(inputs) / len(part)


def judge(row: Row, case: Case, part: Inputs, answer: Answer) -> None:
    """Write down what the first answer was worth."""
    row.notes, row.work = answer.notes, answer.work
    if row.program in LIMITS and (case.tolerance is not None or not len(answer.weights)):
        return
    row.error = exact.error(case, part, answer)
    if answer.converged is not None and case.tolerance is not None:
        row.converged = float(np.mean(answer.converged))
    if answer.steps is not None and row.program in ("vmap", "optax", "jaxopt", "optimistix"):
        # Under vmap every lane goes on until the last one is done.
        row.lane_share = float(answer.steps.sum() / (len(answer.steps) * max(int(answer.steps.max()), 1)))
    if row.ran < row.problems:
        row.notes = ", ".join(filter(None, (row.notes, f"scaled up from {row.ran} problems")))


def useful_steps(case: Case, answers: dict[str, Answer]) -> int | None:
    """Steps that all problems need together: as many as gdjax, or plain vmap, took."""
    if case.tolerance is None:
        return case.problems * case.steps
    counts = (answers[name].steps for name in ("gdjax", "vmap", "numba") if name in answers)
    return next((int(steps.sum(dtype=np.int64)) for steps in counts if steps is not None), None)


def run_case(
    case: Case,
    *,
    rounds: int = 5,
    device: str = "cpu",
    only: Iterable[str] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Time the programs of one case in interleaved rounds.

    Args:
        case: what is solved, at its own size.
        rounds: how often each program runs after its first, compiling run.
        device: where gdjax and the peers that can follow it run, as gdjax names it.
        only: names of programs, None for all of the case. The limit is always among them.
        say: is told what happens.
    """
    from bench.peers.jax_peers import pick
    from gdjax.device import is_host

    place = pick(device)
    inputs = case.inputs()
    limit = case.limit if is_host(place) else "multiply-adds"
    names = [name for name in dict.fromkeys((*case.programs, limit)) if only is None or name in (*only, limit)]
    rows, runs, parts, answers = {}, {}, {}, {}
    for name in names:
        program = programs()[name]
        part = parts[name] = part_for(program, case, inputs)
        row = rows[name] = Row(case.name, name, case.problems, len(part))
        say(f"{case.name}: {name}, first run")
        try:
            runs[name] = program.build(case, part, device)
            memory = Memory(place if program.on_device else None)
            row.first_seconds, answer = timed(runs[name], repeat=False)
            row.peak_bytes = memory.grown()
            judge(row, case, part, answer)
            answers[name] = answer if name in ("gdjax", "vmap", "numba") else Answer(answer.weights[:0])
        except Skip as reason:
            row.missing = f"skipped: {reason}"
        except Exception as error:  # one broken peer must not cost the figures of the others
            row.missing = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            runs.pop(name, None)
    if "gdjax" in runs:
        say(f"{case.name}: gdjax, problems alone")
        rows["gdjax"].bit_equal = own.bit_equal(answers["gdjax"], own.alone(case, inputs, device))
        if case.tolerance is not None:
            rows["gdjax"].lane_share = own.lane_share(case, inputs, device)
    steps = useful_steps(case, answers)
    del answers
    factors = {name: scale(inputs, parts[name]) for name in names}
    for number in range(rounds):
        for name, run in runs.items():
            row = rows[name]
            say(f"{case.name}: {name}, round {number + 1} of {rounds}")
            slow = any(number >= most and max(row.times) / factors[name] > long for most, long in SLOW)
            row.seconds.append(None if slow else timed(run)[0] * factors[name])
    for row in rows.values():
        if row.first_seconds is not None:
            # The scaled time of a sample says nothing of compiling.
            row.first_seconds = row.first_seconds * factors[row.program] if factors[row.program] == 1 else None
        row.useful_steps = None if row.program == "multiply-adds" else steps
    return Result(
        case.name,
        case.title,
        case.problems,
        case.steps,
        limit,
        limit_seconds(case, rows[limit], steps),
        list(rows.values()),
        [asdict(target) for target in case.targets],
        case.sweep,
        "largest error of the weights" if case.tolerance is None else "largest gradient / tolerance",
    )


def limit_seconds(case: Case, limit: Row, steps: int | None) -> list[float | None]:
    """In each round, how long the limit would need for this case."""
    if steps is None or not limit.times:
        return []
    factor = 1.0 if limit.work is None else steps * case.multiply_adds / limit.work
    return [None if value is None else value * factor for value in limit.seconds]


def quick(case: Case) -> Case:
    """The case with a fiftieth of its problems."""
    return case.smaller(0.02)
