"""The front door: what goes in, what comes out."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import CASES, FUNCTIONS, answers, same_bits

import gdjax
from gdjax import batch, kernel


@pytest.fixture
def scalars():
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(3, 60)).astype(np.float32))


def solve(w, data, **options):
    return gdjax.minimize(kernel.squared_loss, w, data, **{"learning_rate": 0.1, "steps": 10, **options})


def test_solution_holds_arrays_of_the_declared_shapes_and_dtypes(scalars):
    w, x, t = scalars
    out = solve(w, (x, t))
    assert (out.weights.shape, out.weights.dtype) == ((60,), np.float32)
    assert (out.loss.shape, out.loss.dtype) == ((60,), np.float32)
    assert (out.gradient_norm.shape, out.gradient_norm.dtype) == ((60,), np.float32)
    assert (out.steps.shape, out.steps.dtype) == ((60,), np.int32)
    assert (out.status.shape, out.status.dtype) == ((60,), np.int8)
    assert out.record is None
    assert isinstance(out.plan, gdjax.Plan)
    assert out.device == "cpu:0"


def test_loss_and_gradient_norm_are_those_at_the_final_weights():
    for name in ("linear", "tanh network", "squared vector"):
        case = CASES[name]
        w, data = case.batch(9)
        out = gdjax.minimize(case.loss, w, data, learning_rate=case.rate, steps=7)
        with jax.enable_x64(True):
            loss, gradient = jax.vmap(jax.value_and_grad(case.loss))(out.weights, *data)
        norm = np.max([np.abs(g).reshape(9, -1).max(1) for g in jax.tree.leaves(gradient)], axis=0)
        np.testing.assert_allclose(out.loss, loss, rtol=1e-12)
        np.testing.assert_allclose(out.gradient_norm, norm, rtol=1e-12)


@pytest.mark.parametrize("stop", [None, gdjax.stop.gradient_below(0.0)], ids=["all steps", "stop rule"])
def test_loss_and_gradient_norm_are_per_problem_whatever_is_shared(stop):
    """The residual's gradient, −x, is the same for all problems where x is; a constant loss is the same for all."""
    w = np.ones(3, np.float32)
    shared = (np.float32(2), np.float32(4))
    out = gdjax.minimize(kernel.residual_loss, w, shared, in_axes=None, learning_rate=0.1, steps=1, stop=stop)
    assert out.gradient_norm.tolist() == [2.0] * 3
    assert out.weights.tolist() == [np.float32(1.2)] * 3
    constant = gdjax.minimize(lambda w: jnp.float32(3.0), w, learning_rate=0.1, steps=1, stop=stop)
    assert constant.loss.tolist() == [3.0] * 3
    assert constant.gradient_norm.tolist() == [0.0] * 3
    assert constant.weights.tolist() == [1.0] * 3


def test_solution_is_a_frozen_pytree(scalars):
    w, x, t = scalars
    out = solve(w, (x, t))
    with pytest.raises(dataclasses.FrozenInstanceError):
        out.loss = 0
    leaves, treedef = jax.tree.flatten(out)
    again = jax.tree.unflatten(treedef, leaves)
    assert same_bits(answers(again), answers(out))
    assert again.plan == out.plan
    doubled = jax.tree.map(lambda leaf: 2 * np.asarray(leaf), out)
    assert doubled.summary is not None
    np.testing.assert_array_equal(doubled.weights, 2 * np.asarray(out.weights))


def test_status_and_summary_count_every_problem(scalars):
    w, x, t = scalars
    x = x.copy()
    x[:3], x[3:5] = 0, np.nan
    out = solve(w, (x, t), stop=gdjax.stop.gradient_below(0.0), steps=3)
    assert out.summary() == {"RAN_ALL_STEPS": 55, "CONVERGED": 3, "DIVERGED": 2}
    assert gdjax.Status(int(out.status[0])) is gdjax.Status.CONVERGED
    assert [s.value for s in gdjax.Status] == [0, 1, 2, 3]


