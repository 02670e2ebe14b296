"""One problem's program evaluated for a tile of problems, the problems along the last axis.

`vmap` puts the problem axis in front and hands dot products to kernels that choose their own order of summation. Here
every value of one problem of shape `s` becomes an array of shape `s + (L,)`: the lanes lie along the vector units, and
sums and dot products are written out term by term, first index first, so that a lane's bits depend on that lane alone.
Values that no lane owns (shared data and what is computed from it) stay as they are, without a lane axis.

Rounding. Where a product feeds an addition, compilers for CPUs and TPUs contract the two to one multiply-add, rounded
once; that is fast, wanted, and declared here. Where they have a choice (`a·b + c·d`, a product used twice, a
product that does not change in the loop), the choice would depend on tile and chunk. There the product is written
`a·b + z` with `z` a runtime −0.0: contracted, `fma(a, b, −0.0)` is the rounded product at no cost, and
nothing is left to choose.
  - `x·w`, summed: `fma(x_n, w_n, … fma(x_1, w_1, round(x_0·w_0)))`
  - `a·b ± c·d`: the right product is rounded, the left one contracted
  - a product used twice, or made of what the loop does not change: rounded
  - a product used once in a sum or difference: contracted
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
    """An array of a tile.

    `lane`: its last axis is the lanes. `product`: it is a product not yet rounded, which an addition may take in.
    `varies`: it changes from step to step.
    """

    __slots__ = ("array", "lane", "product", "varies")

    def __init__(self, array: Any, lane: bool, varies: bool = True, product: bool = False):
        self.array = array
        self.lane = lane
        self.varies = varies
        self.product = product

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape for one problem."""
        shape = tuple(np.shape(self.array))
        return shape[:-1] if self.lane else shape


def spread(value: Value, shape: tuple[int, ...], size: int) -> Any:
    """The array of `value` with lanes, broadcast to `shape + (size,)` from a scalar or along axes of size one."""
    axes = tuple(range(len(value.shape)))
    if not value.lane:
        return lax.broadcast_in_dim(value.array, (*shape, size), axes)
    if value.shape == shape:
        return value.array
    return lax.broadcast_in_dim(value.array, (*shape, size), (*axes, len(shape)))


