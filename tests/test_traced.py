"""`minimize` inside `jit`, `vmap` and `grad` of the user's own code, and its derivatives.

Losses, data and expectations in float64: run under `jax.enable_x64`, since inside a trace there is no other float64.
"""

import csv
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import CASES, answers, same_bits

import gdjax
from gdjax import Status, stop

RIDGE = 0.3


@pytest.fixture
def _wide():
    with jax.enable_x64(True):
        yield


wide = pytest.mark.usefixtures("_wide")


def ridge(w, x, t, strength):
    """Its minimum is `(xᵀx/n + strength)⁻¹ xᵀt/n`."""
    return 0.5 * jnp.mean(jnp.square(x @ w - t)) + 0.5 * strength * jnp.sum(jnp.square(w))


def ridge_minimum(x, t, strength):
    count, width = x.shape
    return jnp.linalg.solve(x.T @ x / count + strength * jnp.eye(width), x.T @ t / count)


def trends():
    """Life expectancy over years in ten countries (Gapminder), both standardised: `x [10, 12, 2]`, `t [10, 12]`."""
    path = pathlib.Path(gdjax.__file__).parent / "data" / "gapminder.csv"
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[: 10 * 12]
    values = np.array([[float(row["year"]), float(row["lifeExp"])] for row in rows]).reshape(10, 12, 2)
    values = (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)
    x, t = np.ones((10, 12, 2)), values[..., 1]
    x[..., 1] = values[..., 0]
    return x, t


def quotients(function, arguments, which, h=1e-5):
    """Central difference quotients of a function of arrays, by some entries of one of them."""
    base = np.asarray(arguments[which], np.float64)
    entries = list(np.ndindex(base.shape))[:: max(1, base.size // 7)]
    out = {}
    for entry in entries:
        sides = []
        for sign in (1, -1):
            moved = base.copy()
            moved[entry] += sign * h
            sides.append(float(function(*arguments[:which], moved, *arguments[which + 1 :])))
        out[entry] = (sides[0] - sides[1]) / (2 * h)
    return out


def assert_derivative(function, arguments, which, derivative, tol=1e-6):
    derivative = np.asarray(derivative)
    for entry, quotient in quotients(function, arguments, which).items():
        assert derivative[entry] == pytest.approx(quotient, rel=tol, abs=tol)


# --- the same answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 30},
        {"steps": 200, "stop": stop.gradient_below(1e-2) | stop.loss_change_below(1e-6)},
        {"steps": 30, "record": 4},
    ],
    ids=["fixed", "stop", "record"],
)
def test_jit_gives_what_a_call_outside_gives(options):
    w, data = CASES["linear"].batch(100, np.float32)
    rates = np.full(100, 0.1, np.float32)
    rates[7] = 1e6
    solve = lambda w, data, rates: gdjax.minimize(CASES["linear"].loss, w, data, learning_rate=rates, **options)  # noqa: E731
    inside, outside = jax.jit(solve)(w, data, rates), solve(w, data, rates)
    assert inside.summary() == outside.summary()
    assert inside.summary()["DIVERGED"] == 1
    for name in ("weights", "loss", "gradient_norm", "record"):
        a, b = getattr(inside, name), getattr(outside, name)
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    assert same_bits((inside.status, inside.steps), (outside.status, outside.steps))
    assert inside.device == "traced"


def test_vmap_over_one_more_axis():
    w, (x, t) = CASES["linear"].batch(6, np.float32)
    solve = lambda x, rate: gdjax.minimize(CASES["linear"].loss, w, (x, t), learning_rate=rate, steps=9)  # noqa: E731
    xs, rates = np.stack([x, 2 * x, -x]), np.array([0.1, 0.01, 0.2], np.float32)
    whole = jax.vmap(solve)(xs, rates)
    assert whole.weights.shape == (3, 6, 3)
    for i in range(3):
        np.testing.assert_allclose(whole.weights[i], solve(xs[i], rates[i]).weights, rtol=1e-5, atol=1e-6)


def test_a_run_is_resumed_across_the_border_of_jit():
    w, data = CASES["linear"].batch(40, np.float32)
    options = {"learning_rate": 0.1, "stop": stop.loss_change_below(1e-3)}
    loss = CASES["linear"].loss
    whole = gdjax.minimize(loss, w, data, steps=20, **options)
    first = jax.jit(lambda w: gdjax.minimize(loss, w, data, steps=8, **options))(w)
    go_on = lambda s: gdjax.minimize(loss, s.weights, data, steps=12, resume=s.state, **options)  # noqa: E731
    for last in (go_on(first), jax.jit(go_on)(first)):
        assert same_bits((last.status, last.steps), (whole.status, whole.steps))
        np.testing.assert_allclose(last.weights, whole.weights, rtol=1e-5, atol=1e-6)


