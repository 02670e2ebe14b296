"""One problem's program evaluated scalar by scalar: each scalar of a problem is a tile of many problems.

On a GPU or TPU such a tile fills one register of every thread or lane, so that a small problem lives in registers as a
whole. A value of one problem of shape `s` is here a NumPy array of shape `s` whose entries are tiles, or numbers known
now. Whatever only moves entries about (slices, transpositions, concatenation, indexing by constants) emits nothing;
sums and dot products are written out, first index first, in the order and rounding of `gdjax.engine.lanes`; sums with
a known zero and products with a known one are left out (the sign of a zero may change by that).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax.engine import rewrites
from gdjax.engine.evaluator import PRODUCTS, Evaluator, UnsupportedError, Value, loop_operands

MAX_WRITTEN = 6000
"""Most operations one step may emit."""

DTYPES = frozenset({"float32", "int32", "uint32", "bool"})


class Scalars(Evaluator):
    """The walk in which each scalar of a problem is a tile. `zero` is a tile of −0.0, `full` makes one of a number."""

    def __init__(self, full: Callable[[Any], Any], zero: Any):
        super().__init__(zero)
        self.full = full
        self.emitted = 0
        # By the id of a tile; the tile is held beside, so that no other gets its id.
        self.products: dict[int, Any] = {}
        self.multiples: dict[int, tuple[Any, Any, np.generic]] = {}

    def emit(self, eqn: Any, operands: list[Value]) -> list[Any]:
        name = eqn.primitive.name
        for var in eqn.outvars:
            if var.aval.dtype.name not in DTYPES:
                raise UnsupportedError(f"operation {name!r} gives {var.aval.dtype}, which the kernels do not hold")
        if name in MOVES:
            return move(eqn, operands)
        if name in RULES:
            return RULES[name](self, eqn, *operands)
        if name in NATIVE or name in REWRITTEN:
            return [self.elementwise(eqn, operands)]
        raise UnsupportedError(f"operation {name!r} has no form of scalars in registers")

    def elementwise(self, eqn: Any, operands: list[Value]) -> np.ndarray:
        aval = eqn.outvars[0].aval
        lists = [np.broadcast_to(entries(v), aval.shape).ravel() for v in operands]
        return settled([self.one(eqn, each) for each in zip(*lists, strict=True)], aval)

    def one(self, eqn: Any, operands: Sequence[Any]) -> Any:
        """One scalar of an elementwise operation."""
        name = eqn.primitive.name
        if all(known(x) for x in operands):
            with jax.ensure_compile_time_eval():
                return np.asarray(eqn.primitive.bind(*(jnp.asarray(x) for x in operands), **eqn.params))[()]
        short = left_out(name, operands)
        if short is not None:
            return operands[short] if name == "mul" else self.round_one(operands[short])
        self.emitted += 1
        if self.emitted > MAX_WRITTEN:
            raise UnsupportedError(f"one step is more than {MAX_WRITTEN} operations scalar by scalar")
        if name in ("pow", "integer_pow"):
            return self.power(eqn, *operands)
        if name in ("mul", "neg"):
            factor = next((x for x in operands if known(x)), None) if name == "mul" else operands[0].dtype.type(-1)
            if factor is not None and factor.dtype.kind == "f":
                return self.multiple(next(x for x in operands if not known(x)), factor)
        tiles = [self.filled(x) for x in operands]
        if name == "convert_element_type":
            return self.converted(tiles[0], eqn.params["new_dtype"])
        made = (
            REWRITTEN[name](*tiles, self.zero) if name in REWRITTEN else eqn.primitive.bind(*tiles, **eqn.params)
        )
        return self.product(made) if name in PRODUCTS else made

    def multiple(self, x: Any, factor: Any) -> Any:
        """`x · factor`, in one product where x is a multiple already by a power of two, which rounds nothing."""
        if id(x) in self.multiples and abs(np.frexp(self.multiples[id(x)][2])[0]) == 0.5:
            _, x, first = self.multiples[id(x)]
            factor = first * factor
        if factor == 1:
            return x
        if factor == -1:
            made = self.product(-x) if id(x) in self.products else -x
        else:
            made = self.product(lax.mul(x, self.filled(factor)))
        self.multiples[id(made)] = made, x, factor
        return made

    def product(self, x: Any) -> Any:
        """Notes that a tile is a product, which an addition could take in."""
        if x.dtype.kind == "f":
            self.products[id(x)] = x
        return x

    def power(self, eqn: Any, x: Any, y: Any = None) -> Any:
        if y is None:
            return self.product(rewrites.integer_power(x, eqn.params["y"]))
        if known(y) and float(y).is_integer() and abs(float(y)) <= 64:
            return self.product(rewrites.integer_power(x, int(y)))
        return rewrites.power(self.filled(x), self.filled(y), self.zero, float(x) if known(x) else None)

    def converted(self, x: Any, dtype: Any) -> Any:
        dtype = np.dtype(dtype)
        if x.dtype == dtype:
            return x
        if x.dtype.kind == "b":
            return lax.select(x, self.full(dtype.type(1)), self.full(dtype.type(0)))
        return x != 0 if dtype.kind == "b" else lax.convert_element_type(x, dtype)

    def filled(self, x: Any) -> Any:
        """The tile of an entry."""
        return self.full(x) if known(x) else x

    def round_one(self, x: Any) -> Any:
        return x + self.zero if id(x) in self.products else x

    def round(self, array: Any) -> Any:
        return row([self.round_one(x) for x in array.ravel()]).reshape(array.shape)

    def add(self, a: Any, b: Any) -> Any:
        if known(a) and known(b):
            return a + b
        if known(a) and a == 0:
            return b
        if known(b) and b == 0:
            return a
        self.emitted += 1
        return lax.add(self.filled(a), self.filled(b))

    def mul(self, a: Any, b: Any) -> Any:
        if known(a) and known(b):
            return a * b
        if known(a) and a == 1:
            return b
        if known(b) and b == 1:
            return a
        self.emitted += 1
        return self.product(lax.mul(self.filled(a), self.filled(b)))


def known(x: Any) -> bool:
    return isinstance(x, np.generic)


def left_out(name: str, operands: Sequence[Any]) -> int | None:
    """Which operand a sum with zero or a product with one comes to; None where there is something to compute."""
    if name in ("add", "add_any", "mul"):
        neutral = 1 if name == "mul" else 0
        return next((1 - i for i in (0, 1) if known(operands[i]) and operands[i] == neutral), None)
    if name == "sub" and known(operands[1]) and operands[1] == 0:
        return 0
    return None


def entries(value: Value) -> np.ndarray:
    """The entries of a value: tiles, and numbers known now."""
    array = np.asarray(value.array)
    return array if array.dtype == object else row(list(array.ravel())).reshape(array.shape)


def row(items: Sequence[Any]) -> np.ndarray:
    """An array of entries; NumPy must not look into them."""
    out = np.empty(len(items), object)
    for i, x in enumerate(items):
        out[i] = x
    return out


def settled(flat: Sequence[Any], aval: Any) -> np.ndarray:
    """Entries as the array of an operation's output; as a plain array where all are known."""
    if all(known(x) for x in flat):
        return np.array(flat, aval.dtype).reshape(aval.shape)
    return row(flat).reshape(aval.shape)


