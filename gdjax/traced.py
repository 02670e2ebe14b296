"""`minimize` inside `jit`, `vmap` or `grad`: the same program of one problem, composed into the surrounding trace.

Outside, sessions compile tiles and threads run them. Inside there is nothing to run yet: the tiles of
`gdjax.engine.refill` become part of the user's own program, with what they need for derivatives
(`gdjax.derivatives`). Whatever the user's functions close over may be traced too, and is an input like any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import get_opaque_trace_state

from gdjax import device as dev
from gdjax import plan as plans
from gdjax.batch import Batch, check_widths, is_traced, named_leaves, problem_shapes
from gdjax.derivatives import Arrays, differentiable
from gdjax.dryrun import check_program
from gdjax.engine import history, refill
from gdjax.engine.kernels import KERNELS
from gdjax.engine.program import DIVERGED, RUNNING, Program, absent
from gdjax.engine.tile import inward, outward, over_tiles
from gdjax.forms import lane_form
from gdjax.pieces import hashable, own, unhashed
from gdjax.plan import VECTOR, Plan
from gdjax.progress import check_watch
from gdjax.session import check_carried
from gdjax.solution import Solution, State

DEVICE = "traced"
"""What a solution gives for its device where the surrounding program decides on it."""

TILE_BYTES, MOST_LANES = 512 * 1024, 4096
"""Size of a tile under vmap, and problems in any tile: smaller ones cost calls, larger ones leave the cache."""


def wanted(program: Program, batch: Batch, state: State | None) -> bool:
    """Whether a batch, or what its functions close over, is being traced."""
    if any(is_traced(leaf) for leaf in jax.tree.leaves((batch.weights, batch.data, batch.hyper, state))):
        return True
    return inside() and closes_over_traced(program, batch)


def inside() -> bool:
    """Whether this is called from within some `jit`, `vmap` or `grad`."""
    return get_opaque_trace_state() != outside()


@functools.cache
def outside() -> Any:
    """The state of a thread in which nothing is being traced."""
    with ThreadPoolExecutor(1) as fresh:
        return fresh.submit(get_opaque_trace_state).result()


def apart() -> contextlib.AbstractContextManager[None]:
    """For a batch with nothing traced in it: it is run here and now, also where something else is being traced."""
    return jax.ensure_compile_time_eval() if inside() else contextlib.nullcontext()


def closes_over_traced(program: Program, batch: Batch) -> bool:
    """Whether the loss, the rule or the stop rule close over traced values."""

    def whole(weights: Any, data: Any, hyper: Any) -> Any:
        index = jnp.int32(0)
        weights = program.start(weights)
        lane = program.begin(weights, program.init(weights, data, hyper), index, data)
        lane = program.advance(lane, index, data, hyper)
        return lane, program.report(lane["weights"], data)

    try:
        closed = jax.make_jaxpr(whole)(*one_problem(batch))
    except Exception:
        check_program(program, batch)  # says which argument is at fault
        raise
    return any(is_traced(constant) for constant in closed.consts)


def one_problem(batch: Batch) -> tuple[Any, Any, Any]:
    """Shapes of the weights, data and hyperparameters of one problem."""
    inputs = batch.weights, batch.data, batch.hyper
    shapes: tuple[Any, Any, Any] = problem_shapes(inputs, (own(batch.weights), batch.data_flags, batch.hyper_flags))
    return shapes


def check_outer(device: Any, measure: bool, progress: Any, callback: Any) -> None:
    """Inside jit, vmap or grad some things are for the surrounding program to say."""
    mend = "inside jit, vmap or grad, where nothing runs yet; leave it out"
    if not isinstance(device, str) or device != "auto":
        raise ValueError(f"device={device!r} {mend}: the program runs where its caller says")
    if measure:
        raise ValueError(f"plan='measure' {mend}")
    check_watch(callback, progress)
    if progress:
        raise ValueError(f"progress={progress!r} {mend}")
    if callback is not None:
        raise ValueError(f"callback={callback!r} {mend}")


def solve(program: Program, batch: Batch, steps: int, every: int, plan: Plan | None, state: State | None) -> Solution:
    """The solution of a batch, as traced arrays; a record has a row every `every` updates, 0: none."""
    check_widths([*named_leaves(batch.weights, "weights"), *named_leaves(batch.data, "data")])
    if state is not None:
        check_carried(program, batch, state)
    arrays, flags = inputs_of(batch, state)
    form = Form.of(program, batch, arrays, flags, state.total if state else 0, steps, every, plan)
    build = compiled.__wrapped__ if closes_over_traced(program, batch) else compiled
    (ended, record), ran = build(form)(arrays)
    lane, status = ended.lane, ended.lane["status"].astype(jnp.int8)
    rows = np.arange(form.start, form.start + steps + 1, every, dtype=np.int32) if every else None
    carried: tuple[Any, str, Any] = (lane, "until", None)
    if program.stop is None:
        carried = (lane["state"], "fixed", hashable(own(lane["state"])))
    return Solution(
        lane["weights"],
        ended.loss,
        ended.gradient_norm,
        lane["index"],
        status,
        record,
        rows,
        State(carried[0], status, lane["index"], carried[1], carried[2], form.start + steps),
        ran,
        DEVICE,
    )


def inputs_of(batch: Batch, state: State | None) -> tuple[Arrays, Arrays]:
    """The arrays of a run, and which of them have the problem axis."""
    arrays = Arrays(batch.weights, None, None, None, batch.data, batch.hyper)
    flags = Arrays(own(batch.weights), None, None, None, batch.data_flags, batch.hyper_flags)
    if state is None:
        return arrays, flags
    kept = unhashed(state.flags, state.carried) if state.engine == "fixed" else own(state.carried)
    return (
        arrays._replace(carried=state.carried, status=state.status, taken=state.steps),
        flags._replace(carried=kept, status=True, taken=True),
    )


class Hashed(NamedTuple):
    """A pytree with leaves that can be hashed."""

    tree: Any
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, tree: Any) -> Hashed:
        leaves, treedef = jax.tree.flatten(tree)
        return cls(treedef, tuple(leaves))

    def get(self) -> Any:
        return jax.tree.unflatten(self.tree, self.leaves)


@dataclasses.dataclass(frozen=True)
class Form:
    """All that a traced run depends on besides its arrays: equal forms share one program."""

    program: Program
    shapes: Hashed
    flags: Hashed
    count: int
    start: int
    steps: int
    every: int
    plan: Plan | None
    x64: bool

    @classmethod
    def of(
        cls,
        program: Program,
        batch: Batch,
        arrays: Arrays,
        flags: Arrays,
        start: int,
        steps: int,
        every: int,
        plan: Any,
    ) -> Form:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arrays)
        x64 = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
        return cls(program, Hashed.of(shapes), Hashed.of(flags), batch.count, start, steps, every, plan, x64)

    def batch(self) -> Batch:
        """The batch, as shapes."""
        shapes, flags = self.shapes.get(), self.flags.get()
        return Batch(shapes.weights, shapes.data, shapes.hyper, flags.data, flags.hyper, self.count, self.x64)


@functools.lru_cache(maxsize=64)
def compiled(form: Form) -> Callable[[Arrays], tuple[Any, Plan]]:
    """The function of a run's arrays, kept between calls."""
    batch, shapes, flags = form.batch(), form.shapes.get(), form.flags.get()
    check_program(form.program, batch)
    plan = chosen(form, batch)
    run = differentiable(
        functools.partial(tiles, form, plan, flags), form.program, form.start, form.steps, shapes, flags
    )
    return lambda arrays: (run(arrays), plan)


