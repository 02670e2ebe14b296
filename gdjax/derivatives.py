"""Derivatives of a run with respect to all that goes into it: weights, data, hyperparameters, closed-over values.

Without a stop rule, exactly through the steps. With one, by the implicit function theorem at the point that was found:
how it was reached does not matter. Both are written as the derivative along a direction (`jax.custom_jvp`), from which
JAX makes the one against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from gdjax.engine.program import DIVERGED, Program
from gdjax.engine.refill import Ended
from gdjax.rules import Projected
from gdjax.stop import widest

DENSE = 64
"""Weights per problem up to which its Hessian is formed and solved directly; beyond, by conjugate gradients."""


class Arrays(NamedTuple):
    """What a run is made of; `carried`, `status` and `taken` of an earlier run that it resumes, or None."""

    weights: Any
    carried: Any
    status: Any
    taken: Any
    data: Any
    hyper: Any


def differentiable(
    run: Callable[[Arrays], tuple[Ended, Any]], program: Program, start: int, steps: int, shapes: Arrays, flags: Arrays
) -> Callable[[Arrays], tuple[Ended, Any]]:
    """`run`, which returns ended problems and a record, as one compiled function with the derivatives of this module.

    Weights and loss have derivatives, without a stop rule the rule's state too; gradient norms, steps, status and the
    record are constants. A problem that diverged takes no part: its derivatives are zero.
    """
    forward, run_values = lifted(run, shapes)
    if program.stop is None:
        tangent, values = through_steps(program, start, steps, shapes, flags)
    else:
        tangent, values = at_stationary_point(program, shapes, flags)

    @jax.custom_jvp
    def descend(closed: Any, arrays: Arrays) -> tuple[Ended, Any]:
        return forward(closed[0], arrays)

    @descend.defjvp
    def derivative(primals: Any, tangents: Any) -> tuple[Any, Any]:
        (closed, arrays), (closed_dot, arrays_dot) = primals, tangents
        ended, record = descend(closed, arrays)
        bad = ended.lane["status"] == DIVERGED
        moved = tangent(ended, bad, (closed[1], arrays), (closed_dot[1], arrays_dot))
        still, record_still = jax.tree.map(no_tangent, (ended, record))
        lane = {**still.lane, **{name: healthy(part, bad) for name, part in moved.items() if name != "loss"}}
        return (ended, record), (still._replace(lane=lane, loss=healthy(moved["loss"], bad)), record_still)

    solver = jax.jit(descend)
    return lambda arrays: solver((run_values, values), arrays)


def lifted(function: Callable[..., Any], *shapes: Any) -> tuple[Callable[..., Any], list[Any]]:
    """`(function of (values, *arguments), values)`: the traced values that a function closes over, as an argument."""
    closed, out = jax.make_jaxpr(function, return_shape=True)(*shapes)
    traced = [isinstance(constant, jax.core.Tracer) for constant in closed.consts]
    kept = [None if t else c for c, t in zip(closed.consts, traced, strict=True)]
    jaxpr = ClosedJaxpr(closed.jaxpr, kept).jaxpr  # since jax 0.11 `closed.jaxpr` would keep the traced values too
    values = [c for c, t in zip(closed.consts, traced, strict=True) if t]
    tree = jax.tree.structure(out)
    del closed, out

    def call(values: list[Any], *arguments: Any) -> Any:
        rest = iter(values)
        constants = [next(rest) if t else c for c, t in zip(kept, traced, strict=True)]
        return jax.tree.unflatten(tree, jaxpr_as_fun(ClosedJaxpr(jaxpr, constants))(*jax.tree.leaves(arguments)))

    return call, values


def through_steps(
    program: Program, start: int, steps: int, shapes: Arrays, flags: Arrays
) -> tuple[Callable[..., Any], list[Any]]:
    """The tangent of a run of `steps` updates: the updates taken again, remembering O(√steps) of them.

    The outer loop remembers where every √steps updates begin, the inner one where each of those does (Griewank and
    Walther, Evaluating Derivatives, 2nd ed., chapter 12).
    """

    def one(arrays: Arrays) -> dict[str, Any]:
        weights, state, data, hyper = arrays.weights, arrays.carried, arrays.data, arrays.hyper
        if state is None:
            weights = program.start(weights)
            state = program.init(weights, data, hyper)

        def step(carry: Any, index: Any, data: Any, hyper: Any) -> Any:
            weights, state = carry
            new, state, _ = program.step(weights, state, jnp.ones((), bool), index, data, hyper)
            return new, state

        weights, state = checkpointed(step, (weights, state), (data, hyper), start, steps)
        return {"weights": weights, "state": state, "loss": program.loss(weights, *data)}

    again, values = lifted(lambda arrays: over_problems(one, (arrays,), (flags,)), shapes)

    def tangent(ended: Ended, bad: Any, primals: Any, tangents: Any) -> dict[str, Any]:
        closed, arrays = primals
        moved: dict[str, Any] = jax.jvp(again, (closed, standing_in(arrays, flags, bad)), tangents)[1]
        return moved

    return tangent, values


def checkpointed(step: Callable[..., Any], carry: Any, rest: tuple[Any, ...], start: int, steps: int) -> Any:
    """`carry = step(carry, index, *rest)` for `steps` indices from `start` on, remembering 2√steps of its values."""
    inner = math.isqrt(max(1, steps - 1)) + 1
    once = jax.checkpoint(step, prevent_cse=False)

    def several(carry: Any, first: Any, count: int, *rest: Any) -> Any:
        indices = first + jnp.arange(count, dtype=jnp.int32)
        return lax.scan(lambda carry, index: (once(carry, index, *rest), None), carry, indices)[0]

    stretch = jax.checkpoint(several, prevent_cse=False, static_argnums=2)
    firsts = jnp.int32(start) + inner * jnp.arange(steps // inner, dtype=jnp.int32)
    carry, _ = lax.scan(lambda carry, first: (stretch(carry, first, inner, *rest), None), carry, firsts)
    return several(carry, jnp.int32(start + steps // inner * inner), steps % inner, *rest)


def at_stationary_point(program: Program, shapes: Arrays, flags: Arrays) -> tuple[Callable[..., Any], list[Any]]:
    """The tangent of the point that a stop rule ended at, taken as a stationary one.

    `F(w, θ) = 0` gives `dw = −(∂F/∂w)⁻¹ ∂F/∂θ dθ`, with `F = ∂l/∂w`, or under a projection `F = w − P(w − ∂l/∂w)`
    (Krantz and Parks, The Implicit Function Theorem, 2013; Blondel et al., Efficient and Modular Implicit
    Differentiation, 2022, section 2.2).
    """
    rule = program.rule

    def point(weights: Any, data: Any) -> tuple[Any, Any]:
        loss, gradient = jax.value_and_grad(program.loss)(weights, *data)
        if isinstance(rule, Projected):
            moved = rule.project(jax.tree.map(jnp.subtract, weights, gradient))
            gradient = jax.tree.map(jnp.subtract, weights, moved)
        return loss, gradient

    one_weights = one_of(shapes.weights, flags.weights)
    at, values = lifted(point, one_weights, one_of(shapes.data, flags.data))

    def one(weights: Any, primal: Any, tangent: Any) -> tuple[Any, Any]:
        """Tangents of one problem's weights and loss, the closed-over values and the data moving along `tangent`."""

        def parameters(moving: Any) -> Any:
            return at(moving[0], weights, moving[1])[1]

        push = jax.jvp(parameters, (primal,), (tangent,))[1]
        turned = solved(lambda w: at(primal[0], w, primal[1])[1], weights, push, not isinstance(rule, Projected))
        weights_dot = jax.tree.map(jnp.negative, turned)
        loss_dot = jax.jvp(lambda w, moving: at(moving[0], w, moving[1])[0], (weights, primal), (weights_dot, tangent))[
            1
        ]
        return weights_dot, loss_dot

    def tangent(ended: Ended, bad: Any, primals: Any, tangents: Any) -> dict[str, Any]:
        (closed, arrays), (closed_dot, arrays_dot) = primals, tangents
        found = standing_in(arrays._replace(weights=ended.lane["weights"]), flags, bad)
        moving, moving_dot = (closed, found.data), (closed_dot, arrays_dot.data)
        moving_flags = (jax.tree.map(lambda _: False, closed), flags.data)
        weights_dot, loss_dot = over_problems(
            one, (found.weights, moving, moving_dot), (flags.weights, moving_flags, moving_flags)
        )
        return {"weights": weights_dot, "loss": loss_dot}

    return tangent, values


