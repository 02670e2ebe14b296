"""Which form a kind of problem can run in, told from its program alone, before anything is compiled."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from gdjax.batch import Batch, problem_shapes
from gdjax.engine.evaluator import UnsupportedError, operations
from gdjax.engine.kernels import KERNELS
from gdjax.engine.program import Program
from gdjax.engine.refill import at_rest
from gdjax.engine.whole import can_be_whole
from gdjax.pieces import own
from gdjax.plan import VECTOR

FUSED_OPERATIONS = 256
"""Longest pass of fused steps; XLA was seen to split longer passes."""


class Form(NamedTuple):
    """What form a problem has.

    `refused` says why it has none in lanes (None: it has one), `fusable` how many of its steps may be fused into one
    pass, `whole` whether a tile of it may be one function of machine code on the CPU.
    """

    refused: str | None
    fusable: int = 1
    whole: bool = False


def lane_form(program: Program, batch: Batch, on_host: bool) -> Form:
    """The form of a problem, where lanes can be had.

    Decided once, for all its tiles, from the problem alone. Fusing is for programs that carry their weights alone
    and are short: XLA splits a long pass into several, at places that depend on its length, and where it
    splits, a product that would have been contracted is rounded; and a product of what one step hands to the next is
    computed in both, which compilers notice: used twice, it is not contracted.
    """
    inputs = batch.weights, batch.data, batch.hyper
    flags = own(batch.weights), batch.data_flags, batch.hyper_flags
    lane = jax.tree.map(
        lambda one, flag: jax.ShapeDtypeStruct((*one.shape, VECTOR) if flag else one.shape, one.dtype),
        problem_shapes(inputs, flags),
        flags,
    )
    kernel = KERNELS["lanes"](VECTOR)
    kernel.on_host = on_host

    def trace(inputs: Any) -> None:
        (weights, data, hyper), (own_weights, own_data, own_hyper) = inputs, flags
        kernel.call(program.start, (weights,), (own_weights,))
        state, own_state = kernel.call(program.init, (weights, data, hyper), flags)
        index = np.int32(0)
        if program.stop is None:
            arguments = (weights, state, np.bool_(True), index, data, hyper)
            kernel.call(program.step, arguments, (own_weights, own_state, False, False, own_data, own_hyper))
        else:
            seat, own_seat = kernel.call(
                program.begin, (weights, state, index, data), (own_weights, own_state, False, own_data)
            )
            lane_flags = (*at_rest(own_seat), None, own_data, own_hyper)
            kernel.call(program.leap, (*at_rest(seat), None, data, hyper), lane_flags)
        kernel.call(program.report, (weights, data), (own_weights, own_data))

    try:
        jaxpr = jax.make_jaxpr(trace)(lane).jaxpr
    except UnsupportedError as error:
        return Form(str(error))
    step = kernel.traces_of(program.step if program.stop is None else program.leap)[0]
    alone = program.rule.sticky and len(jax.tree.leaves(batch.weights)) == 1
    fusable = max(1, FUSED_OPERATIONS // operations(step)) if alone else 1
    return Form(None, fusable, can_be_whole(jaxpr))
