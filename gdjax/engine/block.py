"""A compiled block of tiles: how it is made, and how fast its calls have been."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from gdjax import device as dev
from gdjax.arena import LEAST
from gdjax.engine.copies import on_each
from gdjax.engine.kernels import KERNELS
from gdjax.engine.tile import blank, each_tile, following
from gdjax.engine.whole import can_be_whole, whole
from gdjax.plan import Plan

log = logging.getLogger("gdjax")

TileFunction = Callable[..., Callable[[Any], tuple[Any, Any]]]

ROOM = 5
"""Which argument of a compiled block is the memory for its results."""

SHORT = 4e-3
"""Seconds below which a job is also tried on one worker: to give work to another takes some tenth of a millisecond."""

STAGE_BYTES = 1 << 20
"""Most bytes of a block's inputs that are copied although they could be read where they are."""

AGAIN = 32
"""One in so many short jobs is run the way that was slower, which may have changed; and the first, second, fourth, ...
of them, since first calls are slow either way."""

FADING = 1.05
"""The best time of a size counts, this much longer after every call: one that was slow may have been held up."""


class Pace:
    """How long jobs of each size took on one worker and on all of them, to tell whether a short one is worth handing
    work over."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[int, int], float] = {}
        self.calls: collections.Counter[int] = collections.Counter()

    def crew(self, updates: int, workers: int) -> int:
        """How many of the workers should share so many updates: all, or one."""
        size = updates.bit_length()
        alone, shared = self.seconds.get((size, 1)), self.seconds.get((size, workers))
        if shared is None or shared > SHORT:
            return workers
        if alone is None:
            return 1
        self.calls[size] += 1
        better, other = (1, workers) if alone < shared else (workers, 1)
        calls = self.calls[size]
        return other if calls % AGAIN == 0 or calls.bit_count() == 1 else better

    def note(self, seconds: float, updates: int, workers: int) -> None:
        """So many updates took so many workers so long."""
        key = updates.bit_length(), workers
        self.seconds[key] = min(seconds, FADING * self.seconds.get(key, seconds))


@dataclasses.dataclass(frozen=True)
class Block:
    """A compiled block: `plan.tiles` tiles of `plan.tile` problems each, one executable per device.

    `need` is the bytes that one call takes on the device: arguments, results and what it holds meanwhile.
    """

    plan: Plan
    executables: tuple[Any, ...]
    devices: tuple[jax.Device, ...]
    out_tree: Any
    out_shapes: tuple[Any, ...]
    out_own: tuple[bool, ...]
    x64: bool
    need: int
    room: tuple[tuple[tuple[int, ...], Any], ...] = ()
    """Shapes and dtypes of what is handed over for the results to be written into."""

    stage: tuple[tuple[tuple[int, ...], Any] | None, ...] = ()
    """Shapes and dtypes of the inputs that are copied before a call, None for those that are not; (): none is."""

    by_problem: bool = False
    """Whether a call is told how many problems it has, or how many tiles."""

    whole: bool = False
    """Whether it is one function of machine code."""

    pace: Pace = dataclasses.field(default_factory=lambda: Pace(), compare=False)
    """How fast its calls have been."""

    workers: int = 0
    """Workers on each device; 0: all that there are, divided by the devices."""

    @property
    def size(self) -> int:
        return self.plan.tile * self.plan.tiles

    @functools.cached_property
    def room_bytes(self) -> int:
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.room)

    @property
    def lanes(self) -> int:
        """How many pieces run side by side: the same number on every device."""
        here = self.workers or dev.workers(self.devices[0]) // len(self.devices)
        return max(1, here) * len(self.devices)

    def on(self, number: int) -> Block:
        """The same block on one of its devices, with that device's share of the workers."""
        only, share = slice(number, number + 1), self.lanes // len(self.devices)
        return dataclasses.replace(self, executables=self.executables[only], devices=self.devices[only], workers=share)


