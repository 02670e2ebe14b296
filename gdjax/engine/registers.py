"""The whole descent in one kernel: a problem's scalars stay in registers from the first update to the last.

Each function takes the place of a tile function, with the same inputs and outputs: `descend` of
`gdjax.engine.fixed.tile`, `finish` and `entire` of those in `gdjax.engine.refill`. Everything they give back is per
problem. They take a whole block and are told how many problems there are: those behind them take no step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax.batch import Batch, problem_shapes
from gdjax.engine import fixed, refill
from gdjax.engine.evaluator import UnsupportedError
from gdjax.engine.kernels import Kernel, Lanes, Vmap
from gdjax.engine.machine import Machine, launch, traced
from gdjax.engine.program import DIVERGED, RUNNING, Program
from gdjax.engine.scalars import DTYPES
from gdjax.engine.targets import Arguments, Interpreted, Target
from gdjax.engine.tile import by_problem, inward, outward
from gdjax.work import of_jaxpr

MAX_SCALARS = 320
"""Most scalars one problem may have, its weights, state and data together. A thread of a GPU has 255 registers; a
little beyond them is read from the nearest cache each step, which still beats a pass over memory."""

FEW_SCALARS, LIGHT = 200, 6
"""Where more than so many operations are done with each number, as many scalars: what they need in between crowds the
others out. With data in memory 32 × 8 logistic regressions run 1.3 times as fast (an H100), and compile in a third of
the time; sums of squares half as fast."""

STEPS_PER_LOOK = 8
"""How often a tile asks whether any of its lanes still runs."""


def turns(one: Callable[[Any, Any], Any], chunk: int, steps: Any, carry: Any) -> Any:
    """`steps` turns, `chunk` of them in one pass of the loop."""
    if chunk == 1:
        return lax.fori_loop(0, steps, one, carry)
    passes = lax.div(steps, jnp.int32(chunk))

    def fused(number: Any, carry: Any) -> Any:
        for offset in range(chunk):
            carry = one(number * chunk + offset, carry)
        return carry

    carry = lax.fori_loop(0, passes, fused, carry)
    return lax.fori_loop(passes * chunk, steps, one, carry)


def descend(target: Target) -> Callable[..., Callable[..., Any]]:
    """All steps, no stop rule."""

    @by_problem
    def tile(kernel: Any, program: Program, chunk: int, flags: fixed.Inputs, start: Any, steps: Any) -> Any:
        def run(inputs: fixed.Inputs, count: Any) -> tuple[fixed.Outputs, fixed.Outputs]:
            given, own = started(kernel, program, inputs, flags)
            parts = Descent(program, given, own)
            numbers = jnp.stack([jnp.asarray(n, jnp.int32) for n in (start, steps, count)])
            zero = jnp.reshape(kernel.zero, 1)

            def descent(machine: Machine, arguments: Arguments, arrays: list[np.ndarray]) -> list[np.ndarray]:
                return parts.run(machine, arguments, arrays, chunk)

            shapes = (*parts.step.out, *parts.report.out)
            out = launch(target, descent, given, own, numbers, zero, shapes, kernel.size, parts.length)
            weights, state, healthy, loss, norm = out
            status = jax.vmap(fixed.ending)(weights, healthy, loss)
            result = fixed.Outputs(weights, state, loss, norm, status)
            own = jax.tree.map(lambda _: True, result)
            if kernel.on_host:  # where several threads put results together
                return result, own
            return result._replace(lowest=jnp.min(status)), own._replace(lowest=False)

        return run

    return tile


def started(
    kernel: Kernel, program: Program, inputs: fixed.Inputs, flags: fixed.Inputs
) -> tuple[fixed.Inputs, fixed.Inputs]:
    """The inputs, with the rule's state where making it takes a loop, which would be too long written out."""
    own = (flags.weights, flags.data, flags.hyper)
    parts = (inputs.weights, inputs.data, inputs.hyper)
    begin = beginning(program)
    if inputs.state is not None or "scan" not in str(jax.make_jaxpr(begin)(*problem_shapes(parts, own))):
        return inputs, flags

    def begun(before: Kernel) -> tuple[fixed.Inputs, fixed.Inputs]:
        pair, pair_own = before.call(begin, inward(before, parts, own), own)
        every = jax.tree.map(lambda _: True, pair)
        weights, state = outward(before, before.spread(pair, pair_own, every), every)
        return inputs._replace(weights=weights, state=state), flags._replace(weights=every[0], state=every[1])

    return ahead(kernel, begun)


