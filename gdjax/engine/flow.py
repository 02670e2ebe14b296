"""Stop rules in one program: lanes that take the next problem as soon as theirs is done.

A block of many problems runs through the lanes of one tile. When so many lanes wait that it pays, each of them hands
its problem back and takes the next one; a tile of neighbours that end together is taken to its end where it is, and the
next tile comes. When none is left and most lanes are idle, those still running are handed back as they are, `AWAY`,
where the block is a large one: the caller puts together what many blocks have left and comes again.

Worth it only where a block is one function (`gdjax.engine.whole`): problems change places one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax.engine import refill
from gdjax.engine.inplace import entry, for_each, placed, put, when
from gdjax.engine.kernels import Kernel
from gdjax.engine.program import AWAY, RUNNING, WAITING, Program
from gdjax.engine.refill import Ended, Running, Start, finishing, sprinting, stride_of
from gdjax.engine.tile import by_problem, following, inward, outward, total

FEW = 8
"""Problems change places when 1/FEW of the lanes wait."""

SHARE = 8
"""Neighbours who might end together are given 1/SHARE of the updates that they have taken for it."""

YOUNG, LIGHT_YOUNG = 32, 256
"""Updates for which a problem is not left `AWAY`, and neighbours are waited for; and where several are fused: to be
moved costs as much as many of those."""

LAST = 32
"""With fewer updates left before it has run all its steps, a problem takes them one by one."""

ALONE = 1 << 18
"""Numbers in a block, those of all its problems together, that is gone through to the end however few lanes still run:
to come again for what so small a block leaves would take longer."""

NOBODY = -1

MANY = np.float32(1 << 30)
"""For how many a young problem counts that runs: more than all lanes together."""

Run = Callable[[Any, Any], tuple[Any, Any]]


class Passed(NamedTuple):
    """Problems that have gone through lanes."""

    ended: Any
    tally: Any
    """How many are left `AWAY`, and the updates that lanes went through, idle or not: of less than 2^32 turns."""


class Door(NamedTuple):
    """A tile of problems, begun, that lanes take one by one as they become free."""

    lane: Any
    first: Any


class Flow(NamedTuple):
    """Problems on their way through the lanes of one tile."""

    seats: Running
    clock: Any
    """Updates that the lanes have gone through."""

    first: Any
    """Where the tile begins that came last."""

    came: Any
    """What the clock said when it came fresh."""

    listed: Any
    """Whether the next two say what is in the lanes. They need not before the first of a tile changes places."""

    names: Any
    """Which problem has which lane; `NOBODY`: it is empty."""

    since: Any
    """What the clock said when each was seated."""

    held: Any
    """How many lanes are not empty."""

    neighbours: Any
    """Whether the lanes hold a tile of problems in their order."""

    late: Any
    """Whether so many of these have waited that others could have taken their places."""

    taken: Any
    """How many have been seated."""

    door: Door
    brief: Any
    """Whether the last tile of neighbours ended so soon that each update might as well have been looked at."""

    open: Any
    """For every tile of neighbours whether some of them are still to be taken to their ends."""

    left: Any
    """How many are."""

    away: Any
    """How many problems are left `AWAY`."""

    ended: Ended


Seat = Callable[[Any], Running]
"""A tile of problems from a place in the block on as they begin, in the kernel's layout."""


def flow(kernel: Kernel, program: Program, chunk: int, flags: Start | Running, start: Any, steps: Any) -> Run:
    """Problems to their ends, fresh ones or such as are in their lanes: `run(inputs, count)` takes the first `count` of
    a block. It may be given `room` for the results as well, to be written over."""

    def run(inputs: Start | Running, count: Any, passed: Any = None) -> tuple[Any, Any]:
        if passed is None:
            shapes = room(kernel, program, flags, inputs)
            passed = jax.tree.map(jnp.zeros_like, shapes)

        def seat(first: Any) -> Running:
            return seated(kernel, program, flags, start, inputs, first)

        own = jax.tree.map(lambda _: True, passed.ended)
        seat_flags = Running(own.lane, flags.data, flags.hyper)
        passed = flowed(kernel, program, chunk, seat_flags, start, steps, seat, inputs[-2:], count, passed.ended)
        return passed, Passed(own, False)

    return run


