"""Arrays and models of other libraries, in and out."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import CASES, compilations, same_bits

import gdjax
from gdjax import kernel


@jax.tree_util.register_pytree_with_keys_class
class Model:
    """A linear model with an activation function among its leaves; two of them are never equal."""

    def __init__(self, slope, activation):
        self.slope, self.activation = slope, activation

    def __call__(self, x):
        return self.activation(x @ self.slope)

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return [(key("slope"), self.slope), (key("activation"), self.activation)], None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


def model_loss(model, x, t):
    return jnp.mean(jnp.square(model(x) - t))


def test_what_is_no_array_passes_through_untouched():
    w, data = CASES["linear"].batch(9, np.float32)
    expected = gdjax.minimize(
        lambda w, x, t: jnp.mean(jnp.square(jnp.tanh(x @ w) - t)), w, data, learning_rate=0.1, steps=9
    )
    options = {"learning_rate": 0.1, "stop": gdjax.stop.loss_below(0.0)}
    out = gdjax.minimize(model_loss, Model(w, jnp.tanh), data, steps=9, **options)
    assert type(out.weights) is Model
    assert out.weights.activation is jnp.tanh
    assert same_bits(out.weights.slope, expected.weights)
    first = gdjax.minimize(model_loss, Model(w, jnp.tanh), data, steps=4, **options)
    rest = gdjax.minimize(model_loss, first.weights, data, steps=5, resume=first.state, **options)
    assert same_bits(rest.weights.slope, expected.weights)
    held = gdjax.minimize(
        model_loss,
        Model(w, jnp.tanh),
        data,
        steps=9,
        learning_rate=0.1,
        project=lambda model: Model(jnp.clip(model.slope, -0.1, 0.1), model.activation),
    )
    assert np.abs(held.weights.slope).max() == np.float32(0.1)
    assert out.to("numpy").weights.activation is jnp.tanh


def test_equal_models_are_compiled_once():
    w, data = CASES["linear"].batch(9, np.float32)
    solve = lambda: gdjax.minimize(model_loss, Model(w, jnp.tanh), data, learning_rate=0.1, steps=3)  # noqa: E731
    solve()
    with compilations() as compiled:
        solve()
    assert not compiled


def test_a_setting_among_the_weights_is_named():
    with pytest.raises(ValueError, match=r"weights\.slope is a single number.*keep it out of weights"):
        gdjax.minimize(model_loss, Model(0.5, jnp.tanh), learning_rate=0.1, steps=3)
    with pytest.raises(TypeError, match="neither an array nor hashable"):
        gdjax.minimize(model_loss, Model(np.ones((2, 3)), Unhashable()), learning_rate=0.1, steps=3)


class Unhashable:
    __hash__ = None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_and_jax_arrays_out(dtype):
    w, data = CASES["linear"].batch(9, dtype)
    out = gdjax.minimize(CASES["linear"].loss, w, data, learning_rate=0.1, steps=3)
    as_numpy = out.to("numpy")
    assert type(as_numpy.weights) is type(as_numpy.status) is np.ndarray
    assert np.shares_memory(as_numpy.weights, np.asarray(out.weights))
    if dtype == np.float32:
        assert isinstance(as_numpy.to("jax").weights, jax.Array)
    else:
        with pytest.raises(ValueError, match="float64, which JAX would narrow"):
            as_numpy.to("jax")
    with pytest.raises(ValueError, match=r"kind='cupy'.*'torch'"):
        out.to("cupy")


def test_a_traced_solution_is_converted_outside():
    w, data = CASES["linear"].batch(9, np.float32)
    with pytest.raises(TypeError, match="being traced"):
        jax.jit(lambda w: gdjax.minimize(CASES["linear"].loss, w, data, learning_rate=0.1, steps=3).to("numpy"))(w)


torch_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])


@torch_dtypes
def test_torch_tensors_in_and_out(dtype):
    torch = pytest.importorskip("torch", reason="torch is no dependency of the tests")
    kind = getattr(torch, dtype)
    w = torch.full((5,), 1.0, dtype=kind, requires_grad=True)
    x, t = torch.full((5,), 2.0, dtype=kind), torch.full((5,), 4.0, dtype=kind)
    out = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=0.25, steps=1)
    back = out.to("torch")
    assert back.weights.dtype == kind
    assert back.weights.tolist() == [2.0] * 5
    assert back.status.dtype == torch.int8
    if dtype != "bfloat16":
        assert back.weights.data_ptr() == np.asarray(out.weights).ctypes.data


def test_torch_is_missed_by_name(monkeypatch):
    out = gdjax.minimize(kernel.squared_loss, np.ones(2), (np.ones(2), np.ones(2)), learning_rate=0.1, steps=1)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        out.to("torch")


def test_an_ensemble_of_equinox_networks():
    eqx = pytest.importorskip("equinox", reason="equinox is no dependency of the tests")
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(8, 20, 2)).astype(np.float32), rng.normal(size=(8, 20)).astype(np.float32)
    make = lambda key: eqx.nn.MLP(2, "scalar", 4, 1, key=key, activation=jax.nn.tanh)  # noqa: E731
    networks = eqx.filter_vmap(make)(jax.random.split(jax.random.key(0), 8))
    loss = lambda network, x, t: jnp.mean(jnp.square(jax.vmap(network)(x) - t))  # noqa: E731
    out = gdjax.minimize(loss, networks, (x, t), learning_rate=0.1, steps=50)
    assert isinstance(out.weights, eqx.nn.MLP)
    for i in (0, 7):
        one = jax.tree.map(lambda leaf, i=i: leaf[i] if eqx.is_array(leaf) else leaf, out.weights)
        assert float(loss(one, x[i], t[i])) == pytest.approx(float(out.loss[i]), rel=1e-5)

    @eqx.filter_jit
    @eqx.filter_grad
    def outer(networks):
        return jnp.sum(gdjax.minimize(loss, networks, (x, t), learning_rate=0.1, steps=3).loss)

    slope = outer(networks)
    assert jax.tree.structure(slope) == jax.tree.structure(eqx.filter(networks, eqx.is_inexact_array))


def test_an_ensemble_of_flax_networks():
    nnx = pytest.importorskip("flax.nnx", reason="flax is no dependency of the tests")
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(4, 20, 2)).astype(np.float32), rng.normal(size=(4, 20)).astype(np.float32)
    networks = nnx.vmap(lambda rngs: nnx.Linear(2, 1, rngs=rngs))(nnx.Rngs(0).split(4))
    loss = lambda network, x, t: jnp.mean(jnp.square(network(x)[:, 0] - t))  # noqa: E731
    with jax.numpy_rank_promotion("allow"):
        out = gdjax.minimize(loss, networks, (x, t), learning_rate=0.1, steps=20)
    assert isinstance(out.weights, nnx.Linear)
    assert out.weights.kernel.shape == (4, 2, 1)