def solved(function: Callable[[Any], Any], weights: Any, right: Any, symmetric: bool) -> Any:
    """`(∂function/∂weights)⁻¹ right`, all of them pytrees like the weights of one problem."""
    dtype = widest(weights)
    if jnp.finfo(dtype).bits < 32:  # linear algebra starts at float32
        dtype = jnp.dtype(jnp.float32)
    leaves, tree = jax.tree.flatten(weights)
    sizes = [leaf.size for leaf in leaves]
    _, product = jax.linearize(function, weights)

    def flat(tree: Any) -> Any:
        return jnp.concatenate([leaf.astype(dtype).reshape(-1) for leaf in jax.tree.leaves(tree)])

    def shaped(vector: Any) -> Any:
        parts = jnp.split(vector, np.cumsum(sizes)[:-1])
        return jax.tree.unflatten(
            tree, [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
        )

    def matvec(vector: Any) -> Any:
        return flat(product(shaped(vector)))

    if sum(sizes) <= DENSE:
        matrix = jax.vmap(matvec, out_axes=1)(jnp.eye(sum(sizes), dtype=dtype))
        return shaped(jnp.linalg.solve(matrix, flat(right)))

    from jax.scipy.sparse.linalg import bicgstab, cg  # takes a tenth as long to import as all of gdjax; few need it

    def solve(matvec: Any, vector: Any) -> Any:
        return (cg if symmetric else bicgstab)(matvec, vector, tol=100 * float(jnp.finfo(dtype).eps))[0]

    # JAX's own functions can do this too, but not against the direction (jax 0.10: "open an issue").
    return shaped(lax.custom_linear_solve(matvec, flat(right), solve, solve, symmetric=symmetric))


def over_problems(function: Callable[..., Any], args: tuple[Any, ...], flags: tuple[Any, ...]) -> Any:
    """A function of one problem on all of them, the problems in front wherever a flag says so."""
    leaves, tree = jax.tree.flatten(args)
    axes = [0 if flag else None for flag in jax.tree.leaves(flags)]
    return jax.vmap(lambda *flat: function(*jax.tree.unflatten(tree, flat)), axes)(*leaves)


def one_of(shapes: Any, flags: Any) -> Any:
    return jax.tree.map(lambda s, flag: jax.ShapeDtypeStruct(s.shape[1:] if flag else s.shape, s.dtype), shapes, flags)


def standing_in(arrays: Arrays, flags: Arrays, bad: Any) -> Arrays:
    """The arrays with those of a healthy problem wherever a problem is bad.

    A derivative that is infinite or NaN would spoil, by `0 · NaN`, the sums over the problems that share a value, even
    where it is not asked for.
    """
    healthy = jnp.argmin(bad)

    def replace(leaf: Any, flag: bool) -> Any:
        return jnp.where(shaped_like(bad, leaf), leaf[healthy][None], leaf) if flag else leaf

    return jax.tree.map(replace, jax.tree.map(jnp.asarray, arrays), flags)


def healthy(tangents: Any, bad: Any) -> Any:
    """The tangents, zero for bad problems."""

    def mask(leaf: Any) -> Any:
        if leaf.dtype == jax.dtypes.float0:
            return leaf
        return jnp.where(shaped_like(bad, leaf), jnp.zeros_like(leaf), leaf)

    return jax.tree.map(mask, tangents)


def shaped_like(mask: Any, leaf: Any) -> Any:
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - 1))


def no_tangent(leaf: Any) -> Any:
    """The tangent of a constant."""
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)
