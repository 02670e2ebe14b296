"""What a job would cost on each device: estimates from calibrations, and the cheapest of them.

Everything here is a pure function of a job and of calibrations, whether those were measured (`gdjax.calibration`) or
made up:

    seconds = compile + move + calls + steps
    compile = seconds of a compilation / (1 + earlier runs of the job), 0 where the program is there already
    move    = bytes brought to the device / its rate + bytes taken back / its rate
    calls   = seconds of a launch × calls
    steps   = steps × max(least seconds of a step, problems per device × operations / operations per second)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

HOST = ""
"""Where arrays lie that are on no accelerator."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """How fast a device takes steps of a kind of problem.

    Attributes:
        step: seconds of one step of a few problems: what a step costs however few there are.
        rate: operations per second when there are many.
    """

    step: float
    rate: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a short measurement says of a device.

    Attributes:
        compile: seconds to compile a program.
        call: seconds to launch it once.
        to: bytes per second from the host's memory to the device; to the host itself, as they are read there.
        back: bytes per second from the device to the host's memory; from the host itself, as they are written there.
        scalar: the pace of problems whose values are single numbers.
        vector: the pace of all others.
    """

    compile: float
    call: float
    to: float
    back: float
    scalar: Pace
    vector: Pace


@dataclasses.dataclass(frozen=True)
class Job:
    """A batch to be run, as far as its cost goes.

    Attributes:
        problems: how many.
        steps: updates for each, at most.
        operations: arithmetic operations of one step of one problem, roughly.
        bytes_in: bytes of one problem's weights, data and hyperparameters.
        bytes_out: bytes of one problem's results.
        shared: bytes of what all problems share.
        elementwise: whether a problem's values are single numbers.
        placed: which share of all these bytes lies on which accelerator, by name; the rest lies on the host.
        home: where the results are wanted: the accelerator on which the weights lie, or the host.
        runs: how often this kind of job has been run before.
    """

    problems: int
    steps: int
    operations: float
    bytes_in: float
    bytes_out: float
    shared: float = 0.0
    elementwise: bool = False
    placed: Mapping[str, float] = dataclasses.field(default_factory=dict)
    home: str = HOST
    runs: int = 0

    def of(self, problems: int) -> Job:
        """The same job with another number of problems."""
        return dataclasses.replace(self, problems=problems)


@dataclasses.dataclass(frozen=True)
class Option:
    """A way to run a job: on these devices, which are of one kind.

    Attributes:
        devices: their names.
        calibration: that of one of them.
        host: whether they compute in the host's memory.
        most: problems per call on one of them.
        compiled: whether the job's program is compiled for them.
    """

    devices: tuple[str, ...]
    calibration: Calibration
    host: bool
    most: int = 1 << 20
    compiled: bool = False


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds that a job is expected to take on some devices, by what takes them."""

    devices: tuple[str, ...]
    compile: float
    move: float
    calls: float
    steps: float

    @property
    def seconds(self) -> float:
        """All of them together."""
        return self.compile + self.move + self.calls + self.steps


def estimate(job: Job, option: Option, rates: Mapping[str, Calibration]) -> Estimate:
    """What the job costs on these devices; `rates` has the calibration of every accelerator on which its data lie."""
    speed, count = option.calibration, len(option.devices)
    each = -(-job.problems // count)
    pace = speed.scalar if job.elementwise else speed.vector
    calls = 1 if option.host else -(-each // option.most)
    work = max(pace.step, each * job.operations / pace.rate)
    return Estimate(
        option.devices,
        0.0 if option.compiled else speed.compile / (1 + job.runs),
        moving(job, option, rates),
        speed.call * calls * count,
        job.steps * work,
    )


def moving(job: Job, option: Option, rates: Mapping[str, Calibration]) -> float:
    """Seconds for bringing the data to the devices and the results to where they are wanted."""
    results = job.problems * job.bytes_out
    total = job.problems * job.bytes_in + job.shared * len(option.devices)
    seconds, elsewhere = 0.0, total
    for name, share in job.placed.items():
        elsewhere -= share * total
        if name not in option.devices:
            seconds += share * total / rates[name].back
            elsewhere += share * total
    seconds += max(0.0, elsewhere) / option.calibration.to
    if job.home not in option.devices:
        seconds += results / option.calibration.back
        if job.home != HOST:
            seconds += results / rates[job.home].to
    return seconds


def cheapest(estimates: Iterable[Estimate]) -> Estimate:
    """The estimate of fewest seconds; the first of equals."""
    return min(estimates, key=lambda one: one.seconds)


def estimates(job: Job, options: Iterable[Option], rates: Mapping[str, Calibration]) -> tuple[Estimate, ...]:
    """What the job costs on each of the options."""
    return tuple([estimate(job, option, rates) for option in options])


def crossover(job: Job, options: Iterable[Option], rates: Mapping[str, Calibration], upto: int = 1 << 40) -> int | None:
    """The smallest batch from which on the choice is another than for one problem; None: it never is up to `upto`."""
    options = list(options)

    def chosen(problems: int) -> tuple[str, ...]:
        return cheapest(estimates(job.of(problems), options, rates)).devices

    small = chosen(1)
    low, high = 1, 2
    while chosen(high) == small:
        low, high = high, 2 * high
        if high > upto:
            return None
    while high - low > 1:
        middle = math.isqrt(low * high) if high > 2 * low else (low + high) // 2
        low, high = (middle, high) if chosen(middle) == small else (low, middle)
    return high


@functools.cache
def shards(devices: int) -> tuple[int, ...]:
    """How many of so many devices of a kind are worth a thought: powers of two, and all of them."""
    powers = {1 << power for power in range(devices.bit_length()) if 1 << power <= devices}
    return tuple(sorted(powers | {devices}))
