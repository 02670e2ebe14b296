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
from gdjax.engine.refill import Running, Start, sprinting, stride_of
from gdjax.engine.tile import by_problem, following, inward, outward, over_tiles, total

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


@by_problem
def through(kernel: Kernel, program: Program, chunk: int, flags: Running, start: Any, steps: Any) -> Run:
    """Problems to their ends: `run(inputs, count)` takes the first `count` of a block."""

    def run(inputs: Running, count: Any) -> tuple[Any, Any]:
        size = kernel.size
        lanes, spent = flow(kernel, program, chunk, flags, start, steps, inputs, count)
        last = refill.finish(kernel, program, chunk, flags, start, steps)
        own: list[Any] = []

        def noted(some: Running) -> tuple[Any, Any]:
            ended, ended_own = last(some)
            own.append(ended_own)
            return ended, ended_own

        tiles = inputs.lane["index"].shape[0] // size
        used = (count + size - 1) // size
        ended = over_tiles(noted, size, tiles, inputs._replace(lane=lanes), flags, used)
        last_ones = ended.lane["index"] - lanes["index"]
        return Passed(ended, spent + last_ones), Passed(own[0], True)

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
) -> tuple[dict[str, Any], Any]:
    """The lanes of all problems of a block, in their places, where the first `count` wait or have been left `AWAY`; and
    for how many updates each had its lane."""
    size, stride, (fewest, most) = kernel.size, stride_of(chunk), SPRINT if chunk == 1 else LIGHT_SPRINT
    last = max(LAST, stride)
    leaves = zip(jax.tree.leaves(inputs), jax.tree.leaves(flags), strict=True)
    each = sum(leaf.size // len(leaf) for leaf, own in leaves if own)
    spending = flags._replace(lane={**flags.lane, "spent": True})

    def going(state: Any) -> Any:
        seats, names, taken, _ = state
        running = (seats.lane["status"] == RUNNING) & (names != NOBODY)
        few = jnp.where(count <= max(size, ALONE // each), 0, size // 2)
        return (taken < count) | (total(running.astype(jnp.int32)) > few)

    def once(state: Any) -> Any:
        seats, names, taken, lanes = state
        age = (total((seats.lane["index"] - start).astype(jnp.float32)) / size).astype(jnp.int32)
        lane = {name: leaf for name, leaf in seats.lane.items() if name != "spent"}
        lane, left = held_back(lane, start + steps, last)
        ahead = jnp.minimum(jnp.clip(age // SHARE, max(fewest, last), most), left) // stride * stride
        lane, gone = sprinting(kernel, program, chunk, flags, seats._replace(lane=lane), age, ahead)
        seats = seats._replace(lane={**lane, "spent": seats.lane["spent"] + gone})
        leaving = seats.lane["status"] != RUNNING
        some = (total(leaving.astype(jnp.int32)) >= size // FEW) & (taken < count)
        return when(some, lambda state: exchange(state, leaving), (seats, names, taken, lanes))

    def exchange(state: Any, leaving: Any) -> Any:
        """The problems in the lanes that are `leaving` put back into their places, and others seated: all together
        where a whole tile of neighbours leaves for another."""
        _, names, taken, _ = state
        together = jnp.all(leaving & (names == names[0] + numbers)) & (names[0] != NOBODY) & (taken + size <= count)
        state = when(together, exchange_all, state)
        return when(~together, lambda state: exchange_some(state, leaving), state)

    def exchange_all(state: Any) -> Any:
        seats, names, taken, lanes = state
        back = outward(kernel, seats.lane, spending.lane)
        lanes = jax.tree.map(lambda into, leaf: lax.dynamic_update_slice_in_dim(into, leaf, names[0], 0), lanes, back)
        seats = inward(kernel, following(inputs._replace(lane=lanes), spending, size, taken), spending)
        return seats, taken + numbers, taken + size, lanes

    def exchange_some(state: Any, leaving: Any) -> Any:
        seats, names, taken, lanes = state
        leaving = leaving & (names != NOBODY)

        def back(number: Any, lanes: Any) -> Any:
            name = entry(names, number)
            return jax.tree.map(lambda into, leaf: put(into, 0, name, leaf, leaf.ndim - 1, number), lanes, seats.lane)

        def forth(number: Any, state: Any) -> Any:
            seats, names, taken = state
            name = jnp.where(taken < count, taken, NOBODY)
            names = lax.dynamic_update_slice_in_dim(names, name[None], number, 0)
            seats = when(taken < count, lambda seats: seated(seats, number, name), seats)
            return seats, names, jnp.minimum(taken + 1, count)

        def seated(seats: Running, number: Any, name: Any) -> Running:
            source = inputs._replace(lane=lanes)
            return jax.tree.map(
                lambda into, leaf, own: put(into, into.ndim - 1, number, leaf, 0, name) if own else into,
                seats,
                source,
                spending,
            )

        # First all go, then all come: what is both read and written in one loop, XLA copies at every turn.
        lanes = for_each(leaving, back, lanes)
        return *for_each(leaving, forth, (seats, names, taken)), lanes

    awake = jnp.where(inputs.lane["status"] == AWAY, jnp.int32(RUNNING), inputs.lane["status"])
    lanes = {**inputs.lane, "status": awake, "spent": jnp.zeros_like(awake)}
    numbers = lax.iota(jnp.int32, size)
    names = jnp.where(numbers < count, numbers, NOBODY)
    seats = inward(kernel, following(inputs._replace(lane=lanes), spending, size, 0), spending)
    state = lax.while_loop(going, once, (seats, names, jnp.minimum(size, count), lanes))
    lanes = exchange(state, jnp.ones((size,), bool))[3]
    status, spent = lanes["status"], lanes.pop("spent")
    padding = lax.iota(jnp.int32, status.shape[0]) >= count
    return {**lanes, "status": jnp.where((status == RUNNING) | padding, jnp.int32(AWAY), status)}, spent


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
        some = jnp.any(lax.dynamic_slice_in_dim(marked, first, GROUP))
        return when(some, lambda state: lax.fori_loop(first, first + GROUP, lane, state), state)

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
