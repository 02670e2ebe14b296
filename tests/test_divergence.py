"""A problem that fails ends with a status, at its last finite weights, and never touches its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import answers, pick, same_bits

import gdjax
from gdjax import Status, kernel, stop

STEPS = 40
NAN_DATA, HUGE_RATE, ZERO_INPUT = 4, 11, 23
GOOD = np.array([i for i in range(30) if i not in (NAN_DATA, HUGE_RATE, ZERO_INPUT)])
STOPS = [None, stop.gradient_below(0.0)]
IDS = ["all steps", "stop rule"]


def batch(dtype, shape=()):
    rng = np.random.default_rng(8)
    w, x = (rng.normal(size=(30, *shape)).astype(dtype) for _ in range(2))
    t = rng.normal(size=30).astype(dtype) + dtype(3)
    rates = np.full(30, 0.05, dtype)
    t[NAN_DATA] = np.nan
    rates[HUGE_RATE] = 1e30
    x[ZERO_INPUT] = 0
    return w, x, t, rates


def huge_rate_by_hand(w, x, t, rate):
    """The last finite weights and the updates taken; magnitudes grow by 10³⁰ a step, so rounding decides nothing."""
    dtype = np.asarray(w).dtype
    count = 0
    with np.errstate(all="ignore"):
        while True:
            e = t - (x * w).sum(dtype=dtype)
            g = -(x * e)
            new = w - rate * g
            if not (np.all(np.isfinite(g)) and np.all(np.isfinite(new))):
                return w, count
            w, count = new, count + 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (3,)], ids=["scalar", "vector"])
@pytest.mark.parametrize("rule", STOPS, ids=IDS)
def test_one_batch_with_three_bad_problems(dtype, shape, rule):
    w, x, t, rates = batch(dtype, shape)
    out = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=rates, steps=STEPS, stop=rule)
    status, steps, weights = (np.asarray(a) for a in (out.status, out.steps, out.weights))

    assert np.all(np.isfinite(weights))
    assert (status[NAN_DATA], steps[NAN_DATA]) == (Status.DIVERGED, 0)
    assert same_bits(weights[NAN_DATA], w[NAN_DATA])

    last, count = huge_rate_by_hand(w[HUGE_RATE], x[HUGE_RATE], t[HUGE_RATE], rates[HUGE_RATE])
    assert count >= 1
    assert (status[HUGE_RATE], steps[HUGE_RATE]) == (Status.DIVERGED, count)
    np.testing.assert_allclose(weights[HUGE_RATE], last, rtol=1e-4)

    at_rest = Status.RAN_ALL_STEPS if rule is None else Status.CONVERGED
    assert (status[ZERO_INPUT], steps[ZERO_INPUT]) == (at_rest, STEPS if rule is None else 0)
    assert same_bits(weights[ZERO_INPUT], w[ZERO_INPUT])
    assert np.asarray(out.gradient_norm)[ZERO_INPUT] == 0

    # With the stop rule a problem may find its minimum exactly.
    ended = status[GOOD] == Status.RAN_ALL_STEPS if rule is None else status[GOOD] != Status.DIVERGED
    assert np.all(ended)
    assert np.all(steps[GOOD][status[GOOD] == Status.RAN_ALL_STEPS] == STEPS)
    alone = gdjax.minimize(
        kernel.squared_loss, w[GOOD], (x[GOOD], t[GOOD]), learning_rate=rates[GOOD], steps=STEPS, stop=rule
    )
    assert same_bits(answers(alone), pick(answers(out), GOOD))


@pytest.mark.parametrize(
    "make",
    [
        optax.adam,
        optax.rmsprop,
        lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
        optax.adamw,
    ],
    ids=["adam", "rmsprop", "momentum", "adamw"],
)
@pytest.mark.parametrize("rule", STOPS, ids=IDS)
def test_bad_problems_under_optax(make, rule):
    w, x, t, rates = batch(np.float64, (3,))
    rates[HUGE_RATE] = 1e200

    def solve(which):
        with jax.numpy_dtype_promotion("standard"):
            return gdjax.minimize(
                kernel.squared_loss,
                w[which],
                (x[which], t[which]),
                optimizer=make,
                hyperparams={"learning_rate": rates[which]},
                steps=STEPS,
                stop=rule,
            )

    out = solve(np.arange(30))
    status = np.asarray(out.status)
    assert np.all(np.isfinite(np.asarray(out.weights)))
    assert (status[NAN_DATA], out.steps[NAN_DATA]) == (Status.DIVERGED, 0)
    assert status[HUGE_RATE] == Status.DIVERGED
    assert np.all(status[GOOD] != Status.DIVERGED)
    assert same_bits(answers(solve(GOOD)), pick(answers(out), GOOD))


@pytest.mark.parametrize("rule", STOPS, ids=IDS)
def test_where_it_broke_does_not_depend_on_the_steps_asked_for(rule):
    w, x, t, rates = batch(np.float64)
    outs = [
        gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=rates, steps=steps, stop=rule)
        for steps in (15, 16, 33, 200)
    ]
    for out in outs:
        assert (out.status[HUGE_RATE], out.steps[HUGE_RATE]) == (Status.DIVERGED, outs[0].steps[HUGE_RATE])
        assert same_bits(np.asarray(out.weights)[HUGE_RATE], np.asarray(outs[0].weights)[HUGE_RATE])


@pytest.mark.parametrize("rule", STOPS, ids=IDS)
def test_a_loss_that_is_not_finite_at_the_end_is_divergence(rule):
    """Finite gradients, but the loss is NaN: no answer, whatever the weights."""
    w, c = np.ones(5, np.float32), np.array([0, np.nan, np.inf, 1, 2], np.float32)
    out = gdjax.minimize(lambda w, c: jnp.square(w) + c, w, (c,), learning_rate=0.25, steps=3, stop=rule)
    assert np.asarray(out.status).tolist() == [0, 2, 2, 0, 0]
    assert np.all(np.isfinite(np.asarray(out.weights)))


@pytest.mark.parametrize("rule", STOPS, ids=IDS)
def test_a_gradient_that_is_not_finite_where_the_loss_is(rule):
    """√|w| has no derivative at 0: the second problem breaks before its first update."""
    out = gdjax.minimize(lambda w: jnp.sqrt(jnp.abs(w)), np.array([1.0, 0.0]), learning_rate=0.1, steps=3, stop=rule)
    assert out.status[1] == Status.DIVERGED
    assert (np.asarray(out.weights)[1], out.steps[1]) == (0, 0)
    assert (out.status[0], out.steps[0]) == (Status.RAN_ALL_STEPS, 3)


@pytest.mark.parametrize("rule", STOPS, ids=IDS)
def test_all_problems_bad_and_one_bad_problem_alone(rule):
    nan = np.full(3, np.nan, np.float32)
    for count in (1, 3):
        w = np.arange(1, count + 1, dtype=np.float32)
        out = gdjax.minimize(kernel.squared_loss, w, (w, nan[:count]), learning_rate=0.1, steps=5, stop=rule)
        assert out.summary() == {"RAN_ALL_STEPS": 0, "CONVERGED": 0, "DIVERGED": count}
        assert same_bits(out.weights, w)


def test_weights_that_are_not_finite_at_the_start():
    w = np.array([np.nan, np.inf, 1.0])
    out = gdjax.minimize(lambda w: jnp.square(w), w, learning_rate=0.25, steps=2)
    assert np.asarray(out.status).tolist() == [2, 2, 0]
    assert np.asarray(out.steps).tolist() == [0, 0, 2]


def test_resumed_problems_that_break_in_several_slabs_end_as_in_one(monkeypatch):
    """The rule's state of a resumed run is cut slab by slab with its problems."""
    from gdjax.engine import rounds

    rng = np.random.default_rng(5)
    w, x, t = rng.normal(size=(3, 200)).astype(np.float32)
    options = {"optimizer": optax.sgd(50.0, momentum=0.9), "device": "cpu"}
    half = gdjax.minimize(kernel.squared_loss, w, (x, t), steps=3, **options)

    def rest():
        return gdjax.minimize(
            kernel.squared_loss, half.weights, (x, t), steps=400, resume=half.state, **options
        )

    whole = rest()
    monkeypatch.setattr(rounds, "SLAB", 64)
    parts = rest()
    assert (np.asarray(whole.status) == gdjax.Status.DIVERGED).sum() > 100
    for name in ("weights", "steps", "status"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
