"""A tile of problems that stop when their rule says so: lanes that are done are held while the others go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdjax.engine.kernels import Kernel
from gdjax.engine.program import DIVERGED, RUNNING, Program
from gdjax.engine.tile import inward, outward, settle


class Inputs(NamedTuple):
    """What a block of problems brings; `lane` None: a fresh start, `state` None: of the rule as well."""

    weights: Any
    lane: Any
    data: Any
    hyper: Any
    state: Any = None


class Outputs(NamedTuple):
    """What a block gives back: every lane, with the loss and the gradient norm at its weights."""

    lane: dict[str, Any]
    loss: Any
    gradient_norm: Any


def tile(
    kernel: Kernel, program: Program, chunk: int, flags: Inputs, start: Any, steps: Any
) -> Callable[[Inputs], tuple[Outputs, Outputs]]:
    """The function of one tile: each problem runs until its rule holds or it has taken `steps` updates.

    A tile ends with its slowest problem, looked for every `chunk` updates.
    """

    def run(inputs: Inputs) -> tuple[Outputs, Outputs]:
        weights, lane, data, hyper, state = inward(kernel, inputs, flags)
        own_data, own_hyper, state_flags = flags.data, flags.hyper, flags.state
        if lane is None:
            if state is None:
                state, state_flags = kernel.call(
                    program.init, (weights, data, hyper), (flags.weights, own_data, own_hyper)
                )
            lane, lane_flags = kernel.call(
                program.start, (weights, state, start, data), (flags.weights, state_flags, False, own_data)
            )
        else:
            lane_flags = flags.lane
        last = start + steps
        rest, rest_flags = (last, data, hyper), (False, own_data, own_hyper)

        # Every lane counts its own steps and has its own rule state, whatever the problem shares.
        all_own = jax.tree.map(lambda _: True, lane_flags)
        lane = kernel.spread(lane, lane_flags, all_own)
        carry, carry_flags = settle(kernel, program.advance, (lane,), (all_own,), rest, rest_flags)

        def one(_: Any, carry: Any) -> Any:
            out, out_flags = kernel.call(program.advance, (*carry, *rest), (*carry_flags, *rest_flags))
            return kernel.spread((out,), (out_flags,), carry_flags)

        def running(carry: Any) -> Any:
            return jnp.any(carry[0]["status"] == RUNNING)

        (lane,) = lax.while_loop(running, lambda carry: lax.fori_loop(0, chunk, one, carry), carry)
        lane_flags = carry_flags[0]
        (loss, norm), report_flags = kernel.call(
            program.report, (lane["weights"], data), (lane_flags["weights"], own_data)
        )
        lane = {**lane, "status": judged(lane["status"], loss)}
        out, out_flags = Outputs(lane, loss, norm), Outputs(lane_flags, *report_flags)
        return outward(kernel, out, out_flags), out_flags

    return run


def judged(status: Any, loss: Any) -> Any:
    """A problem whose loss is not finite at its final weights has diverged, whatever its rule said."""
    return jnp.where(jnp.isfinite(loss), status, jnp.int8(DIVERGED))
