"""What the user's functions return is checked on one problem's shapes, and an error names the argument."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import compilations

import gdjax
from gdjax import batch
from gdjax.kernel import squared_loss
from gdjax.stop import StopRule, gradient_below, loss_below

ONE = np.ones(4, np.float32)
VECTOR = np.ones((4, 3), np.float32)


def call(**changes):
    arguments = {"loss": squared_loss, "weights": ONE, "data": (ONE, ONE), "steps": 3, **changes}
    if "optimizer" not in changes:
        arguments.setdefault("learning_rate", 0.1)
    loss, weights, data = (arguments.pop(name) for name in ("loss", "weights", "data"))
    return gdjax.minimize(loss, weights, data, **arguments)


class Pair:
    """An init/update pair by hand."""

    def __init__(self, init, update):
        self.init, self.update = init, update


class ForgetsItsMemory(StopRule):
    def test(self, step, memory):
        return step.loss < 1


class ChangesItsMemory(StopRule):
    def init(self):
        return jnp.int32(0)

    def test(self, step, memory):
        return memory > 3, memory.astype(jnp.float32)


class LosesItsMemory(ChangesItsMemory):
    def test(self, step, memory):
        return memory > 3, ()


@jax.custom_vjp
def once_differentiable(w):
    return w * w


def slope(w, g):
    return (g * jax.pure_callback(lambda v: 2 * v, jax.ShapeDtypeStruct((), np.float32), w),)


once_differentiable.defvjp(lambda w: (w * w, w), slope)

INIT = Pair(lambda w: jnp.zeros(2), None).init
BAD = {
    "a stop rule that raises": (
        {"stop": lambda s: s.weights[0] < 1},
        ValueError,
        ["stop raised IndexError", "float32[]"],
    ),
    "a stop rule of vectors": (
        {"stop": lambda s: s.weights < 1, "weights": VECTOR, "data": (VECTOR, ONE)},
        ValueError,
        ["stop returned bool of shape (3,)", "one boolean", "jnp.all"],
    ),
    "a stop rule that returns a number": (
        {"stop": lambda s: s.loss},
        ValueError,
        ["stop returned float32 of shape ()"],
    ),
    "a stop rule that returns nothing": ({"stop": lambda s: None}, ValueError, ["stop returned None"]),
    "a stop rule that returns two": (
        {"stop": lambda s: (s.loss < 1, 2)},
        ValueError,
        ["stop returned (bool[], int32[])"],
    ),
    "a joined stop rule that raises": (
        {"stop": loss_below(1) | (lambda s: s.size < 1)},
        ValueError,
        ["stop", "'size'"],
    ),
    "a stop rule without memory": ({"stop": ForgetsItsMemory()}, TypeError, ["stop", "(done, memory)"]),
    "a memory of another dtype": ({"stop": ChangesItsMemory()}, ValueError, ["stop", "memory int32[] to float32[]"]),
    "a memory that is lost": ({"stop": LosesItsMemory()}, ValueError, ["stop", "memory int32[] to ()"]),
    "a schedule that is text": (
        {"learning_rate": lambda k: "fast"},
        ValueError,
        ["learning_rate", "str", "int32 scalar"],
    ),
    "a schedule that is nothing": ({"learning_rate": lambda k: None}, ValueError, ["learning_rate", "returned None"]),
    "a schedule of vectors": ({"learning_rate": lambda k: jnp.ones(3)}, ValueError, ["learning_rate", "shape (3,)"]),
    "a complex schedule": ({"learning_rate": lambda k: 1j}, ValueError, ["learning_rate", "complex64", "real"]),
    "a schedule that raises": ({"learning_rate": lambda k: 1 / 0}, ValueError, ["learning_rate", "ZeroDivisionError"]),
    "a schedule of no argument": ({"learning_rate": lambda: 0.1}, ValueError, ["learning_rate", "positional"]),
    "auto without curvature": (
        {"learning_rate": "auto", "loss": lambda w, x, t: once_differentiable(w)},
        ValueError,
        ["learning_rate='auto'", "second derivative", "pass a number"],
    ),
    "a loss without gradient": (
        {"loss": lambda w, x, t: jax.lax.while_loop(lambda c: c < 3, lambda c: c + 1, w)},
        ValueError,
        ["loss", "gradient", "while_loop"],
    ),
    "weights of size zero": (
        {"weights": np.ones((4, 0), np.float32)},
        ValueError,
        ["weights has shape (4, 0)", "at least one"],
    ),
    "an optimizer without its rate": (
        {"optimizer": optax.adam},
        ValueError,
        ["optimizer adam needs learning_rate", "hyperparams={'learning_rate': ...}"],
    ),
    "an optimizer of another hyperparameter": (
        {"optimizer": optax.adam, "hyperparams": {"lr": 0.1}},
        ValueError,
        ["'lr'", "adam does not take", "learning_rate, b1"],
    ),
    "a hyperparameter in text": (
        {"optimizer": optax.adam, "hyperparams": {"learning_rate": "0.1"}},
        ValueError,
        ["optimizer raised", "hyperparams passes text for learning_rate"],
    ),
    "hyperparameters that are none": (
        {"optimizer": optax.adam, "hyperparams": 0.1},
        TypeError,
        ["hyperparams is a float", "dict"],
    ),
    "an optimizer by name": ({"optimizer": "adam"}, TypeError, ["optimizer is a str", "optax.adam", "hyperparams"]),
    "a function that makes no pair": (
        {"optimizer": lambda: None},
        TypeError,
        ["optimizer returned a NoneType", "init/update"],
    ),
    "an optimizer that raises": (
        {"optimizer": Pair(INIT, lambda g, s, w=None: 1 / 0)},
        ValueError,
        ["optimizer raised ZeroDivisionError in update"],
    ),
    "an init that raises": (
        {"optimizer": Pair(lambda w: w["b"], lambda g, s, w=None: (g, s))},
        ValueError,
        ["optimizer raised", "in init"],
    ),
    "updates of another shape": (
        {"optimizer": Pair(INIT, lambda g, s, w=None: (g * jnp.ones(3), s))},
        ValueError,
        ["optimizer brought weights float32[] to float32[3]"],
    ),
    "a state of another shape": (
        {"optimizer": Pair(INIT, lambda g, s, w=None: (g, jnp.zeros(3)))},
        ValueError,
        ["optimizer brought its state float32[2] to float32[3]"],
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_fails_is_named_before_anything_is_compiled(what):
    changes, error, fragments = BAD[what]
    with compilations() as compiled, pytest.raises(error) as raised:
        call(**changes)
    assert type(raised.value) is error  # not one of JAX's own
    for fragment in fragments:
        assert fragment in str(raised.value)
    assert not compiled


def test_optax_under_strict_promotion_is_named():
    """optax's Adam promotes implicitly when its rate is an array: its user should hear whose error that is."""
    hyperparams = {"learning_rate": np.full(4, 0.1), "b1": 0.8125}  # a kind of problem that no other test has checked
    with pytest.raises(ValueError, match=r"optimizer raised TypePromotionError in update .*strict"):
        call(optimizer=optax.adam, hyperparams=hyperparams)
    with jax.numpy_dtype_promotion("standard"):
        assert call(optimizer=optax.adam, hyperparams=hyperparams).weights.shape == (4,)


