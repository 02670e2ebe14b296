"""Going on from a solution: k steps and then as many again are 2k steps in one go, in every bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import CASES, answers, same_bits
from test_stop import Patience

import gdjax
from gdjax import Status, kernel, stop

RULES = {
    "descent": {"learning_rate": np.linspace(0.01, 0.2, 50)},
    "schedule": {"learning_rate": lambda k: 0.2 / (k.astype(jnp.float32) + 1)},
    "auto": {"learning_rate": "auto"},
    "momentum": {"optimizer": optax.sgd(0.02, momentum=0.9)},
    "adam": {"optimizer": optax.adam, "hyperparams": {"learning_rate": np.linspace(0.01, 0.2, 50)}},
    "adam with a schedule": {"optimizer": optax.adam(optax.cosine_decay_schedule(0.1, 60))},
}
STOPS = {"all steps": None, "stop rule": stop.gradient_below(1e-2), "patience": Patience(1e-3, 4)}


@pytest.fixture(autouse=True)
def _optax_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def run(case, weights, data, steps, **options):
    return gdjax.minimize(case.loss, weights, data, steps=steps, **options)


@pytest.mark.parametrize("until", STOPS)
@pytest.mark.parametrize(
    ("name", "rule"), [*(("squared", rule) for rule in RULES), ("linear", "descent"), ("linear", "adam")]
)
def test_two_halves_are_the_whole(name, rule, until):
    case = CASES[name]
    w, data = case.batch(50)
    options = {**RULES[rule], "stop": STOPS[until]}
    whole = run(case, w, data, 38, **options)
    for first in (19, 7):
        half = run(case, w, data, first, **options)
        again = run(case, half.weights, data, 38 - first, resume=half.state, **options)
        assert same_bits(answers(again), answers(whole)), first


@pytest.mark.parametrize("until", ["all steps", "stop rule"])
def test_step_by_step_is_the_whole(until):
    case = CASES["squared"]
    w, data = case.batch(9)
    options = {"learning_rate": RULES["schedule"]["learning_rate"], "stop": STOPS[until]}
    out = run(case, w, data, 1, **options)
    for _ in range(9):
        out = run(case, out.weights, data, 1, resume=out.state, **options)
    assert same_bits(answers(out), answers(run(case, w, data, 10, **options)))


@pytest.mark.parametrize("until", ["all steps", "stop rule"])
def test_a_diverged_problem_stays_where_it_broke(until):
    w, x, t = (np.full(3, v, np.float32) for v in (1, 2, 4))
    t[1] = np.nan
    rates = np.array([0.1, 0.1, 1e20], np.float32)
    options = {"learning_rate": rates, "stop": STOPS[until]}
    half = gdjax.minimize(kernel.squared_loss, w, (x, t), steps=5, **options)
    again = gdjax.minimize(kernel.squared_loss, half.weights, (x, t), steps=5, resume=half.state, **options)
    whole = gdjax.minimize(kernel.squared_loss, w, (x, t), steps=10, **options)
    assert np.asarray(again.status)[1:].tolist() == [Status.DIVERGED] * 2
    assert same_bits(answers(again), answers(whole))


def test_a_converged_problem_stays_and_the_others_go_on():
    case = CASES["squared"]
    w, data = case.batch(50)
    options = {"learning_rate": 0.2, "stop": stop.gradient_below(1e-3)}
    half = run(case, w, data, 25, **options)
    done = np.asarray(half.status) == Status.CONVERGED
    assert 0 < done.sum() < 50
    again = run(case, half.weights, data, 500, resume=half.state, **options)
    assert same_bits(np.asarray(again.weights)[done], np.asarray(half.weights)[done])
    assert same_bits(np.asarray(again.steps)[done], np.asarray(half.steps)[done])
    assert np.all(np.asarray(again.steps)[~done] > 25)


def test_the_state_outlives_a_trip_through_numpy():
    """A state that was saved and loaded is a pytree of arrays with its own description."""
    case = CASES["linear"]
    w, data = case.batch(50)
    options = RULES["adam"]
    half = run(case, w, data, 19, **options)
    leaves, treedef = jax.tree.flatten(half.state)
    loaded = jax.tree.unflatten(treedef, [np.array(leaf) for leaf in leaves])
    again = run(case, np.array(half.weights), data, 19, resume=loaded, **options)
    assert same_bits(answers(again), answers(run(case, w, data, 38, **options)))
    assert dataclasses.is_dataclass(loaded)


@pytest.mark.parametrize("rule", ["descent", "auto", "adam"])
@pytest.mark.parametrize("until", ["all steps", "stop rule"])
def test_going_on_under_another_rule_is_refused(rule, until):
    case = CASES["squared"]
    w, data = case.batch(50)
    half = run(case, w, data, 5, stop=STOPS[until], **RULES["momentum"])
    with pytest.raises(ValueError, match="resume comes from a run with another update rule"):
        run(case, half.weights, data, 5, resume=half.state, stop=STOPS[until], **RULES[rule])


def test_going_on_under_another_stop_rule_with_memory_is_refused():
    case = CASES["squared"]
    w, data = case.batch(50)
    half = run(case, w, data, 5, stop=STOPS["stop rule"], **RULES["descent"])
    with pytest.raises(ValueError, match="resume comes from a run with another"):
        run(case, half.weights, data, 5, resume=half.state, stop=STOPS["patience"], **RULES["descent"])