def move(eqn: Any, operands: list[Value]) -> list[np.ndarray]:
    """An operation that only moves entries: done on their numbers, now."""
    moved = operands[: MOVES[eqn.primitive.name]]
    rest = [v.array for v in operands[len(moved) :]]
    if any(v.lane for v in operands[len(moved) :]):
        raise UnsupportedError(f"operation {eqn.primitive.name!r} with indices of its own in every problem")
    lists = [entries(v) for v in moved]
    ends = np.cumsum([0, *(a.size for a in lists)])
    numbers = [
        np.arange(first, first + a.size, dtype=np.int32).reshape(a.shape) for a, first in zip(lists, ends, strict=False)
    ]
    pool = [x for a in lists for x in a.ravel()]
    params = {**eqn.params, "fill_value": -1} if "fill_value" in eqn.params else eqn.params
    with jax.ensure_compile_time_eval():
        out = eqn.primitive.bind(*(jnp.asarray(n) for n in [*numbers, *rest]), **params)
    results = []
    for numbered, var in zip(out if eqn.primitive.multiple_results else [out], eqn.outvars, strict=True):
        flat = np.asarray(numbered).ravel()
        if flat.size and flat.min() < 0:
            raise UnsupportedError(f"operation {eqn.primitive.name!r} with an index out of bounds")
        results.append(settled([pool[i] for i in flat], var.aval))
    return results


