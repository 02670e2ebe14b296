"""`project=`: weights held in a set, `w ← P(w − r·∂l/∂w)`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import answers, pick, same_bits

import gdjax
from gdjax import Plan, stop

COUNT = 300

PROJECTIONS = {
    "not negative": optax.projections.projection_non_negative,
    "box": lambda w: optax.projections.projection_box(w, -0.2, 0.5),
    "simplex": optax.projections.projection_simplex,
}


def squares(w, x, t):
    return 0.5 * jnp.mean(jnp.square(x @ w - t))


def batch(count=COUNT, dtype=np.float64):
    rng = np.random.default_rng(5)
    x, w = rng.normal(size=(COUNT, 12, 3)), rng.normal(size=(COUNT, 3))
    t = np.einsum("npi,i->np", x, np.array([1.0, -1.0, 0.3])) + 0.1 * rng.normal(size=(COUNT, 12))
    return w[:count].astype(dtype), (x[:count].astype(dtype), t[:count].astype(dtype))


def solve(w, data, project, **options):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax relies on it
        return gdjax.minimize(squares, w, data, project=project, **{"learning_rate": 0.2, "steps": 25, **options})


@pytest.mark.parametrize("name", PROJECTIONS)
def test_it_is_projected_gradient_descent(name):
    """Start and every update are projected, as in a loop written by hand."""
    w, data = batch(20, np.float32)
    project = PROJECTIONS[name]

    def one(w, x, t):
        w = project(w)
        for _ in range(4):
            w = project(w - 0.2 * jax.grad(squares)(w, x, t))
        return w

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = jax.vmap(one)(w, *data)
    out = solve(w, data, project, steps=4)
    np.testing.assert_allclose(out.weights, expected, atol=1e-6)
    assert out.plan.kernel == ("vmap" if name == "simplex" else "lanes")


def test_it_finds_the_least_squares_that_are_not_negative():
    """The best of all supports, each solved directly (Lawson and Hanson, Solving Least Squares Problems, 1974)."""
    w, (x, t) = batch(40)
    out = solve(w, (x, t), PROJECTIONS["not negative"], learning_rate="auto", steps=5000, stop=stop.update_below(1e-14))
    assert out.summary()["CONVERGED"] == 40
    for i in range(40):
        losses = [0.5 * np.mean(t[i] ** 2)]
        for size in (1, 2, 3):
            for support in itertools.combinations(range(3), size):
                part, *_ = np.linalg.lstsq(x[i][:, support], t[i], rcond=None)
                if np.all(part >= 0):
                    losses.append(0.5 * np.mean((x[i][:, support] @ part - t[i]) ** 2))
        assert out.loss[i] == pytest.approx(min(losses), rel=1e-10)
    assert np.min(out.weights) == 0.0


def test_the_gradient_does_not_vanish_on_a_bound():
    w, data = batch(40)
    options = {"learning_rate": 0.2, "steps": 2000}
    by_gradient = solve(w, data, PROJECTIONS["not negative"], stop=stop.gradient_below(1e-9), **options)
    by_update = solve(w, data, PROJECTIONS["not negative"], stop=stop.update_below(1e-12), **options)
    on_bound = np.any(np.asarray(by_update.weights) == 0, axis=1)
    assert on_bound.any()
    assert by_update.summary()["CONVERGED"] == 40
    assert not np.any(np.asarray(by_gradient.status)[on_bound] == gdjax.Status.CONVERGED)


@pytest.mark.parametrize(
    ("name", "rule"),
    [("box", None), ("simplex", None), ("simplex", stop.update_below(1e-4))],
    ids=["box", "simplex", "simplex, stop rule"],
)
def test_same_bits_in_any_batch_and_cut_into_runs(name, rule):
    w, data = batch(COUNT, np.float32)
    whole = solve(w, data, PROJECTIONS[name], stop=rule)
    for which in (np.array([7]), np.arange(40, 107), np.arange(COUNT)[::-1]):
        assert same_bits(
            answers(solve(*pick((w, data), which), PROJECTIONS[name], stop=rule)), pick(answers(whole), which)
        )
    first = solve(w, data, PROJECTIONS[name], stop=rule, steps=10)
    rest = solve(first.weights, data, PROJECTIONS[name], stop=rule, steps=15, resume=first.state)
    assert same_bits(answers(rest), answers(whole))
    if name == "box":
        plan = Plan(kernel="lanes", tile=32, tiles=4, chunk=4)
        assert same_bits(answers(solve(w, data, PROJECTIONS[name], stop=rule, plan=plan)), answers(whole))


def test_a_problem_that_breaks_ends_inside_the_set():
    w, (x, t) = batch(5)
    t[2] = np.inf
    out = solve(w, (x, t), PROJECTIONS["box"])
    assert list(out.status) == [0, 0, gdjax.Status.DIVERGED, 0, 0]
    np.testing.assert_array_equal(out.weights[2], np.clip(w[2], -0.2, 0.5))
    assert out.steps[2] == 0


def test_an_optimizer_and_a_pytree():
    w, data = batch(10, np.float32)
    loss = lambda p, x, t: squares(p["slope"], x, t - p["base"])  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):
        out = gdjax.minimize(
            loss,
            {"slope": w, "base": w[:, 0]},
            data,
            optimizer=optax.adam(0.05),
            project=lambda p: {"slope": jnp.clip(p["slope"], -0.1, 0.1), "base": p["base"]},
            steps=300,
        )
    assert np.abs(out.weights["slope"]).max() == np.float32(0.1)
    assert np.abs(out.weights["base"]).max() > 0.1


@pytest.mark.parametrize(
    ("project", "error", "fragments"),
    [
        ("box", TypeError, ["project is a str", "optax.projections"]),
        (jnp.sum, ValueError, ["project", "float32[3]", "float32[]"]),
        (lambda w: (w, w), ValueError, ["project", "structure"]),
        (lambda w: w.astype(jnp.int32), ValueError, ["project", "int32[3]"]),
        (lambda w: w["slope"], ValueError, ["project raised"]),
    ],
    ids=["text", "another shape", "another structure", "another dtype", "raises"],
)
def test_bad_projections_are_named(project, error, fragments):
    with pytest.raises(error) as raised:
        gdjax.minimize(squares, *batch(4, np.float32), project=project, learning_rate=0.1, steps=3)
    assert all(fragment in str(raised.value) for fragment in fragments)


def test_a_projection_that_turns_nan_into_numbers_wakes_nobody():
    """What ends a problem is marked as NaN for some steps; the gradient of the residual does not notice."""

    def positive(w):
        return jnp.where(w > 0, w, jnp.zeros_like(w))

    w, x, t = np.ones(40, np.float32), np.full(40, 2, np.float32), np.linspace(3, 9, 40, dtype=np.float32)
    options = {"learning_rate": 0.01, "project": positive, "stop": gdjax.stop.loss_below(0.5)}
    out = gdjax.minimize(gdjax.kernel.residual_loss, w, (x, t), steps=400, **options)
    assert out.summary()["CONVERGED"] == 40
    steps = np.ceil((t - 2 * 1 - 0.5) / (0.01 * 2 * 2))
    assert np.abs(np.asarray(out.steps) - steps).max() <= 1
    one_by_one = gdjax.minimize(gdjax.kernel.residual_loss, w, (x, t), steps=1, **options)
    for _ in range(399):
        one_by_one = gdjax.minimize(
            gdjax.kernel.residual_loss, one_by_one.weights, (x, t), steps=1, resume=one_by_one.state, **options
        )
    np.testing.assert_array_equal(np.asarray(out.weights), np.asarray(one_by_one.weights))