@pytest.mark.parametrize("weights", [[[0.0, 0.0]] * 3, {"w": [1.0, 2.0]}, [1.0] * 4])
def test_lists_of_numbers_are_explained(weights):
    with pytest.raises(ValueError, match=r"weights.*single number.*a list is a pytree of its entries.*np\.array"):
        call(weights=weights)
    with pytest.raises(ValueError, match=r"data\[0\]\[0\].*a list is a pytree of its entries"):
        call(data=([1.0, 2.0, 3.0, 4.0], ONE))


GOOD = {
    "Python's True": {"stop": lambda s: True},
    "NumPy's True": {"stop": lambda s: np.bool_(True)},
    "an integer rate": {"learning_rate": lambda k: 1},
    "a schedule of optax": {"learning_rate": optax.exponential_decay(0.1, 2, 0.5)},
    "any names": {"optimizer": lambda **given: optax.sgd(given["rate"]), "hyperparams": {"rate": 0.1}},
    "a default rate": {"optimizer": optax.lbfgs, "hyperparams": {}},
    "None for a hyperparameter": {"optimizer": optax.sgd, "hyperparams": {"learning_rate": 0.1, "momentum": None}},
}


@pytest.mark.parametrize("what", GOOD)
def test_what_is_right_passes(what):
    assert np.isfinite(np.asarray(call(**GOOD[what]).weights)).all()


