"""The losses of the benchmarks, once for JAX (one problem) and once by hand (the gradient of a whole batch).

The hand-written gradients use nothing but operators and `exp`, which NumPy and torch share, so that both are
given the form that an experienced user of theirs would write rather than one differentiated for them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def squared(w: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    """Scalar problem: 0.5 (t - x w)^2."""
    return 0.5 * (t - x * w) ** 2


def mean_squared(w: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    """Vector problem: 0.5 mean((t - x @ w)^2), x [points, weights], t [points]."""
    return 0.5 * jnp.mean((t - x @ w) ** 2)


def logistic(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Logistic regression: mean(log(1 + exp(z)) - y z) with z = x @ w and labels y in {0, 1}."""
    z = x @ w
    return jnp.mean(jnp.logaddexp(z, jnp.zeros_like(z)) - y * z)


def squared_gradient(xp: Any, w: Any, x: Any, t: Any) -> Any:
    """(x w - t) x for a batch: all [N]."""
    return (x * w - t) * x


def mean_squared_gradient(xp: Any, w: Any, x: Any, t: Any) -> Any:
    """x' (x w - t) / points for a batch: x [N, points, weights], t [N, points], w [N, weights]."""
    residual = (x @ w[..., None])[..., 0] - t
    return (residual[:, None, :] @ x)[:, 0, :] / x.shape[1]


def shared_squared_gradient(xp: Any, w: Any, x: Any, t: Any) -> Any:
    """The same with one data set for all, two matrix products: x [points, weights], t [points]."""
    return (w @ x.T - t) @ x / x.shape[0]


def logistic_gradient(xp: Any, w: Any, x: Any, y: Any) -> Any:
    """x' (1 / (1 + exp(-x w)) - y) / points for a batch: shapes as in mean_squared_gradient."""
    z = (x @ w[..., None])[..., 0]
    return ((1 / (1 + xp.exp(-z)) - y)[:, None, :] @ x)[:, 0, :] / x.shape[1]


def adam_corrections(steps: int) -> np.ndarray:
    """Adam's bias corrections, 1/(1 - b^s) for both decays, s = 1 .. steps."""
    powers = np.arange(1, steps + 1)
    return np.stack([1 / (1 - 0.9**powers), 1 / (1 - 0.999**powers)], axis=1).astype(np.float32)
