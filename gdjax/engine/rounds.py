"""The rounds of a batch with a stop rule: sprint, take out who waits, close the gaps, sprint on.

All problems of a slab begin together, so those still running have taken the same number of updates. A round costs a
pass over memory, as much as some `lull` updates, and leaves lanes idle that wait for its end. Where ends are spread
evenly over the logarithm of the steps, a share `d/age` of the lanes ends in a round of `d` updates and is idle for half
of it: the two costs balance at `d = √(2·lull·age)`. A round is twice as long for every round in which nobody ended.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Protocol

import jax
import numpy as np

from gdjax.arena import aligned_empty
from gdjax.engine.program import AWAY, RAN_ALL_STEPS, RUNNING
from gdjax.engine.refill import Ended, Running
from gdjax.pieces import own, scatter
from gdjax.progress import Watch

log = logging.getLogger("gdjax")

SLAB = 1 << 18
"""Problems that begin together; their lanes are all the optimizer state that is held at a time."""

SHARE = 8
"""A round is at least 1/SHARE of the updates taken so far."""

FEW_BYTES = 128 * 1024
"""Problems whose lanes and data are no larger run straight to their end."""


class Run(Protocol):
    """The outputs of a compiled tile for `count` problems; `first` and `second` are what it is told beside them."""

    def __call__(self, name: str, inputs: Any, flags: Any, count: int, first: int, second: int, /) -> Any: ...


def rounds(
    run: Run,
    seats: Running,
    flags: Running,
    start: int,
    steps: int,
    stride: int,
    lull: int,
    watch: Watch | None = None,
) -> tuple[Ended, int]:
    """The ended lanes of a slab of problems, in their order.

    They are seated at update number `start`. And the updates that the longest of them may have taken: `steps`, unless
    the watch ended the run.
    """
    whole, count = seats, len(seats.lane["status"])
    kept: Any = None
    where: Any = None  # None: all problems are in their first places
    quiet = age = 0
    while True:
        status = seats.lane["status"]
        going = np.equal(status, RUNNING, out=aligned_empty(status.shape, np.bool_))
        lanes = int(np.count_nonzero(going))
        if lanes == len(going):
            quiet += age > 0
        elif lanes == 0 and where is None:
            return closed(run, whole, flags, seats.lane, start, steps, watch), steps
        else:
            if where is None:
                where = np.arange(count)
                kept = jax.tree.map(lambda leaf: aligned_empty(leaf.shape, leaf.dtype), seats.lane)
            stay, waits = np.flatnonzero(going), np.flatnonzero(~going)
            write(kept, jax.tree.map(lambda leaf, waits=waits: leaf[waits], seats.lane), where[waits])
            seats, where, quiet = select(seats, flags, stay), where[stay], 0
        if watch is not None and watch.due:
            waits = np.arange(0) if where is None else np.setdiff1d(np.arange(count), where, assume_unique=True)
            share = watch.share(count, max(len(waits) / count, age / max(1, steps)))
            if watch.tell(ends(run, whole, flags, kept, waits, start, steps), len(waits), share):
                steps = age
        if not lanes or steps - age < stride:
            break
        updates = ahead(age, quiet, steps - age, stride, lull, lanes, watch)
        seats = seats._replace(lane=run("sprint", seats, flags, lanes, age, updates))
        age += updates
        if watch is not None:
            watch.took(lanes * updates)
    if where is not None:
        write(kept, seats.lane, where)
    return closed(run, whole, flags, seats.lane if where is None else kept, start, steps, watch), steps


def flowing(run: Run, name: str, inputs: Any, flags: Any, count: int, start: int, steps: int) -> Ended:
    """All problems to their ends through `gdjax.engine.flow`: `"fresh"` ones, or those in their lanes `"through"`. What
    its blocks leave goes through together, until nobody is left."""
    ended, (left, went) = run(name, inputs, flags, count, start, steps)
    where = away(ended) if left else np.arange(0)
    while len(where):
        seat_flags = Running(own(ended.lane), flags.data, flags.hyper)
        again = select(Running(ended.lane, inputs.data, inputs.hyper), seat_flags, where)
        some, (_, more) = run("through", again, seat_flags, len(where), start, steps)
        ended = jax.tree.map(lambda whole, part, which=where: scatter(whole, part, which), ended, some)
        where, went = where[away(some)], went + more
    if log.isEnabledFor(logging.INFO):
        before = start if name == "fresh" else inputs.lane["index"]
        taken = int(np.sum(ended.lane["index"] - before, dtype=np.int64))
        log.info("lanes went through %d updates, of which problems took %d", int(went), taken)
    return ended


def away(ended: Ended) -> np.ndarray:
    """The problems that blocks have left."""
    return np.flatnonzero(ended.lane["status"] == AWAY)


def closed(run: Run, whole: Running, flags: Running, kept: Any, start: int, steps: int, watch: Watch | None) -> Ended:
    """All problems taken to their ends, step by step from where they wait."""
    ended = run("finish", whole._replace(lane=kept), flags, len(kept["status"]), start, steps)
    if watch is not None:
        watch.took(int(np.sum(np.asarray(ended.lane["index"]) - np.asarray(kept["index"]), dtype=np.int64)))
    return ended


def ahead(age: int, quiet: int, left: int, stride: int, lull: int, lanes: int, watch: Watch | None) -> int:
    """The updates of the next round, a multiple of `stride`."""
    balanced = math.isqrt(2 * lull * max(age, lull // 2))
    updates = max(balanced, age // SHARE) << min(quiet, 8)
    updates = min(updates, max(age, balanced), left)
    if watch is not None:
        updates = min(updates, watch.affordable(lanes))
    return max(1, updates // stride) * stride


def ends(run: Run, whole: Running, flags: Running, kept: Any, waits: np.ndarray, start: int, steps: int) -> Any:
    """The statuses in which the problems that wait will end: a look ahead, for the counts alone."""
    if not len(waits):
        return ()
    seats = select(whole._replace(lane=kept), flags, waits)
    return run("finish", seats, flags, len(waits), start, steps).lane["status"]


def slices(run: Run, seats: Running, flags: Running, start: int, steps: int, watch: Watch) -> tuple[Ended, int]:
    """The same step by step on the device, so many steps at a time that the watch can be told in between."""
    age, count = 0, len(seats.lane["status"])
    while True:
        ahead = min(steps - age, watch.affordable(count))
        ended = run("finish", seats, flags, count, start + age, ahead)
        age += ahead
        watch.took(ahead * count)
        status = np.asarray(ended.lane["status"])
        going = (status == RAN_ALL_STEPS) & (np.asarray(ended.lane["index"]) < start + steps)
        done = int(count - going.sum())
        share = watch.share(count, max(done / count, age / steps))
        if watch.tell(status, done, share) or age >= steps or done == count:
            return ended, age
        seats = seats._replace(lane={**ended.lane, "status": np.where(going, np.int32(RUNNING), status)})


def straight(run: Run, seats: Running, flags: Running, start: int, steps: int, stride: int) -> Ended:
    """The same for few problems: one sprint to the end, where rounds would cost more than the lanes they free."""
    count, updates = len(seats.lane["status"]), steps // stride * stride
    if updates:
        seats = seats._replace(lane=run("sprint", seats, flags, count, 0, updates))
    return run("finish", seats, flags, count, start, steps)


def select(tree: Any, flags: Any, which: np.ndarray) -> Any:
    """The problems at `which`."""

    def taken(leaf: Any, own: bool) -> Any:
        if not own:
            return leaf
        out = aligned_empty((len(which), *leaf.shape[1:]), leaf.dtype)
        return np.take(np.asarray(leaf), which, axis=0, out=out, mode="clip")  # the default mode would buffer `out`

    return jax.tree.map(taken, tree, flags)


def write(whole: Any, part: Any, where: np.ndarray) -> None:
    """`part` into `whole` at `where`."""
    for into, leaf in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        into[where] = leaf