def seated(
    kernel: Kernel, program: Program, flags: Start | Running, start: Any, inputs: Start | Running, first: Any
) -> Running:
    """The tile of problems from `first` on as they begin, in the kernel's layout."""
    seats = inward(kernel, following(inputs, flags, kernel.size, first), flags)
    if isinstance(flags, Start):
        return Running(refill.beginning(kernel, program, flags, seats, start)[0], seats.data, seats.hyper)
    status = seats.lane["status"]
    awake = jnp.where(status == AWAY, jnp.int32(RUNNING), status)
    return seats._replace(lane={**seats.lane, "status": awake})


def room(kernel: Kernel, program: Program, flags: Start | Running, inputs: Start | Running) -> Passed:
    """Shapes and dtypes of what becomes of a block of problems."""
    length = len(jax.tree.leaves(inputs)[0])
    figure = lambda dtype: jax.ShapeDtypeStruct((length,), dtype)  # noqa: E731

    def ends(inputs: Any, zero: Any) -> Any:
        lane, data, _ = seated(kernel, program, flags, zero, inputs, zero)
        own = jax.tree.map(lambda _: True, lane["weights"])
        report = kernel.trace(program.report, (lane["weights"], data), (own, flags.data))[0]
        dtypes.extend(leaf.dtype for leaf in report.out_avals)
        return lane

    dtypes: list[Any] = []
    lane = jax.eval_shape(ends, inputs, jax.ShapeDtypeStruct((), jnp.int32))
    lane = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((length, *leaf.shape[:-1]), leaf.dtype), lane)
    return Passed(Ended(lane, *map(figure, dtypes)), jax.ShapeDtypeStruct((2,), jnp.float32))


by_problem(flow, room)


