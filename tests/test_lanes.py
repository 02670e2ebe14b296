"""The lanes kernel: every family of operations against vmap, the order of sums, and what it hands back to vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import CASES, Case, linear, same_bits, softmax_batch, softmax_regression

import gdjax
from gdjax import Plan, kernel, stop
from gdjax.engine.kernels import KERNELS
from gdjax.engine.program import Program
from gdjax.rules import Descent, Transformation

LANES, VMAP = Plan(kernel="lanes", tile=32, tiles=1, chunk=1), Plan(kernel="vmap", tile=32, tiles=1, chunk=1)


def solve(case, plan, count=21, dtype=np.float64, **options):
    w, data = case.batch(count, dtype)
    return gdjax.minimize(
        case.loss, w, data, in_axes=case.axes, plan=plan, **{"learning_rate": case.rate, "steps": 6, **options}
    )


@pytest.mark.parametrize("name", CASES)
def test_lanes_agree_with_vmap(name):
    case = CASES[name]
    lanes, vmap = solve(case, LANES), solve(case, VMAP)
    assert (lanes.plan.kernel, lanes.plan.reason) == ("lanes", "")
    assert vmap.plan.kernel == "vmap"
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)  # noqa: E731
    jax.tree.map(compare, lanes.weights, vmap.weights)
    compare(lanes.loss, vmap.loss)
    compare(lanes.gradient_norm, vmap.gradient_norm)
    assert not same_bits(lanes.weights, case.batch(21)[0])  # it did move


@pytest.mark.parametrize("name", ["tanh network", "scan", "all shared", "huber"])
def test_lanes_agree_with_vmap_under_a_stop_rule(name):
    options = {"stop": stop.gradient_below(0.1), "steps": 40}
    lanes, vmap = solve(CASES[name], LANES, **options), solve(CASES[name], VMAP, **options)
    assert lanes.plan.kernel == "lanes"
    np.testing.assert_array_equal(lanes.steps, vmap.steps)
    np.testing.assert_array_equal(lanes.status, vmap.status)


def test_lanes_agree_with_a_python_loop_of_one_problem():
    case = CASES["tanh network"]
    w, data = case.batch(3)
    out = solve(case, LANES, count=3)
    with jax.enable_x64(True):
        slope = jax.jit(jax.grad(case.loss))
        for i in range(3):
            p = jax.tree.map(lambda leaf: jnp.asarray(leaf[i]), w)  # noqa: B023
            for _ in range(6):
                p = jax.tree.map(lambda a, g: a - case.rate * g, p, slope(p, *(d[i] for d in data)))
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
                p,
                jax.tree.map(lambda leaf: np.asarray(leaf)[i], out.weights),  # noqa: B023
            )


def test_the_derivative_of_half_a_square_is_not_doubled_on_the_way():
    """Twice the residual would overflow; up to jax 0.11 XLA itself makes ½·(2·e) e."""
    w = np.array([1, -1], np.float32) * np.float32(3e38)
    out = gdjax.minimize(lambda w: 0.5 * jnp.square(w), w, learning_rate=0.5, steps=1, plan=LANES)
    assert same_bits(out.weights, w / 2)


def test_what_a_product_of_one_term_is_made_of_is_not_rounded_twice():
    """`x·w` with one term is a product like any other: rounding what goes into it costs an operation at every step."""
    lanes, numbers = KERNELS["lanes"](32), np.ones((4, 32), np.float32)

    def step(w, x, t, r, zero):
        lanes.zero = zero
        descend = lambda w, x, t, r: w - r * jax.grad(gdjax.kernel.squared_loss)(w, x, t)  # noqa: E731
        return lanes.call(descend, (w, x, t, r), (True,) * 4)[0]

    text = jax.jit(step).lower(*numbers, np.float32(-0.0)).compile().as_text()
    assert text.count(" subtract(") == 2
    assert " add(" not in text


@pytest.mark.parametrize("rule", [Descent(), Transformation(optax.adam(0.1))], ids=["plain", "adam"])
def test_what_several_look_at_is_summed_once(rule):
    """On the CPU: XLA would sum the gradient anew for each moment of Adam, for the weights, and for the stop rule."""
    points, weights, hyper = 24, 3, {"learning_rate": np.float32(0.1)}
    program = Program(linear, rule, stop.gradient_below(1e-3))

    def products(on_host):
        lanes = KERNELS["lanes"](32)
        lanes.on_host = on_host

        def leap(w, x, t, zero):
            lanes.zero = zero
            moving = {"weights": w, "state": rule.init(w, None, hyper), "memory": (), "past": {}}
            own = jax.tree.map(lambda leaf: leaf.ndim > 0, moving)
            arguments = moving, jnp.int32(0), None, (x, t), hyper
            flags = own, False, None, (True, True), {"learning_rate": False}
            return lanes.call(program.leap, arguments, flags)[0]

        shapes = (weights, 32), (points, weights, 32), (points, 32), ()
        lowered = jax.jit(leap).lower(*(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes))
        return lowered.compile().as_text().count(" multiply(")

    once = points + weights  # there and back, a row of products at a time
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        assert once <= products(on_host=True) < 1.5 * once
        assert products(on_host=False) > 1.5 * once


# --- the order of sums -----------------------------------------------------------------------------------------------


def value_of(loss, w, x):
    """The loss at `w` as the lanes kernel sums it."""
    return np.asarray(gdjax.minimize(loss, w, (x,), learning_rate=0.0, steps=1, plan=LANES).loss)


def left_to_right(terms):
    """The float32 sum of `[N, D]`, first term first."""
    total = terms[:, 0].copy()
    for k in range(1, terms.shape[1]):
        total = total + terms[:, k]
    return total


def ragged(shape, seed=0):
    """Numbers over many magnitudes: their float32 sum has other bits in any other order."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 10.0 ** rng.integers(-4, 5, shape)).astype(np.float32)