def test_what_is_not_traced_runs_as_outside():
    """And gives its bits, while something else is being traced."""
    w, data = CASES["linear"].batch(5, np.float32)
    solve = lambda: answers(gdjax.minimize(CASES["linear"].loss, w, data, learning_rate=0.1, steps=5))  # noqa: E731
    assert same_bits(jax.jit(lambda number: (number, solve()))(1.0)[1], solve())


def test_random_weights_of_a_traced_key():
    draw = lambda key: gdjax.random_weights(key, (3,), 4)  # noqa: E731
    keys = jax.random.split(jax.random.key(3), 2)
    np.testing.assert_array_equal(jax.vmap(draw)(keys)[1], draw(keys[1]))


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"data": (np.ones((4, 5, 3)), np.ones((4, 5), np.float32))}, ["data[0] is float64", "jax_enable_x64"]),
        ({"dtype": "float64"}, ["float64", "jax_enable_x64"]),
        ({"data": (np.ones((9, 5, 3), np.float32), np.ones((4, 5), np.float32))}, ["4 problems", "data[0] has 9"]),
        ({"device": "cpu"}, ["device='cpu'", "leave it out"]),
        ({"plan": "measure"}, ["plan='measure'", "leave it out"]),
        ({"progress": True}, ["progress", "leave it out"]),
        ({"callback": print}, ["callback", "leave it out"]),
    ],
    ids=["float64 data", "float64 wanted", "lengths", "device", "measure", "progress", "callback"],
)
def test_bad_input_inside_jit_is_named(changes, fragments):
    arguments = {"data": (np.ones((4, 5, 3), np.float32), np.ones((4, 5), np.float32)), "learning_rate": 0.1, **changes}
    with pytest.raises(ValueError) as raised:
        jax.jit(lambda w: gdjax.minimize(CASES["linear"].loss, w, steps=3, **arguments).loss)(
            np.ones((4, 3), np.float32)
        )
    assert all(fragment in str(raised.value) for fragment in fragments)


# --- derivatives through the steps -----------------------------------------------------------------------------------


@wide
def test_gradients_through_steps_equal_difference_quotients():
    """With respect to start weights, data, a hyperparameter in the loss and the rates; inside jit, and eagerly."""
    x, t = trends()
    rng = np.random.default_rng(0)
    arguments = rng.normal(size=(10, 2)), x, t, np.full(10, RIDGE), np.linspace(0.05, 0.5, 10)

    @jax.jit
    def outer(w, x, t, strength, rates):
        solution = gdjax.minimize(ridge, w, (x, t, strength), learning_rate=rates, steps=13)
        return jnp.sum(jnp.sin(solution.weights)) + jnp.sum(solution.loss)

    derivatives = jax.jit(jax.grad(outer, argnums=(0, 1, 2, 3, 4)))(*arguments)
    for which, derivative in enumerate(derivatives):
        assert_derivative(outer, arguments, which, derivative)
    directions = tuple(rng.normal(size=np.shape(a)) for a in arguments)
    along = jax.jvp(outer, arguments, directions)[1]
    against = sum(jnp.vdot(a, b) for a, b in zip(derivatives, directions, strict=True))
    assert float(along) == pytest.approx(float(against), rel=1e-12)


@wide
@pytest.mark.parametrize(
    "rule", ["adam", "schedule", "projected", "by vmap", pytest.param("auto", marks=pytest.mark.slow)]
)
def test_gradients_through_steps_of_every_rule(rule):
    """With respect to a scalar that the rule, the loss or the projection closes over; NumPy weights and data."""
    x, t = trends()
    w = np.random.default_rng(1).normal(size=(10, 2))

    def options(value):
        if rule == "adam":
            return {"optimizer": optax.adam, "hyperparams": {"learning_rate": value}}
        if rule == "schedule":
            return {"learning_rate": lambda index: value / (1 + index.astype(jnp.float64))}
        if rule == "projected":
            return {"learning_rate": 0.1, "project": lambda w: jnp.minimum(w, value)}
        return {"learning_rate": "auto"}

    def loss(w, x, t, value):
        kept = value if rule in ("auto", "by vmap") else jnp.float64(RIDGE)
        return ridge(jnp.sort(w) if rule == "by vmap" else w, x, t, kept)

    @jax.jit
    def outer(value):
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            solution = gdjax.minimize(lambda w, x, t: loss(w, x, t, value), w, (x, t), steps=7, **options(value))
        assert solution.plan.kernel == ("vmap" if rule == "by vmap" else "lanes")
        return jnp.sum(jnp.square(solution.weights))

    value = 0.2
    assert_derivative(outer, (value,), 0, jax.grad(outer)(value))


