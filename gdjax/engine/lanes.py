"""One problem's program evaluated for a tile of problems, the problems along the last axis.

`vmap` puts the problem axis in front and hands dot products to kernels that choose their own order of summation. Here
every value of one problem of shape `s` becomes an array of shape `s + (L,)`: the lanes lie along the vector units, and
sums and dot products are written out term by term, first index first, so that a lane's bits depend on that lane alone.
Values that no lane owns (shared data and what is computed from it) stay as they are, without a lane axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core

MAX_TERMS = 256
"""Longest sum written out; a longer one belongs in a loop or a matrix kernel, so the problem runs under vmap."""

MAX_EQUATIONS = 6000
"""Most operations one step may be written out into: beyond it, compiling costs more than the lanes give."""


class UnsupportedError(NotImplementedError):
    """A program that cannot be evaluated lane by lane; the message says which operation is the reason."""


class Value:
    """An array of a tile: `lane` says whether its last axis is the lanes."""

    __slots__ = ("array", "lane")

    def __init__(self, array: Any, lane: bool):
        self.array = array
        self.lane = lane

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape for one problem."""
        shape = tuple(np.shape(self.array))
        return shape[:-1] if self.lane else shape


def spread(value: Value, shape: tuple[int, ...], size: int) -> Any:
    """The array of `value` with lanes, broadcast from its own problem shape (equal or scalar) to `shape + (size,)`."""
    own = value.shape
    dims = tuple(range(len(own))) if own == shape else ()
    if value.lane:
        if own == shape:
            return value.array
        return lax.broadcast_in_dim(value.array, (*shape, size), (len(shape),))
    return lax.broadcast_in_dim(value.array, (*shape, size), dims)


