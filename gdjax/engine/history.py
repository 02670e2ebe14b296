"""A figure of every problem noted every so many updates, on the way of a batch to its end.

Without a stop rule (`steady`) the updates between two rows are those of `gdjax.engine.fixed`. With one (`rows`) they
are strides as in `gdjax.engine.refill`: a problem to which something happens that ends it waits at the row before, and
there are no further rows for it; it is then finished step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax.arena import aligned_empty
from gdjax.engine import fixed
from gdjax.engine.kernels import Kernel
from gdjax.engine.program import RUNNING, Program, absent
from gdjax.engine.refill import Ended, Running, Tile, at_rest, runs, striding
from gdjax.engine.rounds import Run, closed, ends, select, write
from gdjax.engine.tile import inward, outward, some
from gdjax.pieces import join
from gdjax.progress import Watch

ROWS = 16
"""Rows per call of the compiled tile; between calls the lanes that wait are emptied."""


class Recording(NamedTuple):
    """Problems in their lanes, and the number of updates from row to row."""

    lane: Any
    data: Any
    hyper: Any
    every: Any


class Steady(NamedTuple):
    """Problems without a stop rule: as `gdjax.engine.fixed.Inputs`, and what they remember of the last update."""

    weights: Any
    state: Any
    past: Any
    data: Any
    hyper: Any
    every: Any


class SteadyRows(NamedTuple):
    """Where they stand some rows later, what they remember, and the rows, `[problems, ROWS, ...]`."""

    out: fixed.Outputs
    past: Any
    rows: Any


class Noted(NamedTuple):
    """The lanes some rows later, and the rows, `[problems, ROWS, ...]`."""

    lane: Any
    rows: Any


def steady(kernel: Kernel, program: Program, chunk: int, flags: Steady, start: Any, steps: Any) -> Tile:
    """The next `ROWS` rows from update number `start` on; no more than `steps` updates are taken."""

    def run(inputs: Steady) -> tuple[Any, Any]:
        inputs = inward(kernel, inputs, flags)
        carry, own, updates = fixed.ready(kernel, program, flags, inputs)
        data, every, past, past_own = inputs.data, inputs.every, inputs.past, flags.past
        if past is None:
            past, past_own = kernel.call(program.fresh_past, (carry[0], data), (own[0], flags.data))
        past_own, unspread = jax.tree.map(lambda _: True, past_own), past_own
        past = kernel.spread(past, unspread, past_own)

        def figure(weights: Any, past: Any, index: Any, data: Any) -> Any:
            return program.figure({"weights": weights, "past": past, "index": index}, data)

        def behind(before: Any, after: Any, past: Any, data: Any) -> Any:
            return program.behind(before, after, program.loss(before, *data), past)

        def row(carried: Any, number: Any) -> tuple[Any, Any]:
            carry, past = carried
            done = number * every
            index, ahead = start + done, jnp.clip(steps - done, 0, every)
            arguments = (carry[0], past, index, data)
            noted, noted_own = kernel.call(figure, arguments, (own[0], past_own, False, flags.data), carried=2)
            noted = kernel.spread(noted, noted_own, jax.tree.map(lambda _: True, noted_own))
            if not past:
                return (fixed.descend(updates, carry, index, ahead, chunk), past), noted
            blind = jnp.maximum(ahead - 1, 0)
            before = fixed.descend(updates, carry, index, blind, chunk)
            after = lax.fori_loop(index + blind, index + ahead, updates.one, before)
            arguments = (before[0], after[0], past, data)
            kept, kept_own = kernel.call(behind, arguments, (own[0], own[0], past_own, flags.data), carried=3)
            return (after, kernel.spread(kept, kept_own, past_own)), noted

        (carry, past), noted = lax.scan(row, (carry, past), jnp.arange(ROWS, dtype=jnp.int32))
        out, out_own = fixed.outcome(kernel, program, flags, inputs, carry, own)
        result, result_own = stacked(kernel, SteadyRows(out, past, noted), SteadyRows(out_own, past_own, None))
        return outward(kernel, result, result_own), result_own

    return run


def stacked(kernel: Kernel, result: Any, own: Any) -> tuple[Any, Any]:
    """The result with its rows, which were stacked in front, behind the problem axis where that comes first."""
    noted = result.rows
    if kernel.axis == 0:
        noted = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), noted)
    return result._replace(rows=noted), own._replace(rows=jax.tree.map(lambda _: True, noted))


def rows(kernel: Kernel, program: Program, chunk: int, flags: Recording, start: Any, steps: Any) -> Tile:
    """The next `ROWS` rows, from update number `start` on; no more than `steps` updates are taken."""

    def run(inputs: Recording) -> tuple[Any, Any]:
        inputs = inward(kernel, inputs, flags)
        moving, ahead, hold, rest = striding(kernel, program, 1, flags, inputs)
        every, seated = inputs.every, inputs.lane["index"]
        own = jax.tree.map(lambda _: True, moving)

        def row(carry: Any, number: Any) -> tuple[Any, Any]:
            moving, held = carry
            taken = jnp.minimum(number * every, steps)
            lane, lane_own = {**moving, "index": seated + taken}, {**own, "index": True}
            noted, noted_own = kernel.call(program.noted, (lane, inputs.data), (lane_own, flags.data), carried=1)
            updates = jnp.where(some(runs(kernel, moving)), jnp.minimum(steps - taken, every), 0)
            after = ahead(moving, taken, updates)
            everywhere = jax.tree.map(lambda _: True, noted_own)
            return (after, hold(held, after, taken + updates)), kernel.spread(noted, noted_own, everywhere)

        (moving, held), noted = lax.scan(row, (moving, at_rest(inputs.lane)), jnp.arange(ROWS, dtype=jnp.int32))
        out, out_flags = stacked(kernel, Noted(rest(moving, held), noted), Noted(flags.lane, None))
        return outward(kernel, out, out_flags), out_flags

    return run


def recorded(
    run: Run, seats: Running, flags: Running, start: int, steps: int, every: int, watch: Watch | None
) -> tuple[Ended, int, Any]:
    """The ended lanes as from `gdjax.engine.rounds`, the updates taken at most, and a record of `every` so many."""
    whole, problems, count = seats, len(seats.lane["status"]), steps // every + 1
    kept = jax.tree.map(lambda leaf: aligned_empty(leaf.shape, leaf.dtype), seats.lane)
    where, filled, made = np.arange(problems), 0, None
    while len(where) and filled < count and filled * every <= steps:
        first, ahead = start + filled * every, steps - filled * every
        inputs = Recording(*seats, np.int32(every))
        lane, noted = run("rows", inputs, Recording(*flags, False), len(where), first, ahead)
        made = entered(made, noted, where, filled, count, problems)
        filled += ROWS
        going = np.asarray(lane["status"]) == RUNNING
        stay, waits = np.flatnonzero(going), np.flatnonzero(~going)
        write(kept, jax.tree.map(lambda leaf, waits=waits: np.asarray(leaf)[waits], lane), where[waits])
        if watch is not None:
            watch.took(len(where) * min(ROWS * every, ahead))
        seats, where = select(seats._replace(lane=lane), flags, stay), where[stay]
        if watch is not None and watch.due:
            ended = np.setdiff1d(np.arange(problems), where, assume_unique=True)
            share = watch.share(problems, max(len(ended) / problems, min(1.0, filled * every / steps)))
            if watch.tell(ends(run, whole, flags, kept, ended, start, steps), len(ended), share):
                steps = min(steps, filled * every)
                break
    write(kept, seats.lane, where)
    return closed(run, whole, flags, kept, start, steps, watch), steps, made


def steadily(
    run: Callable[..., Any],
    inputs: fixed.Inputs,
    flags: fixed.Inputs,
    start: int,
    steps: int,
    every: int,
    watch: Watch | None,
) -> tuple[fixed.Outputs, fixed.Outputs, int, Any]:
    """`(outputs, their flags, steps taken, record)`; `run(inputs, flags, start, steps)` runs `steady`."""
    count, problems = steps // every + 1, len(jax.tree.leaves(inputs.weights)[0])
    at = Steady(inputs.weights, inputs.state, None, inputs.data, inputs.hyper, np.int32(every))
    own = Steady(flags.weights, flags.state, None, flags.data, flags.hyper, False)
    made, broken = None, np.zeros(problems, bool)
    for filled in range(0, count, ROWS):
        ahead = steps - filled * every
        (out, past, noted), (out_own, past_own, _) = run(at, own, start + filled * every, ahead)
        made = entered(made, noted, slice(None), filled, count, problems)
        broken |= np.asarray(out.status) == RUNNING
        at = at._replace(weights=out.weights, state=out.state, past=past)
        own = own._replace(weights=out_own.weights, state=out_own.state, past=past_own)
        taken = min(steps, (filled + ROWS) * every)
        if watch is not None:
            watch.took(min(ahead, ROWS * every) * problems)
            if watch.due and watch.tell(out.status, share=taken / steps):
                break
    return out._replace(status=np.where(broken, np.int8(RUNNING), np.asarray(out.status))), out_own, taken, made


def widened(record: np.ndarray, count: int) -> np.ndarray:
    """One array of a record with so many rows, the last ones empty."""
    out = nothing((len(record), count, *record.shape[2:]), record.dtype)
    out[:, : record.shape[1]] = record
    return out


def joined(records: list[Any], problems: int) -> Any:
    """One record of those of all slabs; a slab that was not begun has nothing in it."""
    begun = [record for record in records if record is not None]
    if not begun:
        return None
    whole = join(begun)
    held = len(jax.tree.leaves(whole)[0])
    missing = lambda leaf: nothing((problems - held, *leaf.shape[1:]), leaf.dtype)  # noqa: E731
    return whole if held == problems else join([whole, jax.tree.map(missing, whole)])


def entered(made: Any, rows: Any, where: Any, filled: int, count: int, problems: int) -> Any:
    """The record of `count` rows with some more rows entered at the problems `where`; made first where it is None."""
    rows = jax.tree.map(np.asarray, rows)
    if made is None:
        made = jax.tree.map(lambda leaf: nothing((problems, count, *leaf.shape[2:]), leaf.dtype), rows)
    upto = min(filled + ROWS, count)
    for into, leaf in zip(jax.tree.leaves(made), jax.tree.leaves(rows), strict=True):
        into[where, filled:upto] = leaf[:, : upto - filled]
    return made


def nothing(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Rows that are not there."""
    return np.broadcast_to(np.asarray(absent(np.zeros((), dtype))), shape).copy()
