"""A user's own loss descended on the host, one operation at a time and in higher precision: a reference for `minimize`.

The gradient of one problem is traced to a jaxpr, and NumPy evaluates that jaxpr; XLA compiles and runs nothing. All
floating point values are widened at the start and stay wide: numbers that the program holds (data, start weights,
learning rate, constants) are first rounded to their own dtype, what is computed from them is not. The result is hence
what the same program gives without its rounding errors, as far as the wider type reaches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from gdjax.batch import convert, prepare, problem_shapes
from gdjax.device import on_accelerator
from gdjax.engine.evaluator import INLINED, inner, loop_operands
from gdjax.minimize import check_steps, checked_loss
from gdjax.rates import check_rate


class UnsupportedError(NotImplementedError):
    """A program with an operation that the host has no form of in higher precision; the message names it."""


def evaluate(function: Callable[..., Any], *args: Any, precision: Any = None) -> Any:
    """The value of a JAX function, evaluated one operation at a time with NumPy in higher precision.

    Args:
        function: a pure JAX function, such as a loss or its `jax.grad`.
        args: pytrees of arrays or numbers, in the dtypes that the function would get.
        precision: a NumPy floating dtype wider than those of `args`. None: float64 for float16, bfloat16 and float32,
            `numpy.longdouble` for float64. What the latter is depends on the platform: 64 bits of significand on x86
            Linux and macOS, 113 (slow, in software) on ARM Linux, but no more than float64's 53 on Windows and on
            Apple's ARM, where float64 functions have no reference here.

    Returns:
        What `function` returns, as NumPy arrays: floating ones in the wide type, others in their own.

    Raises:
        UnsupportedError: an operation without a form in that precision, named in the message.
        ValueError: a precision that is not wider than the program's.
        TypeError: a precision that is no floating dtype.

    One third of the float32 number nearest to 0.1:

    >>> print(evaluate(lambda x: x / 3, np.float32(0.1)))
    0.033333333830038704
    """
    args = convert(args, "args", None)
    leaves = jax.tree.leaves(args)
    with jax.enable_x64(any(leaf.dtype.itemsize == 8 for leaf in leaves) or jax.config.jax_enable_x64):  # type: ignore[attr-defined]
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    wide = wider(closed, precision)
    with np.errstate(all="ignore"):  # as XLA: infinities and NaN without a word
        out = run(closed.jaxpr, closed.consts, [widened(leaf, wide) for leaf in leaves], wide)
    return jax.tree.unflatten(jax.tree.structure(shape), out)


def descend(
    loss: Callable[..., Any],
    weights: Any,
    data: tuple[Any, ...] = (),
    *,
    in_axes: Any = 0,
    learning_rate: Any,
    steps: int,
    precision: Any = None,
) -> Any:
    """Plain gradient descent `w ← w − r·∂l/∂w` on the host in higher precision, one problem after another.

    The arguments are those of `gdjax.minimize`, whose result this is a reference for. It is slow: some microseconds
    per operation, step and problem.

    Args:
        loss: `loss(weights, *data) -> scalar`, the loss of ONE problem, a pure JAX function.
        weights: start weights, a pytree of floating point arrays, every leaf `[N, ...]`.
        data: one pytree per further argument of `loss`; leaves `[N, ...]`, or without the problem axis where shared.
        in_axes: as in `jax.vmap`, over `data`: 0 per problem, None shared; one for all, or a tuple.
        learning_rate: a number or an `[N]` array, rounded to the dtype of the weights as `minimize` does.
        steps: how many updates to take, at least 1.
        precision: the type to compute in, as for `evaluate`.

    Returns:
        The final weights: the same pytree, NumPy arrays `[N, ...]` in the wide type. As in `minimize`, an update whose
        gradient or weights are not finite is not taken, and the problem keeps its last finite weights.

    Raises:
        UnsupportedError, ValueError, TypeError: as `evaluate`, and for arguments that do not fit, as `minimize`.

    The tutorial's problem with a learning rate of 0.1 in float32, which is a little more than 0.1:

    >>> import gdjax
    >>> x, t, w = (np.array([v], np.float32) for v in (2, 4, 1))
    >>> print(descend(gdjax.kernel.residual_loss, w, (x, t), learning_rate=0.1, steps=1))
    [1.2]
    """
    if callable(learning_rate) or isinstance(learning_rate, str):
        raise TypeError(f"learning_rate={learning_rate!r}; the host descends with a number or an [N] array")
    check_rate(np.asarray(learning_rate) if on_accelerator(learning_rate) else learning_rate)
    count = check_steps(steps)
    batch = prepare(weights, data, in_axes, {"learning_rate": learning_rate}, None)
    flags = (jax.tree.map(lambda _: True, batch.weights), *batch.data_flags)
    arguments = (batch.weights, *batch.data)
    with jax.enable_x64(batch.x64 or jax.config.jax_enable_x64):  # type: ignore[attr-defined]
        closed = jax.make_jaxpr(jax.grad(checked_loss(loss)))(*problem_shapes(arguments, flags))
    wide = wider(closed, precision)
    leaves = [widened(leaf, wide) for leaf in jax.tree.leaves(arguments)]
    own = jax.tree.leaves(flags)
    starts, structure = jax.tree.flatten(batch.weights)
    rate = np.broadcast_to(batch.hyper["learning_rate"], (batch.count,))
    rates = [widened(rate.astype(start.dtype), wide) for start in starts]
    gradient = functools.partial(run, closed.jaxpr, closed.consts, wide=wide)
    ends = []
    with np.errstate(all="ignore"):
        for problem in range(batch.count):
            values = [leaf[problem] if flag else leaf for leaf, flag in zip(leaves, own, strict=True)]
            ends.append(descend_one(gradient, values, [rate[problem] for rate in rates], count))
    return jax.tree.unflatten(structure, [np.stack(leaf) for leaf in zip(*ends, strict=True)])


def descend_one(gradient: Callable[..., Any], values: list[Any], rates: list[Any], steps: int) -> list[Any]:
    """The last finite weights of one problem; `values` are its start weights, one per rate, and then its data."""
    current, fixed = values[: len(rates)], values[len(rates) :]
    for _ in range(steps):
        slopes = gradient([*current, *fixed])
        proposed = [w - r * g for w, r, g in zip(current, rates, slopes, strict=True)]
        if not all(np.isfinite(v).all() for v in [*slopes, *proposed]):
            break
        current = proposed
    return current


def floating(dtype: Any) -> bool:
    return bool(jax.dtypes.issubdtype(dtype, np.floating))


def wider(closed: Any, precision: Any) -> np.dtype:
    """The type to compute in: that which was asked for, or the next one that is wider than the program's."""
    given = [v.aval.dtype for v in [*closed.jaxpr.invars, *closed.jaxpr.outvars] if floating(v.aval.dtype)]
    bits = max((int(jax.numpy.finfo(dtype).nmant) for dtype in given), default=23)
    wide = np.dtype((np.float64 if bits < 52 else np.longdouble) if precision is None else precision)
    if wide.kind != "f":
        raise TypeError(f"precision={wide.name} is no NumPy floating dtype; pass np.float64 or np.longdouble")
    if np.finfo(wide).nmant <= bits:
        raise ValueError(
            f"precision {wide.name} has {np.finfo(wide).nmant + 1} bits of significand here, the program's own type "
            f"{bits + 1}; a reference needs more: pass a wider precision or narrower inputs"
        )
    return wide