def test_the_checks_run_once_per_kind_of_problem():
    traces = []

    def seen(step):
        traces.append(step)
        return step.loss <= 0

    call(stop=seen)
    first = len(traces)
    call(stop=seen, weights=2 * ONE)
    assert len(traces) == first > 0


def test_a_function_joins_a_rule_from_either_side():
    function = lambda step: step.index >= 1  # noqa: E731
    weights = 3 * ONE
    for rule, steps in [
        (function | gradient_below(0), 1),
        (gradient_below(0) | function, 1),
        (function & gradient_below(0), 3),
        (gradient_below(0) & function, 3),
    ]:
        assert call(stop=rule, weights=weights).steps.tolist() == [steps] * 4
    with pytest.raises(TypeError, match="stop is a float"):
        1e-3 | gradient_below(0)


def test_results_of_64_bits_are_numpy_arrays_while_jax_would_narrow_them():
    wide = call(weights=ONE.astype(np.float64), data=(ONE.astype(np.float64),) * 2)
    assert isinstance(wide.weights, np.ndarray)
    assert isinstance(wide.loss, np.ndarray)
    assert isinstance(wide.steps, jax.Array)
    assert (wide.weights[0] + 1).dtype == np.float64
    narrow = call()
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((narrow.weights, narrow.loss, narrow.status)))
    with jax.enable_x64(True):
        kept = call(weights=ONE.astype(np.float64), data=(ONE.astype(np.float64),) * 2)
        assert isinstance(kept.weights, jax.Array)
        assert (kept.weights + 1).dtype == np.float64


def test_only_arrays_like_those_before_are_not_looked_at_again(monkeypatch):
    looked = []
    original = batch.checked

    def counted(*arguments):
        looked.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(batch, "checked", counted)
    w, x, t, r = (np.full(77, value, np.float32) for value in (1, 2, 4, 0.1))
    solve = lambda *data, rate=r, **options: gdjax.minimize(  # noqa: E731
        gdjax.kernel.squared_loss, w, data, learning_rate=rate, steps=1, **options
    )
    first = solve(x, t)
    for _ in range(2):
        np.testing.assert_array_equal(solve(x, t).weights, first.weights)
    assert len(looked) == 1
    np.testing.assert_array_equal(solve(x, t, rate=0.1).weights, first.weights)
    assert solve(x, t, dtype="float64").weights.dtype == np.float64
    with pytest.raises(TypeError, match=r"in_axes\[0\] has False|in_axes"):
        solve(x, t, in_axes=False)
    with pytest.raises(ValueError, match="77 problems on axis 0"):
        solve(x[:-1], t)
    with pytest.raises(ValueError, match="learning_rate"):
        solve(x, t, rate=np.full(77, np.nan, np.float32))
    with pytest.raises(TypeError, match="data is a list"):
        gdjax.minimize(gdjax.kernel.squared_loss, w, [x, t], learning_rate=r, steps=1)
