"""One problem's program evaluated for a tile of problems, the problems along the last axis.

`vmap` puts the problem axis in front and hands dot products to kernels that choose their own order of summation. Here
every value of one problem of shape `s` becomes an array of shape `s + (L,)`: the lanes lie along the vector units, and
sums and dot products are written out term by term, first index first, so that a lane's bits depend on that lane alone.
Values that no lane owns (shared data and what is computed from it) stay as they are, without a lane axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax.engine.evaluator import Evaluator, UnsupportedError, Value, loop_operands
from gdjax.engine.materialise import materialised
from gdjax.engine.rewrites import log1p as vector_log1p
from gdjax.engine.rewrites import power_of


def shape_of(value: Value) -> tuple[int, ...]:
    """The shape for one problem."""
    shape = tuple(np.shape(value.array))
    return shape[:-1] if value.lane else shape


def spread(value: Value, shape: tuple[int, ...], size: int) -> Any:
    """The array of `value` with lanes, broadcast to `shape + (size,)` from a scalar or along axes of size one."""
    axes = tuple(range(len(shape_of(value))))
    if not value.lane:
        return lax.broadcast_in_dim(value.array, (*shape, size), axes)
    if shape_of(value) == shape:
        return value.array
    return lax.broadcast_in_dim(value.array, (*shape, size), (*axes, len(shape)))


class Lanes(Evaluator):
    """The walk in which problems lie along the last axis, `size` of them, on a CPU if `on_host`."""

    def __init__(self, size: int, zero: Any, on_host: bool = False):
        super().__init__(zero)
        self.size = size
        self.on_host = on_host
        # By the id of an array; the array is held beside, so that no other gets its id.
        self.multiples: dict[int, tuple[Any, Any, Any]] = {}

    def round(self, array: Any) -> Any:
        zero = lax.convert_element_type(self.zero, array.dtype)
        return lax.add(array, lax.broadcast_in_dim(zero, array.shape, ()))

    def emit(self, eqn: Any, operands: list[Value]) -> list[Any]:
        name = eqn.primitive.name
        if name == "scan":
            return self.scan(eqn, operands)
        if name == "split":
            return list(lax.split(operands[0].array, eqn.params["sizes"], eqn.params["axis"]))
        if name == "optimization_barrier":
            arrays = [spread(v, shape_of(v), self.size) for v in operands]
            return materialised(arrays, self.zero) if self.on_host else arrays
        if name == "mul" and (factor := number(operands)) is not None:
            return [self.multiple(eqn, operands, factor)]
        if name == "pow" and self.on_host and (base := base_of(*operands)) is not None:
            exponent = spread(operands[1], eqn.outvars[0].aval.shape, self.size)
            return [power_of(base, lax.convert_element_type(exponent, jnp.float32), self.zero)]
        if name in ELEMENTWISE:
            shape = eqn.outvars[0].aval.shape
            return [eqn.primitive.bind(*(spread(v, shape, self.size) for v in operands), **eqn.params)]
        if name in RULES:
            return [RULES[name](self, operands, eqn)]
        raise UnsupportedError(f"operation {name!r} has no lane form")

    def multiple(self, eqn: Any, operands: list[Value], factor: Any) -> Any:
        """`c·(d·x)` as `(c·d)·x` where d is a power of two: of the derivative of `½e²` no `½·(2·e)` is left.

        XLA does so too up to jax 0.11; from 0.12 on it computes `2·e`, which may overflow.
        """
        shape = eqn.outvars[0].aval.shape
        x = spread(next(v for v in operands if v.lane), shape, self.size)
        _, inner, first = self.multiples.get(id(x), (x, x, None))
        if first is not None and abs(math.frexp(first)[0]) == 0.5:
            with np.errstate(all="ignore"):
                both = first * factor
            if jnp.finfo(both.dtype).tiny <= abs(both) < np.inf:
                x, factor = inner, both
        if factor == 1:
            return x
        made = lax.mul(lax.full_like(x, factor), x)
        self.multiples[id(made)] = made, x, factor
        return made

    def scan(self, eqn: Any, operands: list[Value]) -> list[Value]:
        """A loop of known length: the body in lanes, everything it carries with the lane axis."""
        p = eqn.params
        consts, carried, xs = loop_operands(eqn, operands)
        start = [spread(v, shape_of(v), self.size) for v in carried]

        def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            outside, self.multiples = self.multiples, {}  # what is traced in here must not stay
            values = [Value(c, True) for c in carry]
            sliced = [Value(s, x.lane, x.varies) for s, x in zip(slices, xs, strict=True)]
            out = self.run(p["jaxpr"].jaxpr, p["jaxpr"].consts, [*consts, *values, *sliced])
            arrays = [spread(v, shape_of(v), self.size) for v in out]
            self.multiples = outside
            return arrays[: len(carry)], arrays[len(carry) :]

        carry, ys = lax.scan(body, start, [x.array for x in xs], length=p["length"], reverse=p["reverse"])
        return [*carry, *ys]


def number(operands: list[Value]) -> Any:
    """The floating point number, known now, by which a product multiplies; None if there is none."""
    for array in (v.array for v in operands if not v.lane):
        if isinstance(array, np.ndarray) and array.size and jnp.issubdtype(array.dtype, jnp.floating):
            first = array.flat[0]
            return first if array.tobytes() == np.full_like(array, first).tobytes() else None
    return None


def base_of(base: Value, exponent: Value) -> float | None:
    """The base of a power where it is known now and `rewrites.power_of` takes it; XLA calls a library lane by lane."""
    found = number([base])
    if found is None or found.dtype != np.float32 or exponent.array.dtype not in (np.float32, np.int32):
        return None
    return float(found) if np.finfo(np.float32).tiny <= found < np.inf else None


def reduction(combine: Callable[[Any, Any], Any], identity: Callable[[Any], Any]) -> Callable[..., Any]:
    def rule(evaluator: Lanes, operands: list[Value], eqn: Any) -> Any:
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


def dot_general(evaluator: Lanes, operands: list[Value], eqn: Any) -> Any:
    """Dot product as a chain of multiply-adds over the contracted index; output axes are batch, left, right."""
    aval = eqn.outvars[0].aval
    products = dot_products(evaluator, operands, eqn)
    if not products:
        return lax.full((*aval.shape, evaluator.size), 0, aval.dtype)
    if len(products) == 1:
        return products[0]
    if jnp.issubdtype(aval.dtype, jnp.floating):
        products[0] = evaluator.round(products[0])
    return evaluator.fold(lax.add, products)


def dot_products(evaluator: Lanes, operands: list[Value], eqn: Any) -> list[Any]:
    """What a dot product adds up."""
    (contract_l, contract_r), (batch_l, batch_r) = eqn.params["dimension_numbers"]
    aval = eqn.outvars[0].aval
    nb, rank = len(batch_l), len(aval.shape)
    free_l = len(shape_of(operands[0])) - nb - len(contract_l)

    def terms(value: Value, batch: Sequence[int], contract: Sequence[int], free: range) -> list[Any]:
        """Slices over the contracted axes, each broadcast to the output's shape with lanes."""
        kept = [d for d in range(len(shape_of(value))) if d not in contract]
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
    return [lax.mul(a, b) for a, b in zip(left, right, strict=True)]


