"""On a GPU or TPU that is there, `pytest -m gpu`: right answers, the same bits in any batch, data that stays put."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import answers, pick, same_bits
from ten_losses import LOSSES, RULES, agree, squared

import gdjax
from gdjax import Plan, stop
from gdjax import device as dev
from gdjax.kernel import squared_loss

pytestmark = pytest.mark.gpu
COUNT = 1003
"""A multiple of no tile."""

RULE = stop.gradient_below(0.02) | stop.loss_change_below(1e-7)


@pytest.fixture(scope="module")
def device():
    found = [d.device for d in gdjax.devices() if d.platform != "cpu"]
    return found[0] if found else pytest.skip("there is no GPU or TPU here")


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        yield


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LOSSES)
def test_ten_losses_run_in_registers(device, name, rule):
    weights, data = LOSSES[name].batch(5000)
    options = {"steps": 50, **RULES[rule]}
    kernel = gdjax.minimize(LOSSES[name].loss, weights, data, device=device, **options)
    assert (kernel.plan.kernel, kernel.plan.reason) == ("registers", "")
    plain = gdjax.minimize(LOSSES[name].loss, weights, data, device=device, plan=Plan("lanes", 1024), **options)
    agree(kernel, plain, roundings=5000, odd_ones=0.01 if name in ("absolute", "quantile") else 0.0)


def test_stop_rules_run_in_registers(device):
    weights, data = LOSSES["squared"].batch(5000)
    options = {"learning_rate": 0.3, "steps": 300, "stop": stop.gradient_below(1e-3), "device": device}
    kernel = gdjax.minimize(squared, weights, data, **options)
    assert kernel.plan.kernel == "registers"
    plain = gdjax.minimize(squared, weights, data, plan=Plan("lanes", 1024), **options)
    assert np.max(np.abs(np.asarray(kernel.steps) - plain.steps)) <= 1
    assert len(np.unique(kernel.steps)) > 5


def logistic(w, x, t):
    return jnp.mean(jnp.logaddexp(jnp.zeros_like(t), x @ w) - jnp.where(t > 0, x @ w, jnp.zeros_like(t)))


def network(w, x, t):
    return jnp.mean((jnp.tanh(x @ w["a"]) @ w["b"] - t) ** 2)


SHAPES = {  # loss, points and weights (none: scalars), whether the data is shared
    "scalar": (squared_loss, (), False),
    "16x4": (squared, (16, 4), False),
    "300x4": (squared, (300, 4), False),
    "1000x16, shared": (squared, (1000, 16), True),
    "logistic 211x5": (logistic, (211, 5), False),
    "network, 200 shared points": (network, (200, 3), True),
}


def batch(name, dtype=np.float32, count=COUNT):
    loss, shape, shared = SHAPES[name]
    rng = np.random.default_rng(0)
    draw = lambda *s: rng.normal(size=s).astype(dtype)  # noqa: E731
    lead = () if shared else (count,)
    weights = {"a": draw(count, 3, 4), "b": draw(count, 4)} if loss is network else draw(count, *shape[1:])
    rates = np.linspace(0.02, 0.2, count).astype(dtype)
    return loss, weights, (draw(*lead, *shape), draw(*lead, *shape[:1])), rates, None if shared else 0


def solve(name, device, which=slice(None), dtype=np.float32, **options):
    loss, weights, data, rates, axis = batch(name, dtype)
    data = data if axis is None else pick(data, which)
    settings = {"learning_rate": rates[which], "steps": 40, "in_axes": axis, **options}
    return gdjax.minimize(loss, pick(weights, which), data, device=device, **settings)


@pytest.mark.parametrize("rule", [None, RULE], ids=["all steps", "stop rule"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_problem_gets_the_same_bits_in_any_batch(device, name, rule):
    whole = answers(solve(name, device, stop=rule))
    order = np.random.default_rng(1).permutation(COUNT)
    parts = [slice(0, 1), slice(COUNT - 1, COUNT), slice(3, 700), order]
    for which in parts:
        out = solve(name, device, which, stop=rule)
        assert (out.plan.kernel, out.plan.reason) == ("registers", "")
        assert same_bits(answers(out), jax.tree.map(lambda a, which=which: np.asarray(a)[which], whole))


@pytest.mark.parametrize("name", ["scalar", "16x4"])
def test_float64_keeps_its_bits_in_any_batch(device, name):
    whole = answers(solve(name, device, dtype=np.float64))
    assert jax.tree.leaves(whole)[0].dtype == np.float64
    for which in (slice(5, 6), slice(3, 700)):
        out = solve(name, device, which, dtype=np.float64)
        assert same_bits(answers(out), jax.tree.map(lambda a, which=which: np.asarray(a)[which], whole))


@pytest.mark.parametrize("plan", ["auto", Plan("lanes", 1024), Plan("vmap", 1024)])
@pytest.mark.parametrize("name", ["16x4", "1000x16, shared"])
def test_float32_is_float32(device, name, plan):
    """Not tf32 or bfloat16, in which accelerators multiply matrices unless they are told otherwise."""
    wide = solve(name, "cpu", dtype=np.float64)
    out = solve(name, device, plan=plan)
    np.testing.assert_allclose(out.weights, wide.weights, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rule", [None, RULE], ids=["all steps", "stop rule"])
def test_arrays_on_the_device_stay_there(device, rule):
    loss, weights, data, rates, _ = batch("scalar")
    weights, data, rates = jax.device_put((weights, data, rates), device)
    there = gdjax.minimize(loss, weights, data, learning_rate=rates, steps=40, stop=rule, device=device)
    assert {d for leaf in jax.tree.leaves(answers_on(there)) for d in leaf.devices()} == {device}
    assert same_bits(answers(there), answers(solve("scalar", device, stop=rule)))
    with pytest.raises(ValueError, match=r"learning_rate\[7\] is -1.0"):
        gdjax.minimize(loss, weights, data, learning_rate=rates.at[7].set(-1), steps=1, device=device)


def answers_on(solution):
    return solution.weights, solution.loss, solution.gradient_norm, solution.steps, solution.status


def test_problems_that_diverge_leave_their_neighbours_alone(device):
    loss, weights, data, rates, _ = batch("16x4")
    wild = rates.copy()
    wild[::50] = 1e3
    out, calm = (gdjax.minimize(loss, weights, data, learning_rate=r, steps=60, device=device) for r in (wild, rates))
    broken = np.asarray(out.status) == gdjax.Status.DIVERGED
    assert broken.sum() == len(wild[::50])
    assert np.isfinite(out.weights).all()
    assert same_bits(np.asarray(out.weights)[~broken], np.asarray(calm.weights)[~broken])


def test_a_record_and_a_run_that_goes_on(device):
    noted = solve("16x4", device, record=10)
    plain = solve("16x4", device)
    assert noted.record.shape == (COUNT, 5)
    np.testing.assert_allclose(noted.record[:, -1], plain.loss, rtol=1e-5)
    loss, weights, data, rates, _ = batch("16x4")
    options = {"learning_rate": rates, "device": device}
    first = gdjax.minimize(loss, weights, data, steps=15, **options)
    rest = gdjax.minimize(loss, first.weights, data, steps=25, resume=first.state, **options)
    assert same_bits(answers(rest), answers(plain))


def test_adam_with_a_rate_for_each_problem(device):
    loss, weights, data, rates, _ = batch("300x4")
    options = {"optimizer": optax.adam, "hyperparams": {"learning_rate": rates}, "steps": 60}
    out = gdjax.minimize(loss, weights, data, device=device, **options)
    wide = gdjax.minimize(loss, *jax.tree.map(np.float64, (weights, data)), device="cpu", **options)
    assert out.plan.kernel == "registers"
    np.testing.assert_allclose(out.weights, wide.weights, rtol=1e-4, atol=1e-4)


def test_a_million_problems_are_right(device):
    """As many as fill the device many times over, each against the closed form of its descent."""
    rng = np.random.default_rng(3)
    count = (1 << 20) + 77
    w, x, t = (rng.uniform(-3, 3, count).astype(np.float32) for _ in range(3))
    out = gdjax.minimize(squared_loss, w, (x, t), learning_rate=np.float32(0.1), steps=200, device=device)
    wide = [np.float64(a) for a in (w, x, t)]
    shrink = (1 - 0.1 * wide[1] ** 2) ** 200
    exact = wide[2] / wide[1] + shrink * (wide[0] - wide[2] / wide[1])
    settled = np.abs(wide[1]) > 0.1
    np.testing.assert_allclose(np.asarray(out.weights)[settled], exact[settled], rtol=1e-3, atol=1e-4)
    assert out.summary()["RAN_ALL_STEPS"] == count


def test_problems_that_run_on_are_moved_together_and_keep_their_bits(device):
    """So many that the kernel runs in waves, against some of them run alone."""
    rng = np.random.default_rng(4)
    count = (1 << 20) + 77
    w, x, t = (rng.uniform(-3, 3, count).astype(np.float32) for _ in range(3))
    rates = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), count)).astype(np.float32)
    options = {"steps": 5000, "stop": stop.gradient_below(1e-4) | stop.loss_below(1e-12), "device": device}

    def solve(which):
        data = x[which], t[which]
        return answers(gdjax.minimize(squared_loss, w[which], data, learning_rate=rates[which], **options))

    whole = solve(slice(None))
    assert len(np.unique(whole[3])) > 1000
    for which in (slice(0, 300), slice(700_001, 700_002), rng.permutation(count)[:5000]):
        assert same_bits(solve(which), jax.tree.map(lambda a, which=which: a[which], whole))


def test_every_check_of_verify_passes(device):
    report = gdjax.verify(device=device, quick=True)
    assert report.passed, str(report)


def test_auto_weighs_the_devices(device):
    choice = gdjax.select_device("auto", squared_loss, *batch("scalar")[1:3], learning_rate=0.1, steps=10)
    assert {dev.platform_of(device), "cpu"} <= {one.devices[0].partition(":")[0] for one in choice.estimates}
