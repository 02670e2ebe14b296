"""Runs functions of one problem on the tiles of a target: what a kernel in registers is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax.batch import problem_shapes
from gdjax.engine.evaluator import UnsupportedError, Value
from gdjax.engine.points import Points, Rows
from gdjax.engine.scalars import DTYPES, Scalars, entries, row, value_of
from gdjax.engine.streamed import flat
from gdjax.engine.targets import Arguments, Target

MAX_SCALARS = 320
"""Most scalars one problem may have, its weights, state and data together. A thread of a GPU has 255 registers; a
little beyond them is read from the nearest cache each step, which still beats a pass over memory."""

FEW_SCALARS, LIGHT = 200, 6
"""Where more than so many operations are done with each number, as many scalars: what they need in between crowds the
others out. With data in memory 32 × 8 logistic regressions run 1.3 times as fast (an H100), and compile in a third of
the time; sums of squares half as fast."""


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
        values = [
            Value(a, True, False) if isinstance(a, Rows) else value_of(a, changing)
            for a, changing in zip(arrays, changes, strict=True)
        ]
        walk, rows = Scalars(self.target.full, self.zero), [a for a in arrays if isinstance(a, Rows)]
        if rows:
            length = rows[0].shape[rows[0].axis]
            out = Points(walk, flat(function.closed), values, length, self.target.settle).run()
        else:
            out = walk.run(function.closed.jaxpr, consts, values)
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
    target: Target,
    body: Body,
    inputs: Any,
    flags: Any,
    numbers: Any,
    zero: Any,
    out: Any,
    size: int,
    length: int | None = None,
) -> Any:
    """`body(machine, arguments, leaves of inputs)` on all tiles; `out` are shapes of one problem's results. Leaves with
    an axis of this `length` stay in memory."""
    leaves, own = jax.tree.leaves(inputs), jax.tree.leaves(flags)
    shapes = jax.tree.leaves(problem_shapes(inputs, flags))
    out_shapes, tree = jax.tree.flatten(out)
    held = [s for s in shapes if math.prod(s.shape)]  # no memory for what is empty

    def compute(given: Arguments) -> list[list[Any]]:
        machine = Machine(target, given.zero)
        mine, common = iter(given.own), iter(given.shared)
        arrays: list[Any] = []
        for shape, flag in zip(shapes, own, strict=True):
            leaf = next(mine if flag else common) if math.prod(shape.shape) else None
            if leaf and length is not None and length in shape.shape:
                arrays.append(Rows(shape.shape, length, leaf.one))
            else:
                arrays += machine.unpack(leaf.all() if leaf else [], [shape])
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


def split(arrays: list[np.ndarray], shapes: Any) -> list[list[np.ndarray]]:
    """The leaves of a tuple of trees, tree by tree."""
    out, rest = [], list(arrays)
    for tree in shapes:
        count = len(jax.tree.leaves(tree))
        out.append(rest[:count])
        rest = rest[count:]
    return out


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
