"""All steps, no stop rule: the descent without a look at where it stands, several steps fused into one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax.engine.joint import Joint, joint
from gdjax.engine.kernels import Kernel
from gdjax.engine.program import DIVERGED, RAN_ALL_STEPS, RUNNING, Program, finite
from gdjax.engine.tile import inward, outward, repeat, settle


class Inputs(NamedTuple):
    """What a block of problems brings: weights, the rule's state (None: a fresh start), data, hyperparameters."""

    weights: Any
    state: Any
    data: Any
    hyper: Any


class Outputs(NamedTuple):
    """What a block gives back. `status` is RUNNING where an update was not finite; such problems are run again.

    `lowest`: the lowest status of all, from kernels in registers, where looking for it afterwards would take as long as
    many descents.
    """

    weights: Any
    state: Any
    loss: Any
    gradient_norm: Any
    status: Any
    lowest: Any = None


def tile(
    kernel: Kernel, program: Program, chunk: int, flags: Inputs, start: Any, steps: Any
) -> Callable[[Inputs], tuple[Outputs, Outputs]]:
    """The function of one tile of problems: `steps` updates from update number `start` on, `chunk` of them per pass."""

    def run(inputs: Inputs) -> tuple[Outputs, Outputs]:
        inputs = inward(kernel, inputs, flags)
        carry, carry_flags, updates = ready(kernel, program, flags, inputs)
        carry = descend(updates, carry, start, steps, chunk)
        out, out_flags = outcome(kernel, program, flags, inputs, carry, carry_flags)
        return outward(kernel, out, out_flags), out_flags

    return run


class Updates(NamedTuple):
    """The updates of a tile: `one(number, carry)` takes one, and how a loop should compute what it carries."""

    one: Callable[[Any, Any], Any]
    joint: Joint


def ready(kernel: Kernel, program: Program, flags: Any, inputs: Any) -> tuple[Any, Any, Updates]:
    """What a loop of updates carries, its flags, and the updates."""
    weights, state, data, hyper = inputs.weights, inputs.state, inputs.data, inputs.hyper
    state_flags = flags.state
    if state is None:
        weights = kernel.spread(*kernel.call(program.start, (weights,), (flags.weights,)), flags.weights)
        state, state_flags = kernel.call(
            program.init, (weights, data, hyper), (flags.weights, flags.data, flags.hyper), carried=1
        )
    carry = (weights, state, jnp.ones((), bool))
    carry_flags = (flags.weights, state_flags, False)
    rest, rest_flags = (np.int32(0), data, hyper), (False, flags.data, flags.hyper)
    carry, carry_flags = settle(kernel, program.step, carry, carry_flags, rest, rest_flags)

    def one(index: Any, carry: Any) -> Any:
        out, out_flags = kernel.call(
            program.step, (*carry, index, data, hyper), (*carry_flags, False, flags.data, flags.hyper), carried=4
        )
        return kernel.spread(out, out_flags, carry_flags)

    count = len(jax.tree.leaves(weights))
    return carry, carry_flags, Updates(one, joint(kernel, count, carry, carry_flags, rest[1:], rest_flags[1:]))


def descend(updates: Updates, carry: Any, start: Any, steps: Any, chunk: int) -> Any:
    """`steps` updates from update number `start` on, `chunk` of them per pass."""
    turns = updates.joint.turns
    most = turns * chunk
    passes = steps // most

    def fused(number: Any, carry: Any) -> Any:
        if chunk > 1 and turns == 1:
            carry = vectorise(passes, carry)
        for offset in range(chunk):
            carry = updates.one(start + number * chunk + offset, carry)
        return carry

    carry = repeat(passes, updates.joint.in_turn(fused), carry)
    return lax.fori_loop(start + passes * most, start + steps, updates.one, carry) if most > 1 else carry


def outcome(
    kernel: Kernel, program: Program, flags: Any, inputs: Any, carry: Any, carry_flags: Any
) -> tuple[Outputs, Outputs]:
    """What a tile gives back after its last update, and the flags of it."""
    weights, state, healthy = carry
    # Products of the data alone are rounded here as in the loop: computed in both places, they are computed once.
    report, report_flags = kernel.call(program.report, (weights, inputs.data), (carry_flags[0], flags.data), carried=1)
    loss, norm = kernel.spread(report, report_flags, (True, True))
    ended, ended_flag = kernel.call(ending, (weights, healthy, loss), (carry_flags[0], carry_flags[2], True))
    out_flags = Outputs(carry_flags[0], carry_flags[1], True, True, ended_flag)
    return Outputs(weights, state, loss, norm, ended), out_flags


def ending(weights: Any, healthy: Any, loss: Any) -> Any:
    """How one problem ended, from its last weights, whether all gradients were finite, and its last loss."""
    status = jnp.where(jnp.isfinite(loss), jnp.int8(RAN_ALL_STEPS), jnp.int8(DIVERGED))
    return jnp.where(finite(weights) & healthy, status, jnp.int8(RUNNING))


def vectorise(passes: Any, carry: Any) -> Any:
    """The same carry, behind a choice that always falls on it.

    XLA's CPU compiler emits a pass with a select through its loop emitter, which LLVM vectorises to the full width of
    the machine; without one it takes its tile emitter, which stays at 8 lanes (measured: half the speed). The choice is
    one blend per pass and elsewhere costs nothing that can be measured.
    """

    def behind(leaf: Any) -> Any:
        return leaf if leaf.ndim == 0 else jnp.where(passes < 0, jnp.zeros_like(leaf), leaf)

    return jax.tree.map(behind, carry)
