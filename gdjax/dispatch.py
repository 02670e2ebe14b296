"""Which devices a job runs on: those that are named, or for `"auto"` those on which it is expected to end first.

Where there is a single device nothing is measured and nothing weighed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax

from gdjax import cost
from gdjax import device as dev
from gdjax import plan as plans
from gdjax.batch import Batch
from gdjax.calibration import calibration
from gdjax.cost import HOST, Calibration, Estimate, Job, Option
from gdjax.dryrun import check_program
from gdjax.engine.program import Program
from gdjax.key import Key, key_of
from gdjax.pieces import own
from gdjax.session import SESSIONS
from gdjax.solution import State
from gdjax.work import step_operations

log = logging.getLogger("gdjax")

KEPT = 256
"""Kinds of problem whose runs are counted."""

ASKED = "asked for"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The devices chosen for a job, and why.

    Attributes:
        devices: the `jax.Device`s, among which the batch is divided.
        reason: why these, in a few words.
        estimates: what was expected of each way to run the job; empty where nothing was weighed.
        job: the job that was weighed, or None.
        options: the ways to run it, with the calibrations they were judged by.

    >>> import gdjax
    >>> choice = gdjax.select_device("cpu")
    >>> choice.platform, choice.reason
    ('cpu', 'asked for')
    """

    devices: tuple[jax.Device, ...]
    reason: str
    estimates: tuple[Estimate, ...] = ()
    job: Job | None = None
    options: tuple[Option, ...] = ()

    @property
    def device(self) -> jax.Device:
        """The first of the devices."""
        return self.devices[0]

    @property
    def platform(self) -> str:
        """`"cpu"`, `"gpu"` or `"tpu"`."""
        return dev.platform_of(self.device)

    def explain(self) -> str:
        """The choice in words and, where devices were weighed, what each was expected to take, as a table."""
        lines = [f"{dev.label(self.devices)}: {self.reason}"]
        if self.job is None or not self.estimates:
            return lines[0]
        lines.append(described(self.job))
        rows: list[tuple[str, ...]] = [("device", "compile", "move", "calls", "steps", "together")]
        for one in sorted(self.estimates, key=lambda one: one.seconds):
            parts = (one.compile, one.move, one.calls, one.steps, one.seconds)
            rows.append((named(one.devices), *(in_units(seconds) for seconds in parts)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for name, *figures in rows:
            cells = (cell.rjust(width) for cell, width in zip(figures, widths[1:], strict=True))
            lines.append("   ".join([name.ljust(widths[0]), *cells]))
        return "\n".join([*lines, *turning(self.job, self.options)])

    def __str__(self) -> str:
        return self.explain()


def named(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def described(job: Job) -> str:
    data = job.problems * job.bytes_in + job.shared
    return (
        f"{job.problems:,} problems of {job.operations:,.0f} operations a step, at most {job.steps:,} steps; "
        f"{data / 1e6:,.1f} MB in, {job.problems * job.bytes_out / 1e6:,.1f} MB out"
    )


def turning(job: Job, options: Sequence[Option]) -> list[str]:
    """From which batch size on other devices would be taken than for a single problem."""
    rates = rates_of(options)
    turn = cost.crossover(job, options, rates)
    if turn is None:
        return []
    small, large = (cost.cheapest(cost.estimates(job.of(n), options, rates)).devices for n in (1, turn))
    return [f"From {turn:,} such problems on {named(large)} is expected to be faster than {named(small)}."]


def in_units(seconds: float) -> str:
    """Three digits with a unit, such as `"1.20 ms"`."""
    if seconds == 0:
        return "0"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return "< 1 us"


def choose(
    request: Any, program: Program, batch: Batch, steps: int, state: State | None = None, running: bool = True
) -> Choice:
    """The devices for a job, which is about to be `running`. A run that goes on from a `state` stays on its kind of
    device: its bits are those of one longer run."""
    if not (isinstance(request, str) and request == "auto"):
        return Choice(tuple(dev.own_devices(dev.select_devices(request))), ASKED)
    groups, reason = dev.candidates()
    alike = [group for group in groups if state is not None and dev.kind(group[0]) == state.kind]
    if alike and len(groups) > 1:
        groups, reason = alike, "the run that goes on was there"
    if len(groups) == 1 and len(groups[0]) == 1:
        return Choice((groups[0][0],), reason)
    key = key_of(program, batch)
    kind = KINDS.get(key, program, batch)
    job = job_of(kind, batch, steps, state and state.carried)
    choice = weigh(job, groups, lambda devices: SESSIONS.compiled(key, devices))
    kind.runs += running
    log.info("%s", choice)
    return choice


def weigh(
    job: Job, groups: Sequence[Sequence[jax.Device]], compiled: Callable[[tuple[jax.Device, ...]], bool]
) -> Choice:
    """The cheapest of all ways to run a job on groups of devices, each of one kind."""
    ways = [way for group in groups for way in ways_of(group, job)]
    options = tuple([option(way, compiled(way)) for way in ways])
    estimates = cost.estimates(job, options, rates_of(options) if job.placed else {})
    best, *others = sorted(range(len(ways)), key=lambda way: estimates[way].seconds)
    times = in_units(estimates[best].seconds), in_units(estimates[others[0]].seconds)
    return Choice(ways[best], "expected to take {}, the next best {}".format(*times), estimates, job, options)


def ways_of(group: Sequence[jax.Device], job: Job) -> list[tuple[jax.Device, ...]]:
    """The first device, or one that holds data; several; all."""
    holding = [(device,) for device in group[1:] if name_of(device) in job.placed] if job.placed else []
    return [tuple(group[:1]), *holding, *(tuple(group[:count]) for count in cost.shards(len(group)) if count > 1)]


@functools.lru_cache(1024)
def option(devices: tuple[jax.Device, ...], compiled: bool) -> Option:
    names = tuple([name_of(device) for device in devices])
    return Option(names, calibration(devices[0]), dev.is_host(devices[0]), compiled=compiled)


def rates_of(options: Sequence[Option]) -> dict[str, Calibration]:
    return {name: option.calibration for option in options for name in option.devices}


@functools.cache
def name_of(device: jax.Device) -> str:
    return dev.label([device])


@dataclasses.dataclass
class Kind:
    """A kind of problem as far as its cost goes (see `gdjax.cost.Job`), and how often it has been run."""

    operations: float
    bytes_in: float
    bytes_out: float
    shared: float
    elementwise: bool
    runs: int = 0


class Kinds:
    """The kinds of problem that were weighed, the longest unused dropped first."""

    def __init__(self) -> None:
        self.kept: collections.OrderedDict[Key, Kind] = collections.OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: Key, program: Program, batch: Batch) -> Kind:
        found = self.kept.get(key)
        if found is None:
            check_program(program, batch)
            found = kind_of(program, batch)
        with self.lock:
            self.kept[key] = found
            self.kept.move_to_end(key)
            while len(self.kept) > KEPT:
                self.kept.popitem(last=False)
        return found


KINDS = Kinds()


def kind_of(program: Program, batch: Batch) -> Kind:
    trees = batch.weights, batch.data, batch.hyper
    flags = own(batch.weights), batch.data_flags, batch.hyper_flags
    pairs = list(zip(jax.tree.leaves(trees), jax.tree.leaves(flags), strict=True))
    weights = jax.tree.leaves(batch.weights)
    return Kind(
        operations=step_operations(program, batch),
        bytes_in=sum(leaf.nbytes for leaf, flag in pairs if flag) / batch.count,
        bytes_out=sum(leaf.nbytes for leaf in weights) / batch.count + 2 * weights[0].dtype.itemsize + 5,
        shared=sum(leaf.nbytes for leaf, flag in pairs if not flag),
        elementwise=plans.kind_of(trees, flags).elementwise,
    )


def job_of(kind: Kind, batch: Batch, steps: int, carried: Any = None) -> Job:
    """What there is to do, and where its data lie."""
    arrays = jax.tree.leaves((batch.weights, batch.data, batch.hyper))
    more = jax.tree.leaves(carried)
    placed, home = placement(arrays + more)
    return Job(
        problems=batch.count,
        steps=steps,
        operations=kind.operations,
        bytes_in=kind.bytes_in + sum([leaf.nbytes for leaf in more]) / batch.count,
        bytes_out=kind.bytes_out,
        shared=kind.shared,
        elementwise=kind.elementwise,
        placed=placed,
        home=home,
        runs=kind.runs,
    )


def placement(arrays: list[Any]) -> tuple[dict[str, float], str]:
    """`(which share of the bytes lies on which accelerator, where the first array lies)`."""
    held: dict[str, float] = {}
    home = HOST
    for number, leaf in enumerate(arrays):
        if not isinstance(leaf, jax.Array):
            continue
        devices = leaf.devices()
        for device in devices:
            if not dev.is_host(device):
                held[name_of(device)] = held.get(name_of(device), 0.0) + leaf.nbytes / len(devices)
                home = name_of(device) if number == 0 else home
    total = sum([leaf.nbytes for leaf in arrays]) if held else 1
    return {name: size / total for name, size in held.items()}, home
