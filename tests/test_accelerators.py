"""What can be proved about accelerators without one: the compiled tiles lower for CUDA and TPU from a CPU install."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from gdjax import stop
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
