"""Long sums go through loops in lanes: with the bits of sums written out, whatever the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from long_sums import (
    LANES,
    LOSSES,
    VMAP,
    centred,
    linear,
    logistic,
    network,
    own_counts,
    own_points,
    solve,
    worst,
)
from problems import answers, pick, same_bits

import gdjax
from gdjax import Plan, stop
from gdjax.engine import streamed
from gdjax.engine.kernels import KERNELS

RULE = stop.gradient_below(0.2) | stop.loss_change_below(1e-4)
WRITTEN_OUT = (linear, network, own_counts, own_points, worst)


@pytest.mark.parametrize(("loss", "rule"), [*((loss, None) for loss in WRITTEN_OUT), (logistic, RULE)])
def test_loops_give_the_bits_of_sums_written_out(monkeypatch, loss, rule):
    """(Of centred errors XLA itself makes other products, depending on what it sees of the mean.)"""
    points = 5 * streamed.BLOCK + 5
    in_loops = solve(loss, points, stop=rule, fresh=True)
    monkeypatch.setattr(streamed, "SHORT", 10**9)
    monkeypatch.setattr(streamed, "SHORT_OWN", 10**9)
    written_out = solve(loss, points, stop=rule, fresh=True)
    assert in_loops.plan.kernel == written_out.plan.kernel == "lanes"
    assert same_bits(answers(in_loops), answers(written_out))


@pytest.mark.parametrize(
    ("loss", "optimizer"),
    [*((loss, None) for loss in LOSSES if loss not in WRITTEN_OUT), (network, optax.adam(0.05))],
)
def test_loops_agree_with_vmap(loss, optimizer):
    options = {} if optimizer is None else {"optimizer": optimizer, "learning_rate": None}
    lanes, vmap = (solve(loss, 1003, plan, np.float64, **options) for plan in (LANES, VMAP))
    assert (lanes.plan.kernel, lanes.plan.reason, vmap.plan.kernel) == ("lanes", "", "vmap")
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)  # noqa: E731
    jax.tree.map(compare, lanes.weights, vmap.weights)
    compare(lanes.loss, vmap.loss)
    compare(lanes.gradient_norm, vmap.gradient_norm)


@pytest.mark.parametrize(
    ("loss", "rule"), [(linear, None), (network, None), (own_counts, None), (own_points, None), (centred, RULE)]
)
def test_a_problem_alone_gets_the_same_bits(loss, rule):
    everyone = solve(loss, 1003, stop=rule)
    for which, plan in ((slice(3, 4), LANES), (slice(7, 40), Plan(tile=64)), (slice(44, None), "auto")):
        some = solve(loss, 1003, plan, which=which, stop=rule)
        assert some.plan.kernel == "lanes"
        assert same_bits(answers(some), pick(answers(everyone), which))


def test_terms_are_added_first_to_last():
    """By factors that are powers of two products are exact, so that NumPy can say what every order gives."""
    rng = np.random.default_rng(5)
    x = (rng.normal(size=1003) * 10.0 ** rng.integers(-4, 5, 1003)).astype(np.float32)
    w = (2.0 ** np.arange(-5, 6)).astype(np.float32)

    def summed(terms):
        return np.array([np.add.accumulate(row, dtype=np.float32)[-1] for row in terms])

    forward = summed(w[:, None] * x)
    assert np.mean(summed(w[:, None] * x[::-1]) == forward) < 0.5
    for loss in (lambda w, x: jnp.sum(x * w), lambda w, x: x @ jnp.full(1003, w)):
        out = gdjax.minimize(loss, w, (x,), in_axes=None, learning_rate=0.0, steps=1, plan=LANES)
        assert out.plan.kernel == "lanes"
        assert same_bits(out.loss, forward)


def test_a_zero_and_what_is_not_finite_pass_through():
    x = np.full(300, -0.0, np.float32)
    w = np.array([1, 2, np.nan, 4], np.float32)
    out = gdjax.minimize(lambda w, x: jnp.sum(w * x), w, (x,), in_axes=None, learning_rate=1.0, steps=1, plan=LANES)
    assert same_bits(np.asarray(out.loss)[[0, 1, 3]], np.full(3, -0.0, np.float32))
    assert out.status.tolist() == [0, 0, 2, 0]


@pytest.mark.parametrize("slope", [jax.grad(linear), jax.value_and_grad(linear)], ids=["gradient", "and loss"])
def test_a_point_is_looked_at_once_in_a_step(slope):
    """There and back, a block at a time, and nothing twice, be it for the gradient alone or for a stop rule too."""
    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((16, 64), (1000, 16), (1000,))]

    def tile(w, x, t, zero):
        lanes = KERNELS["lanes"](64)
        lanes.on_host, lanes.zero = True, zero
        return lanes.call(slope, (w, x, t), (True, False, False), carried=1)[0]

    text = jax.jit(tile).lower(*shapes, jax.ShapeDtypeStruct((), np.float32)).compile().as_text()
    once = 16 + streamed.BLOCK
    assert once <= text.count(" multiply(") < 1.5 * once
    # And no loop holds both ways: it would go there anew for every weight on the way back.
    loops = [part.count(" multiply(") for part in text.split("\n}\n")]
    assert max(loops) <= max(streamed.GROUP, streamed.BLOCK) + 2


def sorting(w, x, t):
    return jnp.mean(jnp.sort(x @ w - t) ** 2)


def all_pairs(w, x, t):
    error = x @ w - t
    return jnp.mean((error[:, None] - error[None]) ** 2)


def some_points(w, x, t):
    return jnp.mean((x @ w - t)[10:] ** 2)


def scanning(w, x, t):
    last, before = jax.lax.scan(lambda total, e: (total + e, total), jnp.float32(0), x @ w - t)
    return jnp.mean(before**2) + last**2


def printing(w, x, t):
    jax.debug.callback(lambda value: None, w[0])
    return linear(w, x, t)


@pytest.mark.parametrize(
    ("loss", "weights", "fragment"),
    [
        (scanning, 3, "operation 'scan'"),
        (printing, 3, "an effect beside"),
        (sorting, 3, "operation 'sort'"),
        (all_pairs, 3, "several axes of length 300"),
        (some_points, 3, "sums of 300 terms, and of 290"),
        (linear, 70, "sums of 300 terms, and of 70: matrix products"),
    ],
)
def test_what_loops_cannot_take_runs_under_vmap_and_the_plan_says_so(loss, weights, fragment):
    rng = np.random.default_rng(2)
    x, t, w = (rng.normal(size=shape).astype(np.float32) for shape in ((300, weights), 300, (5, weights)))
    out = gdjax.minimize(loss, w, (x, t), in_axes=None, learning_rate=0.01, steps=3)
    assert out.plan.kernel == "vmap"
    assert fragment in out.plan.reason
    with jax.numpy_rank_promotion("allow"):
        slope = jax.vmap(jax.grad(loss), (0, None, None))
        for _ in range(3):
            w = w - np.float32(0.01) * slope(w, x, t)
    np.testing.assert_allclose(out.weights, w, rtol=1e-4, atol=1e-5)
