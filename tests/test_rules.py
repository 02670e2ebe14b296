"""Update rules: rates, schedules, the rate found from curvature, hand-written init/update pairs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import CASES, FUNCTIONS, pick, same_bits

import gdjax
from gdjax import kernel


def numpy_descent(w, x, t, rate_of, steps):
    for k in range(steps):
        w = w + rate_of(k) * x * (t - x * w)
    return w


@pytest.fixture
def scalars():
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 50))


def test_a_rate_for_all_and_a_rate_per_problem(scalars):
    w, x, t = scalars
    rates = np.linspace(0.0, 0.3, 50)
    out = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=rates, steps=30)
    np.testing.assert_allclose(out.weights, numpy_descent(w, x, t, lambda k: rates, 30), rtol=1e-12)
    assert same_bits(out.weights[0], w[0])  # rate zero
    one = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=rates[20], steps=30)
    assert same_bits(one.weights[20], out.weights[20])


def test_a_schedule_counts_updates_from_zero(scalars):
    w, x, t = scalars
    out = gdjax.minimize(
        kernel.squared_loss, w, (x, t), learning_rate=lambda k: 0.5 / (k.astype(jnp.float32) + 2), steps=23
    )
    np.testing.assert_allclose(
        out.weights, numpy_descent(w, x, t, lambda k: np.float64(np.float32(0.5 / (k + 2))), 23), rtol=1e-6
    )
    stepwise = gdjax.minimize(
        kernel.squared_loss, w, (x, t), learning_rate=lambda k: jnp.where(k == 3, 0.1, 0.0), steps=10
    )
    np.testing.assert_allclose(stepwise.weights, w + np.float64(np.float32(0.1)) * x * (t - x * w), rtol=1e-7)


def test_a_constant_schedule_equals_the_number(scalars):
    w, x, t = scalars.astype(np.float32)
    number = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=0.125, steps=30)
    schedule = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=lambda k: 0.125, steps=30)
    assert same_bits(number.weights, schedule.weights)


def test_auto_is_one_over_the_curvature(scalars):
    """In one dimension that is Newton's step: the squared loss is solved by it."""
    w, x, t = scalars
    out = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate="auto", steps=1)
    np.testing.assert_allclose(out.weights, t / x, rtol=1e-9)


def test_auto_takes_the_largest_eigenvalue_of_each_problem():
    case = CASES["linear"]
    w, (x, t) = case.batch(40)
    x = x * np.geomspace(0.01, 100, 40)[:, None, None]
    out = gdjax.minimize(case.loss, w, (x, t), learning_rate="auto", steps=1)
    hessian = np.einsum("nij,nik->njk", x, x) / 5
    g = np.einsum("nij,ni->nj", x, np.einsum("nij,nj->ni", x, w) - t) / 5
    largest = np.linalg.eigvalsh(hessian)[:, -1]
    rate = np.linalg.norm(w - np.asarray(out.weights), axis=1) / np.linalg.norm(g, axis=1)
    # Power iteration comes from below: the rate is never under 1/L, and close to it.
    assert np.all(rate * largest > 1 - 1e-9)
    assert np.all(rate * largest < 1.1)


def test_auto_solves_least_squares_in_any_units():
    case = CASES["linear"]
    w, (x, t) = case.batch(10)
    for scale in (1e-3, 1.0, 1e3):
        out = gdjax.minimize(case.loss, w, (x * scale, t), learning_rate="auto", steps=20_000)
        best = np.stack([np.linalg.lstsq(x[i] * scale, t[i], rcond=None)[0] for i in range(10)])
        np.testing.assert_allclose(out.weights, best, rtol=1e-6)


def test_auto_without_curvature_takes_rate_one():
    w, x, t = (np.array([v, v]) for v in (1.0, 2.0, 4.0))
    out = gdjax.minimize(kernel.residual_loss, w, (x, t), learning_rate="auto", steps=1)
    assert out.weights.tolist() == [3.0, 3.0]


class Pair(NamedTuple):
    init: object
    update: object


def heavy_ball(rate, beta):
    def init(w):
        return jax.tree.map(jnp.zeros_like, w)

    def update(g, v, w):
        v = jax.tree.map(lambda a, b: jnp.asarray(beta, a.dtype) * a - jnp.asarray(rate, b.dtype) * b, v, g)
        return v, v

    return Pair(init, update)


def test_any_init_update_pair(scalars):
    w, x, t = scalars
    out = gdjax.minimize(kernel.squared_loss, w, (x, t), optimizer=heavy_ball(0.05, 0.8), steps=30)
    v = np.zeros(50)
    for _ in range(30):
        v = 0.8 * v + 0.05 * x * (t - x * w)
        w = w + v
    np.testing.assert_allclose(out.weights, w, rtol=1e-11)


def test_a_function_that_makes_a_pair_from_hyperparameters(scalars):
    w, x, t = scalars
    beta = np.linspace(0, 0.9, 50)
    out = gdjax.minimize(
        kernel.squared_loss, w, (x, t), optimizer=heavy_ball, hyperparams={"rate": 0.05, "beta": beta}, steps=10
    )
    for i in (0, 49):
        one = gdjax.minimize(
            kernel.squared_loss, *pick((w, (x, t)), [i]), optimizer=heavy_ball(0.05, beta[i]), steps=10
        )
        np.testing.assert_allclose(out.weights[i], one.weights[0], rtol=1e-12)


def test_a_pair_may_ask_for_the_loss_by_name(scalars):
    """optax's extra arguments, also where `update` names the one it wants."""
    w, x, t = scalars

    def update(g, state, w, *, value):
        return jax.tree.map(lambda leaf: -jnp.asarray(0.01, leaf.dtype) * jnp.sign(leaf) * value, g), state

    out = gdjax.minimize(kernel.squared_loss, w, (x, t), optimizer=Pair(lambda w: (), update), steps=1)
    value, g = 0.5 * (t - x * w) ** 2, -x * (t - x * w)
    np.testing.assert_allclose(out.weights, w - 0.01 * np.sign(g) * value, rtol=1e-12)


def test_the_hundredfold_grid_of_rates_and_starts():
    function = FUNCTIONS["booth"]
    rates = np.tile(np.geomspace(1e-4, 1e-1, 10), 10)
    starts = np.repeat(function.starts(10), 10, axis=0)
    out = gdjax.minimize(function.loss, starts, learning_rate=rates, steps=400)
    # Booth's curvatures are 2 and 18: descent is stable below 2/18 and at its best rate it is there.
    best = np.asarray(out.loss).reshape(10, 10)
    assert np.all(best[:, -1] < 1e-12)
    assert np.all(np.diff(best, axis=1) <= 1e-24)
