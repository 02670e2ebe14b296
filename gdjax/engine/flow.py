"""Stop rules in one program: lanes that take the next problem as soon as theirs is done.

A block of many problems runs through the lanes of one tile. Between sprints (`gdjax.engine.refill`) each lane that
waits hands its problem back and takes the next one. When none is left and most lanes are idle, those still running
are handed back as they are, `AWAY`, where the block is a large one: the caller puts together what many blocks have left
and comes again.

Worth it only where a block is one function (`gdjax.engine.whole`): problems change places one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdjax.engine import refill
from gdjax.engine.kernels import Kernel
from gdjax.engine.program import AWAY, RUNNING, WAITING, Program
from gdjax.engine.refill import Ended, Running, Start, finishing, sprinting, stride_of
from gdjax.engine.tile import by_problem, every, following, inward, outward, over_tiles, some, total

GROUP = 32
"""Lanes that are looked at together when problems change places."""

SHARE = 8
"""A sprint takes 1/SHARE of the updates that the lanes have taken: those that wait are idle for half of it."""

FEW = 8
"""Problems change places when 1/FEW of the lanes wait."""

SPRINT, LIGHT_SPRINT = (32, 256), (256, 1024)
"""Fewest and most updates in a sprint; and where several are fused: to change places costs as much as many of those."""

LAST = 32
"""With fewer updates left before it has run all its steps, a problem takes them one by one."""

ALONE = 1 << 17
"""Numbers in a block, those of all its problems together, that is gone through to the end however few lanes still run:
to come again for what so small a block leaves would take longer."""

NOBODY = -1

Run = Callable[[Any, Any], tuple[Any, Any]]


class Passed(NamedTuple):
    """Problems that have gone through lanes, and the updates for which each has had its lane, idle or not."""

    ended: Any
    spent: Any


class Flow(NamedTuple):
    """Problems on their way through the lanes of one tile."""

    seats: Running
    names: Any
    """Which problem has which lane; `NOBODY`: it is empty."""

    spent: Any
    """For how many updates each has had its lane."""

    taken: Any
    """How many have been seated."""

    open: Any
    """For every tile of neighbours whether some of them are still to be taken to their ends."""

    passed: Passed


@by_problem
def through(kernel: Kernel, program: Program, chunk: int, flags: Running, start: Any, steps: Any) -> Run:
    """Problems to their ends: `run(inputs, count)` takes the first `count` of a block."""

    def run(inputs: Running, count: Any) -> tuple[Any, Any]:
        passed = flow(kernel, program, chunk, flags, start, steps, inputs, count)
        return passed, jax.tree.map(lambda _: True, passed)

    return run


@by_problem
def fresh(kernel: Kernel, program: Program, chunk: int, flags: Start, start: Any, steps: Any) -> Run:
    """The same for a block of fresh problems, begun in the same program."""

    def run(inputs: Start, count: Any) -> tuple[Any, Any]:
        begin, size, own = refill.begin(kernel, program, chunk, flags, start, steps), kernel.size, []

        def noted(some: Start) -> tuple[Any, Any]:
            lane, lane_own = begin(some)
            own.append(lane_own)
            return lane, lane_own

        tiles = jax.tree.leaves(inputs.weights)[0].shape[0] // size
        lane = over_tiles(noted, size, tiles, inputs, flags, (count + size - 1) // size)
        seats, seat_flags = Running(lane, inputs.data, inputs.hyper), Running(own[0], flags.data, flags.hyper)
        return through(kernel, program, chunk, seat_flags, start, steps)(seats, count)

    return run


def flow(
    kernel: Kernel,
    program: Program,
    chunk: int,
    flags: Running,
    start: Any,
    steps: Any,
    inputs: Running,
    count: Any,
) -> Passed:
    """The first `count` problems of a block at their ends, each in its place, or `AWAY`.

    A tile of neighbours that all wait is taken to its end in its lanes. Those that have changed places wait in theirs
    until all are there; then each tile that is still open takes the lanes once more.
    """
    size, stride, (fewest, most) = kernel.size, stride_of(chunk), SPRINT if chunk == 1 else LIGHT_SPRINT
    last = max(LAST, stride)
    leaves = zip(jax.tree.leaves(inputs), jax.tree.leaves(flags), strict=True)
    each = sum(leaf.size // len(leaf) for leaf, own in leaves if own)
    length = inputs.lane["index"].shape[0]
    numbers, tiles = lax.iota(jnp.int32, size), size * lax.iota(jnp.int32, length // size)

    def flows(state: Flow) -> Any:
        running = state.seats.lane["status"] == RUNNING
        few = jnp.where(count <= max(size, ALONE // each), 0, size // 2)
        young = running & (state.spent < fewest)
        return (state.taken < count) | (total(running.astype(jnp.int32)) > few) | some(young)

    def once(state: Flow) -> Flow:
        state = when(every(state.names == NOBODY), seated, state)
        flowing = flows(state)
        state = when(flowing, sprinted, state)
        lane = state.seats.lane
        away = ~flowing & (lane["status"] == RUNNING)
        lane = {**lane, "status": jnp.where(away, jnp.int32(AWAY), lane["status"])}
        state = state._replace(seats=state.seats._replace(lane=lane))
        leaving = lane["status"] != RUNNING
        together = every(leaving & (state.names == state.names[0] + numbers)) & (state.names[0] != NOBODY)
        enough = ((total(leaving.astype(jnp.int32)) >= size // FEW) & (state.taken < count)) | ~flowing
        if length > size:
            state = when(enough & ~together, lambda state: exchanged(state, leaving), state)
        return when(together, closed, state)

    def sprinted(state: Flow) -> Flow:
        seats = state.seats
        age = (total((seats.lane["index"] - start).astype(jnp.float32)) / size).astype(jnp.int32)
        lane, left = held_back(seats.lane, start + steps, last)
        ahead = jnp.minimum(jnp.clip(age // SHARE, max(fewest, last), most), left) // stride * stride
        lane, gone = sprinting(kernel, program, chunk, flags, seats._replace(lane=lane), age, ahead)
        return state._replace(seats=seats._replace(lane=lane), spent=state.spent + gone)

    def seated(state: Flow) -> Flow:
        """A tile of neighbours in the lanes: the next, or the first of those that are open."""
        still = jnp.min(jnp.where(state.open, tiles, length - size))
        first = jnp.where(state.taken < count, jnp.minimum(state.taken, length - size), still)
        source = (inputs._replace(lane=state.passed.ended.lane), state.passed.spent)
        seats, spent = inward(kernel, following(source, (flags, True), size, first), (flags, True))
        taken = jnp.where(state.taken < count, jnp.minimum(first + size, count), state.taken)
        return state._replace(seats=seats, names=first + numbers, spent=spent, taken=taken)

    def closed(state: Flow) -> Flow:
        """A tile of neighbours taken to their ends and put back into their places."""
        first, before = state.names[0], state.seats.lane["index"]
        out, own = finishing(kernel, program, chunk, flags, state.seats, start, steps)
        spent = state.spent + (out.lane["index"] - before)
        passed = jax.tree.map(
            lambda into, leaf: lax.dynamic_update_slice_in_dim(into, leaf, first, 0, allow_negative_indices=False),
            state.passed,
            outward(kernel, Passed(out, spent), Passed(own, True)),
        )
        names, still = jnp.full_like(state.names, NOBODY), state.open & (tiles != first)
        return state._replace(names=names, open=still, passed=passed)

    def exchanged(state: Flow, leaving: Any) -> Flow:
        """The problems in the lanes that are `leaving` put back into their places, and others seated."""
        names, lanes, spent = state.names, state.passed.ended.lane, state.passed.spent
        leaving = leaving & (names != NOBODY)

        def back(number: Any, lanes: Any) -> Any:
            name, here = entry(names, number), (state.seats.lane, state.spent)
            return jax.tree.map(lambda into, leaf: put(into, 0, name, leaf, leaf.ndim - 1, number), lanes, here)

        def forth(number: Any, state: Any) -> Any:
            here, names, taken = state
            name = jnp.where(taken < count, taken, NOBODY)
            names = lax.dynamic_update_slice_in_dim(names, name[None], number, 0)
            here = when(taken < count, lambda here: seated_at(here, number, name), here)
            return here, names, jnp.minimum(taken + 1, count)

        def seated_at(here: Any, number: Any, name: Any) -> Any:
            return jax.tree.map(
                lambda into, leaf, own: put(into, into.ndim - 1, number, leaf, 0, name) if own else into,
                here,
                (inputs._replace(lane=lanes), spent),
                (flags, True),
            )

        # First all go, then all come: what is both read and written in one loop, XLA copies at every turn.
        lanes, spent = for_each(leaving, back, (lanes, spent))
        here = (state.seats, state.spent), names, state.taken
        (seats, own_spent), names, taken = for_each(leaving, forth, here)
        passed = state.passed._replace(ended=state.passed.ended._replace(lane=lanes), spent=spent)
        return state._replace(seats=seats, names=names, spent=own_spent, taken=taken, passed=passed)

    def empty(leaf: Any, own: bool) -> Any:
        return jnp.zeros((*leaf.shape[1:], size), leaf.dtype) if own else leaf

    padding = lax.iota(jnp.int32, length) >= count
    awake = jnp.where(inputs.lane["status"] == AWAY, jnp.int32(RUNNING), inputs.lane["status"])
    lanes = {**inputs.lane, "status": jnp.where(padding, jnp.int32(AWAY), awake)}
    none = jnp.zeros((length,), jnp.int32)
    seats = jax.tree.map(empty, Running(lanes, inputs.data, inputs.hyper), flags)
    report = kernel.trace(program.report, (seats.lane["weights"], seats.data), (flags.lane["weights"], flags.data))[0]
    passed = Passed(Ended(lanes, *(jnp.zeros((length,), figure.dtype) for figure in report.out_avals)), none)
    state = Flow(seats, jnp.full((size,), NOBODY, jnp.int32), none[:size], jnp.int32(0), tiles < count, passed)
    return lax.while_loop(lambda state: some(state.open), once, state).passed


def held_back(lane: dict[str, Any], end: Any, last: int) -> tuple[dict[str, Any], Any]:
    """The lanes, where those wait that have fewer than `last` updates left up to the `end`; and how many all others
    that run have left at least."""
    left, runs = end - lane["index"], lane["status"] == RUNNING
    few = left < last
    least = jnp.min(jnp.where(runs & ~few, left, jnp.iinfo(jnp.int32).max))
    return {**lane, "status": jnp.where(runs & few, jnp.int32(WAITING), lane["status"])}, least


def put(into: Any, axis: int, at: Any, source: Any, source_axis: int, taken: Any) -> Any:
    """One problem of `source` put into another array, whose problems lie along another axis."""
    one = jnp.moveaxis(lax.dynamic_slice_in_dim(source, taken, 1, source_axis), source_axis, axis)
    return lax.dynamic_update_slice_in_dim(into, one, at, axis)


def for_each(marked: Any, function: Callable[[Any, Any], Any], state: Any) -> Any:
    """`function(number, state)` for every lane that is marked."""

    def lane(number: Any, state: Any) -> Any:
        return when(entry(marked, number), lambda state: function(number, state), state)

    def group(number: Any, state: Any) -> Any:
        first = number * GROUP
        here = some(lax.dynamic_slice_in_dim(marked, first, GROUP))
        return when(here, lambda state: lax.fori_loop(first, first + GROUP, lane, state), state)

    return lax.fori_loop(0, marked.shape[0] // GROUP, group, state)


def entry(array: Any, number: Any) -> Any:
    return lax.dynamic_index_in_dim(array, number, keepdims=False)


def when(wanted: Any, function: Callable[[Any], Any], state: Any) -> Any:
    """`function(state)` where it is wanted.

    As a loop of at most one turn: XLA keeps that in place, as it does not with what a choice returns.
    """

    def once(carry: Any) -> Any:
        return jnp.zeros((), bool), function(carry[1])

    return lax.while_loop(lambda carry: carry[0], once, (wanted, state))[1]
