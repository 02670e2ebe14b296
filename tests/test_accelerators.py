"""What can be proved about accelerators without one: the compiled tiles lower for CUDA and TPU from a CPU install, and
what a call there looks at only once, on a CPU that is taken for one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from simulated import accelerator

import gdjax
from gdjax import batch, rates, stop
from gdjax.engine import fixed, refill
from gdjax.engine.kernels import KERNELS
from gdjax.engine.program import Program
from gdjax.kernel import squared_loss
from gdjax.rules import Descent


def vector_loss(w, x, t):
    return 0.5 * jnp.mean((t - x @ w) ** 2)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("kernel_name", ["lanes", "vmap"])
@pytest.mark.parametrize(("loss", "shape"), [(squared_loss, ()), (vector_loss, (16, 4))])
def test_tiles_lower_for_accelerators(platform, kernel_name, loss, shape):
    size, program = 1024, Program(loss, Descent(), stop.gradient_below(1e-5))
    array = lambda *s: jax.ShapeDtypeStruct((size, *s), np.float32)  # noqa: E731
    data = (array(*shape), array(*shape[:1]))
    weights, hyper = array(*shape[1:]), {"learning_rate": array()}
    number = jax.ShapeDtypeStruct((), np.int32)
    own = (True, (True, True), {"learning_rate": True})
    chunk = 1 if shape else 16

    def run_fixed(inputs, steps):
        flags = fixed.Inputs(own[0], None, own[1], own[2])
        return fixed.tile(KERNELS[kernel_name](size), program, chunk, flags, jnp.int32(0), steps)(inputs)[0]

    def run_until(inputs, steps):
        kernel = KERNELS[kernel_name](size)
        flags = refill.Start(own[0], None, own[1], own[2])
        lane, lane_flags = refill.begin(kernel, program, 1, flags, jnp.int32(0), steps)(inputs)
        seated = refill.Running(lane, inputs.data, inputs.hyper)
        return refill.finish(kernel, program, 1, refill.Running(lane_flags, own[1], own[2]), jnp.int32(0), steps)(
            seated
        )[0]

    for function, inputs in (
        (run_fixed, fixed.Inputs(weights, None, data, hyper)),
        (run_until, refill.Start(weights, None, data, hyper)),
    ):
        exported = export.export(jax.jit(function), platforms=[platform])(inputs, number)
        assert exported.platforms == (platform,)
        assert "stablehlo.while" in exported.mlir_module()


@pytest.fixture
def placed(monkeypatch):
    """`(device, weights, data, rates)`, the arrays on a device that counts as an accelerator."""
    (device,) = accelerator(monkeypatch)
    rng = np.random.default_rng(0)
    w, x, t = (rng.normal(size=100).astype(np.float32) for _ in range(3))
    return device, *jax.device_put((w, (x, t), np.full(100, 0.1, np.float32)), device)


def test_rates_on_an_accelerator_are_looked_at_once_and_bad_ones_always(placed, monkeypatch):
    device, weights, data, good = placed
    looked = []
    sound = rates.sound
    monkeypatch.setattr(rates, "sound", lambda values: looked.append(values) or sound(values))

    def solve(values):
        return gdjax.minimize(squared_loss, weights, data, learning_rate=values, steps=3, device=device)

    first, again = solve(good), solve(good)
    assert len(looked) == 1
    np.testing.assert_array_equal(first.weights, again.weights)
    bad = good.at[7].set(-1)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"learning_rate\[7\] is -1.0"):
            solve(bad)
    solve(good + 0)  # another array, if with the same numbers
    assert len(looked) == 4
    assert len(rates.SETTLED) < 3  # those that nobody holds are forgotten


def test_what_fits_on_an_accelerator_is_looked_at_once_and_what_does_not_always(placed, monkeypatch):
    device, weights, data, rate = placed
    monkeypatch.setattr(batch, "SOUND", {})
    looked = []
    checked = batch.checked
    monkeypatch.setattr(batch, "checked", lambda *args: looked.append(args) or checked(*args))

    def solve(weights, data):
        return gdjax.minimize(squared_loss, weights, data, learning_rate=rate, steps=3, device=device)

    one, other = solve(weights, data), solve(weights + 1, data)
    assert len(looked) == 1
    assert not np.array_equal(one.weights, other.weights)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"weights has 100 problems on axis 0, data\[0\] has 99"):
            solve(weights, (data[0][:99], data[1]))
    host = jax.device_put(weights, jax.devices("cpu")[0])
    np.testing.assert_array_equal(solve(host, data).weights, one.weights)  # elsewhere: looked at anew
    assert len(looked) == 4
