"""Losses over many points, one way or another: what goes through loops in lanes and in kernels in registers."""

import jax
import jax.numpy as jnp
import numpy as np
from problems import pick

import gdjax
from gdjax import Plan

LANES, VMAP = Plan(kernel="lanes", tile=32, tiles=2), Plan(kernel="vmap", tile=32, tiles=2)
COUNT = 45


def linear(w, x, t):
    return 0.5 * jnp.mean((x @ w - t) ** 2)


def logistic(w, x, t):
    return jnp.mean(jnp.logaddexp(jnp.zeros_like(t), x @ w) - jnp.where(t > 0, x @ w, jnp.zeros_like(t)))


def network(w, x, t):
    return jnp.mean((jnp.tanh(x @ w["a"]) @ w["b"] - t) ** 2)


def centred(w, x, t):
    """The terms of one sum hang on another."""
    error = x @ w - t
    return jnp.mean((error - jnp.mean(error)) ** 2)


def own_scale(w, x, t, scale):
    return jnp.mean((x @ w - scale * t) ** 2)


def own_counts(w, x, t, counts):
    """Shared points, each of which counts differently in every problem."""
    return jnp.mean(jnp.abs(counts) * (x @ w - t) ** 2)


def own_points(w, x, t):
    return 0.5 * jnp.mean((x @ w - t) ** 2)


def columns(w, x, t):
    """Slices, transpositions, reshapes and sums over several axes."""
    pairs = (x.T[:2] * w[:2, None]).reshape(2, -1, 1)
    return jnp.sum(jnp.square(jnp.squeeze(pairs, 2).T)) / 100 + jnp.mean(jnp.where(t > 0, x[:, 2] * w[2], t) ** 2)


def worst(w, x, t):
    """Per point the worse of two errors, over which a smooth maximum is taken."""
    errors = jnp.stack([x @ w - t, x @ w + t], axis=1)
    return jnp.mean(jnp.max(errors, axis=1) ** 2) + 0.01 * jnp.log(jnp.sum(jnp.exp(0.1 * errors[:, 0])))


def distances(w, x, t):
    return jnp.mean(jnp.sum((x - w[None]) ** 2, axis=1) * t**2)


LOSSES = (linear, logistic, network, centred, own_scale, own_counts, own_points, columns, worst, distances)


def batch(loss, points, count=COUNT, dtype=np.float32, seed=0):
    """Weights, data, and which of it problems own."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)  # noqa: E731
    w = {"a": draw(count, 3, 4), "b": draw(count, 4)} if loss is network else draw(count, 3)
    if loss is own_points:
        return w, (draw(count, points, 3), draw(count, points)), (0, 0)
    data, axes = (draw(points, 3), draw(points)), (None, None)
    own = {own_scale: (count,), own_counts: (count, points)}.get(loss)
    return (w, data, axes) if own is None else (w, (*data, draw(*own)), (*axes, 0))


def solve(loss, points, plan=LANES, dtype=np.float32, which=slice(None), fresh=False, **options):
    """`fresh` is for a loss that has not been compiled."""
    w, data, axes = batch(loss, points, dtype=dtype)
    data = tuple(d if axis is None else d[which] for d, axis in zip(data, axes, strict=True))
    rates = np.linspace(0.01, 0.1, COUNT, dtype=dtype)[which]
    settings = {"learning_rate": rates, "steps": 12, **options}
    function = (lambda *args: loss(*args)) if fresh else loss
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        return gdjax.minimize(function, pick(w, which), data, in_axes=axes, plan=plan, **settings)
