"""Every part of the tutorial, through `minimize`, against the reference."""

import itertools
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from problems import same_bits

import gdjax
from gdjax import kernel, reference, rounding

DTYPES = [np.float32, np.float64]


def test_reference_takes_w_from_1_to_1_2_and_loss_from_2_to_1_6():
    run = reference.descend(1.0, 2.0, 4.0, 0.1, 1, loss=reference.residual_loss)
    assert run.weights == (1.0, 1.2)
    assert run.losses == (2.0, 1.6)
    exact = reference.descend(Fraction(1), Fraction(2), Fraction(4), Fraction(1, 10), 1, loss=reference.residual_loss)
    assert exact.losses == (2, Fraction(8, 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_minimize_takes_w_from_1_to_1_2_and_loss_from_2_to_1_6(dtype):
    w, x, t = (np.array([v], dtype) for v in (1, 2, 4))
    before = gdjax.minimize(kernel.residual_loss, w, (x, t), learning_rate=0.0, steps=1)
    assert (np.asarray(before.weights), np.asarray(before.loss)) == (1, 2)
    after = gdjax.minimize(kernel.residual_loss, w, (x, t), learning_rate=0.1, steps=1)
    assert np.asarray(after.weights) == dtype(1.2)
    # In float32 1.2 is 1.2000000477, so that the loss is one unit in the last place under 1.6.
    assert np.asarray(after.loss) == dtype(4) - dtype(2) * dtype(1.2)
    assert abs(float(np.asarray(after.loss)[0]) - 1.6) <= np.finfo(dtype).eps
    assert np.asarray(after.gradient_norm) == 2
    assert after.weights.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_twenty_steps_of_the_tutorial_equal_the_scalar_reference(dtype):
    """x = 2 and t = 4 make every product exact but r·x: fused or not, the bits are those of plain Python."""
    w, x, t = (np.array([v], dtype) for v in (1, 2, 4))
    r = dtype(0.1)
    for steps in (1, 2, 5, 20):
        run = reference.descend(dtype(1), dtype(2), dtype(4), r, steps, loss=reference.residual_loss)
        out = gdjax.minimize(kernel.residual_loss, w, (x, t), learning_rate=r, steps=steps)
        assert np.asarray(out.weights) == run.weights[-1], steps
        assert np.asarray(out.loss) == run.losses[-1], steps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("loss", "name", "declared"),
    [
        (kernel.squared_loss, "squared", rounding.FMA_FLUSHED),
        (kernel.residual_loss, "residual", rounding.IEEE_FLUSHED),  # r·x does not change: its product leaves the loop
    ],
)
def test_twenty_steps_equal_the_reference_in_the_cpus_rounding(dtype, loss, name, declared):
    rng = np.random.default_rng(2)
    w, x, t = (rng.normal(size=5003).astype(dtype) for _ in range(3))
    rates = rng.uniform(0.01, 0.3, 5003).astype(dtype)
    out = gdjax.minimize(loss, w, (x, t), learning_rate=rates, steps=20, device="cpu")
    expected = rounding.descend(w, x, t, rates, 20, loss=name, rounding=declared)
    assert same_bits(out.weights, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vector_weights_equal_the_reference_in_the_cpus_rounding(dtype):
    rng = np.random.default_rng(2)
    w, x = rng.normal(size=(2, 403, 3)).astype(dtype)
    t = rng.normal(size=403).astype(dtype)
    out = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=0.1, steps=20, device="cpu")
    assert same_bits(out.weights, rounding.descend(w, x, t, 0.1, 20, rounding=rounding.FMA_FLUSHED))


def test_vector_weights_follow_the_scalar_reference():
    rng = np.random.default_rng(3)
    w, x = rng.normal(size=(2, 5, 4))
    t = rng.normal(size=5)
    out = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=0.1, steps=20)
    for i in range(5):
        run = reference.descend(list(w[i]), list(x[i]), t[i], 0.1, 20)
        np.testing.assert_allclose(out.weights[i], run.weights[-1], rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(out.loss[i], run.losses[-1], rtol=1e-10, atol=1e-25)


def test_difference_quotient_tends_to_minus_x():
    for x in (2.0, -0.75, 1000.0):
        for loss in (reference.residual_loss, kernel.residual_loss):
            quotient = reference.difference_quotients(loss, 1.0, x, 4.0, 1.0, 10)[-1]
            assert abs(float(quotient) + x) <= 1e-3 * abs(x)  # float32 in the second: cancellation over h
    slopes = reference.difference_quotients(reference.squared_loss, 1.0, 2.0, 4.0, 1.0, 30)
    errors = [abs(s - -4.0) for s in slopes]
    assert all(later <= 0.6 * sooner for sooner, later in itertools.pairwise(errors[:21]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_dimensions(dtype):
    """The residual shrinks by 1 − r·|x|² each step, whatever the dimension."""
    rng = np.random.default_rng(4)
    w, x = rng.normal(size=(2, 10, 1000)).astype(dtype)
    t = rng.normal(size=10).astype(dtype)
    out = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=2e-4, steps=3)
    w64, x64, t64 = (v.astype(np.float64) for v in (w, x, t))
    e = (t64 - (x64 * w64).sum(-1)) * (1 - 2e-4 * (x64 * x64).sum(-1)) ** 3
    np.testing.assert_allclose(out.loss, e**2 / 2, rtol=2e-3 if dtype is np.float32 else 1e-10)
    assert out.weights.shape == (10, 1000)


def test_a_two_layer_network_learns_xor_from_a_hundred_starts():
    x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    t = np.array([0, 1, 1, 0], np.float32)
    starts = gdjax.random_weights(0, {"first": (2, 8), "bias": (8,), "second": (8,), "last": ()}, 100)

    def network(p, x):
        return jnp.tanh(x @ p["first"] + p["bias"][None, :]) @ p["second"] + p["last"]

    def loss(p, x, t):
        return jnp.mean(jnp.square(network(p, x) - t))

    out = gdjax.minimize(loss, starts, (x, t), in_axes=None, learning_rate=0.1, steps=3000)
    assert out.weights["first"].shape == (100, 2, 8)
    assert float(jnp.max(out.loss)) < 0.02
    for i in (0, 57, 99):
        said = network({k: v[i] for k, v in out.weights.items()}, x) > 0.5
        assert said.tolist() == [False, True, True, False]
