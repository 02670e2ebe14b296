"""The host reference against `minimize`, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdjax
from gdjax import host

N, STEPS = 5, 20


def squared(w, x, t):
    return 0.5 * (t - x @ w) ** 2


def logistic(w, x, t):
    return -jnp.log(jax.nn.sigmoid(jnp.sign(t) * (x @ w)))


def cross_entropy(w, x, t):
    return jnp.logaddexp(jnp.zeros_like(t), -jnp.sign(t) * (x @ w))


def huber(w, x, t):
    e = jnp.abs(t - x @ w)
    return jnp.where(e < 0.5, 0.5 * e**2, 0.5 * (e - 0.25))


def log_cosh(w, x, t):
    return jnp.log(jnp.cosh(t - x @ w))


def poisson(w, x, t):
    rate = x @ w
    return jnp.exp(rate) - jnp.abs(t) * rate


def softplus_cosine(w, x, t):
    return jax.nn.softplus(x @ w) + 0.5 * jnp.cos(w[0] - t) + 0.5 * jnp.sum(jnp.square(w[1:]))


def network(w, x, t):
    hidden = jnp.tanh(w["in"] @ x + w["bias"])
    return 0.5 * (t - hidden @ w["out"]) ** 2


def largest(w, x, t):
    return jnp.max(jnp.where(x > 0, (w - t) ** 2, 0.5 * w**2)) + 0.1 * jnp.sum(w * w)


def recurrent(w, x, t):
    end, states = jax.lax.scan(lambda c, a: (jnp.tanh(c * w[0] + a * w[1]), c), w[2], x)
    return 0.5 * (t - end) ** 2 + jnp.sum(states**2) * jnp.asarray(0.1, t.dtype)


LOSSES = [squared, logistic, cross_entropy, huber, log_cosh, poisson, softplus_cosine, network, largest, recurrent]


def problem(loss, dtype):
    """Well-conditioned: numbers of order one, and rates far below 2 / curvature. The same numbers in every dtype."""
    random = np.random.default_rng(LOSSES.index(loss))
    draw = lambda *shape: random.uniform(-1, 1, shape).astype(np.float32).astype(dtype)  # noqa: E731
    shapes = {"in": (N, 4, 3), "bias": (N, 4), "out": (N, 4)}
    weights = {k: draw(*s) for k, s in shapes.items()} if loss is network else draw(N, 3)
    rates = np.linspace(0.0625, 0.25, N).astype(dtype)
    return weights, (draw(N, 3), draw(N)), rates


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(p).astype(np.longdouble) - q))) for p, q in pairs)


@pytest.fixture(scope="module")
def distances():
    """Largest distance of `minimize` from the host, by loss and dtype."""
    found = {}
    for loss in LOSSES:
        for dtype in ("float32", "float64"):
            weights, data, rates = problem(loss, dtype)
            got = gdjax.minimize(loss, weights, data, learning_rate=rates, steps=STEPS, device="cpu").weights
            wanted = host.descend(loss, weights, data, learning_rate=rates, steps=STEPS)
            assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(dtype)}
            assert distance(weights, wanted) > 0.01  # it went somewhere
            found[loss, dtype] = distance(got, wanted)
    return found


wide_enough = pytest.mark.skipif(np.finfo(np.longdouble).nmant <= 52, reason="long double is float64 here")


@wide_enough
@pytest.mark.parametrize("loss", LOSSES)
def test_minimize_agrees_with_the_host(loss, distances):
    assert distances[loss, "float32"] < STEPS / 2 * np.finfo(np.float32).eps
    assert distances[loss, "float64"] < 1e-13


@wide_enough
def test_the_distance_shrinks_as_the_epsilons(distances):
    """Over all losses; were the host as narrow as the problem, or its formulas wrong, it would not."""
    ratios = [distances[loss, "float32"] / distances[loss, "float64"] for loss in LOSSES]
    epsilons = float(np.finfo(np.float32).eps / np.finfo(np.float64).eps)
    assert epsilons / 4 < np.median(ratios) < epsilons * 4
    assert all(epsilons / 16 < ratio < epsilons * 16 for ratio in ratios)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_types(dtype):
    weights, data, rates = problem(squared, jnp.dtype(dtype))
    got = gdjax.minimize(squared, weights, data, learning_rate=rates, steps=STEPS, device="cpu").weights
    wanted = host.descend(squared, weights, data, learning_rate=rates, steps=STEPS)
    assert wanted.dtype == np.float64
    assert 0 < distance(got, wanted) < 2 * STEPS * float(jnp.finfo(dtype).eps)


def test_shared_data_and_a_common_rate():
    weights, (x, t), _ = problem(squared, np.float32)
    together = host.descend(squared, weights, (x[0], t), in_axes=(None, 0), learning_rate=0.1, steps=3)
    alone = host.descend(squared, weights[2:3], (x[:1], t[2:3]), learning_rate=np.float32(0.1), steps=3)
    np.testing.assert_array_equal(together[2:3], alone)


def test_an_update_that_is_not_finite_is_not_taken():
    w = np.array([1, 2], np.float32)
    rates = np.array([0, 1], np.float32)
    got = host.descend(lambda w: jnp.exp(jnp.exp(w**2)), w, learning_rate=rates, steps=3)
    assert got[0] == 1
    assert np.isfinite(got[1])
    assert got[1] < -1e20


@pytest.mark.parametrize("loss", [recurrent, network, cross_entropy])
def test_the_result_does_not_depend_on_jax_settings(loss):
    weights, data, rates = problem(loss, np.float32)
    descend = lambda: host.descend(loss, weights, data, learning_rate=rates, steps=3)  # noqa: E731
    usual = descend()
    with jax.disable_jit():
        assert distance(descend(), usual) == 0
    with jax.default_device(jax.devices("cpu")[-1]):
        assert distance(descend(), usual) == 0


def structural(x):
    a = jax.lax.dot_general(x, x + 1, (((2,), (1,)), ((0,), (0,))))
    b = jax.lax.pad(x, jnp.zeros((), x.dtype), ((1, -1, 0), (0, 0, 1), (-1, 2, 0)))
    c = jnp.concatenate([jnp.flip(x, 1), jnp.swapaxes(x, 1, 2)], axis=0)
    d, e = jnp.split(x, [1], axis=2)
    f = jax.lax.clamp(jnp.asarray(-0.5, x.dtype), x, jnp.asarray(0.5, x.dtype))
    h = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 2) % 2 == 0, f, jax.lax.rsqrt(jnp.abs(x) + 1))
    i = (jnp.prod(x, 0), jnp.min(x, 1), jnp.any(x > 0, 2), jnp.all(x > -1), x[:, ::2], jnp.tile(x[0], (2, 1)))
    k = (jnp.trunc(x * 9).astype(jnp.int32) // 2, x**-2, jnp.log1p(jnp.abs(x)), jnp.expm1(x), jax.nn.sigmoid(x))
    return a, b, c, d, e, f, h, i, k, jax.scipy.special.erf(x), jax.scipy.special.erfc(x), jax.checkpoint(jnp.sin)(x)


def test_operations_against_jax():
    """float32 exactly as long as nothing is rounded, so shapes and order are checked, and close where it is."""
    x = np.random.default_rng(0).uniform(-1, 1, (2, 3, 3)).astype(np.float32)
    for got, wanted in zip(
        jax.tree.leaves(host.evaluate(structural, x)), jax.tree.leaves(structural(jnp.asarray(x))), strict=True
    ):
        assert got.shape == wanted.shape
        assert got.dtype == (np.float64 if wanted.dtype == np.float32 else wanted.dtype)
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)


def test_constants_are_rounded_as_the_program_holds_them():
    one = np.float32(1)
    assert host.evaluate(lambda x: x * 0.1, one) == np.float64(np.float32(0.1))
    assert host.evaluate(lambda x: x + 2.0**-40, one) == 1 + 2.0**-40  # what follows is not rounded


def test_what_later_versions_of_jax_made_operations_of_their_own():
    assert host.evaluate(jnp.log2, np.float32(8)) == 3
    assert host.evaluate(jnp.polyval, np.float32([2, 5, 1]), np.float32(3)) == 34
    assert abs(host.evaluate(jax.grad(jnp.tanh), np.float32(1)) - 1 / np.cosh(1) ** 2) < 1e-15


@wide_enough
def test_precision():
    assert host.evaluate(jnp.tanh, np.float32(1)).dtype == np.float64
    assert host.evaluate(jnp.tanh, np.float32(1), precision=np.longdouble).dtype == np.longdouble
    got = host.evaluate(jnp.tanh, np.float64(1))
    assert abs(got - np.tanh(np.longdouble(1))) == 0
    assert got != np.tanh(1.0)


@pytest.mark.parametrize(("dtype", "precision"), [("float64", "float64"), ("float32", "float32")])
def test_a_precision_that_is_not_wider_is_refused(dtype, precision):
    with pytest.raises(ValueError, match=f"precision {precision} has"):
        host.evaluate(jnp.sin, np.ones(2, dtype), precision=precision)
    with pytest.raises(TypeError, match="precision=int32"):
        host.evaluate(jnp.sin, np.ones(2, dtype), precision="int32")


def test_unsupported_operations_are_named():
    weights, data, _ = problem(squared, np.float32)
    with pytest.raises(host.UnsupportedError, match="'sort'"):
        host.descend(lambda w, x, t: jnp.sort(w)[0] * t, weights, data, learning_rate=0.1, steps=1)
    with pytest.raises(host.UnsupportedError, match="'erf' has no form on the host in"):
        host.evaluate(jax.scipy.special.erf, np.float32(1), precision=np.longdouble)
    # An operation whose result no output needs does no harm.
    assert host.evaluate(lambda x: (jnp.sort(x), x + 1)[1], np.float32([1])) == 2


@pytest.mark.parametrize("rate", ["auto", lambda step: 0.1])
def test_rates_that_are_no_numbers_are_refused(rate):
    weights, data, _ = problem(squared, np.float32)
    with pytest.raises(TypeError, match="a number or an"):
        host.descend(squared, weights, data, learning_rate=rate, steps=1)