class Evaluator:
    """Walks a jaxpr of one problem and emits its lane form, operation by operation."""

    def __init__(self, size: int):
        self.size = size
        self.written = 0

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Value]) -> list[Value]:
        env: dict[Any, Value] = {}

        def read(atom: Any) -> Value:
            if isinstance(atom, core.Literal):
                return Value(np.asarray(atom.val, atom.aval.dtype), False)
            return env[atom]

        env.update(zip(jaxpr.constvars, (Value(c, False) for c in consts), strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            results = self.equation(eqn, operands)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        self.count(1)
        if name in INLINED:
            return self.run(*inner(eqn), operands)
        if not any(v.lane for v in operands):
            out = eqn.primitive.bind(*(v.array for v in operands), **eqn.params)
            return [Value(o, False) for o in (out if eqn.primitive.multiple_results else [out])]
        if name == "scan":
            return self.scan(eqn, operands)
        if name in ELEMENTWISE:
            shape = eqn.outvars[0].aval.shape
            arrays = [spread(v, shape, self.size) for v in operands]
            return [Value(eqn.primitive.bind(*arrays, **eqn.params), True)]
        rule = RULES.get(name)
        if rule is None:
            raise UnsupportedError(f"operation {name!r} has no lane form")
        return [Value(rule(self, operands, eqn), True)]

    def scan(self, eqn: Any, operands: list[Value]) -> list[Value]:
        """A loop of known length: the body in lanes, everything it carries with the lane axis."""
        p = eqn.params
        first, last = p["num_consts"], p["num_consts"] + p["num_carry"]
        consts, xs = operands[:first], operands[last:]
        start = [spread(v, v.shape, self.size) for v in operands[first:last]]

        def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            values = [Value(c, True) for c in carry]
            sliced = [Value(s, x.lane) for s, x in zip(slices, xs, strict=True)]
            out = self.run(p["jaxpr"].jaxpr, p["jaxpr"].consts, [*consts, *values, *sliced])
            arrays = [spread(v, v.shape, self.size) for v in out]
            return arrays[: len(carry)], arrays[len(carry) :]

        carry, ys = lax.scan(body, start, [x.array for x in xs], length=p["length"], reverse=p["reverse"])
        return [Value(v, True) for v in [*carry, *ys]]

    def count(self, operations: int) -> None:
        self.written += operations
        if self.written > MAX_EQUATIONS:
            raise UnsupportedError(f"one step is more than {MAX_EQUATIONS} operations written out")

    def fold(self, combine: Callable[[Any, Any], Any], terms: list[Any]) -> Any:
        """Left to right, first term first: the declared order of every sum."""
        if len(terms) > MAX_TERMS:
            raise UnsupportedError(f"a sum of {len(terms)} terms, more than {MAX_TERMS}")
        self.count(len(terms))
        return functools.reduce(combine, terms)


def inner(eqn: Any) -> tuple[Any, Any]:
    """The jaxpr of a call and its constants."""
    jaxpr = eqn.params[INLINED[eqn.primitive.name]]
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "jaxpr") else (jaxpr, ())


def reaches(jaxpr: Any, flags: Sequence[bool]) -> list[bool]:
    """Which outputs of `jaxpr` depend on the inputs that `flags` marks."""
    marked = {v for v, flag in zip(jaxpr.invars, flags, strict=True) if flag}
    for eqn in jaxpr.eqns:
        into = [not isinstance(v, core.Literal) and v in marked for v in eqn.invars]
        if eqn.primitive.name in INLINED:
            out = reaches(inner(eqn)[0], into)
        else:
            out = [any(into)] * len(eqn.outvars)
        marked.update(v for v, flag in zip(eqn.outvars, out, strict=True) if flag)
    return [not isinstance(v, core.Literal) and v in marked for v in jaxpr.outvars]


def reduction(combine: Callable[[Any, Any], Any], identity: Callable[[Any], Any]) -> Callable[..., Any]:
    def rule(evaluator: Evaluator, operands: list[Value], eqn: Any) -> Any:
        (value,) = operands
        axes = eqn.params["axes"]
        pieces = take(value, axes)
        if not pieces:
            shape = (*eqn.outvars[0].aval.shape, evaluator.size)
            return lax.full(shape, identity(value.array.dtype), value.array.dtype)
        return evaluator.fold(combine, pieces)

    return rule


def take(value: Value, axes: Sequence[int]) -> list[Any]:
    """The pieces of `value` at every index of `axes`, first index slowest.

    Each is a slice of the array as it lies in memory: a transposition here would be merged with the one that made the
    lanes, and every step would gather from the old layout.
    """
    shape = tuple(np.shape(value.array))
    pieces = []
    for index in np.ndindex(*(shape[a] for a in axes)):
        start, limit = [0] * len(shape), list(shape)
        for axis, i in zip(axes, index, strict=True):
            start[axis], limit[axis] = i, i + 1
        pieces.append(lax.squeeze(lax.slice(value.array, start, limit), axes))
    return pieces


def dot_general(evaluator: Evaluator, operands: list[Value], eqn: Any) -> Any:
    """Dot product as a chain of multiply-adds over the contracted index; output axes are batch, left, right."""
    (contract_l, contract_r), (batch_l, batch_r) = eqn.params["dimension_numbers"]
    aval = eqn.outvars[0].aval
    nb, rank = len(batch_l), len(aval.shape)
    free_l = len(operands[0].shape) - nb - len(contract_l)

    def terms(value: Value, batch: Sequence[int], contract: Sequence[int], free: range) -> list[Any]:
        """Slices over the contracted axes, each broadcast to the output's shape with lanes."""
        kept = [d for d in range(len(value.shape)) if d not in contract]
        places = iter(free)
        dims = [list(batch).index(d) if d in batch else next(places) for d in kept]
        if dims != sorted(dims):
            raise UnsupportedError("operation 'dot_general' with its batch axes out of order")
        lanes = [rank] if value.lane else []
        shape = (*aval.shape, evaluator.size)
        return [
            lax.broadcast_in_dim(lax.convert_element_type(piece, aval.dtype), shape, (*dims, *lanes))
            for piece in take(value, contract)
        ]

    left = terms(operands[0], batch_l, contract_l, range(nb, nb + free_l))
    right = terms(operands[1], batch_r, contract_r, range(nb + free_l, rank))
    if not left:
        return lax.full((*aval.shape, evaluator.size), 0, aval.dtype)
    return evaluator.fold(lax.add, [lax.mul(a, b) for a, b in zip(left, right, strict=True)])


def select_n(evaluator: Evaluator, operands: list[Value], eqn: Any) -> Any:
    shape = eqn.outvars[0].aval.shape
    return lax.select_n(*(spread(v, shape, evaluator.size) for v in operands))


def broadcast_in_dim(evaluator: Evaluator, operands: list[Value], eqn: Any) -> Any:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    return lax.broadcast_in_dim(operands[0].array, (*shape, evaluator.size), (*dims, len(shape)))


def reshape(evaluator: Evaluator, operands: list[Value], eqn: Any) -> Any:
    return lax.reshape(operands[0].array, (*eqn.params["new_sizes"], evaluator.size))


def squeeze(evaluator: Evaluator, operands: list[Value], eqn: Any) -> Any:
    return lax.squeeze(operands[0].array, eqn.params["dimensions"])


def transpose(evaluator: Evaluator, operands: list[Value], eqn: Any) -> Any:
    permutation = eqn.params["permutation"]
    return lax.transpose(operands[0].array, (*permutation, len(permutation)))


def slice_(evaluator: Evaluator, operands: list[Value], eqn: Any) -> Any:
    p = eqn.params
    strides = None if p["strides"] is None else (*p["strides"], 1)
    return lax.slice(
        operands[0].array, (*p["start_indices"], 0), (*p["limit_indices"], evaluator.size), strides
    )


def reverse(evaluator: Evaluator, operands: list[Value], eqn: Any) -> Any:
    return lax.rev(operands[0].array, eqn.params["dimensions"])


def concatenate(evaluator: Evaluator, operands: list[Value], eqn: Any) -> Any:
    arrays = [spread(v, v.shape, evaluator.size) for v in operands]
    return lax.concatenate(arrays, eqn.params["dimension"])


def pad(evaluator: Evaluator, operands: list[Value], eqn: Any) -> Any:
    operand, padding = operands
    if padding.lane:
        raise UnsupportedError("operation 'pad' with a padding value of its own in every problem")
    config = (*eqn.params["padding_config"], (0, 0, 0))
    return lax.pad(spread(operand, operand.shape, evaluator.size), padding.array, config)


INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}

ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy copy_p cos
    cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic
    lt max min mul ne neg nextafter not or pow real reduce_precision rem round rsqrt shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
    bitcast_convert_type population_count clz""".split()
)

RULES: dict[str, Callable[[Evaluator, list[Value], Any], Any]] = {
    "broadcast_in_dim": broadcast_in_dim,
    "concatenate": concatenate,
    "dot_general": dot_general,
    "pad": pad,
    "reduce_and": reduction(lax.bitwise_and, lambda dtype: True),
    "reduce_max": reduction(lax.max, lambda dtype: -np.inf),
    "reduce_min": reduction(lax.min, lambda dtype: np.inf),
    "reduce_or": reduction(lax.bitwise_or, lambda dtype: False),
    "reduce_prod": reduction(lax.mul, lambda dtype: 1),
    "reduce_sum": reduction(lax.add, lambda dtype: 0),
    "reshape": reshape,
    "rev": reverse,
    "select_n": select_n,
    "slice": slice_,
    "squeeze": squeeze,
    "transpose": transpose,
}
