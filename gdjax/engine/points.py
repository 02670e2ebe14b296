"""Problems with more data than registers hold: the data stays in memory, and sums over it go through loops.

What `gdjax.engine.streamed` does in lanes, for kernels in registers: weights, the rule's state and the totals of sums
stay in registers for the whole descent; of the data a few points at a time are loaded, used for all that needs them,
and forgotten. Terms are added first one first, so that the bits are those of sums written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax

from gdjax.engine.evaluator import UnsupportedError, Value
from gdjax.engine.scalars import Scalars, entries, row, stacked
from gdjax.engine.streamed import Streamed, zero_of

AT_A_TIME = 144
"""Numbers loaded at a time, about: as many as can be on their way without crowding out weights and totals."""

MOST_POINTS = 8
"""Points at a time, at most: more would only lengthen the program."""


class Rows:
    """An array of one problem that stays in memory. `load` brings an entry to a tile, by its number in C order, which
    may be known in the kernel only."""

    def __init__(self, shape: tuple[int, ...], length: int, load: Callable[[Any], Any]):
        self.shape, self.axis, self.load = shape, shape.index(length), load

    def cut(self, first: Any, size: int) -> np.ndarray:
        """The tiles of `size` entries along the long axis from `first` on, and of all along the others."""
        axis, length = self.axis, self.shape[self.axis]
        shape = (*self.shape[:axis], size, *self.shape[axis + 1 :])
        stride = math.prod(self.shape[axis + 1 :])
        places = np.arange(math.prod(self.shape)).reshape(self.shape).take(range(size), axis)
        assert size <= length
        return row([self.load(first * stride + int(place)) for place in places.ravel()]).reshape(shape)


def at_a_time(shapes: Sequence[tuple[int, ...]], length: int) -> int:
    """How many points to load at a time, of arrays of these shapes."""
    each = sum(math.prod(shape) // length for shape in shapes)
    return max(1, min(MOST_POINTS, AT_A_TIME // max(1, each)))


class Points(Streamed):
    """A flat jaxpr on its way through the scalars, where some arguments are `Rows`. `settle` gives a tile the form in
    which a loop carries it."""

    def __init__(self, walk: Scalars, closed: Any, args: Sequence[Value], length: int, settle: Callable[[Any], Any]):
        super().__init__(walk, closed, args, length)
        self.settle = settle
        self.block = at_a_time([v.array.shape for v in args if isinstance(v.array, Rows)], length)

    def cut(self, variable: Any, first: Any, size: int) -> Value:
        value = self.values[variable]
        if isinstance(value.array, Rows):
            return Value(value.array.cut(first, size), True, False)
        if self.axis(variable) is None or np.ptp(value.array) == 0:
            return super().cut(variable, first, size)
        raise UnsupportedError(f"constants that differ along an axis of length {self.length}")

    def terms(self, eqn: Any, operands: list[Value]) -> list[Any]:
        arrays, shape = [entries(v) for v in operands], eqn.outvars[0].aval.shape
        axes = [self.axis(v) for v in eqn.invars]
        if eqn.primitive.name == "reduce_sum" and min(eqn.params["axes"]) == axes[0]:
            rows = stacked(arrays[0], (), sorted(eqn.params["axes"]))[0]
            return [rows[:, k].reshape(shape) for k in range(rows.shape[1])]
        if eqn.primitive.name == "dot_general":
            (contract_l, contract_r), (batch_l, batch_r) = eqn.params["dimension_numbers"]
            if [dims[0] if dims else None for dims in (contract_l, contract_r)] == axes:
                a, b = stacked(arrays[0], batch_l, contract_l), stacked(arrays[1], batch_r, contract_r)
                places = list(np.ndindex(a.shape[0], a.shape[1], b.shape[1]))
                return [
                    row([self.walk.mul(a[n, i, k], b[n, j, k]) for n, i, j in places]).reshape(shape)
                    for k in range(a.shape[2])
                ]
        raise self.unsupported(eqn)

    def nothing(self, aval: Any) -> np.ndarray:
        zero = self.walk.full(aval.dtype.type(zero_of(aval)))
        return row([self.settle(zero)] * math.prod(aval.shape)).reshape(aval.shape)

    def loop(self, turns: int, turn: Callable[[Any, Any], Any], totals: list[np.ndarray]) -> list[np.ndarray]:
        def flat(arrays: list[np.ndarray]) -> list[Any]:
            return [self.settle(x) for array in arrays for x in array.ravel()]

        def unflat(tiles: Sequence[Any]) -> list[np.ndarray]:
            rest = iter(tiles)
            return [row([next(rest) for _ in range(array.size)]).reshape(array.shape) for array in totals]

        return unflat(lax.fori_loop(0, turns, lambda n, tiles: flat(turn(n, unflat(tiles))), flat(totals)))

    def add(self, total: np.ndarray, term: np.ndarray) -> np.ndarray:
        return row([self.walk.add(a, b) for a, b in zip(total.ravel(), term.ravel(), strict=True)]).reshape(total.shape)

    def in_block(self, several: bool) -> Scalars:
        return Scalars(self.walk.full, self.walk.zero)

    def laid_out(self, values: list[Value]) -> list[Value]:
        return values
