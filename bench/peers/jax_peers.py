"""The other ways to do it in JAX: plain vmap of a loop, optax in that loop, jaxopt, optimistix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import Case, Inputs
from bench.peers import Answer, Run, Skip, load

One = Callable[..., tuple[Any, Any, Any]]  # (weights, rate, *data) -> weights, steps, converged


def pick(device: str) -> jax.Device:
    """The JAX device that gdjax calls by this name."""
    import gdjax

    return gdjax.select_device(device).device


def compiled(case: Case, one: One) -> Callable[..., tuple[Any, ...]]:
    """`one` under vmap and jit; without a stop rule only the weights are computed."""
    wanted = one if case.tolerance is not None else lambda *problem: one(*problem)[:1]
    return jax.jit(jax.vmap(wanted, in_axes=(0, 0, case.in_axes, case.in_axes)))


def batched(case: Case, inputs: Inputs, device: str, one: One, notes: str = "") -> Run:
    """`one` compiled, NumPy arrays to NumPy arrays."""
    solve = compiled(case, one)
    place = pick(device)

    def run() -> Answer:
        with jax.default_device(place):
            found = jax.block_until_ready(solve(inputs.weights, inputs.rates, *inputs.data))
        return Answer(*map(np.asarray, found), notes=notes)

    return run


def descent(case: Case) -> One:
    """Plain descent of one problem: a fori_loop; with a stop rule a while_loop."""

    def one(w: Any, rate: Any, *data: Any) -> tuple[Any, Any, Any]:
        gradient = lambda w: jax.grad(case.loss)(w, *data)  # noqa: E731
        if case.tolerance is None:
            return jax.lax.fori_loop(0, case.steps, lambda _, w: w - rate * gradient(w), w), 0, True
        unmet = lambda g: jnp.max(jnp.abs(g)) > case.tolerance  # noqa: E731
        w, g, steps = jax.lax.while_loop(
            lambda state: unmet(state[1]) & (state[2] < case.steps),
            lambda state: (new := state[0] - rate * state[1], gradient(new), state[2] + 1),
            (w, gradient(w), jnp.int32(0)),
        )
        return w, steps, ~unmet(g)

    return one


def vmap(case: Case, inputs: Inputs, device: str) -> Run:
    """jit(vmap(fori_loop)); with a stop rule jit(vmap(while_loop))."""
    return batched(case, inputs, device, descent(case))


def optax_descent(case: Case) -> One:
    """An optax rule in the same loops: adam, or sgd."""
    package = load("optax")
    rule = package.adam if case.family == "adam" else package.sgd

    def one(w: Any, rate: Any, *data: Any) -> tuple[Any, Any, Any]:
        optimizer = rule(rate)

        def step(w: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
            updates, state = optimizer.update(gradient, state, w)
            return package.apply_updates(w, updates), state

        gradient = lambda w: jax.grad(case.loss)(w, *data)  # noqa: E731
        if case.tolerance is None:
            loop = lambda _, pair: step(*pair, gradient(pair[0]))  # noqa: E731
            return jax.lax.fori_loop(0, case.steps, loop, (w, optimizer.init(w)))[0], 0, True
        unmet = lambda g: jnp.max(jnp.abs(g)) > case.tolerance  # noqa: E731

        def body(carry: Any) -> Any:
            w, state, g, steps = carry
            w, state = step(w, state, g)
            return w, state, gradient(w), steps + 1

        w, _, g, steps = jax.lax.while_loop(
            lambda carry: unmet(carry[2]) & (carry[3] < case.steps),
            body,
            (w, optimizer.init(w), gradient(w), jnp.int32(0)),
        )
        return w, steps, ~unmet(g)

    return one


def optax(case: Case, inputs: Inputs, device: str) -> Run:
    """An optax rule in the same loops, under vmap."""
    return batched(case, inputs, device, optax_descent(case))


def jaxopt(case: Case, inputs: Inputs, device: str) -> Run:
    """jaxopt.GradientDescent with a fixed step size; its rule is the 2-norm of the gradient."""
    package = load("jaxopt")
    if case.family == "adam":
        raise Skip("jaxopt's own solvers have no Adam")

    def one(w: Any, rate: Any, *data: Any) -> tuple[Any, Any, Any]:
        solver = package.GradientDescent(
            case.loss,
            stepsize=lambda _: rate,
            maxiter=case.steps,
            tol=case.tolerance or 0.0,
            acceleration=False,
            implicit_diff=False,
        )
        w, state = solver.run(w, *data)
        return w, state.iter_num, state.error <= (case.tolerance or 0.0)

    return batched(case, inputs, device, one, "stops by the 2-norm" if case.tolerance and case.weights > 1 else "")


def optimistix(case: Case, inputs: Inputs, device: str) -> Run:
    """optimistix.GradientDescent; its own rule is Cauchy's, here with the tolerance on the step it takes."""
    package = load("optimistix")
    if case.family == "adam":
        raise Skip("optimistix wraps optax for Adam")

    def one(w: Any, rate: Any, *data: Any) -> tuple[Any, Any, Any]:
        tolerance = 0.0 if case.tolerance is None else case.tolerance * rate
        solver = package.GradientDescent(learning_rate=rate, rtol=0.0, atol=tolerance)
        # The first of its steps only evaluates the loss.
        found = package.minimise(
            lambda w, data: case.loss(w, *data), solver, w, args=data, max_steps=case.steps + 1, throw=False
        )
        return found.value, found.stats["num_steps"] - 1, found.result == package.RESULTS.successful

    return batched(case, inputs, device, one, "stops by its own rule" if case.tolerance else "")
