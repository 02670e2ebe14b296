"""Stop rules: problems that are done make room for others, so that a batch costs what its useful steps cost.

The compiled tiles. `begin` seats problems in lanes. `sprint` takes steps blindly, several at a time, noting only
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

from gdjax.engine.joint import joint
from gdjax.engine.kernels import Kernel
from gdjax.engine.program import AWAY, DIVERGED, MOVING, RUNNING, WAITING, Program, finite
from gdjax.engine.tile import inward, outward, settle, some, total


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


STRIDE, LIGHT_STRIDE = 2, 16
"""Updates from one look at whether anything happened to the next, to begin with; and where several are fused."""

PATIENCE = 16
"""A problem's last stride is at most 1/PATIENCE of its updates, and at most `LONGEST` of them."""

LONGEST = 32

LAST_STEPS, LAST_LIGHT_STEPS = 2, 4
"""Updates one by one between two questions whether any lane still runs; and where several are fused before."""

Tile = Callable[[Any], tuple[Any, Any]]


def begin(kernel: Kernel, program: Program, chunk: int, flags: Start, start: Any, steps: Any) -> Tile:
    """Lanes for fresh problems, at update number `start`. Everything in a lane is its own, whatever problems share."""

    def run(inputs: Start) -> tuple[Any, Any]:
        lane, own = beginning(kernel, program, flags, inward(kernel, inputs, flags), start)
        return outward(kernel, lane, own), own

    return run


def beginning(kernel: Kernel, program: Program, flags: Start, seats: Start, start: Any) -> tuple[Any, Any]:
    """The same for problems in the kernel's layout, as `seats` are: their lanes, and the flags of these."""
    weights, state, data, hyper = seats
    state_flags = flags.state
    if state is None:
        weights = kernel.spread(*kernel.call(program.start, (weights,), (flags.weights,)), flags.weights)
        state, state_flags = kernel.call(
            program.init, (weights, data, hyper), (flags.weights, flags.data, flags.hyper), carried=1
        )
    lane, lane_flags = kernel.call(
        program.begin, (weights, state, start, data), (flags.weights, state_flags, False, flags.data)
    )
    own = jax.tree.map(lambda _: True, lane_flags)
    return kernel.spread(lane, lane_flags, own), own


def sprint(kernel: Kernel, program: Program, chunk: int, flags: Running, age: Any, updates: Any) -> Tile:
    """At most so many updates (a multiple of `chunk`, so many of which are fused), or until every lane waits.

    `age` is how many the lanes have taken since they began: the strides grow with it.
    """

    def run(inputs: Running) -> tuple[Any, Any]:
        lane, _ = sprinting(kernel, program, chunk, flags, inward(kernel, inputs, flags), age, updates)
        return outward(kernel, lane, flags.lane), flags.lane

    return run