def powers_of_two(shape, seed=1):
    """Factors whose products are exact, so that a fused multiply-add rounds as a sum does."""
    rng = np.random.default_rng(seed)
    return (rng.choice([-1, 1], shape) * 2.0 ** rng.integers(-3, 4, shape)).astype(np.float32)


def test_the_numbers_can_tell_orders_apart():
    terms = ragged((40, 50)) * powers_of_two((40, 50))
    forward = left_to_right(terms)
    assert np.mean(left_to_right(terms[:, ::-1]) == forward) < 0.5
    assert np.mean(terms.sum(1) == forward) < 0.5


def test_dot_products_and_sums_run_from_left_to_right():
    w, x = powers_of_two((40, 50)), ragged((40, 50))
    expected = left_to_right(w * x)
    assert same_bits(value_of(lambda w, x: x @ w, w, x), expected)
    assert same_bits(value_of(lambda w, x: jnp.sum(x * w), w, x), expected)
    assert same_bits(value_of(lambda w, x: jnp.einsum("i,i->", w, x), w, x), expected)
    classic = np.array([[1e8, 1, -1e8, 1]], np.float32)  # 1 from left to right, 0 in pairs, 2 in exact arithmetic
    assert value_of(lambda w, x: x @ w, np.ones((1, 4), np.float32), classic).tolist() == [1.0]


def test_sums_over_several_axes_run_the_first_index_slowest():
    w, x = powers_of_two((40, 4, 5)), ragged((40, 4, 5))
    assert same_bits(value_of(lambda w, x: jnp.sum(w * x), w, x), left_to_right((w * x).reshape(40, 20)))
    rows = left_to_right((w * x).transpose(0, 2, 1).reshape(200, 4)).reshape(40, 5)  # sum over the first axis first
    assert same_bits(value_of(lambda w, x: jnp.sum(jnp.sum(w * x, 0)), w, x), left_to_right(rows))
    assert same_bits(value_of(lambda w, x: jnp.tensordot(w, x, 2), w, x), left_to_right((w * x).reshape(40, 20)))


def test_extremes_are_exact():
    w, x = np.ones((30, 9), np.float32), ragged((30, 9))
    assert same_bits(value_of(lambda w, x: jnp.max(w * x), w, x), x.max(1))
    assert same_bits(value_of(lambda w, x: jnp.min(w * x), w, x), x.min(1))