def chosen(form: Form, batch: Batch) -> Plan:
    """In lanes where the problem has a lane form and the caller's compiler can be expected to serve it well.

    On a CPU it splits operations on tiles beyond the fastest cache over its threads, at every step; sessions switch
    that off, here it is not ours to say. Larger problems run under vmap then.
    """
    flags = own(batch.weights), batch.data_flags, batch.hyper_flags
    kind, device = plans.kind_of((batch.weights, batch.data, batch.hyper), flags), dev.one_device("auto")
    refused = lane_form(form.program, batch, on_host=False).refused
    plan = form.plan
    if plan is not None and plan.kernel == "registers":  # kernels are for calls of their own, which can try them first
        plan = None
    if plan is not None and not (refused and plan.kernel == "lanes"):
        return plan
    if not dev.is_host(device):
        return plans.fallback(kind, device, form.count, refused) if refused else plans.refill(kind, device, form.count)
    if refused is None and kind.bytes * VECTOR <= plans.CACHE_BYTES:
        return Plan("lanes", plans.power_below(plans.CACHE_BYTES / kind.bytes, VECTOR, MOST_LANES))
    reason = refused or "a tile of lanes is larger than the fastest cache"
    return Plan("vmap", plans.power_below(TILE_BYTES / kind.bytes, VECTOR, MOST_LANES), reason=reason)


