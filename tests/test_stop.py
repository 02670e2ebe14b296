"""Stop rules: what they see, when they fire, and that every problem counts its own steps."""

import jax.numpy as jnp
import numpy as np
import pytest
from problems import CASES, FUNCTIONS

import gdjax
from gdjax import kernel, stop
from gdjax.stop import StopRule

RNG = np.random.default_rng(5)
W, X, T = RNG.normal(size=(3, 200))
X = np.where(np.abs(X) < 0.3, 0.3, X)
RATE = 0.2


def solve(rule, steps=400, rate=RATE):
    return gdjax.minimize(kernel.squared_loss, W, (X, T), learning_rate=rate, steps=steps, stop=rule)


def plain_loop(done, steps=400):
    """Updates taken and whether the rule fired, problem by problem, in plain Python."""
    counts, fired = [], []
    for w, x, t in zip(W.tolist(), X.tolist(), T.tolist(), strict=True):
        previous, update, memory = np.inf, np.inf, {}
        for k in range(steps + 1):
            e = t - x * w
            loss, g = 0.5 * e * e, -(x * e)
            hit = done(k, w, loss, abs(g), previous, update, memory)
            if hit or k == steps:
                break
            new = w - RATE * g
            previous, update, w = loss, abs(new - w), new
        counts.append(k)
        fired.append(hit)
    return np.array(counts), np.array(fired)