def sprinting(
    kernel: Kernel, program: Program, chunk: int, flags: Running, seats: Running, age: Any, updates: Any, least: Any = 0
) -> tuple[dict[str, Any], Any]:
    """The lanes after a sprint, in the kernel's layout as `seats` are, and the updates that were taken; lanes to which
    something happened wait. It ends where no more than the `least` lanes run."""
    first = stride_of(chunk)
    moving, ahead, hold, rest = striding(kernel, program, chunk, flags, seats)

    def once(carry: Any) -> Any:
        moving, held, taken = carry
        grown = jnp.clip((age + taken) // (PATIENCE * first), 1, max(1, LONGEST // first)) * first
        count = jnp.minimum(grown, updates - taken) // chunk * chunk
        after = ahead(moving, taken, count)
        return after, hold(held, after, taken + count), taken + count

    def going(carry: Any) -> Any:
        moving, _, taken = carry
        return (taken < updates) & (total(runs(kernel, moving).astype(jnp.int32)) > least)

    moving, held, taken = lax.while_loop(going, once, (moving, at_rest(seats.lane), jnp.int32(0)))
    return rest(moving, held), taken


def stride_of(chunk: int) -> int:
    """Updates from look to look where so many are fused."""
    return STRIDE if chunk == 1 else max(chunk, LIGHT_STRIDE // chunk * chunk)


def at_rest(lane: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Where a lane stands, and the updates it has taken."""
    return {name: lane[name] for name in MOVING}, lane["index"]


def runs(kernel: Kernel, moving: dict[str, Any]) -> Any:
    """Which lanes of those that stride still run."""
    own = jax.tree.map(lambda _: True, moving["weights"])
    return kernel.call(finite, (moving["weights"],), (own,))[0]


def striding(
    kernel: Kernel, program: Program, chunk: int, flags: Any, inputs: Any
) -> tuple[Any, Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """How lanes stride blindly: `(moving, ahead, hold, rest)`.

    `moving` are the lanes that stride: those that do not run, or to which something happened, have NaN for weights. (Or
    may have happened, where several updates are taken in a pass: these problems are finished one by one to their end.)
    `ahead(moving, taken, count)` takes `count` updates after `taken` since the lanes were seated, `hold(held, after,
    taken)` keeps where the running ones stand then, `rest(moving, held)` gives the lanes back, the others waiting.
    """
    lane, data, hyper = inputs.lane, inputs.data, inputs.hyper
    seats, seated = at_rest(lane)
    seats_own, rest_own = jax.tree.map(lambda _: True, seats), (flags.data, flags.hyper)
    running = lane["status"] == RUNNING
    moving, _ = kernel.call(program.mark, (seats, running), (seats_own, True))
    count = len(jax.tree.leaves(seats["weights"]))
    how = joint(kernel, count, seats, seats_own, (seated, data, hyper), (True, *rest_own))

    def ahead(moving: Any, taken: Any, count: Any) -> Any:
        def turn(number: Any, moving: Any) -> Any:
            noted: Any = None
            noted_own: Any = None
            for step in range(chunk):
                index = seated + (taken + (number * chunk + step))
                (moving, noted), (own, noted_own) = kernel.call(
                    program.leap,
                    (moving, index, noted, data, hyper),
                    (seats_own, True, noted_own, *rest_own),
                    carried=3,
                )
                moving = kernel.spread(moving, own, seats_own)
            stay = program.stay if chunk > 1 else program.stay_after_one
            marked, own = kernel.call(stay, (moving, noted), (seats_own, noted_own))
            return kernel.spread(marked, own, seats_own)

        # A loop, be it of one turn, whose length the compiler does not know: it must not merge the strides into the
        # choices after them, each of which would repeat the strides (XLA's CPU backend fuses by repeating).
        passes = count // chunk
        whole = passes // how.turns
        moving = lax.fori_loop(0, whole, how.in_turn(turn), moving)
        return lax.fori_loop(whole * how.turns, passes, turn, moving) if how.turns > 1 else moving

    def hold(held: Any, after: Any, taken: Any) -> Any:
        kept, index = held
        return kernel.call(program.hold, (kept, index, after, seated + taken), (seats_own, True, seats_own, True))[0]

    def rest(moving: Any, held: Any) -> dict[str, Any]:
        (kept, index), waits = held, running & ~runs(kernel, moving)
        return {**kept, "index": index, "status": jnp.where(waits, jnp.int32(WAITING), lane["status"])}

    return moving, ahead, hold, rest


def finish(kernel: Kernel, program: Program, chunk: int, flags: Running, start: Any, steps: Any) -> Tile:
    """Every problem, those that wait too, one step at a time until its rule holds or it has taken `steps` updates since
    `start`."""

    def run(inputs: Running) -> tuple[Any, Any]:
        out, own, _ = finishing(kernel, program, chunk, flags, inward(kernel, inputs, flags), start, steps)
        return outward(kernel, out, own), own

    return run


def finishing(
    kernel: Kernel,
    program: Program,
    chunk: int,
    flags: Running,
    seats: Running,
    start: Any,
    steps: Any,
    most: Any = None,
) -> tuple[Ended, Ended, Any]:
    """The same for lanes in the kernel's layout, as `seats` are: how they ended, its flags, and the updates that it
    took.

    Where these are as many as `most`, if that is given, some may still run.
    """
    lane, data, hyper = seats
    awake = jnp.where(lane["status"] == WAITING, jnp.int32(RUNNING), lane["status"])
    lane = {**lane, "status": awake}
    rest, rest_flags = (start + steps, data, hyper), (False, flags.data, flags.hyper)
    carry, carry_flags = settle(kernel, program.advance, (lane,), (flags.lane,), rest, rest_flags)

    def one(_: Any, carry: Any) -> Any:
        out, out_flags = kernel.call(program.advance, (*carry, *rest), (*carry_flags, *rest_flags), carried=1)
        return kernel.spread((out,), (out_flags,), carry_flags)

    several = LAST_STEPS if chunk == 1 else LAST_LIGHT_STEPS

    def running(state: Any) -> Any:
        taken, (lane,) = state
        goes = some(lane["status"] == RUNNING)
        return goes if most is None else goes & (taken < most)

    def some_more(state: Any) -> Any:
        taken, carry = state
        return taken + several, lax.fori_loop(0, several, one, carry)

    taken, (lane,) = lax.while_loop(running, some_more, (jnp.int32(0), carry))
    own = carry_flags[0]
    report, report_flags = kernel.call(program.report, (lane["weights"], data), (own["weights"], flags.data), carried=1)
    loss, norm = kernel.spread(report, report_flags, (True, True))
    # A loss that is not finite at the final weights is no answer, whatever the rule said.
    answered = jnp.isfinite(loss) | (lane["status"] == AWAY) | (lane["status"] == RUNNING)
    lane = {**lane, "status": jnp.where(answered, lane["status"], jnp.int32(DIVERGED))}
    return Ended(lane, loss, norm), Ended(own, True, True), taken


def entire(kernel: Kernel, program: Program, chunk: int, flags: Start, start: Any, steps: Any) -> Tile:
    """Fresh problems to their ends in one program: `begin`, and `finish` without anything before it."""

    def run(inputs: Start) -> tuple[Any, Any]:
        lane, own = begin(kernel, program, chunk, flags, start, steps)(inputs)
        seated = Running(own, flags.data, flags.hyper)
        last = finish(kernel, program, chunk, seated, start, steps)
        return last(Running(lane, inputs.data, inputs.hyper))

    return run