def widened(value: Any, wide: np.dtype) -> Any:
    array = np.asarray(value)
    if array.dtype.kind == "c":
        raise UnsupportedError("complex numbers have no form on the host")
    return array.astype(wide) if floating(array.dtype) else array


def run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], wide: np.dtype) -> list[Any]:
    """The outputs of `jaxpr`, operation by operation; what no output needs is left out."""
    env: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
    env.update((v, widened(c, wide)) for v, c in zip(jaxpr.constvars, consts, strict=True))

    def read(atom: Any) -> Any:
        if isinstance(atom, core.Literal):  # rounded first, as the program holds it
            aval: Any = atom.aval
            return widened(np.asarray(atom.val, aval.dtype), wide)
        return env[atom]

    for eqn in needed(jaxpr):
        results = equation(eqn, [read(v) for v in eqn.invars], wide)
        for var, result in zip(eqn.outvars, results, strict=True):
            env[var] = np.asarray(result, wide if floating(var.aval.dtype) else var.aval.dtype)
    return [read(v) for v in jaxpr.outvars]


def needed(jaxpr: Any) -> list[Any]:
    """The equations that the outputs depend on: a gradient carries along parts of the loss that it does not use."""
    live = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if not live.isdisjoint(eqn.outvars):
            kept.append(eqn)
            live.update(v for v in eqn.invars if not isinstance(v, core.Literal))
    return kept[::-1]


def equation(eqn: Any, operands: list[Any], wide: np.dtype) -> list[Any]:
    name = eqn.primitive.name
    if name in INLINED:
        return run(*inner(eqn), operands, wide)
    if name == "scan":
        return scan(eqn, operands, wide)
    if name in MATH and wide != np.float64:
        raise UnsupportedError(f"operation {name!r} has no form on the host in {wide.name}, only in float64")
    if name not in OPERATIONS:
        raise UnsupportedError(f"operation {name!r} has no form on the host; write the loss without it")
    out = OPERATIONS[name](eqn.params, *operands)
    return out if eqn.primitive.multiple_results else [out]


def scan(eqn: Any, operands: list[Any], wide: np.dtype) -> list[Any]:
    p = eqn.params
    consts, carry, xs = loop_operands(eqn, operands)
    rows = []
    for i in range(p["length"])[:: -1 if p["reverse"] else 1]:
        out = run(p["jaxpr"].jaxpr, p["jaxpr"].consts, [*consts, *carry, *(x[i] for x in xs)], wide)
        carry = out[: len(carry)]
        rows.append(out[len(carry) :])
    if not rows:
        return [*carry, *(np.zeros(v.aval.shape) for v in eqn.outvars[len(carry) :])]
    return [*carry, *(np.stack(y) for y in zip(*rows[:: -1 if p["reverse"] else 1], strict=True))]