def compile_block(
    engine: TileFunction, program: Any, plan: Plan, inputs: Any, flags: Any, devices: Sequence[jax.Device]
) -> Block:
    """Compile `engine`'s tile of `program` for inputs like these, on every device."""
    places = tuple(dev.runs_on(device) for device in devices)
    kernel, size, on_host = KERNELS[plan.kernel](plan.tile), plan.tile * plan.tiles, dev.is_host(places[0])
    kernel.on_host = on_host
    by_problem = getattr(engine, "by_problem", False)
    number, real = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    problems = like(inputs, flags, size)
    own: list[Any] = []

    def tile(piece: Any, start: Any, steps: Any, zero: Any, *more: Any) -> Any:
        kernel.zero = zero
        with dev.full_precision(places[0]):
            out, out_own = engine(kernel, program, plan.chunk, flags, start, steps)(piece, *more)
        own.append(out_own)
        return out

    shapes = problems if by_problem else like(inputs, flags, plan.tile)
    several, room = plan.tiles > 1 and not by_problem, ()
    if on_host and getattr(engine, "room", None) is not None:
        room = large(engine.room(kernel, program, flags, problems))  # type: ignore[attr-defined]
    more = [number, *([room] if room else [])] if by_problem else []
    traced = Traced(tile, shapes, number, number, real, *more)
    if several and on_host:
        room = large(like(traced.out, own[0], size))
    as_one = on_host and plan.kernel == "lanes" and can_be_whole(traced.jaxpr)
    apart: list[jax.Device] = []

    def block(inputs: Any, start: Any, steps: Any, used: Any, zero: Any, room: Any) -> Any:
        if by_problem:
            return traced(inputs, start, steps, zero, used, room)
        if not several:
            return traced(inputs, start, steps, zero)

        def at(first: Any) -> tuple[Any, Any]:
            return traced(following(inputs, flags, plan.tile, first), start, steps, zero), own[0]

        return each_tile(at, plan.tile, used, room if room else blank(traced.out, own[0], size))

    def compiled(device: jax.Device, function: Callable[..., Any]) -> Any:
        here = jax.sharding.SingleDeviceSharding(device)
        jitted = jax.jit(function, in_shardings=here, out_shardings=here, donate_argnums=ROOM)
        lowered = jitted.lower(problems, number, number, number, real, room)
        return lowered.compile(compiler_options=dev.compiler_options(device))

    def best(device: jax.Device) -> Any:
        if as_one:
            try:
                return compiled(device, whole(block))
            except jax.errors.JaxRuntimeError as error:
                if dev.out_of_memory(error):
                    raise
                log.info("a block is not compiled whole: %s", error)
                apart.append(device)
        return compiled(device, block)

    executables = on_each(best, places)
    leaves, tree = jax.tree.flatten(executables[0].out_info)
    x64 = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
    return Block(
        plan,
        executables,
        places,
        tree,
        tuple(leaves),
        tuple(jax.tree.leaves(own[0])),
        x64,
        need_of(executables[0]),
        tuple(shape_of(leaf) for leaf in jax.tree.leaves(room)),
        stage_of(problems, flags) if on_host else (),
        by_problem=by_problem,
        whole=as_one and not apart,
    )


class Traced:
    """A function traced once, to be called again and again without its Python code."""

    def __init__(self, function: Callable[..., Any], *shapes: Any):
        self.closed, self.out = jax.make_jaxpr(function, return_shape=True)(*shapes)
        self.jaxpr = self.closed.jaxpr

    def __call__(self, *args: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(self.out), core.jaxpr_as_fun(self.closed)(*jax.tree.leaves(args)))


def like(tree: Any, flags: Any, count: int) -> Any:
    """Shapes and dtypes of a pytree, for so many problems where they are its own."""
    return jax.tree.map(
        lambda leaf, own: jax.ShapeDtypeStruct((count, *leaf.shape[1:]) if own else leaf.shape, leaf.dtype), tree, flags
    )


def large(results: Any) -> Any:
    """Shapes and dtypes of results, or () where they are small: these are given away as they are."""
    return results if sum(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(results)) > LEAST else ()


def shape_of(leaf: Any) -> tuple[tuple[int, ...], Any]:
    return leaf.shape, leaf.dtype


def stage_of(problems: Any, flags: Any) -> tuple[tuple[tuple[int, ...], Any] | None, ...]:
    """What problems of their own bring, where it is little for a whole block."""
    leaves = list(zip(jax.tree.leaves(problems), jax.tree.leaves(flags), strict=True))
    small = sum(leaf.dtype.itemsize * leaf.size for leaf, own in leaves if own) <= STAGE_BYTES
    return tuple(shape_of(leaf) if own else None for leaf, own in leaves) if small else ()


def need_of(executable: Any) -> int:
    """Bytes of a call on the device, as the compiler says; 0 where it does not."""
    stats = executable.memory_analysis()
    if stats is None:
        return 0
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return held - stats.alias_size_in_bytes