def scatter_add(evaluator: Scalars, eqn: Any, operand: Value, indices: Value, updates: Value) -> list[np.ndarray]:
    """Adding at constant places, in the order of the updates; the places are found by adding ones."""
    if indices.lane:
        raise UnsupportedError("operation 'scatter-add' with indices of its own in every problem")
    target, source = entries(operand), entries(updates)
    with jax.ensure_compile_time_eval():
        place = lambda ones: eqn.primitive.bind(  # noqa: E731
            jnp.zeros(target.shape, jnp.float32), jnp.asarray(indices.array), ones, **eqn.params
        )
        ones = jnp.eye(source.size, dtype=jnp.float32).reshape((source.size, *source.shape))
        goes = np.asarray(jax.vmap(place)(ones)).reshape(source.size, target.size)
    sums = list(target.ravel())
    for number, x in enumerate(source.ravel()):
        for to in np.flatnonzero(goes[number]):
            sums[to] = evaluator.add(sums[to], x)
    return [settled(sums, eqn.outvars[0].aval)]


def dot_general(evaluator: Scalars, eqn: Any, left: Value, right: Value) -> list[np.ndarray]:
    """Dot products as chains of multiply-adds over the contracted index; output axes are batch, left, right."""
    (contract_l, contract_r), (batch_l, batch_r) = eqn.params["dimension_numbers"]
    aval = eqn.outvars[0].aval
    a, b = stacked(entries(left), batch_l, contract_l), stacked(entries(right), batch_r, contract_r)
    terms = a.shape[2]
    evaluator.count(terms)
    flat = []
    for batch, i, j in np.ndindex(a.shape[0], a.shape[1], b.shape[1]):
        products = [evaluator.mul(a[batch, i, k], b[batch, j, k]) for k in range(terms)]
        if terms > 1 and jnp.issubdtype(aval.dtype, jnp.floating):
            products[0] = evaluator.round_one(products[0])
        flat.append(functools.reduce(evaluator.add, products) if products else np.zeros((), aval.dtype)[()])
    return [settled(flat, aval)]


def stacked(array: np.ndarray, batch: Sequence[int], contract: Sequence[int]) -> np.ndarray:
    """The array as `[batch, free, contracted]`."""
    free = [d for d in range(array.ndim) if d not in batch and d not in contract]
    sizes = [int(np.prod([array.shape[d] for d in axes], dtype=int)) for axes in (batch, free, contract)]
    return array.transpose(*batch, *free, *contract).reshape(sizes)


def reduction(combine: Callable[[Scalars, Any, Any], Any], start: Any = None) -> Callable[..., list[np.ndarray]]:
    """A reduction over some axes, first index slowest; `start` is what nothing reduces to, by dtype."""

    def rule(evaluator: Scalars, eqn: Any, operand: Value) -> list[np.ndarray]:
        aval = eqn.outvars[0].aval
        rows = stacked(entries(operand), (), eqn.params["axes"])[0]
        evaluator.count(rows.shape[1])
        if not rows.shape[1]:
            return [np.full(aval.shape, start(aval.dtype), aval.dtype)]
        return [settled([functools.reduce(functools.partial(combine, evaluator), row) for row in rows], aval)]

    return rule


def binary(primitive: Callable[[Any, Any], Any]) -> Callable[[Scalars, Any, Any], Any]:
    def combine(evaluator: Scalars, a: Any, b: Any) -> Any:
        if known(a) and known(b):
            with jax.ensure_compile_time_eval():
                return np.asarray(primitive(jnp.asarray(a), jnp.asarray(b)))[()]
        evaluator.emitted += 1
        return primitive(evaluator.filled(a), evaluator.filled(b))

    return combine