def test_inputs_are_not_written_to(scalars):
    kept = [a.copy() for a in scalars]
    for array in scalars:
        array.setflags(write=False)
    w, x, t = scalars
    solve(w, (x, t))
    solve(w, (x, t), stop=gdjax.stop.gradient_below(1e-3))
    assert all(same_bits(a, b) for a, b in zip(scalars, kept, strict=True))
    on_device = jax.device_put(w)
    solve(on_device, (x, t))
    assert same_bits(on_device, w)  # not donated either


def test_numpy_jax_strided_and_foreign_arrays_are_alike(scalars):
    w, x, t = scalars
    expected = solve(w, (x, t))

    class Foreign:
        def __array__(self, dtype=None, copy=None):
            return x

    wide = np.zeros((60, 4), np.float32)
    wide[:, 2] = x
    for form in (jnp.asarray(x), x[::-1].copy()[::-1], wide[:, 2], Foreign(), x.astype(">f4").astype("<f4")):
        assert same_bits(answers(solve(w, (form, t))), answers(expected))


def test_a_rate_that_is_a_number_is_looked_at_as_often_as_an_array(scalars, monkeypatch):
    """The arrays beside it once; its value, and what type it is, always."""
    w, x, t = scalars
    monkeypatch.setattr(batch, "SOUND", {})
    looked = []
    checked = batch.checked
    monkeypatch.setattr(batch, "checked", lambda *args: looked.append(args) or checked(*args))
    rates = [0.1, 0.25, 1, np.float64(0.1), np.full(60, 0.1, np.float32)]
    results = [answers(solve(w, (x, t), learning_rate=rate)) for rate in rates]
    assert len(looked) == 3  # one each for a number, a number of NumPy's and an array
    assert same_bits(results[0], results[3])
    assert same_bits(results[0], results[4])
    for rate, result in zip(rates[1:3], results[1:3], strict=True):
        assert same_bits(result, answers(solve(w, (x, t), learning_rate=np.full(60, rate, np.float32))))
    wide = solve(*jax.tree.map(np.float64, (w, (x, t))), learning_rate=0.1)
    assert wide.weights.dtype == np.float64
    assert not np.array_equal(wide.weights.astype(np.float32), results[0][0])
    for bad in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="learning_rate is"):
            solve(w, (x, t), learning_rate=bad)


def test_weights_may_be_a_dict():
    out = gdjax.minimize(
        lambda p: jnp.square(p["w"] - 1.0), {"w": np.array([3.0, 5.0], np.float32)}, learning_rate=0.25, steps=1
    )
    assert out.weights["w"].tolist() == [2.0, 3.0]


@pytest.mark.parametrize("stop", [None, gdjax.stop.gradient_below(1e-2)], ids=["all steps", "stop rule"])
def test_in_axes_as_in_vmap(stop):
    case = CASES["linear"]
    w, (x, t) = case.batch(11)
    options = {"learning_rate": 0.05, "steps": 9, "stop": stop}
    expected = gdjax.minimize(case.loss, w, (x, t), **options)
    for axes, data in (
        ((1, 0), (np.moveaxis(x, 0, 1), t)),
        ((-1, -1), (np.moveaxis(x, 0, -1), t.T)),
        (-1, (np.moveaxis(x, 0, -1), t.T)),
        ([0, 0], (x, t)),
    ):
        assert same_bits(answers(gdjax.minimize(case.loss, w, data, in_axes=axes, **options)), answers(expected))

    def of_dict(w, d):
        return case.loss(w, d["x"], d["t"])

    out = gdjax.minimize(of_dict, w, ({"x": np.moveaxis(x, 0, 2), "t": t},), in_axes=({"x": 2, "t": 0},), **options)
    assert same_bits(answers(out), answers(expected))


@pytest.mark.parametrize("stop", [None, gdjax.stop.gradient_below(1e-2)], ids=["all steps", "stop rule"])
def test_shared_data_is_data_repeated(stop):
    case = CASES["linear"]
    w, (x, t) = case.batch(11)
    options = {"learning_rate": 0.05, "steps": 50, "stop": stop}
    for axes, shared, repeated in (
        ((None, 0), (x[0], t), (np.broadcast_to(x[0], x.shape), t)),
        (None, (x[0], t[0]), (np.broadcast_to(x[0], x.shape), np.broadcast_to(t[0], t.shape))),
    ):
        one = gdjax.minimize(case.loss, w, shared, in_axes=axes, **options)
        other = gdjax.minimize(case.loss, w, repeated, **options)
        np.testing.assert_allclose(one.weights, other.weights, rtol=1e-13, atol=1e-14)
        np.testing.assert_array_equal(one.steps, other.steps)