def select_n(evaluator: Lanes, operands: list[Value], eqn: Any) -> Any:
    shape = eqn.outvars[0].aval.shape
    return lax.select_n(*(spread(v, shape, evaluator.size) for v in operands))


def broadcast_in_dim(evaluator: Lanes, operands: list[Value], eqn: Any) -> Any:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    return lax.broadcast_in_dim(operands[0].array, (*shape, evaluator.size), (*dims, len(shape)))


def reshape(evaluator: Lanes, operands: list[Value], eqn: Any) -> Any:
    return lax.reshape(operands[0].array, (*eqn.params["new_sizes"], evaluator.size))


def squeeze(evaluator: Lanes, operands: list[Value], eqn: Any) -> Any:
    return lax.squeeze(operands[0].array, eqn.params["dimensions"])


def transpose(evaluator: Lanes, operands: list[Value], eqn: Any) -> Any:
    permutation = eqn.params["permutation"]
    return lax.transpose(operands[0].array, (*permutation, len(permutation)))


def slice_(evaluator: Lanes, operands: list[Value], eqn: Any) -> Any:
    p = eqn.params
    strides = None if p["strides"] is None else (*p["strides"], 1)
    return lax.slice(operands[0].array, (*p["start_indices"], 0), (*p["limit_indices"], evaluator.size), strides)


def reverse(evaluator: Lanes, operands: list[Value], eqn: Any) -> Any:
    return lax.rev(operands[0].array, eqn.params["dimensions"])


def concatenate(evaluator: Lanes, operands: list[Value], eqn: Any) -> Any:
    arrays = [spread(v, shape_of(v), evaluator.size) for v in operands]
    return lax.concatenate(arrays, eqn.params["dimension"])


def pad(evaluator: Lanes, operands: list[Value], eqn: Any) -> Any:
    operand, padding = operands
    if padding.lane:
        raise UnsupportedError("operation 'pad' with a padding value of its own in every problem")
    config = (*eqn.params["padding_config"], (0, 0, 0))
    return lax.pad(spread(operand, shape_of(operand), evaluator.size), padding.array, config)


def log1p(evaluator: Lanes, operands: list[Value], eqn: Any) -> Any:
    return vector_log1p(operands[0].array, evaluator.zero)


ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy copy_p cos
    cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log logistic
    lt max min mul ne neg nextafter not or pow real reduce_precision rem round rsqrt shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
    bitcast_convert_type population_count clz""".split()
)

RULES: dict[str, Callable[[Lanes, list[Value], Any], Any]] = {
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