def select_n(evaluator: Scalars, eqn: Any, which: Value, *cases: Value) -> list[np.ndarray]:
    aval = eqn.outvars[0].aval
    lists = [np.broadcast_to(entries(v), aval.shape).ravel() for v in (which, *cases)]
    flat = []
    for chosen, *options in zip(*lists, strict=True):
        if known(chosen):
            flat.append(options[int(chosen)])
        elif len(options) != 2:
            raise UnsupportedError("operation 'select_n' among more than two")
        else:
            evaluator.emitted += 1
            chosen = evaluator.converted(chosen, bool)
            flat.append(lax.select(chosen, evaluator.filled(options[1]), evaluator.filled(options[0])))
    return [settled(flat, aval)]


def scan(evaluator: Scalars, eqn: Any, *operands: Value) -> list[np.ndarray]:
    """A loop of known length, written out."""
    p = eqn.params
    consts, carry, xs = loop_operands(eqn, operands)
    turns = range(p["length"])
    ys: list[list[Value]] = []
    for turn in reversed(turns) if p["reverse"] else turns:
        slices = [value_of(v.array[turn], v.varies) for v in xs]
        out = evaluator.run(p["jaxpr"].jaxpr, p["jaxpr"].consts, [*consts, *carry, *slices])
        carry, y = out[: len(carry)], out[len(carry) :]
        ys.append(y)
    ys = ys[::-1] if p["reverse"] else ys
    ends = [settled(list(entries(v).ravel()), var.aval) for v, var in zip(carry, eqn.outvars, strict=False)]
    rows = [
        settled([x for y in ys for x in entries(y[number]).ravel()], var.aval)
        for number, var in enumerate(eqn.outvars[len(carry) :])
    ]
    return [*ends, *rows]


def value_of(array: Any, varies: bool = True) -> Value:
    """The value of an array of entries, or of a single one."""
    if isinstance(array, np.ndarray) and array.dtype == object:
        return Value(array, True, varies)
    if isinstance(array, np.ndarray | np.generic):
        return Value(np.asarray(array), False, False)
    return Value(row([array]).reshape(()), True, varies)


MOVES = {
    "broadcast_in_dim": 1,
    "concatenate": None,
    "copy": 1,
    "copy_p": 1,
    "dynamic_slice": 1,
    "dynamic_update_slice": 2,
    "expand_dims": 1,
    "gather": 1,
    "optimization_barrier": None,
    "pad": 2,
    "reshape": 1,
    "rev": 1,
    "slice": 1,
    "split": 1,
    "squeeze": 1,
    "transpose": 1,
}
"""Operations that move entries, and how many of their operands are moved (None: all); the others are indices."""

NATIVE = frozenset(
    """abs add and atan2 bitcast_convert_type clamp convert_element_type cos div eq erf exp exp2 ge gt integer_pow le
    log lt max min mul ne neg not or pow rem rsqrt shift_left shift_right_arithmetic shift_right_logical sin
    stop_gradient sub tanh xor""".split()
)
"""Elementwise operations that Mosaic has on GPUs and TPUs alike."""

REWRITTEN: dict[str, Callable[..., Any]] = {
    **rewrites.UNARY,
    "add_any": lambda a, b, zero: lax.add(a, b),
    "square": lambda x, zero: x * x,
}

RULES: dict[str, Callable[..., list[np.ndarray]]] = {
    "dot_general": dot_general,
    "reduce_and": reduction(binary(lax.bitwise_and), lambda dtype: True),
    "reduce_max": reduction(binary(lax.max), lambda dtype: -np.inf),
    "reduce_min": reduction(binary(lax.min), lambda dtype: np.inf),
    "reduce_or": reduction(binary(lax.bitwise_or), lambda dtype: False),
    "reduce_prod": reduction(Scalars.mul, lambda dtype: 1),
    "reduce_sum": reduction(Scalars.add, lambda dtype: 0),
    "scan": scan,
    "scatter-add": scatter_add,
    "scatter_add": scatter_add,
    "select_n": select_n,
}