def shrunk(strength):
    """Squares of the weights after a few steps, over the ridge strength."""
    x, t = trends()
    loss = lambda w, x, t: ridge(w, x, t, strength)  # noqa: E731
    solution = gdjax.minimize(loss, np.zeros((10, 2)), (x, t), learning_rate=0.3, steps=6)
    return jnp.sum(jnp.square(solution.weights))


@wide
def test_vmap_of_gradients_through_steps():
    strengths = jnp.array([0.1, 0.5])
    slopes = jax.jit(jax.vmap(jax.grad(shrunk)))(strengths)
    for strength, slope in zip(strengths, slopes, strict=True):
        assert_derivative(jax.jit(shrunk), (strength,), 0, slope)


@wide
@pytest.mark.slow
def test_second_derivatives_through_steps():
    assert_derivative(jax.jit(jax.grad(shrunk)), (0.1,), 0, jax.jit(jax.grad(jax.grad(shrunk)))(0.1))


@wide
def test_memory_grows_with_the_root_of_the_steps():
    """Of a loss whose curvature changes along the way: derivatives need every state again."""
    x, t = trends()
    loss = lambda w, x, t: jnp.mean(jnp.log(jnp.cosh(x @ w - t)))  # noqa: E731

    def needed(steps):
        def outer(w):
            return jnp.sum(gdjax.minimize(loss, w, (x, t), learning_rate=0.1, steps=steps).weights)

        compiled = jax.jit(jax.grad(outer)).lower(np.zeros((10, 2))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = needed(100), needed(10_000)
    state = 10 * 2 * 8
    assert many - few < 4 * 100 * state  # all states would be 10,000 of them


# --- derivatives at a minimum ----------------------------------------------------------------------------------------


@wide
@pytest.mark.parametrize("width", [2, 70], ids=["solved directly", "by conjugate gradients"])
def test_implicit_gradients_equal_the_closed_form_of_ridge(width):
    x, t = trends()
    if width > 2:
        x, t = np.random.default_rng(2).normal(size=(2, 3, width)), np.random.default_rng(3).normal(size=(2, 3))
    arguments = x, t, np.linspace(0.6, 0.9, len(x))

    def outer(x, t, strength):
        options = {"learning_rate": "auto", "steps": 20_000, "stop": stop.gradient_below(1e-13)}
        solution = gdjax.minimize(ridge, np.zeros((len(x), width)), (x, t, strength), **options)
        return jnp.sum(jnp.sin(solution.weights)) + jnp.sum(solution.loss)

    def exact(x, t, strength):
        w = jax.vmap(ridge_minimum)(x, t, strength)
        return jnp.sum(jnp.sin(w)) + jnp.sum(jax.vmap(ridge)(w, x, t, strength))

    implicit = jax.jit(jax.grad(outer, argnums=(0, 1, 2)))(*arguments)
    for ours, closed in zip(implicit, jax.grad(exact, argnums=(0, 1, 2))(*arguments), strict=True):
        np.testing.assert_allclose(ours, closed, rtol=1e-8, atol=1e-8)


def held_back():
    """`(outer, exact)`: the error on points held back over the ridge strength, by gdjax and in closed form."""
    x, t = trends()
    train, check = (x[:, ::2], t[:, ::2]), (x[:, 1::2], t[:, 1::2])

    def error(w):
        return jnp.mean(jnp.square(jnp.einsum("npi,ni->np", check[0], w) - check[1]))

    def outer(strength):
        loss = lambda w, x, t: ridge(w, x, t, strength)  # noqa: E731
        options = {"learning_rate": "auto", "steps": 5000, "stop": stop.gradient_below(1e-13)}
        return error(gdjax.minimize(loss, np.zeros((10, 2)), train, **options).weights)

    def exact(strength):
        return error(jax.vmap(ridge_minimum, (0, 0, None))(*train, strength))

    return outer, exact


@wide
def test_a_hyperparameter_that_the_loss_closes_over():
    """All else is NumPy: eagerly, and under jit and vmap."""
    outer, exact = held_back()
    assert float(jax.grad(outer)(RIDGE)) == pytest.approx(float(jax.grad(exact)(RIDGE)), abs=1e-8)
    strengths = jnp.array([0.1, 0.5])
    both = jax.jit(jax.vmap(jax.grad(outer)))(strengths)
    np.testing.assert_allclose(both, jax.vmap(jax.grad(exact))(strengths), atol=1e-8)


@wide
@pytest.mark.slow
def test_second_implicit_derivatives():
    outer, exact = held_back()
    expected = float(jax.hessian(exact)(RIDGE))
    for derivative in (jax.hessian(outer), jax.grad(jax.grad(outer))):
        assert float(jax.jit(derivative)(RIDGE)) == pytest.approx(expected, abs=1e-7)


@wide
def test_implicit_gradients_on_a_bound():
    """A weight on its bound stays there; the others move as if it were a constant."""
    rng = np.random.default_rng(4)
    x, w = rng.normal(size=(20, 3)), np.ones((1, 3))
    t = x @ np.array([1.0, -1.0, 0.5])

    def outer(t):
        options = {"learning_rate": "auto", "steps": 5000, "stop": stop.update_below(1e-15)}
        return gdjax.minimize(
            ridge, w, (x[None], t[None], np.full(1, 0.1)), project=lambda w: jnp.maximum(w, 0.2), **options
        ).weights[0]

    def exact(t):
        free = ridge_minimum(x[:, [0, 2]], t - 0.2 * x[:, 1], 0.1)
        return jnp.array([free[0], 0.2, free[1]])

    np.testing.assert_allclose(jax.jit(outer)(t), exact(t), atol=1e-9)
    np.testing.assert_allclose(jax.jit(jax.jacrev(outer))(t), jax.jacrev(exact)(t), atol=1e-8)


# --- problems that diverge -------------------------------------------------------------------------------------------


@wide
@pytest.mark.parametrize("rule", [None, stop.gradient_below(1e-9)], ids=["through steps", "implicit"])
def test_a_diverging_problem_takes_no_part_in_derivatives(rule):
    x, t = trends()
    rates = np.full(10, 0.1)
    rates[4] = 1e5
    broken = x.copy()
    broken[6, 0, 0] = np.nan
    healthy = np.array([i for i in range(10) if i not in (4, 6)])

    def outer(x, strength, which):
        loss = lambda w, x, t: ridge(w, x, t, strength)  # noqa: E731
        data = x[which], t[which]
        solution = gdjax.minimize(
            loss, np.ones((len(which), 2)), data, learning_rate=rates[which], steps=900, stop=rule
        )
        ended = solution.status != Status.DIVERGED
        return jnp.sum(jnp.where(ended[:, None], jnp.square(solution.weights), 0)), solution.status

    slope = jax.grad(outer, argnums=(0, 1), has_aux=True)
    (all_x, shared), status = slope(broken, RIDGE, np.arange(10))
    (some_x, expected), _ = slope(broken, RIDGE, healthy)
    assert [int(i) for i in np.flatnonzero(status == Status.DIVERGED)] == [4, 6]
    assert float(shared) == pytest.approx(float(expected), rel=1e-9)
    np.testing.assert_allclose(all_x[healthy], some_x[healthy], rtol=1e-9, atol=1e-12)
    assert not np.any(all_x[np.array([4, 6])])


@pytest.mark.parametrize(
    ("function", "fragments"),
    [
        (lambda n: call(steps=n), ["steps=", "static_argnums"]),
        (lambda tol: call(stop=stop.loss_below(tol)), ["tol=", "lambda step"]),
        (lambda rate: call(learning_rate=rate).summary(), ["being traced"]),
    ],
    ids=["steps", "tolerance", "summary"],
)
def test_what_must_be_known_is_named(function, fragments):
    with pytest.raises((TypeError, ValueError)) as raised:
        jax.jit(function)(0.1)
    assert all(fragment in str(raised.value) for fragment in fragments)


def test_a_list_of_traced_rates():
    rates = lambda rate: call(learning_rate=[rate, 2 * rate]).weights  # noqa: E731
    np.testing.assert_array_equal(jax.jit(rates)(0.1), call(learning_rate=np.array([0.1, 0.2], np.float32)).weights)


def call(**changes):
    w, data = CASES["squared"].batch(2, np.float32)
    options = {"learning_rate": 0.1, "steps": 3, **changes}
    return gdjax.minimize(CASES["squared"].loss, w, data, **options)
