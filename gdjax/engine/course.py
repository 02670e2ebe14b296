"""Problems with a stop rule in registers: takes the place of `finish` and `entire` of `gdjax.engine.refill`.

A tile ends when all its lanes are done, and one lane may take a thousand times as long as its neighbours. Where there
are more problems than a device runs side by side, they therefore run in waves: after so many updates the kernel ends,
those that still run move together into as few tiles as hold them, and only these go on. All waves are one program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax.batch import problem_shapes
from gdjax.engine import refill
from gdjax.engine.kernels import ahead
from gdjax.engine.machine import Machine, launch, long_axis, split, traced
from gdjax.engine.program import AWAY, DIVERGED, RUNNING, Program, finite
from gdjax.engine.scalars import row
from gdjax.engine.targets import Arguments, Target
from gdjax.engine.tile import by_problem
from gdjax.work import of_jaxpr

STEPS_PER_LOOK = 8
"""How often a tile asks whether any of its lanes still runs."""

WIDTH = 1 << 14
"""Problems that a device runs side by side as fast as fewer of them: so many go to their ends in one wave."""

WAVE, MOVE = 2.0**35, 64.0
"""Operations that an accelerator (an H100) does in the time that a new wave takes, some 500 microseconds, and while it
moves a byte of its problems."""

LONG = 1024
"""A batch where a new wave would take as long as so many updates goes to its end in one: few descents are longer."""

SHARE = 8
"""A wave is at least 1/SHARE of the updates taken so far."""


def finish(target: Target) -> Callable[..., Callable[..., Any]]:
    """Every problem until its rule holds or it has taken all steps. A lane that is done stays as it is; a tile ends
    when all its lanes are done."""

    @by_problem
    def tile(kernel: Any, program: Program, chunk: int, flags: refill.Running, start: Any, steps: Any) -> Any:
        def run(inputs: refill.Running, count: Any) -> tuple[refill.Ended, refill.Ended]:
            parts = Course(program, inputs, flags)
            zero, end = jnp.reshape(kernel.zero, 1), start + steps

            @jax.jit
            def wave(seats: refill.Running, count: Any, first: Any, updates: Any) -> refill.Ended:
                numbers = jnp.stack([jnp.asarray(n, jnp.int32) for n in (first, updates, count, end)])
                shapes = (parts.advance.out, *parts.report.out)
                out = launch(target, parts.run, seats, flags, numbers, zero, shapes, kernel.size, parts.length)
                return refill.Ended(*out)

            cost = cost_of_wave(inputs, flags) / parts.operations
            if kernel.size <= WIDTH or cost > LONG * kernel.size:
                ended = wave(inputs, count, start, steps)
            else:
                ended = waves(wave, cost, inputs, flags, count, start, steps)
            # A loss that is not finite at the final weights is no answer, whatever the rule said.
            status = jnp.where(jnp.isfinite(ended.loss), ended.lane["status"], jnp.int32(DIVERGED))
            result = ended._replace(lane={**ended.lane, "status": status})
            return result, jax.tree.map(lambda _: True, result)

        return run

    return tile


def cost_of_wave(inputs: refill.Running, flags: refill.Running) -> float:
    """Operations that could be done in the time that a new wave takes."""
    leaves = zip(jax.tree.leaves(inputs), jax.tree.leaves(flags), strict=True)
    return WAVE + MOVE * sum(leaf.size * leaf.dtype.itemsize for leaf, own in leaves if own)


def waves(
    wave: Callable[..., refill.Ended],
    cost: float,
    inputs: refill.Running,
    flags: refill.Running,
    count: Any,
    start: Any,
    steps: Any,
) -> refill.Ended:
    """All problems to their ends, wave after wave; `wave(seats, count, first, updates)` leaves those `AWAY` that run
    on after so many updates.

    A wave leaves lanes idle until its end, and a new one has the `cost` of so many updates of one problem: with ends
    that are spread evenly over the logarithm of the steps the two balance as in `gdjax.engine.rounds`.
    """
    size = inputs.lane["status"].shape[0]
    numbers = lax.iota(jnp.int32, size)

    def ahead(taken: Any, left: Any, quiet: Any) -> Any:
        """The updates of the next wave."""
        age, lanes, doubled = (x.astype(jnp.float32) for x in (taken, left, jnp.minimum(quiet, 8)))
        lull = cost / jnp.maximum(lanes, WIDTH)
        balanced = jnp.sqrt(2 * lull * jnp.maximum(age, lull / 2))
        updates = jnp.maximum(balanced, age / SHARE) * jnp.exp2(doubled)
        some = jnp.clip(updates, 1, 1 << 30).astype(jnp.int32)
        return jnp.where(left <= WIDTH, steps - taken, jnp.minimum(some, steps - taken))

    def away(ended: refill.Ended) -> Any:
        return (ended.lane["status"] == AWAY) & (numbers < count)

    def put(whole: Any, to: Any, some: Any) -> Any:
        return whole.at[to].set(some, mode="drop", unique_indices=True)

    def once(state: Any) -> Any:
        ended, left, taken, quiet = state
        on, nowhere = away(ended), size + numbers  # what is dropped has a place of its own too: no two may be the same
        to = jnp.where(on, jnp.cumsum(on.astype(jnp.int32)) - 1, nowhere)
        which = put(nowhere, to, numbers)
        seats = jax.tree.map(
            lambda leaf, own: jnp.take(leaf, which, axis=0, mode="clip") if own else leaf,
            inputs._replace(lane=ended.lane),
            flags,
        )
        updates = ahead(taken, left, quiet)
        part = wave(seats, left, start + taken, updates)
        ended = jax.tree.map(lambda whole, some: put(whole, which, some), ended, part)
        return after(ended, left, taken + updates, quiet)

    def after(ended: refill.Ended, before: Any, taken: Any, quiet: Any) -> Any:
        left = jnp.sum(away(ended).astype(jnp.int32))
        return ended, left, taken, jnp.where(left == before, quiet + 1, 0)

    none = jnp.int32(0)
    updates = ahead(none, count, none)
    state = after(wave(inputs, count, start, updates), count, updates, none)
    return lax.while_loop(lambda state: state[1] > 0, once, state)[0]


def entire(target: Target) -> Callable[..., Callable[..., Any]]:
    """The same for fresh problems, seated before the kernel in the same program."""

    @by_problem
    def tile(kernel: Any, program: Program, chunk: int, flags: refill.Start, start: Any, steps: Any) -> Any:
        def run(inputs: refill.Start, count: Any) -> tuple[refill.Ended, refill.Ended]:
            begun = lambda before: refill.begin(before, program, 1, flags, start, steps)(inputs)  # noqa: E731
            lane, own = ahead(kernel, begun)
            seated = refill.Running(own, flags.data, flags.hyper)
            last = finish(target)(kernel, program, chunk, seated, start, steps)
            return last(refill.Running(lane, inputs.data, inputs.hyper), count)

        return run

    return tile


class Course:
    """One problem's way to where its rule holds, traced: first strides of updates taken blindly, after which is looked
    whether anything happened, and from there one by one (as on the CPU, see `gdjax.engine.refill`)."""

    def __init__(self, program: Program, inputs: refill.Running, flags: refill.Running):
        self.shapes = problem_shapes(inputs, flags)
        lane, data, hyper = self.shapes
        moving, index = refill.at_rest(lane)
        self.mark = traced(program.mark, moving, jax.ShapeDtypeStruct((), np.dtype(bool)))
        self.leap = traced(leap(program), moving, index, data, hyper)
        self.hold = traced(program.hold, moving, index, moving, index)
        self.runs = traced(lambda moving: finite(moving["weights"]), moving)
        self.advance = traced(program.advance, lane, index, data, hyper)
        self.length = long_axis((lane["weights"], lane["state"], hyper), data, of_jaxpr(self.advance.closed.jaxpr))
        self.report = traced(program.report, lane["weights"], data)
        self.operations = max(1.0, of_jaxpr(self.leap.closed.jaxpr))

    def run(self, machine: Machine, given: Arguments, arrays: list[np.ndarray]) -> list[np.ndarray]:
        lane, data, hyper = split(arrays, self.shapes)
        rest = [*data, *hyper]
        lane = self.sprint(machine, given, lane, rest)
        last = machine.number(given.end)
        avals = self.advance.avals
        varies = [True] * (len(avals) + 1) + [False] * len(rest)
        named = jax.tree.unflatten(jax.tree.structure(self.advance.out), range(len(avals)))

        def one(_: Any, carry: Any) -> Any:
            return machine.pack(machine.run(self.advance, [*machine.unpack(carry, avals), last, *rest], varies), avals)

        def running(carry: Any) -> Any:
            status = machine.unpack(carry, avals)[named["status"]][()]
            return jnp.max(machine.ones(status == RUNNING))

        def some(carry: Any) -> Any:
            tiles = lax.fori_loop(0, STEPS_PER_LOOK, one, carry[1])
            return running(tiles), tiles

        tiles = machine.pack(lane, avals)
        _, tiles = lax.while_loop(lambda carry: carry[0] > 0, some, (running(tiles), tiles))
        ends = machine.unpack(tiles, avals)
        weights = [ends[i] for i in jax.tree.leaves(named["weights"])]
        return [*ends, *machine.run(self.report, [*weights, *data])]

    def sprint(
        self, machine: Machine, given: Arguments, lane: list[np.ndarray], rest: list[np.ndarray]
    ) -> list[np.ndarray]:
        """The lanes where nothing has happened yet that ends their problems, each after as many strides as it bore; in
        a wave before the last, those to which nothing happened at all are `AWAY`."""
        named = jax.tree.unflatten(jax.tree.structure(self.shapes[0]), lane)
        (seats, index), status = refill.at_rest(named), named["status"][()]
        avals, given_seats = self.leap.avals, jax.tree.leaves(seats)
        held_avals = [*avals, jax.ShapeDtypeStruct((), np.int32)]
        varies = [True] * (len(avals) + 1) + [False] * len(rest)
        number = lambda n: machine.number(n)[()]  # noqa: E731
        # Those that a run before this one has taken further than others go one by one.
        fresh = ((status == RUNNING) | (status == AWAY)) & (index[()] <= number(given.start))

        def after(updates: Any) -> np.ndarray:
            return row([index[()] + number(updates)]).reshape(())

        def runs(moving: Any) -> Any:
            (each,) = machine.run(self.runs, machine.unpack(moving, avals))
            return each[()]

        def running(moving: Any) -> Any:
            return jnp.max(machine.ones(runs(moving)))

        def stride(carry: Any) -> Any:
            _, taken, moving, held = carry
            grown = jnp.clip(lax.div(taken, jnp.int32(refill.PATIENCE)), 1, refill.LONGEST)
            updates = jnp.minimum(grown, most - taken)

            def once(update: Any, moving: Any) -> Any:
                now = [*machine.unpack(moving, avals), after(taken + update), *rest]
                return machine.pack(machine.run(self.leap, now, varies), avals)

            moving, taken = lax.fori_loop(0, updates, once, moving), taken + updates
            both = [*machine.unpack(held, held_avals), *machine.unpack(moving, avals), after(taken)]
            return running(moving), taken, moving, machine.pack(machine.run(self.hold, both), held_avals)

        # Before the end one update at least is left to be taken alone, so that few show both ways.
        most = given.steps - (given.start + given.steps == given.end).astype(jnp.int32)

        def going(carry: Any) -> Any:
            return (carry[0] > 0) & (carry[1] < most)

        moving = machine.pack(machine.run(self.mark, [*given_seats, row([fresh]).reshape(())]), avals)
        begun = running(moving), jnp.int32(0), moving, machine.pack([*given_seats, index], held_avals)
        _, _, moving, held = lax.while_loop(going, stride, begun)
        held = machine.unpack(held, held_avals)
        kept = jax.tree.unflatten(jax.tree.structure(seats), held[:-1])
        on = runs(moving) & (number(given.start + given.steps) < number(given.end))
        awake = lax.select(status == AWAY, number(np.int32(RUNNING)), status)
        status = row([lax.select(on, number(np.int32(AWAY)), awake)]).reshape(())
        return jax.tree.leaves({**named, **kept, "index": held[-1], "status": status})


def leap(program: Program) -> Callable[..., Any]:
    """The function that takes an update blindly and marks a problem that ended before it."""

    def one(moving: Any, index: Any, data: Any, hyper: Any) -> Any:
        return program.stay_after_one(*program.leap(moving, index, None, data, hyper))

    return one