class Evaluator:
    """Walks a jaxpr of one problem and emits its lane form. `zero` is a −0.0 that is known at run time only."""

    def __init__(self, size: int, zero: Any):
        self.size = size
        self.zero = zero
        self.written = 0

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Value], once: Sequence[bool] = ()) -> list[Value]:
        """The outputs of `jaxpr`; `once` says which of them are used a single time outside."""
        env: dict[Any, Value] = {}

        def read(atom: Any) -> Value:
            if isinstance(atom, core.Literal):
                aval: Any = atom.aval
                return Value(np.asarray(atom.val, aval.dtype), False, False)
            return env[atom]

        # An output counts as used twice where it is not known what becomes of it outside.
        uses = collections.Counter(v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, core.Literal))
        counted = [v for v, alone in zip(jaxpr.outvars, once, strict=True) if not alone] if once else jaxpr.outvars
        uses.update(v for v in [*jaxpr.outvars, *counted] if not isinstance(v, core.Literal))
        env.update(zip(jaxpr.constvars, (Value(c, False, False) for c in consts), strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            alone = [uses[v] == 1 for v in eqn.outvars]
            results = self.equation(eqn, [read(v) for v in eqn.invars], alone)
            for var, value in zip(eqn.outvars, results, strict=True):
                kept = value.varies and value.lane and uses[var] == 1
                env[var] = value if kept else self.rounded(value)
        return [read(v) for v in jaxpr.outvars]

    def rounded(self, value: Value) -> Value:
        """The value with its product, if it is one, rounded here and now."""
        if not value.product:
            return value
        zero = lax.convert_element_type(self.zero, value.array.dtype)
        return Value(lax.add(value.array, lax.broadcast_in_dim(zero, value.array.shape, ())), value.lane, value.varies)

    def equation(self, eqn: Any, operands: list[Value], alone: list[bool]) -> list[Value]:
        name = eqn.primitive.name
        self.count(1)
        if name in SUMS and all(v.product for v in operands):
            operands = [operands[0], self.rounded(operands[1])]
        elif name not in SUMS and name not in PASSED_ON and name != "mul":
            operands = [self.rounded(v) for v in operands]
        if name in INLINED:
            return self.run(*inner(eqn), operands, alone)
        varies = any(v.varies for v in operands)
        if not any(v.lane for v in operands):
            if all(isinstance(v.array, np.ndarray | np.generic) for v in operands):
                return [Value(np.asarray(o), False, False) for o in constant(eqn, operands)]
            out = eqn.primitive.bind(*(v.array for v in operands), **eqn.params)
            product = name in PRODUCTS and jnp.issubdtype(out.dtype, jnp.floating)
            return [Value(o, False, varies, product) for o in (out if eqn.primitive.multiple_results else [out])]
        if name == "scan":
            return self.scan(eqn, operands)
        if name == "split":
            pieces = lax.split(operands[0].array, eqn.params["sizes"], eqn.params["axis"])
            return [Value(piece, True, varies) for piece in pieces]
        product = name in PRODUCTS or one_term(eqn) or (name in PASSED_ON and operands[0].product)
        if name in ELEMENTWISE:
            shape = eqn.outvars[0].aval.shape
            array = eqn.primitive.bind(*(spread(v, shape, self.size) for v in operands), **eqn.params)
        elif name in RULES:
            array = RULES[name](self, operands, eqn)
        else:
            raise UnsupportedError(f"operation {name!r} has no lane form")
        return [Value(array, True, varies, product and jnp.issubdtype(array.dtype, jnp.floating))]

    def scan(self, eqn: Any, operands: list[Value]) -> list[Value]:
        """A loop of known length: the body in lanes, everything it carries with the lane axis."""
        p = eqn.params
        first, last = p["num_consts"], p["num_consts"] + p["num_carry"]
        consts, xs = operands[:first], operands[last:]
        start = [spread(v, v.shape, self.size) for v in operands[first:last]]

        def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            values = [Value(c, True) for c in carry]
            sliced = [Value(s, x.lane, x.varies) for s, x in zip(slices, xs, strict=True)]
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


def constant(eqn: Any, operands: list[Value]) -> list[Any]:
    """The results of an operation on constants, computed now: what is left for the compiler to fold stays foldable."""
    with jax.ensure_compile_time_eval():
        out = eqn.primitive.bind(*(jnp.asarray(v.array) for v in operands), **eqn.params)
    return out if eqn.primitive.multiple_results else [out]


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


def operations(jaxpr: Any) -> int:
    """Roughly how many machine operations a jaxpr is, for one number per value."""
    return sum(
        operations(inner(eqn)[0]) if eqn.primitive.name in INLINED else 1 if eqn.primitive.name in SIMPLE else 12
        for eqn in jaxpr.eqns
    )


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


def one_term(eqn: Any) -> bool:
    """Whether the operation is a dot product of one term: a product."""
    if eqn.primitive.name != "dot_general":
        return False
    (contract, _), _ = eqn.params["dimension_numbers"]
    return math.prod(eqn.invars[0].aval.shape[d] for d in contract) == 1


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
    products = [lax.mul(a, b) for a, b in zip(left, right, strict=True)]
    if len(products) == 1:
        return products[0]
    first = evaluator.rounded(Value(products[0], True, product=jnp.issubdtype(aval.dtype, jnp.floating)))
    return evaluator.fold(lax.add, [first.array, *products[1:]])


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
    return lax.slice(operands[0].array, (*p["start_indices"], 0), (*p["limit_indices"], evaluator.size), strides)


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


def log1p(evaluator: Evaluator, operands: list[Value], eqn: Any) -> Any:
    """`log(1 + x) = x · log(u) / (u − 1)` with `u = 1 + x` rounded: a few units in the last place off, as a vector.

    XLA's own log1p branches, which compilers cannot turn into vector code. (Kahan's form: D. Goldberg, What Every
    Computer Scientist Should Know About Floating-Point Arithmetic, 1991, theorem 4.)
    """
    x = operands[0].array
    # A one that is known at run time only: XLA would simplify (x + 1) − 1 to x.
    one = lax.full_like(x, 1) + lax.convert_element_type(evaluator.zero, x.dtype)
    u = x + one
    rest = u - one
    safe = lax.select(rest == 0, one, rest)
    near = lax.select(rest == 0, x, lax.log(u) * (x / safe))
    return lax.select(u == jnp.inf, u, near)


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
    cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log logistic
    lt max min mul ne neg nextafter not or pow real reduce_precision rem round rsqrt shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
    bitcast_convert_type population_count clz""".split()
)

SIMPLE = frozenset(
    """abs add add_any and convert_element_type copy copy_p eq ge gt integer_pow is_finite le lt max min mul ne neg
    not or
    select_n sign sqrt square sub broadcast_in_dim reshape squeeze dot_general reduce_max stop_gradient""".split()
)
"""Operations that are one instruction or none on a vector unit."""

PRODUCTS = frozenset({"mul", "log1p", "square", "integer_pow", "reduce_prod"})
"""Operations that end in a multiplication."""

SUMS = frozenset({"add", "sub", "add_any"})
"""Operations that may take a product in."""

PASSED_ON = frozenset({"neg", "broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "rev", "copy", "copy_p"})
"""Operations behind which a compiler still sees the product."""

RULES: dict[str, Callable[[Evaluator, list[Value], Any], Any]] = {
    "broadcast_in_dim": broadcast_in_dim,
    "concatenate": concatenate,
    "dot_general": dot_general,
    "log1p": log1p,
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
