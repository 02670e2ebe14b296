"""Bad input gets an error that names the argument, what came and what was wanted, before anything is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import compilations
from simulated import accelerator

import gdjax
from gdjax import kernel
from gdjax.kernel import squared_loss

ONE = np.ones(4, np.float32)
VECTOR = np.ones((4, 3), np.float32)


def raising(w, x, t):
    raise KeyError("no such column")


class Unhashable:
    """A function with settings that may change, as dataclasses are."""

    __hash__ = None

    def __call__(self, *args):
        return jnp.float32(0)


def call(**changes):
    arguments = {"loss": squared_loss, "weights": ONE, "data": (ONE, ONE), "learning_rate": 0.1, "steps": 3, **changes}
    loss, weights, data = (arguments.pop(name) for name in ("loss", "weights", "data"))
    return gdjax.minimize(loss, weights, data, **arguments)


BAD = {
    "lengths that differ": (
        {"weights": {"a": ONE, "b": np.ones(5, np.float32)}},
        ValueError,
        ["weights['a'] has 4 problems", "weights['b'] has 5"],
    ),
    "data of another length": (
        {"data": (ONE, np.ones(5, np.float32))},
        ValueError,
        ["4 problems", "data[1] has 5", "in_axes"],
    ),
    "nested data of another length": (
        {"data": ({"x": ONE, "y": [np.ones(9, np.float32)]}, ONE)},
        ValueError,
        ["4 problems", "data[0]['y'][0] has 9"],
    ),
    "rates of another length": ({"learning_rate": np.full(3, 0.1)}, ValueError, ["4 problems", "learning_rate has 3"]),
    "a leaf without problem axis": (
        {"weights": {"w": ONE, "b": np.float32(1)}},
        ValueError,
        ["weights['b']", "problem axis", "[N, ...]"],
    ),
    "a number for weights": ({"weights": 1.0}, ValueError, ["weights", "problem axis"]),
    "data without problem axis": ({"data": (ONE, np.float32(3))}, ValueError, ["data[1]", "in_axes=None"]),
    "a loss that cannot be hashed": ({"loss": Unhashable()}, TypeError, ["loss: unhashable", "plain function"]),
    "a figure that cannot be hashed": (
        {"stop": gdjax.stop.Below("mine", Unhashable(), 1.0)},
        TypeError,
        ["stop: unhashable", "plain function"],
    ),
    "a record that cannot be hashed": ({"record": Unhashable()}, TypeError, ["record: unhashable", "plain function"]),
    "a schedule that cannot be hashed": (
        {"learning_rate": Unhashable()},
        TypeError,
        ["learning_rate", "unhashable", "plain function"],
    ),
    "an empty batch": (
        {"weights": ONE[:0], "data": (ONE[:0], ONE[:0])},
        ValueError,
        ["weights has 0 problems", "at least one"],
    ),
    "no weights": ({"weights": {}}, ValueError, ["weights", "no arrays"]),
    "integer weights": ({"weights": np.ones(4, np.int32)}, TypeError, ["weights", "int32", "integer", "astype"]),
    "boolean weights": ({"weights": np.ones(4, bool)}, TypeError, ["weights", "bool", "floating"]),
    "complex weights": ({"weights": np.ones(4, np.complex64)}, TypeError, ["weights", "complex64", "real"]),
    "text weights": ({"weights": np.array(["a"] * 4)}, TypeError, ["weights", "<U1"]),
    "object data": ({"data": (ONE, np.array([None] * 4))}, TypeError, ["data[1]", "object"]),
    "dates": ({"data": (ONE, np.zeros(4, "datetime64[s]"))}, TypeError, ["data[1]", "datetime64"]),
    "long doubles": ({"weights": np.ones(4, np.longdouble)}, TypeError, ["weights", "float128"]),
    "data that is no tuple": ({"data": ONE}, TypeError, ["data", "ndarray", "tuple"]),
    "data that is a list": ({"data": [ONE, ONE]}, TypeError, ["data", "list", "tuple"]),
    "in_axes of another length": ({"in_axes": (0,)}, ValueError, ["in_axes=(0,)", "2 entries"]),
    "in_axes that is no axis": ({"in_axes": (0, "x")}, TypeError, ["in_axes[1]", "'x'"]),
    "in_axes out of range": ({"in_axes": (0, 1)}, ValueError, ["data[1]", "(4,)", "axis 1"]),
    "in_axes that does not fit": ({"in_axes": ({"x": 0}, 0)}, ValueError, ["in_axes[0]", "data[0]"]),
    "a loss that is no scalar": (
        {"loss": lambda w, x, t: (t - x * w) * w, "weights": VECTOR, "data": (VECTOR, ONE)},
        ValueError,
        ["loss", "shape (3,)", "scalar"],
    ),
    "a loss that returns two": ({"loss": lambda w, x, t: (w, x)}, ValueError, ["loss", "2 arrays", "scalar"]),
    "a loss that returns nothing": ({"loss": lambda w, x, t: None}, ValueError, ["loss", "scalar"]),
    "a loss that returns an integer": (
        {"loss": lambda w, x, t: jnp.int32(1)},
        TypeError,
        ["loss", "int32", "floating"],
    ),
    "a complex loss": ({"loss": lambda w, x, t: jax.lax.complex(w, x)}, TypeError, ["loss", "complex64", "real"]),
    "a loss that raises": ({"loss": raising}, ValueError, ["loss", "KeyError", "no such column", "float32"]),
    "a loss of other arguments": ({"loss": lambda w: w}, ValueError, ["loss", "TypeError", "positional"]),
    "a loss that looks at values": (
        {"loss": lambda w, x, t: w if w > 0 else -w},
        ValueError,
        ["loss", "TracerBoolConversionError"],
    ),
    "a loss whose shapes do not fit": ({"data": (VECTOR, ONE)}, ValueError, ["loss", "float32[3]"]),
    "a loss that is no function": ({"loss": "squared"}, TypeError, ["loss", "str", "function"]),
    "both rate and optimizer": ({"optimizer": object()}, ValueError, ["both", "learning_rate", "optimizer"]),
    "neither rate nor optimizer": ({"learning_rate": None}, ValueError, ["neither", "learning_rate", "optimizer"]),
    "zero steps": ({"steps": 0}, ValueError, ["steps=0", "at least 1"]),
    "negative steps": ({"steps": -3}, ValueError, ["steps=-3", "at least 1"]),
    "half a step": ({"steps": 2.5}, TypeError, ["steps=2.5", "whole number"]),
    "steps by name": ({"steps": "all"}, TypeError, ["steps='all'", "whole number"]),
    "true steps": ({"steps": True}, ValueError, ["steps=True", "whole number"]),
    "too many steps": ({"steps": 2**31}, ValueError, ["steps=2147483648", "2**31"]),
    "a negative rate": ({"learning_rate": -0.1}, ValueError, ["learning_rate is -0.1", "zero or more"]),
    "a rate that is NaN": ({"learning_rate": float("nan")}, ValueError, ["learning_rate is nan", "finite"]),
    "an infinite rate": ({"learning_rate": np.inf}, ValueError, ["learning_rate is inf", "finite"]),
    "one negative rate": ({"learning_rate": np.array([0.1, 0.1, -1.0, 0.1])}, ValueError, ["learning_rate[2] is -1.0"]),
    "one rate that is NaN": (
        {"learning_rate": np.array([0.1, np.nan, 1.0, 0.1])},
        ValueError,
        ["learning_rate[1] is nan"],
    ),
    "a table of rates": ({"learning_rate": np.ones((4, 2))}, ValueError, ["learning_rate", "(4, 2)", "[N]"]),
    "a rate by another name": ({"learning_rate": "fast"}, ValueError, ["learning_rate='fast'", "'auto'"]),
    "a rate that is no number": ({"learning_rate": [None]}, TypeError, ["learning_rate", "number"]),
    "a complex rate": ({"learning_rate": 1j}, TypeError, ["learning_rate", "number"]),
    "hyperparameters with a rate": ({"hyperparams": {"b1": 0.9}}, ValueError, ["hyperparams", "optimizer"]),
    "an optimizer that is none": (
        {"learning_rate": None, "optimizer": "adam"},
        TypeError,
        ["optimizer", "str", "optax"],
    ),
    "stop that is no rule": ({"stop": 1e-6}, TypeError, ["stop", "float", "gradient_below"]),
    "an unknown device": ({"device": "gpus"}, ValueError, ["device='gpus'", "'gpu'"]),
    "an absent device": ({"device": "tpu"}, ValueError, ["device='tpu'", "cpu:0", "pip install"]),
    "a device number too high": ({"device": "cpu:8"}, ValueError, ["device='cpu:8'", "cpu:7"]),
    "a device that is none": ({"device": 3}, TypeError, ["device", "int"]),
    "no devices": ({"device": []}, ValueError, ["device", "empty"]),
    "an integer dtype": ({"dtype": "int32"}, TypeError, ["dtype=int32", "float32"]),
    "an unknown dtype": ({"dtype": "float31"}, TypeError, ["dtype='float31'", "float32"]),
    "a plan by name": ({"plan": "fastest"}, TypeError, ["plan", "'fastest'", "'auto'"]),
    "resume that is no state": ({"resume": {}}, TypeError, ["resume", "dict", "state"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named_before_anything_is_compiled(what):
    changes, error, fragments = BAD[what]
    with compilations() as compiled, pytest.raises(error) as raised:
        call(**changes)
    message = str(raised.value)
    assert type(raised.value) is error  # not one of JAX's own
    assert "gdjax" in str(raised.traceback[-1].path)
    for fragment in fragments:
        assert fragment in message
    assert not compiled


def test_hyperparameters_of_another_length():
    with pytest.raises(ValueError, match=r"4 problems.*b1.* has 3"):
        call(learning_rate=None, optimizer=optax.adam, hyperparams={"learning_rate": 0.1, "b1": np.full(3, 0.9)})


def test_hyperparameters_with_a_finished_pair():
    with pytest.raises(ValueError, match=r"hyperparams.*optax\.adam"):
        call(learning_rate=None, optimizer=optax.adam(0.1), hyperparams={"b1": 0.9})


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"learning_rate": None, "optimizer": lambda rate: None, "hyperparams": {}}, ["optimizer", "rate"]),
        ({"stop": lambda s: s.weights[0] < 1}, ["stop"]),
        ({"stop": lambda s: s.weights < 1, "weights": VECTOR, "data": (VECTOR, ONE)}, ["stop", "(3,)"]),
        ({"learning_rate": lambda k: "fast"}, ["learning_rate"]),
        ({"learning_rate": lambda k: jnp.ones(3)}, ["learning_rate", "(3,)"]),
    ],
    ids=["optimizer", "stop raises", "stop is no scalar", "schedule is text", "schedule is no scalar"],
)
def test_functions_that_fail_are_named(changes, fragments):
    with compilations() as compiled, pytest.raises((ValueError, TypeError)) as raised:
        call(**changes)
    assert all(fragment in str(raised.value) for fragment in fragments)
    assert not compiled


def test_resume_of_another_batch_and_another_kind_of_run():
    first = call()
    with pytest.raises(ValueError, match="4 problems, weights has 5"):
        call(weights=np.ones(5, np.float32), data=(np.ones(5, np.float32),) * 2, resume=first.state)
    with pytest.raises(ValueError, match="stop rule"):
        call(stop=gdjax.stop.gradient_below(1e-3), resume=first.state)
    stopped = call(stop=gdjax.stop.gradient_below(1e-3))
    with pytest.raises(ValueError, match="stop rule"):
        call(resume=stopped.state)


@pytest.mark.parametrize("tol", [-1.0, float("nan"), "small", None, True])
@pytest.mark.parametrize(
    "make",
    [
        gdjax.stop.gradient_below,
        gdjax.stop.loss_below,
        gdjax.stop.loss_change_below,
        gdjax.stop.update_below,
    ],
)
def test_tolerances(make, tol):
    with pytest.raises(ValueError, match=f"{make.__name__}; pass a number, zero or more"):
        make(tol)


def test_a_stop_rule_joined_with_something_else():
    with pytest.raises(TypeError, match="stop is a float"):
        gdjax.stop.gradient_below(1e-3) | 1e-3


def test_a_failed_call_leaves_nothing_behind():
    expected = call()
    for changes, error, _ in BAD.values():
        with pytest.raises(error):
            call(**changes)
    again = call()
    np.testing.assert_array_equal(again.weights, expected.weights)
    assert kernel.squared_loss is squared_loss


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_rates_on_an_accelerator_are_refused_whether_compiled_or_not(monkeypatch, bad):
    (device,) = accelerator(monkeypatch)

    def loss(w, x, t):
        return squared_loss(w, x, t)

    good = jax.device_put(np.full(4, 0.1, np.float32), device)
    solve = lambda rates: call(loss=loss, learning_rate=rates, device=device)  # noqa: E731
    with compilations() as seen, pytest.raises(ValueError, match=r"learning_rate\[2\] is "):
        solve(good.at[2].set(bad))
    assert not any("block" in name for name in seen)
    assert np.isfinite(solve(good).weights).all()
    with pytest.raises(ValueError, match=r"learning_rate\[2\] is .*zero or more"):
        solve(good.at[2].set(bad))


def test_adam_may_have_any_rate(monkeypatch):
    """It is a hyperparameter like others."""
    (device,) = accelerator(monkeypatch)
    rates = jax.device_put(np.full(4, -0.1, np.float32), device)
    with jax.numpy_dtype_promotion("standard"):
        options = {"optimizer": optax.adam, "hyperparams": {"learning_rate": rates}, "learning_rate": None}
        assert call(device=device, **options).summary()["RAN_ALL_STEPS"] == 4


@pytest.mark.parametrize("name", ["weights['a']", "data[0]", "data[1]", "learning_rate", "resume"])
def test_arrays_that_were_given_away_are_named(name):
    """Also where arrays like them have been used before."""

    def loss(w, x, t):
        return squared_loss(w["a"], x, t)

    arrays = {"weights['a']": ONE, "data[0]": ONE, "data[1]": ONE, "learning_rate": ONE / 8}
    arrays = {key: jnp.array(value) for key, value in arrays.items()}  # JAX's own memory
    options = {"learning_rate": arrays["learning_rate"], "steps": 3, "device": "cpu"}
    given = {"a": arrays["weights['a']"]}, (arrays["data[0]"], arrays["data[1]"])
    first = gdjax.minimize(loss, *given, stop=gdjax.stop.loss_below(0.0), **options)
    if name == "resume":
        given = (first.weights, given[1])
        options["resume"] = jax.tree.map(jnp.array, first.state)
        jax.tree.leaves(options["resume"].carried)[0].delete()
    else:
        arrays[name].delete()
    with compilations() as seen, pytest.raises(ValueError) as raised:
        gdjax.minimize(loss, *given, stop=gdjax.stop.loss_below(0.0), **options)
    assert not seen
    assert str(raised.value).startswith(f"{name} is a jax.Array that was deleted, as donating it to a function does")


def test_a_hyperparameter_that_was_given_away_is_named():
    rates = jnp.full(4, 0.1, jnp.float32)
    rates.delete()
    with pytest.raises(ValueError, match=r"learning_rate is a .* that was deleted"):
        call(optimizer=optax.adam, hyperparams={"learning_rate": rates}, learning_rate=None)


def test_other_arguments_that_were_given_away_are_named(tmp_path):
    gone = jnp.array(ONE)
    gone.delete()
    mean = lambda w, x, t: jnp.mean(squared_loss(w, x, t))  # noqa: E731
    options = {"learning_rate": 0.1, "steps": 3}
    stream = lambda source, weights, data: gdjax.solve_stream(  # noqa: E731
        source, tmp_path / "out", squared_loss, weights, data, **options
    )
    columns = {"x": ONE, "t": ONE}
    calls = {
        "over['learning_rate']: it": lambda: gdjax.sweep(
            mean, np.float32(1), (ONE, ONE), over={"learning_rate": gone}, steps=3
        ),
        "over['start']: it": lambda: gdjax.sweep(
            mean, np.float32(1), (ONE, ONE), over={"start": [gone, gone]}, **options
        ),
        "source['x']": lambda: stream({"x": gone, "t": ONE}, 1.0, ("x", "t")),
        "weights": lambda: stream(columns, gone, ("x", "t")),
        "data[1]": lambda: stream(columns, 1.0, ("x", gone)),
        "key": lambda: gdjax.random_weights(gone, (3,), 4),
    }
    for name, call_it in calls.items():
        with pytest.raises(ValueError) as raised:
            call_it()
        assert str(raised.value).startswith(f"{name} is a jax.Array that was deleted")
    assert not list(tmp_path.iterdir())
