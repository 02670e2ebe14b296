"""The tutorial's functions of one problem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdjax import kernel, reference

numbers = st.floats(-8, 8, width=32)
vectors = st.lists(numbers, min_size=1, max_size=6)


def test_tutorial_step():
    gradient = kernel.gradient(kernel.residual_loss)(1.0, 2.0, 4.0)
    assert float(gradient) == -2.0
    assert float(kernel.residual_loss(1.0, 2.0, 4.0)) == 2.0
    moved = kernel.update(1.0, gradient, 0.1)
    assert moved == np.float32(1.2)
    assert kernel.residual_loss(moved, 2.0, 4.0) == np.float32(4) - np.float32(2) * np.float32(1.2)


@given(st.integers(1, 6).flatmap(lambda d: st.tuples(*[st.lists(numbers, min_size=d, max_size=d)] * 2)), numbers)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_agrees_with_the_reference(pair, t):
    w, x = pair
    with jax.enable_x64(True):
        arrays = np.asarray(w, np.float64), np.asarray(x, np.float64), np.float64(t)
        size = abs(t) + sum(abs(a * b) for a, b in zip(w, x, strict=True))
        for ours, theirs in (
            (kernel.residual_loss, reference.residual_loss),
            (kernel.squared_loss, reference.squared_loss),
        ):
            scale = (1 + size) * (1 + size)
            np.testing.assert_allclose(ours(*arrays), theirs(w, x, t), atol=1e-15 * scale * 8)
            slope = [reference.partial_derivative(theirs, w, x, t, i) for i in range(len(w))]
            np.testing.assert_allclose(kernel.gradient(ours)(*arrays), slope, atol=1e-15 * scale * 8)


def test_scalars_and_vectors_under_jit_vmap_and_grad():
    rng = np.random.default_rng(0)
    for shape in ((7,), (7, 3)):
        w, x = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
        t = rng.normal(size=7).astype(np.float32)
        batch = jax.jit(jax.vmap(kernel.gradient(kernel.squared_loss)))(w, x, t)
        single = jnp.stack([kernel.gradient(kernel.squared_loss)(*p) for p in zip(w, x, t, strict=True)])
        np.testing.assert_allclose(batch, single, rtol=2e-5, atol=1e-6)


def test_difference_quotient_tends_to_the_gradient():
    with jax.enable_x64(True):
        w, x, t = np.float64(1), np.float64(2), np.float64(4)
        slope = float(kernel.gradient(kernel.squared_loss)(w, x, t))
        errors = [
            float((kernel.squared_loss(w + h, x, t) - kernel.squared_loss(w, x, t)) / h) - slope
            for h in (0.5, 0.25, 2.0**-20)
        ]
        assert errors == [1.0, 0.5, 2.0**-19]  # h·x²/2, exactly: every operation here is exact
        for h in (1.0, 2.0**-10, 2.0**-30):
            quotient = (kernel.residual_loss(w + h, x, t) - kernel.residual_loss(w, x, t)) / h
            assert float(quotient) == -2.0


def test_a_thousand_dimensions():
    rng = np.random.default_rng(1)
    w, x = rng.normal(size=(2, 1000)).astype(np.float32)
    t = np.float32(0.5)
    e = t - np.dot(x.astype(np.float64), w.astype(np.float64))
    np.testing.assert_allclose(kernel.gradient(kernel.squared_loss)(w, x, t), -x * e, rtol=1e-4)


def test_update_keeps_each_leafs_dtype():
    w = {"a": np.ones(2, np.float32), "b": np.ones((), np.float16)}
    new = kernel.update(w, jax.tree.map(np.ones_like, w), 0.25)
    assert {k: v.dtype.name for k, v in new.items()} == {"a": "float32", "b": "float16"}
    assert float(new["b"]) == 0.75


def test_shapes_that_do_not_match_raise():
    with pytest.raises(TypeError):
        kernel.predict(np.ones(3, np.float32), np.ones(2, np.float32))
    with pytest.raises(ValueError):
        kernel.update({"a": 1.0}, {"b": 1.0}, 0.1)