def ahead(kernel: Kernel, function: Callable[[Kernel], Any]) -> Any:
    """`function` of the form in which XLA does what comes before a kernel: lanes, where the problem has that form."""
    for form in (Lanes, Vmap):
        before = form(kernel.size)
        before.zero = kernel.zero
        try:
            return function(before)
        except UnsupportedError as error:
            reason = error
    raise reason


def beginning(program: Program) -> Callable[..., Any]:
    """The function that gives weights and rule's state of a fresh start."""

    def begin(weights: Any, data: Any, hyper: Any) -> tuple[Any, Any]:
        inside = program.start(weights)
        return inside, program.init(inside, data, hyper)

    return begin


class Descent:
    """One problem's descent, traced: the start of the rule's state, a step, the report at the end."""

    def __init__(self, program: Program, inputs: fixed.Inputs, flags: fixed.Inputs):
        self.shapes = problem_shapes(inputs, flags)
        weights, state, data, hyper = self.shapes
        self.fresh = traced(beginning(program), weights, data, hyper) if state is None else None
        state = self.fresh.out[1] if self.fresh else state
        healthy, index = jax.ShapeDtypeStruct((), np.dtype(bool)), jax.ShapeDtypeStruct((), np.int32)
        self.step = traced(program.step, weights, state, healthy, index, data, hyper)
        self.length = long_axis((weights, state, hyper), data, of_jaxpr(self.step.closed.jaxpr))
        self.report = traced(program.report, weights, data)

    def run(self, machine: Machine, given: Arguments, arrays: list[np.ndarray], chunk: int) -> list[np.ndarray]:
        weights, state, data, hyper = split(arrays, self.shapes)
        if self.fresh:
            begun = machine.run(self.fresh, [*weights, *data, *hyper])
            weights, state = begun[: len(weights)], begun[len(weights) :]
        yes = np.array(np.bool_(True))
        avals = self.step.avals
        rest = [*data, *hyper]
        varies = [True] * (len(avals) + 1) + [False] * len(rest)

        def one(number: Any, carry: Any) -> Any:
            index = machine.number(given.start + number)
            out = machine.run(self.step, [*machine.unpack(carry, avals), index, *rest], varies)
            return machine.pack(out, avals)

        carry = machine.pack([*weights, *state, yes], avals)
        ends = machine.unpack(turns(one, chunk, given.steps, carry), avals)
        return [*ends, *machine.run(self.report, [*ends[: len(weights)], *data])]


def finish(target: Target) -> Callable[..., Callable[..., Any]]:
    """Every problem until its rule holds or it has taken all steps. A lane that is done stays as it is; a tile ends
    when all its lanes are done."""

    @by_problem
    def tile(kernel: Any, program: Program, chunk: int, flags: refill.Running, start: Any, steps: Any) -> Any:
        def run(inputs: refill.Running, count: Any) -> tuple[refill.Ended, refill.Ended]:
            parts = Course(program, inputs, flags)
            numbers = jnp.stack([jnp.asarray(n, jnp.int32) for n in (start, steps, count)])
            shapes = (parts.advance.out, *parts.report.out)
            zero = jnp.reshape(kernel.zero, 1)
            lane, loss, norm = launch(
                target, parts.run, inputs, flags, numbers, zero, shapes, kernel.size, parts.length
            )
            # A loss that is not finite at the final weights is no answer, whatever the rule said.
            lane = {**lane, "status": jnp.where(jnp.isfinite(loss), lane["status"], jnp.int32(DIVERGED))}
            result = refill.Ended(lane, loss, norm)
            return result, jax.tree.map(lambda _: True, result)

        return run

    return tile


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
    """One problem's way to where its rule holds, traced."""

    def __init__(self, program: Program, inputs: refill.Running, flags: refill.Running):
        self.shapes = problem_shapes(inputs, flags)
        lane, data, hyper = self.shapes
        self.advance = traced(program.advance, lane, jax.ShapeDtypeStruct((), np.int32), data, hyper)
        self.length = long_axis((lane["weights"], lane["state"], hyper), data, of_jaxpr(self.advance.closed.jaxpr))
        self.report = traced(program.report, lane["weights"], data)

    def run(self, machine: Machine, given: Arguments, arrays: list[np.ndarray]) -> list[np.ndarray]:
        lane, data, hyper = split(arrays, self.shapes)
        last = machine.number(given.start + given.steps)
        avals, rest = self.advance.avals, [*data, *hyper]
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


