"""The whole descent in one kernel: a problem's scalars stay in registers from the first update to the last.

Each function takes the place of a tile function, with the same inputs and outputs: `descend` of
`gdjax.engine.fixed.tile`, `finish` and `entire` of those in `gdjax.engine.refill`. Everything they give back is per
problem. They take a whole block and are told how many problems there are: those behind them take no step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax.batch import Batch, problem_shapes
from gdjax.engine import fixed, refill
from gdjax.engine.evaluator import UnsupportedError
from gdjax.engine.kernels import Kernel, Lanes
from gdjax.engine.program import DIVERGED, RUNNING, Program
from gdjax.engine.scalars import DTYPES, Scalars, entries, row, value_of
from gdjax.engine.targets import Arguments, Interpreted, Target
from gdjax.engine.tile import by_problem, inward, outward

MAX_SCALARS = 320
"""Most scalars one problem may have, its weights, state and data together. A thread of a GPU has 255 registers; a
little beyond them is read from the nearest cache each step, which still beats a pass over memory."""

STEPS_PER_LOOK = 8
"""How often a tile asks whether any of its lanes still runs."""


class Traced(NamedTuple):
    """The jaxpr of a function of one problem, and the shapes of what it returns."""

    closed: Any
    out: Any

    @property
    def avals(self) -> list[Any]:
        return list(self.closed.out_avals)


def traced(function: Callable[..., Any], *shapes: Any) -> Traced:
    closed, out = jax.make_jaxpr(function, return_shape=True)(*shapes)
    return Traced(closed, out)


class Machine:
    """Evaluates traced functions of one problem on the tiles of a target."""

    def __init__(self, target: Target, zero: Any):
        self.target = target
        self.zero = zero

    def run(self, function: Traced, arrays: Sequence[np.ndarray], varies: Sequence[bool] | None = None) -> list[Any]:
        """The outputs as arrays of entries; `varies` says which arguments change from turn to turn of a loop."""
        changes = varies or [True] * len(arrays)
        consts = [np.asarray(c) for c in function.closed.consts]
        values = [value_of(a, changing) for a, changing in zip(arrays, changes, strict=True)]
        out = Scalars(self.target.full, self.zero).run(function.closed.jaxpr, consts, values)
        return [entries(value) for value in out]

    def pack(self, arrays: Sequence[np.ndarray], avals: Sequence[Any]) -> list[Any]:
        """All entries in one list of tiles, as a loop carries them and memory holds them: no bits, no numbers."""
        return [
            self.target.settle(self.held(x, aval.dtype))
            for array, aval in zip(arrays, avals, strict=True)
            for x in array.ravel()
        ]

    def held(self, x: Any, dtype: Any) -> Any:
        if isinstance(x, np.generic):
            return self.target.full(x.astype(stored(dtype)))
        return x if dtype.kind != "b" else self.ones(x)

    def ones(self, x: Any) -> Any:
        """1 where a tile of bits is set, else 0."""
        return lax.select(x, self.target.full(np.int32(1)), self.target.full(np.int32(0)))

    def unpack(self, tiles: Sequence[Any], avals: Sequence[Any]) -> list[np.ndarray]:
        """The inverse of `pack`."""
        arrays, rest = [], list(tiles)
        for aval in avals:
            size = math.prod(aval.shape)
            items = [x != 0 if aval.dtype.kind == "b" else x for x in rest[:size]]
            arrays.append(row(items).reshape(aval.shape))
            rest = rest[size:]
        return arrays

    def number(self, x: Any) -> np.ndarray:
        """A uniform number as an array of one tile."""
        return row([self.target.full(x)]).reshape(())


def stored(dtype: Any) -> np.dtype:
    """The dtype in which memory and loops hold a value."""
    return np.dtype(np.int32) if dtype.kind == "b" else np.dtype(dtype)


Body = Callable[[Machine, Arguments, list[np.ndarray]], list[np.ndarray]]


def launch(
    target: Target, body: Body, inputs: Any, flags: Any, numbers: Any, zero: Any, out: Any, size: int
) -> Any:
    """`body(machine, arguments, leaves of inputs)` on all tiles; `out` are shapes of one problem's results."""
    leaves, own = jax.tree.leaves(inputs), jax.tree.leaves(flags)
    shapes = jax.tree.leaves(problem_shapes(inputs, flags))
    out_shapes, tree = jax.tree.flatten(out)
    held = [s for s in shapes if math.prod(s.shape)]  # no memory for what is empty

    def compute(given: Arguments) -> list[list[Any]]:
        machine = Machine(target, given.zero)
        mine, common = iter(given.own), iter(given.shared)
        arrays = []
        for shape, flag in zip(shapes, own, strict=True):
            tiles = next(mine if flag else common) if math.prod(shape.shape) else []
            arrays += machine.unpack(tiles, [shape])
        results = body(machine, given, arrays)
        return [machine.pack([a], [s]) for a, s in zip(results, out_shapes, strict=True) if math.prod(s.shape)]

    def flat(leaf: Any, shape: Any, flag: bool) -> Any:
        leaf = leaf.astype(stored(shape.dtype))
        return leaf.reshape(size, -1).T if flag else leaf.reshape(-1)

    given = [(flat(a, s, f), f) for a, s, f in zip(leaves, shapes, own, strict=True) if math.prod(s.shape)]
    assert len(given) == len(held)
    wanted = [(math.prod(s.shape), stored(s.dtype)) for s in out_shapes if math.prod(s.shape)]
    mine, common = [a for a, flag in given if flag], [a for a, flag in given if not flag]
    with jax.enable_x64(False):  # Mosaic's own indices have 32 bits
        results = iter(target.launch(compute, numbers, zero, mine, common, wanted, size))
    back = [
        next(results).T.reshape(size, *s.shape).astype(s.dtype)
        if math.prod(s.shape)
        else jnp.zeros((size, *s.shape), s.dtype)
        for s in out_shapes
    ]
    return jax.tree.unflatten(tree, back)


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
            out = launch(target, descent, given, own, numbers, zero, shapes, kernel.size)
            weights, state, healthy, loss, norm = out
            status = jax.vmap(fixed.ending)(weights, healthy, loss)
            result = fixed.Outputs(weights, state, loss, norm, status)
            return result, jax.tree.map(lambda _: True, result)

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
    before = Lanes(kernel.size)
    before.zero = kernel.zero
    begun, begun_own = before.call(begin, inward(before, parts, own), own)
    every = jax.tree.map(lambda _: True, begun)
    weights, state = outward(before, before.spread(begun, begun_own, every), every)
    return inputs._replace(weights=weights, state=state), flags._replace(weights=every[0], state=every[1])


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
        check_size((weights, state, data, hyper))
        healthy, index = jax.ShapeDtypeStruct((), np.dtype(bool)), jax.ShapeDtypeStruct((), np.int32)
        self.step = traced(program.step, weights, state, healthy, index, data, hyper)
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
            lane, loss, norm = launch(target, parts.run, inputs, flags, numbers, zero, shapes, kernel.size)
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
            before = Lanes(kernel.size)
            before.zero = kernel.zero
            lane, own = refill.begin(before, program, 1, flags, start, steps)(inputs)
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
        check_size((lane["weights"], lane["state"], data, hyper))
        self.advance = traced(program.advance, lane, jax.ShapeDtypeStruct((), np.int32), data, hyper)
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


def check_size(shapes: Any) -> None:
    """Refuses a problem whose scalars are too many, or of a dtype that the kernels do not hold."""
    leaves = jax.tree.leaves(shapes)
    other = [leaf.dtype for leaf in leaves if np.dtype(leaf.dtype).name not in DTYPES]
    if other:
        raise UnsupportedError(f"{other[0]} among its numbers, where kernels in registers hold float32")
    scalars = sum(math.prod(leaf.shape) for leaf in leaves)
    if scalars > MAX_SCALARS:
        raise UnsupportedError(f"one problem is {scalars} numbers, more than {MAX_SCALARS}")
