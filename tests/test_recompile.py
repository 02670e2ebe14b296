"""A second call with the same kind of problem compiles nothing and does not trace the loss again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import compilations

import gdjax
from gdjax import kernel, stop


def batch(count, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=count).astype(dtype) for _ in range(3))


@pytest.fixture
def counted():
    """A fresh squared loss that counts how often it is traced."""

    def loss(w, x, t):
        loss.calls += 1
        return kernel.squared_loss(w, x, t)

    loss.calls = 0
    return loss


def solve(loss, count, dtype=np.float32, seed=0, **options):
    w, x, t = batch(count, dtype, seed)
    if "optimizer" not in options:
        options = {"learning_rate": 0.1, **options}
    return gdjax.minimize(loss, w, (x, t), **{"steps": 20, **options})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", [None, stop.gradient_below(1e-3)], ids=["all steps", "stop rule"])
def test_same_shapes_other_numbers(counted, rule, dtype):
    with compilations() as first:
        solve(counted, 100, dtype, stop=rule)
    assert first  # the counter does count
    assert counted.calls > 0
    calls = counted.calls
    with compilations() as second:
        out = solve(counted, 100, dtype, seed=1, stop=rule)
    assert second == []
    assert counted.calls == calls
    assert not np.array_equal(out.weights, solve(counted, 100, dtype, stop=rule).weights)


@pytest.mark.parametrize("rule", [None, stop.gradient_below(1e-3)], ids=["all steps", "stop rule"])
def test_another_number_of_problems_of_the_same_class(counted, rule):
    solve(counted, 200, stop=rule)
    solve(counted, 3000, stop=rule)
    calls = counted.calls
    with compilations() as compiled:
        for count in (1, 7, 256, 199, 2999, 3500):
            solve(counted, count, stop=rule)
    assert compiled == []
    assert counted.calls == calls


def test_other_steps_rates_and_tolerances_of_the_same_rule(counted):
    solve(counted, 50)
    calls = counted.calls
    with compilations() as compiled:
        for options in ({"steps": 1}, {"steps": 33}, {"learning_rate": 0.37}, {"learning_rate": np.float64(0.2)}):
            solve(counted, 50, **options)
    assert compiled == []
    assert counted.calls == calls
    rates = np.full(50, 0.1)
    solve(counted, 50, learning_rate=rates)
    with compilations() as compiled:
        solve(counted, 50, learning_rate=2 * rates)
    assert compiled == []


def test_the_same_stop_rule_made_anew(counted):
    solve(counted, 50, stop=stop.gradient_below(1e-3) | stop.loss_below(1e-6))
    with compilations() as compiled:
        solve(counted, 50, stop=stop.gradient_below(1e-3) | stop.loss_below(1e-6))
    assert compiled == []


def test_optax_with_other_hyperparameters(counted):
    with jax.numpy_dtype_promotion("standard"):
        options = {"optimizer": optax.adam, "hyperparams": {"learning_rate": np.full(50, 0.1)}}
        solve(counted, 50, **options)
        calls = counted.calls
        options["hyperparams"] = {"learning_rate": np.full(50, 0.2)}
        with compilations() as compiled:
            solve(counted, 50, **options)
    assert compiled == []
    assert counted.calls == calls


def test_going_on_again_and_again(counted):
    out = solve(counted, 50)
    x, t = batch(50)[1:]
    options = {"learning_rate": 0.1, "steps": 5}
    out = gdjax.minimize(counted, out.weights, (x, t), resume=out.state, **options)
    calls = counted.calls
    with compilations() as compiled:
        for _ in range(3):
            out = gdjax.minimize(counted, out.weights, (x, t), resume=out.state, **options)
    assert compiled == []
    assert counted.calls == calls
    assert int(out.steps[0]) == 40


def test_a_broken_problem_costs_its_replay_once(counted):
    w, x, t = batch(50)
    t[3] = np.nan
    gdjax.minimize(counted, w, (x, t), learning_rate=0.1, steps=20)
    with compilations() as compiled:
        gdjax.minimize(counted, w, (x, t), learning_rate=0.1, steps=20)
    assert compiled == []


def test_a_loss_made_by_a_factory_is_compiled_once_per_loss():
    def make(target):
        return lambda w: jnp.square(w - target)

    first = make(1.0)
    w = np.zeros(5, np.float32)
    gdjax.minimize(first, w, learning_rate=0.5, steps=1)
    with compilations() as compiled:
        gdjax.minimize(first, w, learning_rate=0.5, steps=1)
    assert compiled == []
    with compilations() as compiled:
        out = gdjax.minimize(make(2.0), w, learning_rate=0.5, steps=1)
    assert compiled
    assert out.weights.tolist() == [2.0] * 5
