"""The ten losses that kernels in registers must take, each with a small problem of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import kernel


def absolute(w, x, t):
    return jnp.mean(jnp.abs(x @ w - t))


def huber(w, x, t):
    e = jnp.abs(x @ w - t)
    return jnp.mean(jnp.where(e < 1, 0.5 * e**2, e - 0.5))


def log_cosh(w, x, t):
    return jnp.mean(jnp.log(jnp.cosh(x @ w - t)))


def logistic(w, x, t):
    f = x @ w
    return jnp.mean(jnp.logaddexp(jnp.zeros_like(f), f) - jnp.abs(t) * f)


def poisson(w, x, t):
    f = x @ w
    return jnp.mean(jnp.exp(f) - jnp.abs(t) * f)


def quantile(w, x, t):
    e = t - x @ w
    return jnp.mean(jnp.maximum(0.3 * e, -0.7 * e))


def squared(w, x, t):
    return 0.5 * jnp.mean((t - x @ w) ** 2)


def softplus_cosine(w, x, t):
    f = x @ w
    return jnp.mean(jax.nn.softplus(f) + 0.1 * jnp.cos(f - t))


def network(p, x, t):
    """2 inputs, 3 hidden units, 1 output."""
    hidden = jnp.tanh(x @ p["hidden"] + p["bias"][None, :])
    return 0.5 * jnp.mean(jnp.square(hidden @ p["out"] + p["shift"] - t))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss, the shapes of one problem's weights, and those of its data."""

    loss: Callable[..., Any]
    weights: Any
    data: tuple[tuple[int, ...], ...]

    def batch(self, count: int, dtype: Any = np.float32) -> tuple[Any, tuple[Any, ...]]:
        rng = np.random.default_rng(5)
        draw = lambda s: rng.normal(size=(count, *s)).astype(dtype)  # noqa: E731
        return jax.tree.map(draw, self.weights, is_leaf=lambda s: isinstance(s, tuple)), tuple(map(draw, self.data))


POINTS = ((3, 2), (3,))

LOSSES = {
    "squared": Problem(squared, (2,), POINTS),
    "residual": Problem(kernel.residual_loss, (), ((), ())),
    "absolute": Problem(absolute, (2,), POINTS),
    "huber": Problem(huber, (2,), POINTS),
    "log-cosh": Problem(log_cosh, (2,), POINTS),
    "logistic": Problem(logistic, (2,), POINTS),
    "poisson": Problem(poisson, (2,), POINTS),
    "quantile": Problem(quantile, (2,), POINTS),
    "softplus with cosine": Problem(softplus_cosine, (2,), POINTS),
    "network": Problem(network, {"hidden": (2, 3), "bias": (3,), "out": (3,), "shift": ()}, POINTS),
}

RULES: dict[str, dict[str, Any]] = {
    "plain": {"learning_rate": 0.05},
    "momentum": {"optimizer": optax.sgd(0.05, momentum=0.9)},
    "adam": {"optimizer": optax.adam(0.05)},
}


def agree(one, other, roundings=200, odd_ones=0.0):
    """Every weight to so many roundings of the largest of its problem, the losses to as many of the largest.

    A share of the problems may be `odd_ones`: where two roundings of an error fall on either side of a kink.
    """
    even = np.ones(len(one.status), bool)
    for a, b in zip(jax.tree.leaves(one.weights), jax.tree.leaves(other.weights), strict=True):
        a, b = np.asarray(a).reshape(len(a), -1), np.asarray(b).reshape(len(b), -1)
        allowed = roundings * np.finfo(np.float32).eps * (1 + np.abs(b).max(1, keepdims=True))
        even &= (np.abs(a - b) <= allowed).all(1)
    for a, b in ((one.loss, other.loss), (one.gradient_norm, other.gradient_norm)):
        largest = np.abs(b).max(where=np.isfinite(b), initial=0.0)
        even &= np.isclose(a, b, rtol=1e-4, atol=1e-4 * largest, equal_nan=True)
    assert even.mean() >= 1 - odd_ones
    np.testing.assert_array_equal(one.status, other.status)
