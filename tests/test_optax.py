"""optax's rules through `minimize` against optax in its own Python loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import FUNCTIONS, pick, same_bits, softmax_batch, softmax_regression

import gdjax

STEPS = (1, 2, 10, 60)

RULES = {
    "descent": lambda r: optax.sgd(r),
    "momentum": lambda r: optax.sgd(r, momentum=0.9),
    "nesterov": lambda r: optax.sgd(r, momentum=0.9, nesterov=True),
    "adam": lambda r: optax.adam(r),
    "adamw": lambda r: optax.adamw(r, weight_decay=0.01),
    # With the eps of 1e-8 it takes full steps on gradients that are rounding noise: no two programs agree there.
    "rmsprop": lambda r: optax.rmsprop(r, eps=1e-3),
}
ADAPTIVE = {"adam", "adamw", "rmsprop"}


@pytest.fixture(autouse=True)
def _optax_promotes():
    """optax itself relies on JAX's standard promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def problem(name, count):
    """`(loss, start weights, data, rate)` of a batch in float64."""
    if name == "softmax":
        weights, data = softmax_batch(count)
        return softmax_regression, weights, data, 0.1
    function = FUNCTIONS[name]
    return function.loss, function.starts(count), (), function.rate


def own_loop(optimizer, loss, weights, data, steps):
    """optax in a Python loop, one compiled step for all problems: the weights after each number of `steps`."""
    seen = []
    with jax.enable_x64(True):
        state = jax.vmap(optimizer.init)(weights)

        @jax.jit
        @jax.vmap
        def step(weights, state, data):
            moves, state = optimizer.update(jax.grad(loss)(weights, *data), state, weights)
            return optax.apply_updates(weights, moves), state

        for index in range(max(steps)):
            weights, state = step(weights, state, data)
            if index + 1 in steps:
                seen.append(jax.tree.map(np.asarray, weights))
    return seen


def assert_close(ours, theirs, tol=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tol, atol=tol), ours, theirs)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [*FUNCTIONS, "softmax"])
def test_same_trajectory_as_optax_in_its_own_loop(name, rule):
    loss, weights, data, rate = problem(name, 1000)
    optimizer = RULES[rule](2e-3 if rule in ADAPTIVE else 0.1 * rate)
    expected = own_loop(optimizer, loss, weights, data, STEPS)
    for steps, wanted in zip(STEPS, expected, strict=True):
        out = gdjax.minimize(loss, weights, data, optimizer=optimizer, steps=steps)
        assert_close(out.weights, wanted)
        assert out.summary()["RAN_ALL_STEPS"] == 1000
        assert jax.tree.leaves(out.weights)[0].dtype == np.float64
    first = slice(0, 1)
    single = gdjax.minimize(loss, pick(weights, first), pick(data, first), optimizer=optimizer, steps=STEPS[-1])
    assert_close(single.weights, pick(expected[-1], first))


@pytest.mark.parametrize("rule", [optax.adam, optax.rmsprop, optax.sgd])
def test_hyperparameters_per_problem(rule):
    """One call with [N] rates equals one call per rate."""
    function = FUNCTIONS["beale"]
    starts = function.starts(12)
    rates = np.geomspace(1e-4, 3e-3, 12)
    out = gdjax.minimize(function.loss, starts, optimizer=rule, hyperparams={"learning_rate": rates}, steps=40)
    for i in (0, 5, 11):
        (expected,) = own_loop(rule(rates[i]), function.loss, starts[i : i + 1], (), (40,))
        assert_close(out.weights[i : i + 1], expected)


def test_several_hyperparameters_scalar_and_per_problem():
    function = FUNCTIONS["booth"]
    starts = function.starts(6)
    b1 = np.linspace(0.5, 0.95, 6)
    hyper = {"learning_rate": 0.02, "b1": b1, "eps": np.float64(1e-6)}
    out = gdjax.minimize(function.loss, starts, optimizer=optax.adam, hyperparams=hyper, steps=30)
    for i in range(6):
        (expected,) = own_loop(optax.adam(0.02, b1=b1[i], eps=1e-6), function.loss, starts[i : i + 1], (), (30,))
        assert_close(out.weights[i : i + 1], expected)


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        *((name, None) for name in FUNCTIONS),
        ("rosenbrock", gdjax.stop.gradient_below(1e-9)),
    ],
)
def test_lbfgs_with_its_line_search_solves_a_batch(name, stop):
    function = FUNCTIONS[name]
    starts = function.starts(20)
    out = gdjax.minimize(function.loss, starts, optimizer=optax.lbfgs(), steps=60, stop=stop)
    distance = np.abs(np.asarray(out.weights)[:, None, :] - np.asarray(function.minima)[None]).max(-1).min(-1)
    assert distance.max() < 1e-6
    if stop is not None:
        assert out.summary()["CONVERGED"] == 20
        assert int(out.steps.max()) < 60


def test_lbfgs_solves_a_multiclass_regression():
    loss, weights, data, _ = problem("softmax", 9)
    out = gdjax.minimize(loss, weights, data, optimizer=optax.lbfgs(), steps=60)
    assert float(out.gradient_norm.max()) < 1e-7


@pytest.mark.parametrize("name", ["booth", "matyas", "beale"])
def test_polyak_sgd_gets_the_loss_it_asks_for(name):
    function = FUNCTIONS[name]
    starts = function.starts(10)
    optimizer = optax.polyak_sgd(max_learning_rate=1.0)
    out = gdjax.minimize(function.loss, starts, optimizer=optimizer, steps=25)
    with jax.enable_x64(True):
        step = jax.jit(
            lambda w, s: optimizer.update(jax.grad(function.loss)(w), s, w, value=function.loss(w)),
        )
        for i in (0, 9):
            w, state = jnp.asarray(starts[i]), optimizer.init(jnp.asarray(starts[i]))
            for _ in range(25):
                moves, state = step(w, state)
                w = optax.apply_updates(w, moves)
            np.testing.assert_allclose(out.weights[i], w, rtol=1e-9, atol=1e-9)


def test_schedules_inside_optax():
    function = FUNCTIONS["booth"]
    starts = function.starts(4)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 40))
    out = gdjax.minimize(function.loss, starts, optimizer=optimizer, steps=40)
    assert_close(out.weights, own_loop(optimizer, function.loss, starts, (), (40,))[0])


def test_chains_and_injected_hyperparameters():
    function = FUNCTIONS["himmelblau"]
    starts = function.starts(4)
    for optimizer in (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.02)),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.02),
        optax.apply_if_finite(optax.sgd(1e-3), 3),
    ):
        out = gdjax.minimize(function.loss, starts, optimizer=optimizer, steps=20)
        assert_close(out.weights, own_loop(optimizer, function.loss, starts, (), (20,))[0])


def test_float32_stays_float32():
    function = FUNCTIONS["booth"]
    starts = function.starts(4).astype(np.float32)
    out = gdjax.minimize(function.loss, starts, optimizer=optax.adamw(0.1), steps=5)
    assert out.weights.dtype == out.loss.dtype == out.gradient_norm.dtype == np.float32
    again = gdjax.minimize(function.loss, starts, optimizer=optax.adamw(0.1), steps=5)
    assert same_bits(out.weights, again.weights)
