"""record=: what is noted on the way is what a run that ends there would have reported, and noting changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import CASES, answers, pick, same_bits

import gdjax
from gdjax import kernel, stop

RULES = {
    "descent": {"learning_rate": 0.1},
    "adam": {"optimizer": optax.adam, "hyperparams": {"learning_rate": np.linspace(0.01, 0.2, 60)}},
}
STOPS = {"all steps": None, "stop rule": stop.gradient_below(1e-1)}


@pytest.fixture(autouse=True)
def _optax_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("until", STOPS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["squared", "linear"])
def test_the_loss_every_k_updates(name, rule, until):
    case = CASES[name]
    w, data = case.batch(60)
    options = {**RULES[rule], "stop": STOPS[until]}
    plain = gdjax.minimize(case.loss, w, data, steps=47, **options)
    noted = gdjax.minimize(case.loss, w, data, steps=47, record=2, **options)  # more rows than one call notes
    assert same_bits(answers(noted), answers(plain))
    assert noted.record.shape == (60, 24)
    assert noted.record_steps.tolist() == list(range(0, 48, 2))
    for row in (1, 7, 17, 23):
        there = gdjax.minimize(case.loss, w, data, steps=2 * row, **options)
        live = np.asarray(plain.steps) >= 2 * row
        assert same_bits(np.asarray(noted.record)[live, row], np.asarray(there.loss)[live])
        assert np.all(np.isnan(np.asarray(noted.record)[~live, row]))


@pytest.mark.parametrize("until", STOPS)
def test_a_record_depends_on_its_problem_alone(until):
    case = CASES["linear"]
    w, data = case.batch(60)
    options = {"learning_rate": 0.1, "stop": STOPS[until], "steps": 40, "record": 5}
    whole = gdjax.minimize(case.loss, w, data, **options)
    some = np.array([3, 59, 17])
    few = gdjax.minimize(case.loss, w[some], tuple(d[some] for d in data), **options)
    assert same_bits(few.record, pick(whole.record, some))
    vmapped = gdjax.minimize(case.loss, w, data, **options, plan=gdjax.Plan("vmap", 32))
    np.testing.assert_allclose(vmapped.record, whole.record, rtol=1e-4)


@pytest.mark.parametrize("until", STOPS)
def test_any_figure_of_the_state(until):
    w, x, t = (np.full(5, v, np.float32) for v in (1, 2, 4))
    out = gdjax.minimize(
        kernel.squared_loss,
        w,
        (x, t),
        learning_rate=0.1,
        steps=10,
        stop=STOPS[until],
        record=(3, lambda s: {"w": s.weights, "moved": s.update_norm, "was": s.previous_loss, "at": s.index}),
    )
    assert out.record_steps.tolist() == [0, 3, 6, 9]
    after = [gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=0.1, steps=k) for k in (2, 3)]
    assert same_bits(np.asarray(out.record["w"])[:, 1], np.asarray(after[1].weights))
    assert same_bits(np.asarray(out.record["was"])[:, 1], np.asarray(after[0].loss))
    moved = np.asarray(after[1].weights) - np.asarray(after[0].weights)
    assert same_bits(np.asarray(out.record["moved"])[:, 1], np.abs(moved))
    assert np.all(np.asarray(out.record["moved"])[:, 0] == np.inf)
    ended = np.asarray(out.steps)[0]
    assert np.asarray(out.record["at"])[0].tolist() == [k if k <= ended else 0 for k in (0, 3, 6, 9)]


def test_what_remembers_the_last_update_survives_the_call_after():
    """More rows than one call of the compiled program notes."""
    w, x, t = (np.full(2, v, np.float32) for v in (1, 2, 4))
    out = gdjax.minimize(
        kernel.squared_loss, w, (x, t), learning_rate=0.01, steps=40, record=(1, lambda s: (s.loss, s.previous_loss))
    )
    loss, before = (np.asarray(leaf) for leaf in out.record)
    assert same_bits(before[:, 1:], loss[:, :-1])


def test_memory_stays_bounded_where_the_distance_is_left_open():
    w, x, t = (np.full(2, v, np.float32) for v in (1, 2, 4))
    out = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=1e-4, steps=10_000, record=lambda s: s.loss)
    assert out.record.shape[1] == len(out.record_steps) <= 257
    assert out.record_steps[0] == 0
    assert np.all(np.diff(np.asarray(out.record)) < 0)


def test_a_problem_that_diverges_has_nothing_after_its_end():
    w, x, t = (np.full(4, v, np.float32) for v in (1, 2, 4))
    rates = np.array([0.1, 1e18, 0.1, 1e30], np.float32)
    out = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=rates, steps=12, record=1)
    steps, record = np.asarray(out.steps), np.asarray(out.record)
    assert out.summary()["DIVERGED"] == 2
    for problem in range(4):
        there = np.isfinite(record[problem]) | (np.arange(13) <= steps[problem])
        assert there.sum() == steps[problem] + 1


def test_record_of_a_run_that_goes_on():
    case = CASES["squared"]
    w, data = case.batch(20)
    whole = gdjax.minimize(case.loss, w, data, learning_rate=0.1, steps=20, record=5)
    half = gdjax.minimize(case.loss, w, data, learning_rate=0.1, steps=10, record=5)
    rest = gdjax.minimize(case.loss, half.weights, data, learning_rate=0.1, steps=10, record=5, resume=half.state)
    assert rest.record_steps.tolist() == [10, 15, 20]
    assert same_bits(rest.record, np.asarray(whole.record)[:, 2:])


def test_float64_rows():
    w, x, t = (np.full(3, v, np.float64) for v in (1, 2, 4))
    out = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=0.1, steps=4, record=2)
    assert np.asarray(out.record).dtype == np.float64


@pytest.mark.parametrize("record", [0, -3, True, "loss", (2, 3), 2.5])
def test_records_that_nobody_can_mean(record):
    w = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="record="):
        gdjax.minimize(kernel.squared_loss, w, (w, w), learning_rate=0.1, steps=4, record=record)


def test_a_figure_that_fails_is_named():
    w = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="record raised AttributeError"):
        gdjax.minimize(kernel.squared_loss, w, (w, w), learning_rate=0.1, steps=4, record=lambda s: jnp.sin(s.lost))