def test_losses_without_data_and_with_empty_leaves():
    out = gdjax.minimize(FUNCTIONS["booth"].loss, np.zeros((2, 2)), learning_rate=0.05, steps=2000)
    np.testing.assert_allclose(out.weights, [[1, 3]] * 2, atol=1e-9)
    empty = gdjax.minimize(
        lambda p: jnp.square(p["w"] - 1) + jnp.sum(p["none"]),
        {"w": np.zeros(2, np.float32), "none": np.zeros((2, 0), np.float32)},
        learning_rate=0.5,
        steps=1,
    )
    assert empty.weights["w"].tolist() == [1.0, 1.0]
    assert empty.weights["none"].shape == (2, 0)


def test_a_weight_the_loss_does_not_use_stays():
    start = {"a": np.ones(3, np.float32), "b": np.full((3, 2), 7, np.float32)}
    out = gdjax.minimize(lambda p: jnp.square(p["a"]), start, learning_rate=0.5, steps=4)
    assert same_bits(out.weights["b"], start["b"])
    assert out.weights["a"].tolist() == [0.0, 0.0, 0.0]


def test_more_problems_than_any_tile():
    """2²⁰ + 1 problems, each with its own answer: x is one, so that w ← w − r(w − t) has a closed form."""
    count = 2**20 + 1
    t = np.arange(count, dtype=np.float32)
    out = gdjax.minimize(
        kernel.squared_loss, np.zeros(count, np.float32), (np.ones(count, np.float32), t), learning_rate=0.5, steps=3
    )
    np.testing.assert_array_equal(out.weights, t * np.float32(0.875))  # exact: t has 20 bits, 7/8 takes three more
    assert out.summary()["RAN_ALL_STEPS"] == count


def test_two_runs_and_two_threads_give_the_same_bits(scalars):
    w, x, t = scalars
    expected = answers(solve(w, (x, t)))
    assert same_bits(answers(solve(w, (x, t))), expected)
    found = []
    threads = [threading.Thread(target=lambda: found.append(answers(solve(w, (x, t))))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(same_bits(f, expected) for f in found)


def test_a_loss_defined_anew_is_not_taken_for_the_old_one(scalars):
    """Compiled programs are kept by the loss itself: a closure over another number is another loss."""
    w, _, _ = scalars
    outs = []
    for target in (1.0, 2.0):
        out = gdjax.minimize(lambda w, target=target: jnp.square(w - target), w, learning_rate=0.5, steps=1)
        outs.append(float(out.weights[0]))
    assert outs == [1.0, 2.0]


def test_random_weights_depend_on_key_shape_and_place_alone():
    shape = {"w": (3,), "b": ()}
    ten, four = gdjax.random_weights(5, shape, 10), gdjax.random_weights(jax.random.key(5), shape, 4)
    assert same_bits(jax.tree.map(lambda leaf: leaf[:4], ten), four)
    assert not same_bits(gdjax.random_weights(6, shape, 4), four)
    assert len(np.unique(ten["w"])) == 30
    many = gdjax.random_weights(0, (), 20_000, scale=3.0, dtype=np.float64)
    assert many.dtype == np.float64
    assert abs(many.mean()) < 0.1
    assert abs(many.std() - 3) < 0.1
    with pytest.raises(ValueError, match="0"):
        gdjax.random_weights(0, (), 0)
    with pytest.raises(TypeError, match="int32"):
        gdjax.random_weights(0, (), 3, dtype=np.int32)


def test_random_weights_are_weights():
    out = gdjax.minimize(lambda w: jnp.sum(w * w), gdjax.random_weights(0, (3,), 5), learning_rate=0.25, steps=60)
    assert float(jnp.max(jnp.abs(out.weights))) < 1e-15
