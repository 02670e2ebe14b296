"""Kernels in registers, interpreted: the arithmetic of ten losses and three rules, stop rules, trust, and fallbacks.

That they compile for devices is seen in `test_aot.py`; here they run, through plans that ask for them.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import CASES, same_bits
from ten_losses import LOSSES, RULES, agree, squared

import gdjax
from gdjax import Plan, stop
from gdjax import device as dev
from gdjax.engine import course, descent
from gdjax.engine.targets import Interpreted

REGISTERS, PLAIN = Plan("registers", 128), "auto"
COUNT, STEPS = 130, 5  # a tile and two problems more

SOME = [("squared", rule) for rule in RULES]
SOME += [(name, "plain") for name in LOSSES if name not in ("squared", "network")] + [("network", "adam")]
OTHERS = [(name, rule) for name in LOSSES for rule in RULES if (name, rule) not in SOME]


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        yield


def solve(problem, plan, count=COUNT, **options):
    weights, data = problem.batch(count)
    return gdjax.minimize(problem.loss, weights, data, device="cpu", plan=plan, **{"steps": STEPS, **options})


def check(name, rule):
    problem = LOSSES[name]
    kernel, plain = (solve(problem, plan, **RULES[rule]) for plan in (REGISTERS, PLAIN))
    assert (kernel.plan.kernel, plan_reason(kernel), plain.plan.kernel) == ("registers", "", "lanes")
    agree(kernel, plain)
    assert not same_bits(kernel.weights, problem.batch(COUNT)[0])  # they did move
    return kernel, plain


def plan_reason(solution):
    return solution.plan.reason


@pytest.mark.parametrize(("name", "rule"), SOME)
def test_ten_losses_in_registers_agree_with_the_plain_path(name, rule):
    kernel, plain = check(name, rule)
    if name in ("squared", "residual") and rule == "plain":  # nothing but sums and products: the same in every bit
        assert same_bits(kernel.weights, plain.weights)
        assert same_bits(kernel.loss, plain.loss)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rule"), OTHERS)
def test_the_other_losses_and_rules_in_registers_agree_with_the_plain_path(name, rule):
    check(name, rule)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_family_of_operations_is_right_in_registers_or_falls_back(name):
    case = CASES[name]
    weights, data = case.batch(40, np.float32)
    options = {"in_axes": case.axes, "learning_rate": case.rate, "steps": 3, "device": "cpu"}
    kernel, plain = (gdjax.minimize(case.loss, weights, data, plan=p, **options) for p in (REGISTERS, PLAIN))
    assert kernel.plan.kernel == "registers"
    agree(kernel, plain)


def test_shared_data_and_rates_of_their_own():
    weights, (x, t) = LOSSES["squared"].batch(COUNT)
    rates = np.linspace(0.01, 0.1, COUNT, dtype=np.float32)
    options = {"in_axes": None, "learning_rate": rates, "steps": STEPS, "device": "cpu"}
    kernel, plain = (gdjax.minimize(squared, weights, (x[0], t[0]), plan=p, **options) for p in (REGISTERS, PLAIN))
    assert kernel.plan.kernel == "registers"
    assert same_bits(kernel.weights, plain.weights)


def test_indices_that_are_known_move_nothing():
    def loss(w, x):
        picked = w[jnp.array([2, 0, 2])]  # its gradient adds at the same place twice
        return jnp.sum((picked - x) ** 2) + jnp.sum(jnp.concatenate([w[1:], w[:1]]) * w) + jnp.max(w[::-1])

    rng = np.random.default_rng(0)
    w, x = (rng.normal(size=(40, 3)).astype(np.float32) for _ in range(2))
    out = gdjax.minimize(loss, w, (x,), learning_rate=0.1, steps=2, plan=REGISTERS, device="cpu")
    assert out.plan.kernel == "registers"
    slope = jax.vmap(jax.grad(loss))
    wanted = w - 0.1 * slope(w, x)
    wanted = wanted - 0.1 * slope(wanted, x)
    np.testing.assert_allclose(out.weights, wanted, rtol=1e-5, atol=1e-6)


# --- stop rules ------------------------------------------------------------------------------------------------------


def test_a_lane_that_is_done_freezes_and_the_others_go_on():
    rule = stop.gradient_below(1e-2) & stop.loss_change_below(1.0)
    kernel, plain = (
        solve(LOSSES["squared"], plan, learning_rate=0.3, steps=200, stop=rule) for plan in (REGISTERS, PLAIN)
    )
    assert kernel.plan.kernel == "registers"
    assert same_bits(kernel.weights, plain.weights)
    np.testing.assert_array_equal(kernel.steps, plain.steps)
    np.testing.assert_array_equal(kernel.status, plain.status)
    assert len(np.unique(kernel.steps)) > 5
    assert (np.asarray(kernel.status) == gdjax.Status.CONVERGED).sum() > 20


def test_a_problem_that_diverges_keeps_its_last_finite_weights():
    out, plain = (solve(LOSSES["squared"], plan, learning_rate=40.0, steps=60) for plan in (REGISTERS, PLAIN))
    assert (np.asarray(out.status) == gdjax.Status.DIVERGED).any()
    assert np.isfinite(out.weights).all()
    np.testing.assert_array_equal(out.steps, plain.steps)


def test_it_goes_on_from_where_it_stood():
    problem = LOSSES["squared"]
    weights, data = problem.batch(40)
    whole = solve(problem, REGISTERS, count=40, **RULES["momentum"])
    options = {"device": "cpu", "plan": REGISTERS, **RULES["momentum"]}
    first = gdjax.minimize(problem.loss, weights, data, steps=2, **options)
    rest = gdjax.minimize(problem.loss, first.weights, data, steps=STEPS - 2, resume=first.state, **options)
    assert same_bits(rest.weights, whole.weights)


def flat_tail(w, x, t):
    """Slower the nearer it is to its lowest point: problems take from a few steps to all of them."""
    return jnp.sum((w - t) ** 4) + 0.0 * jnp.sum(x)


WAVES = {
    "gradient": (squared, None, {"learning_rate": 0.2, "stop": stop.gradient_below(1e-3)}),
    "memory": (flat_tail, 0, {"learning_rate": 0.05, "stop": stop.loss_change_below(1e-6) | stop.gradient_below(1e-4)}),
    "adam": (squared, 0, {"optimizer": optax.adam(0.05), "stop": stop.gradient_below(1e-2)}),
    "some diverge": (squared, 0, {"learning_rate": "wild", "stop": stop.update_below(1e-5)}),
}


@pytest.mark.parametrize("name", WAVES)
def test_problems_that_run_on_are_moved_together_and_get_the_same_bits(name, monkeypatch):
    loss, axis, options = WAVES[name]
    count, rng = 400, np.random.default_rng(0)
    w, x, t = (rng.normal(size=s).astype(np.float32) for s in ((count, 3), (count, 5, 3), (count, 5)))
    data = (x, rng.normal(size=(count, 3)).astype(np.float32)) if loss is flat_tail else (x, t)
    data = data if axis == 0 else (x[0], t[0])
    if options.get("learning_rate") == "wild":
        options = {**options, "learning_rate": np.geomspace(0.003, 3, count, dtype=np.float32)}
    moved = []

    def counted(*args):
        moved.append(args)
        return waves(*args)

    waves = course.waves
    monkeypatch.setattr(course, "waves", counted)

    def solve(**more):
        function = lambda w, *data: loss(w, *data)  # a new kind of problem each time  # noqa: E731
        return gdjax.minimize(function, w, data, in_axes=axis, steps=300, device="cpu", **{**options, **more})

    whole = solve(plan=Plan("registers", 512))
    assert not moved  # too few to be worth it
    monkeypatch.setattr(course, "WIDTH", 64)
    monkeypatch.setattr(course, "WAVE", 2.0**16)
    monkeypatch.setattr(course, "MOVE", 0.0)
    out = solve(plan=Plan("registers", 512))
    assert moved
    assert (out.plan.kernel, out.plan.reason) == ("registers", "")
    for mine, wanted in zip(jax.tree.leaves(out), jax.tree.leaves(whole), strict=True):
        assert same_bits(mine, wanted)
    assert len(np.unique(out.steps)) > 20
    plain = solve()
    np.testing.assert_array_equal(out.status, plain.status)
    assert np.max(np.abs(np.asarray(out.steps) - plain.steps)) <= (1 if name == "adam" else 0)


# --- the way of an accelerator, the CPU standing in for it -----------------------------------------------------------


@pytest.fixture
def accelerated(monkeypatch):
    """The CPU taken for a device with memory of its own, whose kernels are interpreted."""
    monkeypatch.setattr(dev, "is_host", lambda device: False)


def test_an_accelerator_chooses_it_by_itself(accelerated):
    def chosen_loss(w, x, t):
        return squared(w, x, t)

    weights, data = LOSSES["squared"].batch(COUNT)
    solve = lambda **options: gdjax.minimize(chosen_loss, weights, data, device="cpu", steps=60, **options)  # noqa: E731
    plain = lambda **options: solve(plan=Plan("lanes", 256), **options)  # noqa: E731
    for options in ({"learning_rate": 40.0}, {"learning_rate": 0.3, "stop": stop.gradient_below(1e-2)}):
        out, wanted = solve(**options), plain(**options)
        assert (out.plan.kernel, out.plan.reason, wanted.plan.kernel) == ("registers", "", "lanes")
        assert out.plan.tile % 128 == 0
        np.testing.assert_array_equal(out.status, wanted.status)
        np.testing.assert_array_equal(out.steps, wanted.steps)
        assert same_bits(out.weights, wanted.weights)
    noted = solve(learning_rate=0.3, record=30)
    assert (noted.plan.kernel, noted.plan.reason) == ("lanes", "a record is kept on the way")


def test_several_accelerators_share_the_batch(accelerated):
    def spread_loss(w, x, t):
        return squared(w, x, t)

    weights, data = LOSSES["squared"].batch(700)
    options = {"learning_rate": 0.1, "steps": 3}
    one = gdjax.minimize(spread_loss, weights, data, device="cpu:0", **options)
    three = gdjax.minimize(spread_loss, weights, data, device=jax.devices("cpu")[:3], **options)
    assert (one.plan.kernel, three.plan.kernel) == ("registers", "registers")
    assert same_bits(one.weights, three.weights)


# --- what is refused, and what is not trusted ------------------------------------------------------------------------


def test_the_cpu_never_chooses_it():
    assert solve(LOSSES["squared"], "auto", learning_rate=0.1).plan.kernel == "lanes"


def fallback(loss, weights, data, fragment, caplog):
    """The solution of a plan for registers that cannot be kept to; the reason is logged once."""
    options = {"device": "cpu", "learning_rate": 0.1, "steps": 3}
    with caplog.at_level(logging.INFO, "gdjax"):
        for _ in range(2):
            out = gdjax.minimize(loss, weights, data, plan=REGISTERS, **options)
    assert out.plan.kernel != "registers"
    assert fragment in out.plan.reason
    assert sum(fragment in record.message for record in caplog.records) == 1
    plain = gdjax.minimize(loss, weights, data, plan=PLAIN, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), out.weights, plain.weights)


def test_too_many_numbers_fall_back(caplog):
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(20, 161)).astype(np.float32), rng.normal(size=(20, 300)).astype(np.float32)
    fallback(lambda w, x: jnp.mean(w**2) + jnp.mean(x), w, (x,), "462 numbers", caplog)


def test_an_operation_without_a_form_falls_back(caplog):
    def loss(w, x):
        return jnp.sum(jax.lax.cbrt(w * w + 1) - x)

    w = np.ones((20, 2), np.float32)
    fallback(loss, w, (w,), "'cbrt'", caplog)


def test_float64_falls_back(caplog):
    w = np.ones((20, 2))
    fallback(lambda w, x: jnp.sum((w - x) ** 2), w, (w,), "float64", caplog)


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch, caplog):
    def wrong_loss(w, x, t):
        return squared(w, x, t)

    right = descent.Descent.run

    def wrong(self, *args):
        weights, *rest = right(self, *args)
        return [weights * np.float32(1.001), *rest]

    monkeypatch.setattr(descent.Descent, "run", wrong)
    weights, data = LOSSES["squared"].batch(COUNT)
    options = {"learning_rate": 0.1, "steps": 3, "device": "cpu"}
    with pytest.warns(RuntimeWarning, match="'wrong_loss' disagrees with XLA on cpu:0: weights of 130 of 130"):
        out = gdjax.minimize(wrong_loss, weights, data, plan=REGISTERS, **options)
    assert out.plan.kernel == "lanes"
    assert "disagrees with XLA: weights of 130" in out.plan.reason
    plain = gdjax.minimize(squared, weights, data, plan=PLAIN, **options)
    assert same_bits(out.weights, plain.weights)


def test_inside_jit_it_runs_in_lanes():
    weights, data = LOSSES["squared"].batch(40)
    solve = lambda w: gdjax.minimize(squared, w, data, learning_rate=0.1, steps=2, plan=REGISTERS)  # noqa: E731
    inside = jax.jit(lambda w: solve(w).weights)(weights)
    np.testing.assert_allclose(inside, solve(weights).weights, rtol=1e-5)


@pytest.mark.parametrize("when", ["compiling", "running"])
def test_a_kernel_that_fails_is_given_up_and_the_call_goes_on(when, monkeypatch, caplog):
    def failing_loss(w, x, t):
        return squared(w, x, t)

    weights, data = LOSSES["squared"].batch(COUNT)
    options = {"learning_rate": 0.1, "steps": 3, "device": "cpu", "plan": REGISTERS}
    if when == "running":
        assert gdjax.minimize(failing_loss, weights, data, **options).plan.kernel == "registers"
        from gdjax import blocks

        run = blocks.run_block

        def fail(block, *args):
            if block.plan.kernel == "registers":
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too many registers")
            return run(block, *args)

        monkeypatch.setattr(blocks, "run_block", fail)
    else:

        def fail(self, *args):
            raise NotImplementedError("RESOURCE_EXHAUSTED: Mosaic cannot")

        monkeypatch.setattr(Interpreted, "call", fail)
    with caplog.at_level(logging.INFO, "gdjax"):
        out = gdjax.minimize(failing_loss, weights, data, **options)
    assert out.plan.kernel == "lanes"
    assert "RESOURCE_EXHAUSTED" in out.plan.reason
    assert any("given up" in record.message for record in caplog.records)


class Card:
    """A GPU as JAX describes it."""

    platform = "gpu"

    def __init__(self, kind, capability):
        self.device_kind, self.compute_capability = kind, capability


@pytest.mark.parametrize(
    ("card", "target"),
    [(Card("NVIDIA H200", "9.0"), "gpu"), (Card("NVIDIA A100", "8.0"), None), (Card("AMD Instinct", "gfx942"), None)],
)
def test_gpus_before_hopper_keep_to_xla(card, target):
    found, why = dev.register_target(card)
    assert found == target
    assert (card.device_kind in why) == (target is None)