def flowed(
    kernel: Kernel,
    program: Program,
    chunk: int,
    flags: Running,
    start: Any,
    steps: Any,
    seat: Seat,
    rest: Any,
    count: Any,
    ended: Ended,
) -> Passed:
    """The first `count` problems of a block at their ends, each in its place in `ended`, or `AWAY`.

    They begin as `seat` says; `rest` is what all bring beside their lanes, as the user lays it: data, hyperparameters.

    A tile of neighbours that all wait is taken to its end in its lanes. Those that have changed places wait in theirs
    until all are there; then each tile that is still open takes the lanes once more.
    """
    length = len(ended.loss)
    size, stride, last = kernel.size, stride_of(chunk), max(LAST, stride_of(chunk))
    fewest, several = YOUNG if chunk == 1 else LIGHT_YOUNG, size // FEW
    numbers, tiles = lax.iota(jnp.int32, size), size * lax.iota(jnp.int32, length // size)
    shapes = jax.eval_shape(seat, jnp.int32(0))
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(flags), strict=True)
    few = jnp.where(count <= max(size, ALONE * size // sum(leaf.size for leaf, own in leaves if own)), 0, size // 2)

    def once(state: Flow) -> Flow:
        empty, fresh = state.held == 0, state.taken < count
        state = when(empty & fresh, arrived, state)
        state = when(empty & ~fresh, returned, state)
        # In haste nothing is done beside: where problems take few updates, that is what they would wait for.
        hasty = state.neighbours & state.brief
        state, together = when(~hasty, gone_on, (state, hasty))
        return when(together, closed, state)

    def gone_on(carry: Any) -> Any:
        """After a sprint, where it pays, and an exchange, where it does; and whether the lanes are to be closed."""
        state, _ = carry
        state = when(~state.listed, entered, state)
        # Those that run and the young ones of them are counted together: what is summed apart, a call pays for apart.
        fresh, runs = state.taken < count, (state.seats.lane["status"] == RUNNING).astype(jnp.float32)
        running = total(jnp.where(state.clock - state.since < fewest, MANY * runs, runs))
        flowing, young = fresh | (running > few.astype(jnp.float32)), ~fresh & (running >= MANY)
        state = when(flowing, lambda state: sprinted(state, young), state)
        lane = state.seats.lane
        away = ~flowing & (lane["status"] == RUNNING)
        lane = {**lane, "status": jnp.where(away, jnp.int32(AWAY), lane["status"])}
        leaving = lane["status"] != RUNNING
        waiting = total(leaving.astype(jnp.int32))
        together = state.neighbours & (waiting == size)
        ready = fresh & (waiting >= several) & ~together
        late = ready & state.neighbours & ~state.late
        state = state._replace(
            seats=state.seats._replace(lane=lane), late=late, away=state.away + jnp.where(flowing, 0, running)
        )
        if length > size:
            enough = (ready & ~late) | ~(flowing | together)
            state = when(enough, lambda state: exchanged(state, leaving, waiting), state)
        return state, together

    def entered(state: Flow) -> Flow:
        """With the names of those in the lanes, and since when they are: but for what has been seated before."""
        names = state.first + numbers
        before = names < state.first + size - state.held
        return state._replace(
            listed=jnp.ones((), bool),
            names=jnp.where(before, NOBODY, names),
            since=jnp.full_like(names, state.came),
        )

    def sprinted(state: Flow, young: Any) -> Flow:
        """Until so many wait that others can take their places; of neighbours, who might end together, some time
        longer; in the end, until those are few that still run."""
        seats, fresh = state.seats, state.taken < count
        age = (total((seats.lane["index"] - start).astype(jnp.float32)) / size).astype(jnp.int32)
        lane, left = held_back(seats.lane, start + steps, last)
        least = jnp.where(fresh & ~state.late, size - several, jnp.where(fresh | young, 0, few))
        longer = jnp.maximum(age // SHARE, max(fewest, last))
        ahead = jnp.where(state.late | young, jnp.minimum(left, longer), left) // stride * stride
        lane, gone = sprinting(kernel, program, chunk, flags, seats._replace(lane=lane), age, ahead, least)
        return state._replace(seats=seats._replace(lane=lane), clock=state.clock + gone)

    def arrived(state: Flow) -> Flow:
        """The next tile of problems in the lanes, save those of them that have been seated before."""
        first = jnp.minimum(state.taken, length - size)
        names = first + numbers
        seats = seat(first)
        idle = (names < state.taken) | (names >= count)
        lane = {**seats.lane, "status": jnp.where(idle, jnp.int32(AWAY), seats.lane["status"])}
        return state._replace(
            seats=seats._replace(lane=lane),
            first=first,
            came=state.clock,
            listed=jnp.zeros((), bool),
            held=first + size - state.taken,
            neighbours=first == state.taken,
            taken=jnp.minimum(first + size, count),
        )

    def returned(state: Flow) -> Flow:
        """The first tile that is open, back in the lanes."""
        first = jnp.min(jnp.where(state.open, tiles, length - size))
        source = Running(state.ended.lane, *rest)
        seats = inward(kernel, following(source, flags, size, first), flags)
        names, lane = first + numbers, seats.lane
        status = jnp.where(names < count, lane["status"], jnp.int32(AWAY))
        lane = {**lane, "status": status, "index": jnp.where(names < count, lane["index"], start)}
        return state._replace(
            seats=seats._replace(lane=lane),
            first=first,
            listed=jnp.zeros((), bool),
            held=jnp.int32(size),
            neighbours=jnp.ones((), bool),
        )

    def closed(state: Flow) -> Flow:
        """A tile of neighbours taken to their ends and put back into their places; in haste only as far as they come
        with few updates."""
        turns = jnp.where(state.brief, jnp.int32(LAST), jnp.iinfo(jnp.int32).max)
        out, own, gone = finishing(kernel, program, chunk, flags, state.seats, start, steps, turns)
        clock, finished = state.clock + gone, gone < turns
        return state._replace(
            seats=state.seats._replace(lane=out.lane),
            clock=clock,
            held=jnp.where(finished, 0, state.held),
            brief=finished & (clock - state.came <= LAST),
            open=state.open & ~(finished & (tiles == state.first)),
            left=state.left - (finished & (state.first % size == 0)).astype(jnp.int32),
            ended=jax.tree.map(
                lambda into, leaf: placed(into, leaf, state.first), state.ended, outward(kernel, out, own)
            ),
        )

    def exchanged(state: Flow, leaving: Any, waiting: Any) -> Flow:
        """The problems in the lanes that are `leaving` put back into their places, and others seated. Empty lanes are
        `waiting` as well."""
        leaving = leaving & (state.names != NOBODY)
        going = waiting - (size - state.held)
        coming = jnp.where(going < state.held, going, 0)  # where all go, a whole tile comes
        wanted = jnp.minimum(state.taken + coming, count)
        state = when(wanted > state.door.first + size, opened, state)
        names, (door, first) = state.names, state.door

        def back(number: Any, lanes: Any) -> Any:
            name, here = entry(names, number), state.seats.lane
            return jax.tree.map(lambda into, leaf: put(into, 0, name, leaf, leaf.ndim - 1, number), lanes, here)

        def forth(number: Any, carry: Any) -> Any:
            seats, names, taken = carry
            lane = jax.tree.map(
                lambda into, leaf: put(into, into.ndim - 1, number, leaf, leaf.ndim - 1, taken - first),
                seats.lane,
                door,
            )
            own = jax.tree.map(
                lambda into, leaf, own: put(into, into.ndim - 1, number, leaf, 0, taken) if own else into,
                seats[1:],
                rest,
                flags[1:],
            )
            return Running(lane, *own), placed(names, taken[None], number), taken + 1

        # First all go, then all come: what is both read and written in one loop, XLA copies at every turn.
        lanes = for_each(leaving, back, state.ended.lane)
        here = state.seats, jnp.where(leaving, NOBODY, names), state.taken
        seats, names, taken = for_each(leaving, forth, here, lambda here: here[-1] < wanted)
        return state._replace(
            seats=seats,
            names=names,
            since=jnp.where(leaving, state.clock, state.since),
            held=state.held - going + wanted - state.taken,
            neighbours=jnp.zeros((), bool),
            taken=taken,
            ended=state.ended._replace(lane=lanes),
        )

    def opened(state: Flow) -> Flow:
        """The problems that come next at the door."""
        first = jnp.minimum(state.taken, length - size)
        return state._replace(door=Door(seat(first).lane, first))

    def empty(shape: Any, leaf: Any, own: bool) -> Any:
        return jnp.zeros_like(shape) if own else leaf

    lane, none, never = jax.tree.map(jnp.zeros_like, shapes.lane), jnp.int32(0), jnp.zeros((), bool)
    state = Flow(
        seats=Running(lane, *jax.tree.map(empty, shapes[1:], rest, flags[1:])),
        clock=none,
        first=none,
        came=none,
        listed=never,
        names=jnp.zeros_like(numbers),
        since=jnp.zeros_like(numbers),
        held=none,
        neighbours=never,
        late=never,
        taken=none,
        door=Door(lane, jnp.int32(-size)),
        brief=jnp.ones((), bool),
        open=tiles < count,
        left=(count + size - 1) // size,
        away=jnp.float32(0),
        ended=ended,
    )
    state = lax.while_loop(lambda state: state.left > 0, once, state)
    went = state.clock.astype(jnp.uint32).astype(jnp.float32) * size
    return Passed(state.ended, jnp.concatenate([state.away[None], went[None]]))


def held_back(lane: dict[str, Any], end: Any, last: int) -> tuple[dict[str, Any], Any]:
    """The lanes, where those wait that have fewer than `last` updates left up to the `end`; and how many all others
    that run have left at least."""
    left, runs = end - lane["index"], lane["status"] == RUNNING
    few = left < last
    least = jnp.min(jnp.where(runs & ~few, left, jnp.iinfo(jnp.int32).max))
    return {**lane, "status": jnp.where(runs & few, jnp.int32(WAITING), lane["status"])}, least