RULES = {
    "gradient": (stop.gradient_below(1e-4), lambda k, w, l, g, p, u, m: g <= 1e-4),
    "loss": (stop.loss_below(1e-5), lambda k, w, l, g, p, u, m: abs(l) <= 1e-5),
    "loss change": (stop.loss_change_below(1e-6), lambda k, w, l, g, p, u, m: abs(l - p) <= 1e-6),
    "update": (stop.update_below(1e-4), lambda k, w, l, g, p, u, m: u <= 1e-4),
    "either": (
        stop.gradient_below(1e-5) | stop.loss_below(1e-4),
        lambda k, w, l, g, p, u, m: g <= 1e-5 or l <= 1e-4,
    ),
    "both": (
        stop.gradient_below(1e-3) & stop.loss_below(1e-8),
        lambda k, w, l, g, p, u, m: g <= 1e-3 and l <= 1e-8,
    ),
    "nested": (
        (stop.update_below(1e-3) & stop.loss_change_below(1e-5)) | stop.gradient_below(1e-6),
        lambda k, w, l, g, p, u, m: (u <= 1e-3 and abs(l - p) <= 1e-5) or g <= 1e-6,
    ),
    "a function": (lambda s: (s.index >= 7) & (s.weights > 0), lambda k, w, l, g, p, u, m: k >= 7 and w > 0),
    "a rule and a function": (
        stop.gradient_below(1e-6) | (lambda s: s.index == 11),
        lambda k, w, l, g, p, u, m: g <= 1e-6 or k == 11,
    ),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("steps", [1, 13, 400])
def test_counts_equal_a_plain_loop(name, steps):
    rule, done = RULES[name]
    counts, fired = plain_loop(done, steps)
    out = solve(rule, steps)
    np.testing.assert_array_equal(out.steps, counts)
    np.testing.assert_array_equal(np.asarray(out.status) == gdjax.Status.CONVERGED, fired)
    assert fired.sum() > 0 or steps < 400


class Patience(StopRule):
    """Done when the loss has not come down by `least` for `patience` tests in a row."""

    def __init__(self, least, patience):
        self.least, self.patience = least, patience

    def init(self):
        return {"best": jnp.float64(jnp.inf), "waited": jnp.int32(0)}

    def test(self, step, memory):
        better = step.loss < memory["best"] - self.least
        waited = jnp.where(better, 0, memory["waited"] + 1)
        best = jnp.where(better, step.loss, memory["best"])
        return waited >= self.patience, {"best": best, "waited": waited}


def patience_loop(k, w, l, g, p, u, m):
    better = l < m.get("best", np.inf) - 1e-4
    m["waited"] = 0 if better else m.get("waited", 0) + 1
    m["best"] = l if better else m.get("best", np.inf)
    return m["waited"] >= 3


@pytest.mark.parametrize("steps", [5, 400])
def test_a_rule_with_a_memory(steps):
    counts, fired = plain_loop(patience_loop, steps)
    out = solve(Patience(1e-4, 3), steps)
    np.testing.assert_array_equal(out.steps, counts)
    np.testing.assert_array_equal(np.asarray(out.status) == gdjax.Status.CONVERGED, fired)
    joined = solve(Patience(1e-4, 3) & stop.gradient_below(np.inf) | stop.loss_below(0.0), steps)
    np.testing.assert_array_equal(joined.steps, counts)


def test_a_rule_never_met_ends_at_steps():
    out = solve(lambda s: s.loss < -1, 37)
    assert out.summary() == {"RAN_ALL_STEPS": 200, "CONVERGED": 0, "DIVERGED": 0}
    assert set(np.asarray(out.steps)) == {37}
    fixed = gdjax.minimize(kernel.squared_loss, W, (X, T), learning_rate=RATE, steps=37)
    np.testing.assert_allclose(out.weights, fixed.weights, rtol=1e-15)


def test_tested_before_each_update_and_once_after_the_last():
    always = solve(lambda s: s.index >= 0)
    assert set(np.asarray(always.steps)) == {0}
    np.testing.assert_array_equal(always.weights, W)
    for steps, status in ((9, "RAN_ALL_STEPS"), (10, "CONVERGED"), (11, "CONVERGED")):
        out = solve(lambda s: s.index == 10, steps)
        assert out.summary()[status] == 200, steps
        assert set(np.asarray(out.steps)) == {min(steps, 10)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_tutorials_loss_reaches_zero_one_step_later_than_on_paper(dtype):
    """On paper w is 2 after five steps of 0.2; in float64 it is 1.9999999999999998."""
    w, x, t = (np.array([v], dtype) for v in (1, 2, 4))
    r, on_paper, value, count = dtype(0.1), 5, dtype(1), 0
    while dtype(4) - dtype(2) * value > 0:
        value, count = value - r * dtype(-2), count + 1
    out = gdjax.minimize(kernel.residual_loss, w, (x, t), learning_rate=r, steps=50, stop=lambda s: s.loss <= 0)
    assert np.asarray(out.steps).tolist() == [count]
    assert np.asarray(out.weights) == value
    if dtype is np.float64:
        assert count == on_paper + 1


def test_gradient_below_looks_at_the_largest_entry_of_the_whole_pytree():
    start = {"a": np.array([[1.0, 0.0], [0.0, 0.0]]), "b": np.array([0.0, 1.0])}

    def loss(p):
        return 0.5 * jnp.sum(jnp.square(p["a"])) + 0.5 * jnp.square(p["b"])

    out = gdjax.minimize(loss, start, learning_rate=0.5, steps=100, stop=stop.gradient_below(1e-3))
    assert np.asarray(out.steps).tolist() == [10, 10]  # 2⁻¹⁰ is the first power of a half under 1/1000


def test_vector_weights_and_their_figures():
    """`gradient`, `weights` and `update_norm` of a step are those of one problem, whatever its shape."""
    case = CASES["linear"]
    w, data = case.batch(30)
    a = gdjax.minimize(case.loss, w, data, learning_rate=0.2, steps=500, stop=stop.gradient_below(1e-2))
    b = gdjax.minimize(
        case.loss, w, data, learning_rate=0.2, steps=500, stop=lambda s: jnp.max(jnp.abs(s.gradient)) <= 1e-2
    )
    np.testing.assert_array_equal(a.steps, b.steps)
    assert len(set(np.asarray(a.steps))) > 5
    c = gdjax.minimize(case.loss, w, data, learning_rate=0.2, steps=500, stop=stop.update_below(2e-3))
    # The last update was 0.2 times a gradient at most 1e-2: the rule sees it one step later.
    np.testing.assert_array_equal(c.steps, np.asarray(a.steps) + 1)


def test_lanes_of_very_different_length():
    """Rates that differ by a factor of 10⁴: each problem stops at its own step."""
    starts = FUNCTIONS["booth"].starts(300)
    rates = np.geomspace(1e-5, 0.1, 300)
    out = gdjax.minimize(
        FUNCTIONS["booth"].loss, starts, learning_rate=rates, steps=20_000, stop=stop.gradient_below(1e-3)
    )
    assert np.asarray(out.steps).min() < 100
    done = np.asarray(out.status) == gdjax.Status.CONVERGED
    assert np.all(np.asarray(out.gradient_norm)[done] <= 1e-3)
    assert np.all(np.asarray(out.gradient_norm)[~done] > 1e-3)
    assert np.all(np.asarray(out.steps)[~done] == 20_000)
    assert 0 < done.sum() < 300


AT = np.arange(200.0)


def dips(later=0, around=1.0, tol=0.5):
    """A rule met at one update alone, which each problem's weight names: its figure is `around` before and after."""

    def figure(step):
        return jnp.where(step.index == step.weights.astype(jnp.int32) + later, 0.25, around).astype(step.loss.dtype)

    return stop.Below("dips", figure, tol)


def standing(rule, steps=300):
    """The steps taken by problems whose weights stay as they are; a record has a row for each of them."""
    flat = lambda w, x: 0.0 * w * x  # noqa: E731
    out = gdjax.minimize(flat, AT, (X,), learning_rate=0.1, steps=steps, stop=rule)
    noted = gdjax.minimize(flat, AT, (X,), learning_rate=0.1, steps=steps, stop=rule, record=1)
    np.testing.assert_array_equal(out.weights, AT)
    np.testing.assert_array_equal(out.steps, noted.steps)
    np.testing.assert_array_equal(np.isfinite(noted.record).sum(axis=1), np.asarray(out.steps) + 1)
    return out.steps.tolist()


@pytest.mark.parametrize("around", [1.0, np.inf, np.nan])
def test_a_rule_met_at_one_step_alone_is_not_overlooked(around):
    """Several updates are taken before the rule is asked; a figure that is no number among them hides nothing."""
    assert standing(dips(0, around)) == AT.tolist()
    assert standing(stop.loss_below(0) & dips(0, around) | dips(7, around)) == AT.tolist()
    assert standing(dips(9, around) | dips(4, around)) == (AT + 4).tolist()


def test_both_rules_must_hold_at_the_same_step():
    assert set(standing(dips() & dips(1))) == {300}


@pytest.mark.parametrize("figure", [0.5, np.float64(0.5), 0])
def test_a_figure_may_be_a_plain_number(figure):
    w, data = np.ones(40, np.float32), (np.ones(40, np.float32), np.zeros(40, np.float32))
    for tol, taken in ((0.6, 0), (0.25, 0 if figure == 0 else 50)):
        rule = stop.Below("plain", lambda step: figure, tol)
        out = gdjax.minimize(kernel.squared_loss, w, data, learning_rate=0.1, steps=50, stop=rule, device="cpu")
        assert set(np.asarray(out.steps)) == {taken}


def test_a_tolerance_that_every_figure_meets_ends_at_once_unless_it_is_no_number():
    assert set(standing(dips(tol=np.inf))) == {0}
    assert standing(dips(0, np.nan, np.inf)) == AT.tolist()


def test_a_rule_derived_from_below_is_asked_by_its_own_test():
    class Above(stop.Below):
        def test(self, step, memory):
            return self.figure(step) > self.tol, memory

    def index(step):
        return step.index.astype(step.loss.dtype)

    assert set(solve(Above("above", index, 21.0)).steps.tolist()) == {22}
    assert set(solve(Above("above", index, 21.0) | stop.loss_below(0), rate=1e-3).steps.tolist()) == {22}


def test_rules_that_share_a_name_are_not_taken_for_each_other():
    early, late = (stop.Below("far", lambda step, far=far: abs(step.index - far), 0) for far in (3, 7))
    assert early != late
    assert set(solve(early).steps.tolist()) == {3}
    assert set(solve(late).steps.tolist()) == {7}
    both = stop.Joined(jnp.logical_and, "|", early, late)  # shows as another does, and joins otherwise
    assert set(solve(early | late).steps.tolist()) == {3}
    assert set(solve(both, steps=20).steps.tolist()) == {20}


def test_rules_say_what_they_are_and_compare_by_it():
    rule = stop.gradient_below(1e-6) | stop.loss_below(0.001)
    assert repr(rule) == "(gradient_below(1e-06) | loss_below(0.001))"
    assert rule == stop.gradient_below(1e-6) | stop.loss_below(1e-3)
    assert rule != stop.gradient_below(1e-6) & stop.loss_below(1e-3)
    assert hash(rule) == hash(stop.gradient_below(1e-6) | stop.loss_below(1e-3))
    assert stop.loss_below(1) != stop.update_below(1)
