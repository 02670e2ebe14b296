"""Sums with more terms than are written out: in a loop over blocks of terms, the first ones first.

A loss over many points is some operations on each of them and a sum. Whatever has an axis of so many entries and
differs between problems is computed for `BLOCK` entries at a time, so that what lies between a problem's weights and
its gradient stays in the fastest cache. Where the terms of a sum hang on another such sum (a loss of centred
predictions, say), one loop follows the other. The bits are those of sums written out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from gdjax.engine.evaluator import INLINED, MAX_TERMS, UnsupportedError, Value, inner, reaches
from gdjax.engine.lanes import ELEMENTWISE, Lanes, dot_products, take
from gdjax.engine.materialise import materialised

BLOCK = 8
"""Entries of the long axis at a time: a total is loaded and stored once for so many terms."""

GROUP = 8
"""Terms of a shorter sum between two times that its total is put down: so many factors stay in registers."""

SHORT, SHORT_OWN = 16, 32
"""Sums of no more terms are written out: over what problems share, and over data of their own."""

WIDE = 64
"""Where a term over shared data is itself made of a longer sum, matrix products are faster."""

LENGTHS = {"broadcast_in_dim": "shape", "reshape": "new_sizes", "slice": "limit_indices"}
"""Which parameter says how long the result of an operation is."""

ROWWISE = ELEMENTWISE | frozenset(
    """broadcast_in_dim concatenate dot_general log1p pad reduce_max reduce_min reduce_sum reshape select_n slice
    squeeze transpose""".split()
)
"""What may be done to a block of entries as to all of them, where it is done along other axes (`Streamed.check`)."""


def long_axes(jaxpr: core.Jaxpr, own: Sequence[bool]) -> list[int]:
    """The lengths of the axes that may go through loops, the longest first."""
    lengths = sums(jaxpr, own)
    mine = {n for v, flag in zip(jaxpr.invars, own, strict=True) if flag for n in shape_of(v)}
    found = sorted((n for n in lengths if n > (SHORT_OWN if n in mine else SHORT)), reverse=True)
    for n in found:
        if n not in mine and (wide := max(lengths - {n}, default=0)) > WIDE:
            raise UnsupportedError(f"sums of {n} terms, and of {wide}: matrix products, which are faster")
    return found


def shape_of(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def sums(jaxpr: core.Jaxpr, own: Sequence[bool]) -> set[int]:
    """The lengths of all axes over which something is summed up that differs between problems."""
    marked = {v for v, flag in zip(jaxpr.invars, own, strict=True) if flag}
    lengths: set[int] = set()
    for eqn in jaxpr.eqns:
        into = [not isinstance(v, core.Literal) and v in marked for v in eqn.invars]
        out = [any(into)] * len(eqn.outvars)
        if eqn.primitive.name in INLINED:
            nested = inner(eqn)[0]
            lengths |= sums(nested, into)
            out = reaches(nested, into)
        elif any(into):
            lengths.update(summed(eqn))
        marked.update(v for v, flag in zip(eqn.outvars, out, strict=True) if flag)
    return lengths


def summed(eqn: Any) -> list[int]:
    """The lengths of the axes that an operation sums over."""
    if eqn.primitive.name == "dot_general":
        axes = eqn.params["dimension_numbers"][0][0]
    else:
        axes = eqn.params["axes"] if eqn.primitive.name == "reduce_sum" else ()
    return [eqn.invars[0].aval.shape[axis] for axis in axes]


def run(walk: Lanes, closed: Any, args: Sequence[Value], own: Sequence[bool]) -> list[Value]:
    """The outputs of a jaxpr in lanes, where long sums go through loops, if they can."""
    lengths = long_axes(closed.jaxpr, own)
    without_calls = flat(closed) if lengths else closed
    for length in lengths:
        try:
            return Streamed(walk, without_calls, args, length).run()
        except UnsupportedError:
            if length > MAX_TERMS:
                raise
    return walk.run(closed.jaxpr, closed.consts, args)


def flat(closed: Any) -> Any:
    """The same jaxpr without calls in it."""

    def walk(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        of = functools.partial(read, env)
        for eqn in jaxpr.eqns:
            values = [of(v) for v in eqn.invars]
            out = walk(*inner(eqn), values) if eqn.primitive.name in INLINED else bound(eqn, values, eqn.params)
            env.update(zip(eqn.outvars, out, strict=True))
        return [of(v) for v in jaxpr.outvars]

    return jax.make_jaxpr(lambda *args: walk(closed.jaxpr, closed.consts, args))(*closed.in_avals)


def read(env: dict[Any, Any], atom: Any) -> Any:
    return number(atom) if isinstance(atom, core.Literal) else env[atom]


def number(literal: Any) -> np.ndarray:
    return np.asarray(literal.val, literal.aval.dtype)


def bound(eqn: Any, values: Sequence[Any], params: Any) -> list[Any]:
    out = eqn.primitive.bind(*values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def variables(eqns: Iterable[Any]) -> Iterator[Any]:
    """What operations take."""
    return (v for eqn in eqns for v in eqn.invars if not isinstance(v, core.Literal))


def leading_to(wanted: Iterable[Any], eqns: Sequence[Any]) -> list[Any]:
    """Those of the operations on which values hang."""
    wanted, kept = set(wanted), []
    for eqn in reversed(eqns):
        if not wanted.isdisjoint(eqn.outvars):
            wanted.update(variables([eqn]))
            kept.append(eqn)
    return kept[::-1]


class InBlocks(Lanes):
    """The walk over a block of entries; `several` sums look at what comes of it."""

    def __init__(self, walk: Lanes, several: bool):
        super().__init__(walk.size, walk.zero, walk.on_host)
        self.several = several

    def fold(self, combine: Callable[[Any, Any], Any], terms: list[Any]) -> Any:
        self.count(len(terms))
        total, *others = terms
        for first in range(0, len(others), GROUP):
            if first:
                (total,) = materialised([total], self.zero)
            total = functools.reduce(combine, others[first : first + GROUP], total)
        return materialised([total], self.zero)[0] if self.several else total


class Streamed:
    """A flat jaxpr on its way through the lanes. `values` are those that are there in full: what came in, and what has
    no long axis. `block` entries of that are taken at a time."""

    block = BLOCK

    def __init__(self, walk: Any, closed: Any, args: Sequence[Value], length: int):
        self.walk, self.jaxpr, self.length = walk, closed.jaxpr, length
        if self.jaxpr.effects:
            raise UnsupportedError(f"an effect beside a sum of {length} terms")  # it has no result to hang on
        self.values: dict[Any, Value] = dict(zip(self.jaxpr.invars, args, strict=True))
        self.values.update(zip(self.jaxpr.constvars, (Value(c, False, False) for c in closed.consts), strict=True))
        self.lanes = {v for v, value in self.values.items() if value.lane}
        for eqn in self.jaxpr.eqns:
            if not self.lanes.isdisjoint(variables([eqn])):
                self.lanes.update(eqn.outvars)

    def axis(self, variable: Any) -> int | None:
        """Which axis of a value is the long one."""
        shape = shape_of(variable)
        if shape.count(self.length) > 1:
            raise UnsupportedError(f"an array with several axes of length {self.length}, too long to be written out")
        return shape.index(self.length) if self.length in shape else None

    def in_blocks(self, variable: Any) -> bool:
        """Whether a value is looked at for a block of entries at a time only."""
        return variable in self.lanes and self.axis(variable) is not None

    def run(self) -> list[Value]:
        """By turns all that can be computed in full, and in one loop all sums whose terms can be computed."""
        wanted = [v for v in self.jaxpr.outvars if not isinstance(v, core.Literal)]
        if any(map(self.in_blocks, wanted)):
            raise UnsupportedError(f"a result with an axis of length {self.length}, too long to be written out")
        rows: list[Any] = []
        sums: list[Any] = []
        others: list[Any] = []
        for eqn in leading_to(wanted, self.jaxpr.eqns):
            if any(map(self.in_blocks, eqn.outvars)):
                self.check(eqn)
                rows.append(eqn)
            else:
                (sums if any(map(self.in_blocks, variables([eqn]))) else others).append(eqn)
        while others or sums:
            ready, others = self.ready(others, others)
            self.compute(ready, {*wanted, *variables([*rows, *sums, *others])})
            ready, sums = self.ready(sums, rows)
            if ready:
                self.add_up(ready, leading_to(variables(ready), rows))
        return [
            Value(number(v), False, False) if isinstance(v, core.Literal) else self.values[v]
            for v in self.jaxpr.outvars
        ]

    def ready(self, eqns: list[Any], by_way_of: list[Any]) -> tuple[list[Any], list[Any]]:
        """The operations that can be computed from what is there, by way of others; and those that cannot."""
        there = set(self.values)
        for eqn in by_way_of:
            if there.issuperset(variables([eqn])):
                there.update(eqn.outvars)
        now: list[Any] = []
        later: list[Any] = []
        for eqn in eqns:
            (now if there.issuperset(variables([eqn])) else later).append(eqn)
        return now, later

    def compute(self, eqns: list[Any], wanted: set[Any]) -> None:
        """Operations in full; those of their results that are `wanted` are kept."""
        into, out = ends(eqns, wanted)
        part = self.part(eqns, into, out, self.length)
        results = self.walk.run(part.jaxpr, part.consts, [self.values[v] for v in into])
        self.values.update(zip(out, results, strict=True))

    def add_up(self, sums: list[Any], rows: list[Any]) -> None:
        """Sums in a loop over blocks of their terms, which come by way of `rows`."""
        into, _ = ends([*rows, *sums], set())
        taken, out = ends(rows, set(variables(sums)))
        start = [self.nothing(eqn.outvars[0].aval) for eqn in sums]

        def added(first: Any, size: int, totals: Sequence[Any]) -> list[Any]:
            env = {v: self.cut(v, first, size) for v in into}
            part = self.part(rows, taken, out, size)
            walk = self.in_block(len(sums) > 1)
            terms = walk.run(part.jaxpr, part.consts, [env[v] for v in taken])
            env.update(zip(out, self.laid_out(terms), strict=True))
            return [
                functools.reduce(self.add, self.terms(eqn, [read(env, v) for v in eqn.invars]), total)
                for eqn, total in zip(sums, totals, strict=True)
            ]

        blocks, rest = divmod(self.length, self.block)
        totals = self.loop(blocks, lambda n, totals: added(n * self.block, self.block, totals), start)
        if rest:
            totals = added(blocks * self.block, rest, totals)
        self.values.update((eqn.outvars[0], Value(total, True)) for eqn, total in zip(sums, totals, strict=True))

    def nothing(self, aval: Any) -> Any:
        """A total before its first term: −0.0, which leaves that as it is."""
        return lax.full((*aval.shape, self.walk.size), zero_of(aval), aval.dtype)

    def loop(self, turns: int, turn: Callable[[Any, Any], Any], totals: Any) -> Any:
        return lax.fori_loop(0, turns, turn, totals)

    def add(self, total: Any, term: Any) -> Any:
        return lax.add(total, term)

    def in_block(self, several: bool) -> Any:
        """The walk over a block of entries."""
        return InBlocks(self.walk, several)

    def laid_out(self, values: list[Value]) -> list[Value]:
        """The same values in memory: a sum looks at each of them several times."""
        arrays = iter(materialised([v.array for v in values if v.lane], self.walk.zero))
        return [Value(next(arrays), True) if v.lane else v for v in values]

    def part(self, eqns: list[Any], into: list[Any], out: list[Any], size: int) -> Any:
        """Operations as a jaxpr of their own, with `size` entries along the long axis."""

        def resized(shape: Sequence[int]) -> tuple[int, ...]:
            return tuple(size if n == self.length else n for n in shape)

        def function(*values: Any) -> list[Any]:
            env = dict(zip(into, values, strict=True))
            for eqn in eqns:
                name = LENGTHS.get(eqn.primitive.name)
                params = {**eqn.params, name: resized(eqn.params[name])} if name else eqn.params
                env.update(zip(eqn.outvars, bound(eqn, [read(env, v) for v in eqn.invars], params), strict=True))
            return [env[v] for v in out]

        return jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(resized(v.aval.shape), v.aval.dtype) for v in into))

    def cut(self, variable: Any, first: Any, size: int) -> Value:
        """`size` entries of a value from `first` on; a value without the long axis as it is."""
        value, axis = self.values[variable], self.axis(variable)
        if axis is None:
            return value
        array = value.array
        if isinstance(array, np.ndarray) and np.ptp(array) == 0:
            return Value(array.take(range(size), axis), False, False)  # the same number everywhere stays known
        return Value(lax.dynamic_slice_in_dim(jnp.asarray(array), first, size, axis), value.lane, value.varies)

    def terms(self, eqn: Any, operands: list[Value]) -> list[Any]:
        """What a sum adds up, for a block of entries."""
        axes = [self.axis(v) for v in eqn.invars]
        if eqn.primitive.name == "reduce_sum" and min(eqn.params["axes"]) == axes[0]:
            return take(operands[0], sorted(eqn.params["axes"]))
        if eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0]
            if [dims[0] if dims else None for dims in contracted] == axes:
                return dot_products(self.walk, operands, eqn)
        raise self.unsupported(eqn)

    def check(self, eqn: Any) -> None:
        """UnsupportedError for an operation that cannot be applied to a block of entries as to all of them."""
        name, p = eqn.primitive.name, eqn.params
        if name not in ROWWISE:
            raise self.unsupported(eqn)
        (axis,) = {self.axis(v) for v in eqn.outvars}
        before = [None if isinstance(v, core.Literal) else self.axis(v) for v in eqn.invars]
        good = True
        if name == "reshape":
            old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
            good = before[0] is not None and math.prod(old[: before[0]]) == math.prod(new[:axis])
        elif name == "slice":
            good = before[0] is not None and p["start_indices"][axis] == 0 and (p["strides"] or {axis: 1})[axis] == 1
        elif name == "concatenate":
            good = p["dimension"] != axis
        elif name == "pad":
            good = tuple(p["padding_config"][axis]) == (0, 0, 0)
        elif name.startswith("reduce_"):
            good = before[0] is not None and before[0] not in p["axes"]
        if not good:
            raise self.unsupported(eqn)

    def unsupported(self, eqn: Any) -> UnsupportedError:
        return UnsupportedError(
            f"operation {eqn.primitive.name!r} along an axis of length {self.length}, too long to be written out"
        )


def ends(eqns: list[Any], wanted: set[Any]) -> tuple[list[Any], list[Any]]:
    """What operations take from outside, and which of their results are wanted."""
    made = dict.fromkeys(v for eqn in eqns for v in eqn.outvars)
    return [v for v in dict.fromkeys(variables(eqns)) if v not in made], [v for v in made if v in wanted]


def zero_of(aval: Any) -> float | int:
    """What a sum of no terms is."""
    return -0.0 if jnp.issubdtype(aval.dtype, jnp.floating) else 0
