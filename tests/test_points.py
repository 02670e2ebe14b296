"""Kernels in registers whose data stays in memory, interpreted: the bits of lanes, whatever the batch."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from long_sums import COUNT, centred, columns, linear, logistic, network, own_counts, own_points, solve, worst
from problems import answers, same_bits

import gdjax
from gdjax import Plan, stop
from gdjax.engine import machine, points
from gdjax.engine.evaluator import UnsupportedError

REGISTERS = Plan("registers", 128)
POINTS = 16 * points.MOST_POINTS + 331  # no multiple of any number of points at a time
RULE = stop.gradient_below(0.2) | stop.loss_change_below(1e-4)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        *((loss, {}) for loss in (linear, own_counts, own_points, columns, worst)),
        (network, {"optimizer": optax.adam(0.05), "learning_rate": None}),
        (logistic, {"stop": RULE}),
        (own_points, {"learning_rate": "auto"}),
    ],
)
def test_the_bits_are_those_of_lanes(loss, options):
    """(Of centred errors XLA makes other products in loops.)"""
    kernel = solve(loss, POINTS, REGISTERS, **options)
    lanes = solve(loss, POINTS, **options)
    assert (kernel.plan.kernel, kernel.plan.reason) == ("registers", "")
    if loss in (linear, own_points) and lanes.plan.kernel == "lanes":
        assert same_bits(answers(kernel), answers(lanes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), kernel.weights, lanes.weights)
    np.testing.assert_allclose(kernel.loss, lanes.loss, rtol=1e-5)
    np.testing.assert_array_equal(kernel.steps, lanes.steps)
    np.testing.assert_array_equal(kernel.status, lanes.status)


@pytest.mark.parametrize(("loss", "rule"), [(linear, None), (own_points, RULE), (centred, None)])
def test_a_problem_alone_gets_the_bits_it_gets_in_the_batch(loss, rule):
    whole = solve(loss, POINTS, REGISTERS, stop=rule)
    for index in (0, COUNT - 1):
        alone = solve(loss, POINTS, REGISTERS, which=slice(index, index + 1), stop=rule)
        assert alone.plan.kernel == "registers"
        assert same_bits(answers(alone), jax.tree.map(lambda a, index=index: a[index : index + 1], answers(whole)))


def test_problems_that_diverge_keep_their_last_finite_weights():
    kernel, lanes = (solve(own_points, POINTS, plan, learning_rate=50.0, steps=60) for plan in (REGISTERS, "auto"))
    assert kernel.plan.kernel == "registers"
    assert set(np.asarray(kernel.status)) == {gdjax.Status.DIVERGED}
    assert np.isfinite(kernel.weights).all()
    np.testing.assert_array_equal(kernel.steps, lanes.steps)


def test_registers_hold_a_small_problem_as_a_whole():
    shape = lambda *s: jax.ShapeDtypeStruct(s, np.float32)  # noqa: E731
    assert machine.long_axis((shape(4), shape()), (shape(16, 4), shape(16)), 1e4) is None
    assert machine.long_axis((shape(8), shape()), (shape(32, 8), shape(32)), 1000) is None
    assert machine.long_axis((shape(8), shape()), (shape(32, 8), shape(32)), 3000) == 32
    assert machine.long_axis((shape(4), shape()), (shape(300, 4), shape(300)), 1) == 300
    assert machine.long_axis((shape(64), shape()), (shape(200, 64), shape(200)), 1) == 200
    with pytest.raises(UnsupportedError, match="whatever stays in memory"):
        machine.long_axis((shape(161), shape()), (shape(300, 161),), 1)


def test_fewer_points_at_a_time_where_each_is_much():
    assert points.at_a_time([(300, 4), (300,)], 300) == points.MOST_POINTS
    assert points.at_a_time([(1000, 24), (1000,)], 1000) == 5
    assert points.at_a_time([(10, 300)], 10) == 1


def running(w, x):
    """Sums up to every point: along the long axis, but no sum over it."""
    return jnp.mean(jnp.cumsum(x @ w) ** 2)


def ranked(w, x):
    """Points that count by their place."""
    return jnp.mean(jnp.arange(x.shape[0], dtype=x.dtype) * (x @ w) ** 2)


@pytest.mark.parametrize(("loss", "fragment"), [(running, "cumsum"), (ranked, "constants that differ")])
def test_what_is_no_sum_over_points_falls_back(loss, fragment, caplog):
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(40, 3)).astype(np.float32), rng.normal(size=(40, 211, 3)).astype(np.float32)
    options = {"learning_rate": 1e-5, "steps": 2, "device": "cpu"}
    with caplog.at_level(logging.INFO, "gdjax"):
        out = gdjax.minimize(loss, w, (x,), plan=REGISTERS, **options)
    assert out.plan.kernel != "registers"
    assert any(fragment in record.message for record in caplog.records)
    plain = gdjax.minimize(loss, w, (x,), **options)
    np.testing.assert_allclose(out.weights, plain.weights, rtol=1e-5)