# Operations: `rule(params, *operands)`. `run` brings results to their type: a conversion needs no more than that.


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda p, *operands: function(*operands)


def reduction(ufunc: Any) -> Callable[..., Any]:
    return lambda p, x: ufunc.reduce(x, axis=tuple(p["axes"]), dtype=x.dtype)


def divide(p: Any, a: Any, b: Any) -> Any:
    """Integers are divided towards zero."""
    return a / b if a.dtype.kind == "f" else np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


def dot_general(p: Any, left: Any, right: Any) -> Any:
    (contract_l, contract_r), (batch_l, batch_r) = p["dimension_numbers"]
    labels_l, labels_r = list(range(left.ndim)), list(range(left.ndim, left.ndim + right.ndim))
    for l, r in zip((*contract_l, *batch_l), (*contract_r, *batch_r), strict=True):
        labels_r[r] = l
    free_l = [label for label in labels_l if label not in (*contract_l, *batch_l)]
    free_r = [label for label in labels_r if label >= left.ndim]
    return np.einsum(left, labels_l, right, labels_r, [*batch_l, *free_l, *free_r])


def broadcast_in_dim(p: Any, x: Any) -> Any:
    sizes = dict(zip(p["broadcast_dimensions"], x.shape, strict=True))
    return np.broadcast_to(x.reshape([sizes.get(axis, 1) for axis in range(len(p["shape"]))]), p["shape"])


def pad(p: Any, x: Any, value: Any) -> Any:
    for axis, (low, high, between) in enumerate(p["padding_config"]):
        rows = np.moveaxis(x, axis, 0)
        end = max(low, 0) + max(len(rows) + between * (len(rows) - 1), 0)
        spread = np.full((end + max(high, 0), *rows.shape[1:]), value, x.dtype)
        spread[max(low, 0) : end : between + 1] = rows
        x = np.moveaxis(spread[max(-low, 0) : len(spread) - max(-high, 0)], 0, axis)
    return x


def slice_(p: Any, x: Any) -> Any:
    return x[tuple(map(slice, p["start_indices"], p["limit_indices"], p["strides"] or (1,) * x.ndim))]


def iota(p: Any) -> Any:
    shape = [-1 if axis == p["dimension"] else 1 for axis in range(len(p["shape"]))]
    return np.broadcast_to(np.arange(p["shape"][p["dimension"]]).reshape(shape), p["shape"])


MATH = {"erf": plain(np.vectorize(math.erf, otypes="d")), "erfc": plain(np.vectorize(math.erfc, otypes="d"))}
"""Operations that NumPy lacks: in float64 only."""

UFUNCS = """abs=absolute acos=arccos acosh=arccosh add add_any=add and=bitwise_and asin=arcsin asinh=arcsinh
atan=arctan atan2=arctan2 atanh=arctanh cbrt ceil cos cosh eq=equal exp exp2 expm1 floor ge=greater_equal gt=greater
is_finite=isfinite le=less_equal log log1p lt=less max=maximum min=minimum mul=multiply ne=not_equal neg=negative
not=invert or=bitwise_or pow=power rem=fmod sign sin sinh sqrt square sub=subtract tan tanh xor=bitwise_xor"""

OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: plain(getattr(np, ufunc or name)) for name, _, ufunc in (u.partition("=") for u in UFUNCS.split())},
    **dict.fromkeys(("convert_element_type", "copy", "copy_p", "stop_gradient"), plain(lambda x: x)),
    **MATH,
    "broadcast_in_dim": broadcast_in_dim,
    "clamp": plain(lambda low, x, high: np.minimum(np.maximum(x, low), high)),
    "concatenate": lambda p, *xs: np.concatenate(xs, p["dimension"]),
    "div": divide,
    "dot_general": dot_general,
    "integer_pow": lambda p, x: np.power(x, p["y"]),
    "iota": iota,
    "logistic": plain(lambda x: 1 / (1 + np.exp(-x))),
    "pad": pad,
    "reduce_and": reduction(np.bitwise_and),
    "reduce_max": reduction(np.maximum),
    "reduce_min": reduction(np.minimum),
    "reduce_or": reduction(np.bitwise_or),
    "reduce_prod": reduction(np.multiply),
    "reduce_sum": reduction(np.add),
    "reshape": lambda p, x: x.reshape(p["new_sizes"]),
    "rev": lambda p, x: np.flip(x, p["dimensions"]),
    "rsqrt": plain(lambda x: 1 / np.sqrt(x)),
    "select_n": plain(lambda which, *cases: np.choose(which.astype(np.intp), cases, mode="clip")),
    "slice": slice_,
    "split": lambda p, x: np.split(x, np.cumsum(p["sizes"])[:-1], p["axis"]),
    "squeeze": lambda p, x: np.squeeze(x, tuple(p["dimensions"])),
    "tile": lambda p, x: np.tile(x, p["reps"]),
    "transpose": lambda p, x: np.transpose(x, p["permutation"]),
}
"""What each primitive is in NumPy."""
