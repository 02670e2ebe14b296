"""The whole descent in one kernel: a problem's scalars stay in registers from the first update to the last.

`TILES` has what takes the place of each tile function, with the same inputs and outputs. Everything they give back is
per problem. They take a whole block and are told how many problems there are: those behind them take no step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdjax.batch import Batch, problem_shapes
from gdjax.engine import course, descent, fixed, refill
from gdjax.engine.evaluator import UnsupportedError
from gdjax.engine.kernels import Kernel
from gdjax.engine.program import Program
from gdjax.engine.targets import Interpreted, Target

TILES: dict[Any, Callable[[Target], Any]] = {
    fixed.tile: descent.descend,
    refill.finish: course.finish,
    refill.entire: course.entire,
}
"""The kernel that takes the place of a tile function, for a target."""


def unfit(program: Program, batch: Batch) -> str:
    """Why a kernel cannot hold these problems; empty where it can. Nothing is compiled for that."""
    target = Interpreted()
    kernel = Kernel(target.lanes)
    own = jax.tree.map(lambda _: True, batch.weights)
    flags = fixed.Inputs(own, None, batch.data_flags, batch.hyper_flags)
    one = problem_shapes((batch.weights, batch.data, batch.hyper), (own, batch.data_flags, batch.hyper_flags))

    def seated(shapes: Any, own: Any) -> Any:
        return jax.tree.map(
            lambda s, flag: jax.ShapeDtypeStruct((target.lanes, *s.shape) if flag else s.shape, s.dtype), shapes, own
        )

    def whole(inputs: Any) -> Any:
        index = jnp.int32(0)
        if program.stop is None:
            descent.descend(target)(kernel, program, 1, flags, index, index)(inputs, index)
        weights, data, hyper = one
        state = jax.eval_shape(program.init, weights, data, hyper)
        lane = jax.eval_shape(program.begin, weights, state, jax.ShapeDtypeStruct((), np.int32), data)
        running = refill.Running(jax.tree.map(lambda _: True, lane), flags.data, flags.hyper)
        seats = seated(refill.Running(lane, data, hyper), running)
        last = course.finish(target)(kernel, program, 1, running, index, index)
        return jax.eval_shape(lambda seated: last(seated, index)[0], seats)

    try:
        jax.eval_shape(whole, seated(fixed.Inputs(one[0], None, one[1], one[2]), flags))
    except UnsupportedError as error:
        return str(error)
    return ""