def tiles(form: Form, plan: Plan, flags: Arrays, arrays: Arrays) -> tuple[refill.Ended, Any]:
    """Every problem to its end, a tile at a time.

    A batch smaller than a tile is a tile of its own: where the user's `vmap` makes the batch, each call may have a
    single problem, and there must not be 32 lanes for it.
    """
    size = min(plan.tile, form.count if form.count < VECTOR else -(-form.count // VECTOR) * VECTOR)
    number = -(-form.count // size)
    missing = number * size - form.count

    def padded(leaf: Any, flag: bool) -> Any:
        leaf = jnp.asarray(leaf)
        return jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1), mode="edge") if flag and missing else leaf

    kernel = KERNELS[plan.kernel](size)
    kernel.zero = negative_zero(arrays.weights)
    run = functools.partial(one_tile, kernel, form, flags)
    out = over_tiles(run, size, number, jax.tree.map(padded, arrays, flags), flags, number)
    return jax.tree.map(lambda leaf: leaf[: form.count], out) if missing else out


def negative_zero(weights: Any) -> Any:
    """A −0.0 that the compiler does not know: it hangs on a weight (which, were it NaN, would make it 0.0)."""
    first = next(leaf for leaf in jax.tree.leaves(weights) if leaf.size)
    return jnp.where(jnp.isnan(first[(0,) * first.ndim]), jnp.float32(0.0), jnp.float32(-0.0))


def one_tile(kernel: Any, form: Form, flags: Arrays, piece: Arrays) -> tuple[Any, Any]:
    """`(ended problems, record)` of a tile, and their flags."""
    program, start, steps = form.program, np.int32(form.start), np.int32(form.steps)
    if program.stop is not None and piece.carried is not None:
        lane, lane_flags = {**piece.carried, "weights": piece.weights}, flags.carried
    else:
        seats = refill.Start(piece.weights, piece.carried, piece.data, piece.hyper)
        seat_flags = refill.Start(flags.weights, flags.carried, flags.data, flags.hyper)
        lane, lane_flags = refill.begin(kernel, program, 1, seat_flags, start, np.int32(0))(seats)
    if piece.status is not None:  # a problem that had diverged before stays where it did
        broken = piece.status == DIVERGED
        status = jnp.where(broken, jnp.int32(DIVERGED), jnp.int32(RUNNING))
        lane = {**lane, "status": status, "index": jnp.where(broken, piece.taken, lane["index"])}
    running = refill.Running(lane, piece.data, piece.hyper)
    running_flags = refill.Running(lane_flags, flags.data, flags.hyper)
    if not form.every:
        ended, ended_flags = refill.finish(kernel, program, 1, running_flags, start, steps)(running)
        return (ended, None), (ended_flags, None)
    rows, row_flags = noted(kernel, form, running_flags)(running)
    running = running._replace(lane=rows.lane)
    ended, ended_flags = refill.finish(kernel, program, 1, running_flags, start, steps)(running)
    return (ended, rows.rows), (ended_flags, row_flags)


def noted(kernel: Any, form: Form, flags: refill.Running) -> Callable[[refill.Running], tuple[history.Noted, Any]]:
    """The rows of a record, every one of them, and the lanes after the last."""
    program, last = form.program, np.int32(form.start + form.steps)

    def run(inputs: refill.Running) -> tuple[history.Noted, Any]:
        lane, data, hyper = inward(kernel, inputs, flags)
        rest, rest_flags = (last, data, hyper), (False, flags.data, flags.hyper)

        def step(_: Any, lane: Any) -> Any:
            out, out_flags = kernel.call(program.advance, (lane, *rest), (flags.lane, *rest_flags), carried=1)
            return kernel.spread(out, out_flags, flags.lane)

        def figure(lane: Any, data: Any) -> Any:
            runs = lane["status"] == RUNNING
            return jax.tree.map(lambda leaf: jnp.where(runs, leaf, absent(leaf)), program.figure(lane, data))

        def row(lane: Any, _: None) -> tuple[Any, Any]:
            seen, own_seen = kernel.call(figure, (lane, data), (flags.lane, flags.data), carried=1)
            return lax.fori_loop(0, form.every, step, lane), kernel.spread(seen, own_seen, own(own_seen))

        lane, rows = lax.scan(row, lane, None, length=form.steps // form.every + 1)
        out, out_flags = history.stacked(kernel, history.Noted(lane, rows), history.Noted(flags.lane, None))
        return outward(kernel, out, out_flags), out_flags.rows

    return run
