"""What comes in in float64 goes out in float64, whatever the global flag; nothing is narrowed in silence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import softmax_batch, softmax_regression

import gdjax
from gdjax import kernel, stop

W, X, T = np.random.default_rng(0).normal(size=(3, 20))


def flag():
    return bool(jax.config.jax_enable_x64)


@pytest.fixture(autouse=True)
def _flag_is_off_and_stays_off():
    assert not flag()
    yield
    assert not flag()


@pytest.mark.parametrize("rule", [None, stop.gradient_below(1e-9)], ids=["all steps", "stop rule"])
def test_float64_without_the_global_flag(rule):
    out = gdjax.minimize(kernel.squared_loss, W, (X, T), learning_rate=0.1, steps=30, stop=rule)
    assert out.weights.dtype == out.loss.dtype == out.gradient_norm.dtype == np.float64
    w = W
    for _ in range(30):
        w = w + 0.1 * X * (T - X * w)
    np.testing.assert_allclose(out.weights, w, rtol=1e-13)  # float32 anywhere would show at 1e-7


def test_float64_rates_and_hyperparameters_keep_their_digits():
    rate = np.full(20, 0.1)
    out = gdjax.minimize(kernel.squared_loss, W, (X, T), learning_rate=rate, steps=1)
    np.testing.assert_allclose(out.weights, W + 0.1 * X * (T - X * W), rtol=1e-15)
    with jax.numpy_dtype_promotion("standard"):
        out = gdjax.minimize(
            kernel.squared_loss, W, (X, T), optimizer=optax.sgd, hyperparams={"learning_rate": rate}, steps=1
        )
    np.testing.assert_allclose(out.weights, W + 0.1 * X * (T - X * W), rtol=1e-15)


def test_the_flag_is_as_before_after_an_error():
    with pytest.raises(ValueError, match="loss raised"):
        gdjax.minimize(lambda w: w.nothing, W, learning_rate=0.1, steps=1)
    assert not flag()
    with jax.enable_x64(True):
        gdjax.minimize(
            kernel.squared_loss, *(W.astype(np.float32), (X.astype(np.float32),) * 2), learning_rate=0.1, steps=1
        )
        assert flag()


def test_float32_stays_float32_with_the_flag_on_and_has_the_same_bits():
    w, x, t = (a.astype(np.float32) for a in (W, X, T))
    off = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=0.1, steps=9)
    with jax.enable_x64(True):
        on = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=0.1, steps=9)
    assert on.weights.dtype == on.loss.dtype == np.float32
    np.testing.assert_array_equal(on.weights, off.weights)


def test_mixed_dtypes_keep_each_its_own():
    start = {"a": W.astype(np.float32), "b": W.copy()}

    def loss(p, x):
        return jnp.square(p["a"].astype(x.dtype) - x) + jnp.square(p["b"] - 2 * x)

    out = gdjax.minimize(loss, start, (X,), learning_rate=0.25, steps=2)
    assert {k: v.dtype.name for k, v in out.weights.items()} == {"a": "float32", "b": "float64"}
    assert out.loss.dtype == np.float64
    np.testing.assert_allclose(out.weights["b"], 2 * X + (W - 2 * X) / 4, rtol=1e-13)
    np.testing.assert_allclose(out.weights["a"], X + (W - X) / 4, rtol=1e-5)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.int8, np.uint8])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_integer_labels(kind, dtype):
    weights, (x, label) = softmax_batch(5)
    weights = jax.tree.map(lambda leaf: leaf.astype(dtype), weights)
    out = gdjax.minimize(softmax_regression, weights, (x.astype(dtype), label.astype(kind)), learning_rate=0.1, steps=5)
    assert out.weights["w"].dtype == dtype
    again = gdjax.minimize(softmax_regression, weights, (x.astype(dtype), label), learning_rate=0.1, steps=5)
    np.testing.assert_array_equal(out.weights["w"], again.weights["w"])


def test_integers_past_32_bits_keep_their_value():
    big = np.array([2**40 + 1, -(2**40), 3])
    out = gdjax.minimize(
        lambda w, k: 0.5 * jnp.square(w - k.astype(w.dtype)), np.zeros(3), (big,), learning_rate=1.0, steps=1
    )
    np.testing.assert_array_equal(out.weights, big.astype(np.float64))


def test_boolean_data():
    mask = np.array([True, False])
    out = gdjax.minimize(
        lambda w, m: jnp.where(m, jnp.square(w), 0.0), np.ones(2, np.float32), (mask,), learning_rate=0.5, steps=1
    )
    assert out.weights.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("wanted", ["float64", np.float32, jnp.bfloat16])
def test_dtype_brings_every_float_to_it(wanted):
    w, x = W.astype(np.float32), X.astype(np.float32)
    seen = []

    def loss(w, x, t):
        seen.append({w.dtype, x.dtype, t.dtype})
        return kernel.squared_loss(w, x, t)

    out = gdjax.minimize(loss, w, (x, T), learning_rate=0.1, steps=2, dtype=wanted)
    assert out.weights.dtype == out.loss.dtype == np.dtype(wanted)
    assert all(dtypes == {np.dtype(wanted)} for dtypes in seen)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
@pytest.mark.parametrize("rule", [None, stop.gradient_below(1e-2)], ids=["all steps", "stop rule"])
def test_half_precision(dtype, rule):
    w, x, t = (a.astype(dtype) for a in (W, X, T))
    out = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=0.125, steps=20, stop=rule)
    assert out.weights.dtype == out.loss.dtype == out.gradient_norm.dtype == dtype
    full = gdjax.minimize(kernel.squared_loss, W, (X, T), learning_rate=0.125, steps=20)
    tol = 0.02 if dtype is np.float16 else 0.2  # bfloat16 stops moving where r·g is under half a unit of w
    if rule is None:
        np.testing.assert_allclose(np.asarray(out.weights).astype(np.float64), full.weights, atol=tol)


def test_python_numbers_in_data_take_the_default_dtype():
    out = gdjax.minimize(
        lambda w, p: jnp.square(w - p), np.zeros(3, np.float32), (2.0,), in_axes=None, learning_rate=0.5, steps=1
    )
    assert out.weights.tolist() == [2.0] * 3