def split(arrays: list[np.ndarray], shapes: Any) -> list[list[np.ndarray]]:
    """The leaves of a tuple of trees, tree by tree."""
    out, rest = [], list(arrays)
    for tree in shapes:
        count = len(jax.tree.leaves(tree))
        out.append(rest[:count])
        rest = rest[count:]
    return out


TILES: dict[Any, Callable[[Target], Any]] = {fixed.tile: descend, refill.finish: finish, refill.entire: entire}
"""The kernel that takes the place of a tile function, for a target."""


def unfit(program: Program, batch: Batch) -> str:
    """Why a kernel cannot hold these problems; empty where it can. Nothing is compiled for that."""
    target = Interpreted()
    kernel = Kernel(target.lanes)
    own = jax.tree.map(lambda _: True, batch.weights)
    flags = fixed.Inputs(own, None, batch.data_flags, batch.hyper_flags)
    one = problem_shapes((batch.weights, batch.data, batch.hyper), (own, batch.data_flags, batch.hyper_flags))

    def seated(shapes: Any, own: Any) -> Any:
        return jax.tree.map(
            lambda s, flag: jax.ShapeDtypeStruct((target.lanes, *s.shape) if flag else s.shape, s.dtype), shapes, own
        )

    def whole(inputs: Any) -> Any:
        index = jnp.int32(0)
        if program.stop is None:
            descend(target)(kernel, program, 1, flags, index, index)(inputs, index)
        weights, data, hyper = one
        state = jax.eval_shape(program.init, weights, data, hyper)
        lane = jax.eval_shape(program.begin, weights, state, jax.ShapeDtypeStruct((), np.int32), data)
        running = refill.Running(jax.tree.map(lambda _: True, lane), flags.data, flags.hyper)
        seats = seated(refill.Running(lane, data, hyper), running)
        return jax.eval_shape(lambda r: finish(target)(kernel, program, 1, running, index, index)(r, index)[0], seats)

    try:
        jax.eval_shape(whole, seated(fixed.Inputs(one[0], None, one[1], one[2]), flags))
    except UnsupportedError as error:
        return str(error)
    return ""


def long_axis(carried: Any, data: Any, operations: float) -> int | None:
    """The length of the axis along which data stays in memory; None where registers hold a problem as a whole, which
    takes so many operations a step.

    UnsupportedError where there is none, or for a dtype that the kernels do not hold.
    """
    fixed, shapes = jax.tree.leaves(carried), jax.tree.leaves(data)
    other = [leaf.dtype for leaf in [*fixed, *shapes] if np.dtype(leaf.dtype).name not in DTYPES]
    if other:
        raise UnsupportedError(f"{other[0]} among its numbers, where kernels in registers hold float32")
    scalars = count(fixed) + count(shapes)
    if scalars <= (MAX_SCALARS if operations <= LIGHT * scalars else FEW_SCALARS):
        return None
    lengths = {n for leaf in shapes if leaf.dtype != np.bool_ for n in leaf.shape}
    for n in sorted(lengths - {n for leaf in fixed for n in leaf.shape}, reverse=True):
        if 2 * (count(fixed) + count(leaf for leaf in shapes if n not in leaf.shape)) <= MAX_SCALARS:
            return n
    if scalars <= MAX_SCALARS:
        return None
    raise UnsupportedError(f"one problem is {scalars} numbers, more than {MAX_SCALARS}, whatever stays in memory")


def count(shapes: Iterable[Any]) -> int:
    return sum(math.prod(leaf.shape) for leaf in shapes)
