"""Operations written with others: right to the error that they declare."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdjax
from gdjax import kernel
from gdjax.engine import rewrites


@pytest.mark.parametrize("name", rewrites.UNARY)
def test_rewritten_functions_are_right_to_a_few_ulp(name):
    x = np.concatenate([np.geomspace(1e-6, 60, 400), [0.0, 1.0]]).astype(np.float32)
    x = x if name in ("sqrt", "log1p") else np.concatenate([-x, x])
    special = np.float32([0, np.inf, np.nan])
    exact = {"is_finite": np.isfinite, "logistic": lambda v: 1 / (1 + np.exp(-v)), "atan": np.arctan}
    exact = exact.get(name) or getattr(np, name)
    compute = jax.jit(lambda v, z: rewrites.UNARY[name](v, z))
    zero = np.float32(-0.0)
    got, wanted = np.asarray(compute(x, zero)), exact(x.astype(np.float64))
    if name == "is_finite":
        assert got.all()
    else:
        off = np.abs(got - wanted) / (np.spacing(np.abs(wanted).astype(np.float32)) + 1e-30)
        assert off.max() < (2 if name in ("sqrt", "sign") else 30)
    if name != "tan":
        with np.errstate(invalid="ignore"):
            np.testing.assert_allclose(np.asarray(compute(special, zero), float), exact(special.astype(float)))


def test_powers_keep_to_the_declared_error():
    x = np.linspace(-3, 3, 121, dtype=np.float32)
    y = np.int32([-5, -2, 0, 1, 4, 7])[:, None] + np.zeros_like(x, np.int32)[None]
    x = x[None] + np.zeros(y.shape, np.float32)
    with np.errstate(divide="ignore"):
        wanted = x.astype(float) ** y
    got = np.asarray(rewrites.power(jnp.asarray(x), jnp.asarray(y), np.float32(-0.0)))
    np.testing.assert_allclose(got, wanted, rtol=3e-6)
    decay = rewrites.power(jnp.float32(0.999), jnp.arange(1, 5000), np.float32(-0.0), float(np.float32(0.999)))
    np.testing.assert_allclose(decay, np.float64(np.float32(0.999)) ** np.arange(1, 5000), rtol=6e-7)


@pytest.mark.parametrize("base", [0.9, 0.999, 0.99999, 1 - 2.0**-24, 0.5, 1e-3, 1.0, 1 + 2.0**-23, 1.5, 1e30])
def test_powers_of_a_number_are_right_to_an_ulp(base):
    """Negative exponents and broken ones, and on to where all is zero or infinite."""
    counts = np.arange(1 << 17, dtype=np.float32)
    y = np.concatenate([counts, -counts, counts[:3000] + np.float32(0.37), [2e7, -1e9, np.inf, -np.inf]])
    y = y.astype(np.float32)
    got = np.asarray(jax.jit(lambda y, z: rewrites.power_of(float(np.float32(base)), y, z))(y, np.float32(-0.0)))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        wanted = np.exp2(y * np.log2(np.longdouble(np.float32(base))))
    wanted[np.isnan(wanted)] = 1  # 1 to an infinite power
    least, most = np.finfo(np.float32).tiny, np.finfo(np.float32).max
    inside = (wanted >= least) & (wanted <= most)
    off = abs(got[inside] - wanted[inside]) / np.spacing(wanted[inside].astype(np.float32))
    assert off.max() < 1.2
    assert (got[~inside] == np.where(wanted[~inside] < least, 0, np.inf)).all()
    assert np.isnan(rewrites.power_of(0.9, jnp.full(3, jnp.nan), np.float32(-0.0))).all()


def test_an_optimizer_that_counts_its_steps_descends_alike_with_a_rule_and_without():
    """With a rule each problem has a count of its own, which Adam raises two numbers to."""
    rng = np.random.default_rng(3)
    w, x, t = (rng.normal(size=1000).astype(np.float32) for _ in range(3))
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        without, ruled = (
            gdjax.minimize(kernel.squared_loss, w, (x, t), optimizer=optax.adam(0.01), steps=200, stop=rule)
            for rule in (None, lambda step: step.loss < -1)
        )
    assert (ruled.steps == 200).all()
    np.testing.assert_allclose(ruled.weights, without.weights, rtol=1e-5, atol=1e-6)
