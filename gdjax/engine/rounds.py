"""The rounds of a batch with a stop rule: sprint, take out who waits, close the gaps, sprint on.

All problems of a slab begin together, so those still running have taken the same number of updates. A round is a fixed
share of the updates taken so far: a lane that waits is idle for at most that share of its own work, and the number of
rounds grows with the logarithm of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gdjax.device import aligned_empty
from gdjax.engine.program import RUNNING, WAITING
from gdjax.engine.refill import Ended, Running

SLAB = 1 << 18
"""Problems that begin together; their lanes are all the optimizer state that is held at a time."""

SHARE = 5
"""A round is 1/SHARE of the updates taken so far."""

STRIDE = 8
"""Updates per look at whether anything happened."""

FIRST = 2
"""Looks in the first round."""

Run = Callable[[str, Any, Any, int, int, int], Any]
"""`run(tile, inputs, flags, count, a, b)`: the outputs of a compiled tile for `count` problems."""


def rounds(run: Run, seats: Running, flags: Running, start: int, steps: int, stride: int) -> Ended:
    """The ended lanes of a slab of problems that are seated at update number `start`, in their order."""
    whole, count = seats, len(seats.lane["status"])
    kept = jax.tree.map(lambda leaf: aligned_empty(leaf.shape, leaf.dtype), seats.lane)
    where = np.arange(count)
    age = 0
    while len(where) and steps - age >= stride:
        looks = min(max(FIRST, age // (SHARE * stride)), (steps - age) // stride)
        lane = run("sprint", seats, flags, len(where), looks, stride)
        age += looks * stride
        going = lane["status"] == RUNNING
        stay = np.flatnonzero(going)
        if len(stay) < len(where):
            waits = np.flatnonzero(~going)
            write(kept, jax.tree.map(lambda leaf, waits=waits: leaf[waits], lane), where[waits])
            seats, where = select(seats._replace(lane=lane), flags, stay), where[stay]
        else:
            seats = seats._replace(lane=lane)
    write(kept, seats.lane, where)
    status = np.where(kept["status"] == WAITING, np.int32(RUNNING), kept["status"])
    return run("finish", whole._replace(lane={**kept, "status": status}), flags, count, start, steps)


def select(tree: Any, flags: Any, which: np.ndarray) -> Any:
    """The problems at `which`."""
    return jax.tree.map(lambda leaf, own: np.take(np.asarray(leaf), which, axis=0) if own else leaf, tree, flags)


def write(whole: Any, part: Any, where: np.ndarray) -> None:
    """`part` into `whole` at `where`."""
    for into, leaf in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        into[where] = leaf
