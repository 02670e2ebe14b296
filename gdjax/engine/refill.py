"""Stop rules: problems that are done make room for others, so that a batch costs what its useful steps cost.

Three compiled tiles. `begin` seats problems in lanes. `sprint` takes steps blindly, several at a time, noting only
whether anything happened that ends a problem; one to which something happened waits where it stood before them.
`finish` takes a waiting problem through those last steps one by one. Between sprints the lanes that wait are
emptied and the others moved together (`gdjax.engine.rounds`), so that no lane runs for nothing longer than one sprint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdjax.engine.kernels import Kernel
from gdjax.engine.program import DIVERGED, RUNNING, Program
from gdjax.engine.tile import inward, outward, settle


class Start(NamedTuple):
    """What problems bring; `state` None: a fresh start of the rule."""

    weights: Any
    state: Any
    data: Any
    hyper: Any


class Running(NamedTuple):
    """Problems in their lanes."""

    lane: Any
    data: Any
    hyper: Any


class Ended(NamedTuple):
    """Lanes that are done, with the loss and the gradient norm at their weights."""

    lane: dict[str, Any]
    loss: Any
    gradient_norm: Any


PASSES_PER_CHECK = 4
"""How often a tile asks whether any of its lanes still runs."""

Tile = Callable[[Any], tuple[Any, Any]]


def begin(kernel: Kernel, program: Program, chunk: int, flags: Start, start: Any, steps: Any) -> Tile:
    """Lanes for fresh problems, at update number `start`. Everything in a lane is its own, whatever problems share."""

    def run(inputs: Start) -> tuple[Any, Any]:
        weights, state, data, hyper = inward(kernel, inputs, flags)
        state_flags = flags.state
        if state is None:
            weights = kernel.spread(*kernel.call(program.start, (weights,), (flags.weights,)), flags.weights)
            state, state_flags = kernel.call(
                program.init, (weights, data, hyper), (flags.weights, flags.data, flags.hyper)
            )
        lane, lane_flags = kernel.call(
            program.begin, (weights, state, start, data), (flags.weights, state_flags, False, flags.data)
        )
        own = jax.tree.map(lambda _: True, lane_flags)
        return outward(kernel, kernel.spread(lane, lane_flags, own), own), own

    return run


def sprint(kernel: Kernel, program: Program, chunk: int, flags: Running, passes: Any, stride: Any) -> Tile:
    """At most `passes` times `stride` updates, `chunk` of them fused, or until every lane waits."""

    def run(inputs: Running) -> tuple[Any, Any]:
        lane, data, hyper = inward(kernel, inputs, flags)
        own = flags.lane
        rest, rest_flags = (data, hyper), (flags.data, flags.hyper)

        def step(_: Any, lane: Any) -> Any:
            out, out_flags = kernel.call(program.stride, (lane, *rest), (own, *rest_flags), carried=1)
            return kernel.spread(out, out_flags, own)

        def blind(_: Any, lane: Any) -> Any:
            if chunk == 1:
                return lax.fori_loop(0, stride, step, lane)
            for _ in range(chunk):
                lane = step(0, lane)
            return lane

        # A loop of one turn, whose length the compiler does not know: it must not merge the strides into the choices
        # after them, each of which would repeat the strides (XLA's CPU backend fuses by repeating).
        once_only = jnp.minimum(passes, 1)

        def once(_: Any, lane: Any) -> Any:
            after = lax.fori_loop(0, once_only, blind, lane)
            held, held_flags = kernel.call(program.hold, (lane, after), (own, own))
            return kernel.spread(held, held_flags, own)

        def going(carry: Any) -> Any:
            number, lane = carry
            return (number < passes) & jnp.any(lane["status"] == RUNNING)

        def some(carry: Any) -> Any:
            number, lane = carry
            upto = jnp.minimum(number + PASSES_PER_CHECK, passes)
            return upto, lax.fori_loop(number, upto, once, lane)

        _, lane = lax.while_loop(going, some, (jnp.int32(0), lane))
        return outward(kernel, lane, own), own

    return run


def finish(kernel: Kernel, program: Program, chunk: int, flags: Running, start: Any, steps: Any) -> Tile:
    """Every problem one step at a time until its rule holds or it has taken `steps` updates since `start`."""

    def run(inputs: Running) -> tuple[Any, Any]:
        lane, data, hyper = inward(kernel, inputs, flags)
        rest, rest_flags = (start + steps, data, hyper), (False, flags.data, flags.hyper)
        carry, carry_flags = settle(kernel, program.advance, (lane,), (flags.lane,), rest, rest_flags)

        def one(_: Any, carry: Any) -> Any:
            out, out_flags = kernel.call(program.advance, (*carry, *rest), (*carry_flags, *rest_flags), carried=1)
            return kernel.spread((out,), (out_flags,), carry_flags)

        def running(carry: Any) -> Any:
            return jnp.any(carry[0]["status"] == RUNNING)

        (lane,) = lax.while_loop(running, lambda carry: lax.fori_loop(0, 4, one, carry), carry)
        own = carry_flags[0]
        report, report_flags = kernel.call(program.report, (lane["weights"], data), (own["weights"], flags.data))
        loss, norm = kernel.spread(report, report_flags, (True, True))
        # A loss that is not finite at the final weights is no answer, whatever the rule said.
        lane = {**lane, "status": jnp.where(jnp.isfinite(loss), lane["status"], jnp.int32(DIVERGED))}
        out, out_flags = Ended(lane, loss, norm), Ended(own, True, True)
        return outward(kernel, out, out_flags), out_flags

    return run
