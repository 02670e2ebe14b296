"""All steps of a problem in registers, without a stop rule: takes the place of `gdjax.engine.fixed.tile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax.batch import problem_shapes
from gdjax.engine import fixed
from gdjax.engine.kernels import Kernel, ahead
from gdjax.engine.machine import Machine, launch, long_axis, split, traced
from gdjax.engine.program import Program
from gdjax.engine.targets import Arguments, Target
from gdjax.engine.tile import by_problem, inward, outward
from gdjax.work import of_jaxpr


def descend(target: Target) -> Callable[..., Callable[..., Any]]:
    """All steps, no stop rule."""

    @by_problem
    def tile(kernel: Any, program: Program, chunk: int, flags: fixed.Inputs, start: Any, steps: Any) -> Any:
        def run(inputs: fixed.Inputs, count: Any) -> tuple[fixed.Outputs, fixed.Outputs]:
            given, own = started(kernel, program, inputs, flags)
            parts = Descent(program, given, own)
            numbers = jnp.stack([jnp.asarray(n, jnp.int32) for n in (start, steps, count, start + steps)])
            zero = jnp.reshape(kernel.zero, 1)

            def descent(machine: Machine, arguments: Arguments, arrays: list[np.ndarray]) -> list[np.ndarray]:
                return parts.run(machine, arguments, arrays, chunk)

            shapes = (*parts.step.out, *parts.report.out)
            out = launch(target, descent, given, own, numbers, zero, shapes, kernel.size, parts.length)
            weights, state, healthy, loss, norm = out
            status = jax.vmap(fixed.ending)(weights, healthy, loss)
            result = fixed.Outputs(weights, state, loss, norm, status)
            own = jax.tree.map(lambda _: True, result)
            if kernel.on_host:  # where several threads put results together
                return result, own
            return result._replace(lowest=jnp.min(status)), own._replace(lowest=False)

        return run

    return tile


def turns(one: Callable[[Any, Any], Any], chunk: int, steps: Any, carry: Any) -> Any:
    """`steps` turns, `chunk` of them in one pass of the loop."""
    if chunk == 1:
        return lax.fori_loop(0, steps, one, carry)
    passes = lax.div(steps, jnp.int32(chunk))

    def fused(number: Any, carry: Any) -> Any:
        for offset in range(chunk):
            carry = one(number * chunk + offset, carry)
        return carry

    carry = lax.fori_loop(0, passes, fused, carry)
    return lax.fori_loop(passes * chunk, steps, one, carry)


def started(
    kernel: Kernel, program: Program, inputs: fixed.Inputs, flags: fixed.Inputs
) -> tuple[fixed.Inputs, fixed.Inputs]:
    """The inputs, with the rule's state where making it takes a loop, which would be too long written out."""
    own = (flags.weights, flags.data, flags.hyper)
    parts = (inputs.weights, inputs.data, inputs.hyper)
    begin = beginning(program)
    if inputs.state is not None or "scan" not in str(jax.make_jaxpr(begin)(*problem_shapes(parts, own))):
        return inputs, flags

    def begun(before: Kernel) -> tuple[fixed.Inputs, fixed.Inputs]:
        pair, pair_own = before.call(begin, inward(before, parts, own), own)
        every = jax.tree.map(lambda _: True, pair)
        weights, state = outward(before, before.spread(pair, pair_own, every), every)
        return inputs._replace(weights=weights, state=state), flags._replace(weights=every[0], state=every[1])

    return ahead(kernel, begun)


def beginning(program: Program) -> Callable[..., Any]:
    """The function that gives weights and rule's state of a fresh start."""

    def begin(weights: Any, data: Any, hyper: Any) -> tuple[Any, Any]:
        inside = program.start(weights)
        return inside, program.init(inside, data, hyper)

    return begin


class Descent:
    """One problem's descent, traced: the start of the rule's state, a step, the report at the end."""

    def __init__(self, program: Program, inputs: fixed.Inputs, flags: fixed.Inputs):
        self.shapes = problem_shapes(inputs, flags)
        weights, state, data, hyper = self.shapes
        self.fresh = traced(beginning(program), weights, data, hyper) if state is None else None
        state = self.fresh.out[1] if self.fresh else state
        healthy, index = jax.ShapeDtypeStruct((), np.dtype(bool)), jax.ShapeDtypeStruct((), np.int32)
        self.step = traced(program.step, weights, state, healthy, index, data, hyper)
        self.length = long_axis((weights, state, hyper), data, of_jaxpr(self.step.closed.jaxpr))
        self.report = traced(program.report, weights, data)

    def run(self, machine: Machine, given: Arguments, arrays: list[np.ndarray], chunk: int) -> list[np.ndarray]:
        weights, state, data, hyper = split(arrays, self.shapes)
        if self.fresh:
            begun = machine.run(self.fresh, [*weights, *data, *hyper])
            weights, state = begun[: len(weights)], begun[len(weights) :]
        yes = np.array(np.bool_(True))
        avals = self.step.avals
        rest = [*data, *hyper]
        varies = [True] * (len(avals) + 1) + [False] * len(rest)

        def one(number: Any, carry: Any) -> Any:
            index = machine.number(given.start + number)
            out = machine.run(self.step, [*machine.unpack(carry, avals), index, *rest], varies)
            return machine.pack(out, avals)

        carry = machine.pack([*weights, *state, yes], avals)
        ends = machine.unpack(turns(one, chunk, given.steps, carry), avals)
        return [*ends, *machine.run(self.report, [*ends[: len(weights)], *data])]