def test_shared_data_is_summed_in_the_same_order():
    w, x = powers_of_two((40, 50)), ragged((50,))
    out = gdjax.minimize(lambda w, x: x @ w, w, (x,), in_axes=None, learning_rate=0.0, steps=1, plan=LANES)
    assert same_bits(out.loss, left_to_right(w * x))


# --- what has no lane form -------------------------------------------------------------------------------------------


def sorting(w, x):
    return jnp.sum(jnp.square(jnp.sort(w) - x))


def looping(w, x):
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * 0.5), (0, jnp.sum(jnp.square(w - x))))[1]


def long_sum(w, x):
    return jnp.sum(jnp.square(jnp.concatenate([w, x] * 60) - 1.0))


def choosing(w, x):
    return jax.lax.cond(x[0] > 0, lambda: jnp.sum(jnp.square(w - x)), lambda: jnp.sum(jnp.abs(w)))


@pytest.mark.parametrize(("loss", "fragment"), [(sorting, "sort"), (choosing, "cond"), (long_sum, "length 360")])
@pytest.mark.parametrize("rule", [None, stop.gradient_below(1e-3)], ids=["all steps", "stop rule"])
def test_an_operation_without_lane_form_runs_under_vmap_and_the_plan_says_so(loss, fragment, rule):
    case = Case(loss, (3,), ((3,),), rate=1e-3)
    out = solve(case, "auto", stop=rule)
    assert out.plan.kernel == "vmap"
    assert fragment in out.plan.reason
    wanted = solve(case, VMAP, stop=rule)
    np.testing.assert_allclose(out.weights, wanted.weights, rtol=1e-12)


def test_indexing_by_data_is_right_whichever_kernel_takes_it():
    weights, (x, label) = softmax_batch(30)
    out = gdjax.minimize(softmax_regression, weights, (x, label), learning_rate=0.1, steps=5)
    assert out.plan.kernel == "lanes" or "gather" in out.plan.reason
    with jax.enable_x64(True):
        w = weights
        slope = jax.jit(jax.vmap(jax.grad(softmax_regression)))
        for _ in range(5):
            w = jax.tree.map(lambda a, g: a - 0.1 * np.asarray(g), w, slope(w, x, label))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), out.weights, w)


def test_size_one_axes_broadcast():
    """`x @ w + b[None, :]`, with the bias a weight or shared."""
    rng = np.random.default_rng(0)

    def loss(p, x, c):
        return jnp.sum(jnp.square(x @ p["w"] + p["b"][None, :] - c[:, None]))

    w = {"w": rng.normal(size=(5, 2, 3)), "b": rng.normal(size=(5, 3))}
    data = rng.normal(size=(4, 2)), rng.normal(size=4)
    outs = [gdjax.minimize(loss, w, data, in_axes=None, learning_rate=1e-2, steps=3, plan=p) for p in (LANES, VMAP)]
    assert outs[0].plan.kernel == "lanes"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), outs[0].weights, outs[1].weights)


def test_custom_derivatives_and_checkpoints_are_kept():
    @jax.custom_vjp
    def clipped(w):
        return w * w

    clipped.defvjp(lambda w: (w * w, w), lambda w, g: (jnp.clip(2 * w * g, -1, 1),))

    @jax.checkpoint
    def inner(w):
        return jnp.sin(clipped(w))

    w = np.array([-3.0, 0.1, 0.4])
    out = gdjax.minimize(lambda w: inner(w) + 0.0, w, learning_rate=0.1, steps=1, plan=LANES)
    assert out.plan.kernel == "lanes"
    np.testing.assert_allclose(out.weights, w - 0.1 * np.clip(2 * w * np.cos(w * w), -1, 1), rtol=1e-14)


def test_a_loss_that_ignores_some_of_its_data():
    out = gdjax.minimize(
        lambda w, x, s: jnp.sum(w) * jnp.sum(s),
        np.ones((4, 2)),
        (np.ones(4), np.arange(3.0)),
        in_axes=(0, None),
        learning_rate=0.5,
        steps=2,
        plan=LANES,
    )
    np.testing.assert_array_equal(out.weights, np.full((4, 2), 1 - 2 * 0.5 * 3))


def test_kernel_functions_take_lanes():
    out = solve(Case(kernel.squared_loss, (4,), ((4,), ())), "auto")
    assert out.plan.kernel == "lanes"
