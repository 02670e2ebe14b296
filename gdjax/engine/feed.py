"""Takes a batch through a compiled block of tiles: cut, padded, run on every worker, put together again."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax import device as dev
from gdjax import memory
from gdjax.engine.copies import on_each
from gdjax.engine.kernels import KERNELS
from gdjax.engine.tile import over_tiles
from gdjax.plan import Plan

NEGATIVE_ZERO = np.float32(-0.0)

AHEAD = 2
"""Pieces in flight per accelerator: one runs while the next is placed. The inputs of more would pile up there."""

TileFunction = Callable[..., Callable[[Any], tuple[Any, Any]]]


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

    workers: int = 0
    """Workers on each device; 0: all that there are, divided by the devices."""

    @property
    def size(self) -> int:
        return self.plan.tile * self.plan.tiles

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
    size = plan.tile * plan.tiles
    kernel = KERNELS[plan.kernel](plan.tile)
    out_flags: list[Any] = []

    def block(inputs: Any, start: Any, steps: Any, used: Any, zero: Any) -> Any:
        kernel.zero = zero
        run = engine(kernel, program, plan.chunk, flags, start, steps)

        def noted(piece: Any) -> tuple[Any, Any]:
            out, own = run(piece)
            out_flags.append(own)
            return out, own

        return over_tiles(noted, plan.tile, plan.tiles, inputs, flags, used)

    shapes = jax.tree.map(
        lambda leaf, own: jax.ShapeDtypeStruct((size, *leaf.shape[1:]) if own else leaf.shape, leaf.dtype),
        inputs,
        flags,
    )
    number = jax.ShapeDtypeStruct((), jnp.int32)

    def compiled(device: jax.Device) -> Any:
        here = jax.sharding.SingleDeviceSharding(device)
        lowered = jax.jit(block, in_shardings=here, out_shardings=here).lower(
            shapes, number, number, number, jax.ShapeDtypeStruct((), jnp.float32)
        )
        return lowered.compile(compiler_options=dev.compiler_options(device))

    executables = on_each(compiled, devices)
    leaves, tree = jax.tree.flatten(executables[0].out_info)
    x64 = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
    return Block(
        plan,
        executables,
        tuple(devices),
        tree,
        tuple(leaves),
        tuple(jax.tree.leaves(out_flags[-1])),
        x64,
        need_of(executables[0]),
    )


def need_of(executable: Any) -> int:
    """Bytes of a call on the device, as the compiler says; 0 where it does not."""
    stats = executable.memory_analysis()
    if stats is None:
        return 0
    return stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes


def run_block(
    block: Block,
    inputs: Any,
    flags: Any,
    count: int,
    start: int,
    steps: int,
    smaller: Callable[[Block], Block] | None = None,
) -> Any:
    """The outputs for all `count` problems, leaves `[count, ...]` (or without the axis where no problem owns them).

    Where the device runs out of memory, what is left of the batch goes through the block that `smaller` gives.
    """
    leaves, tree = jax.tree.flatten(inputs)
    own = jax.tree.leaves(flags)
    on_device = not dev.is_host(block.devices[0])
    drive = on_accelerators if on_device else on_host
    outputs = Outputs(block, count, on_device and stays(block, count))
    left = [(0, count)]
    while left:
        left = drive(block, leaves, own, tree, left, start, steps, outputs, smaller is not None)
        if left and smaller is not None:
            outputs.fetch()
            block = smaller(block)
    return jax.tree.unflatten(block.out_tree, outputs.whole())


class Outputs:
    """The results of a batch as they come in: written into their place in host memory, or left on the device."""

    def __init__(self, block: Block, count: int, stay: bool):
        self.own = block.out_own
        self.shapes = [(count, *s.shape[1:]) for s in block.out_shapes]
        self.dtypes = [s.dtype for s in block.out_shapes]
        self.home = block.devices[0]
        self.arrays: list[Any] = [None] * len(self.own)
        self.parts: list[tuple[int, int, list[Any]]] = []
        self.stay = stay
        if not stay:
            self.make_room()

    def make_room(self) -> None:
        for index, flag in enumerate(self.own):
            if flag:
                self.arrays[index] = dev.aligned_empty(self.shapes[index], self.dtypes[index])

    def put(self, first: int, last: int, results: list[Any]) -> None:
        """The results of the problems from `first` to `last`, padding behind them."""
        if self.stay:
            held = [r[: last - first] if flag else r for r, flag in zip(results, self.own, strict=True)]
            self.parts.append((first, last, jax.block_until_ready(held)))
            return
        for index, (result, flag) in enumerate(zip(results, self.own, strict=True)):
            if flag:
                self.arrays[index][first:last] = np.asarray(result)[: last - first]
            else:
                self.arrays[index] = result

    def fetch(self) -> None:
        """Take what has been left on the device to host memory: the device is full."""
        if self.stay:
            self.stay, parts, self.parts = False, self.parts, []
            self.make_room()
            while parts:
                self.put(*parts.pop())

    def whole(self) -> list[Any]:
        if not self.stay:
            return self.arrays
        parts = [part for _, _, part in sorted(self.parts, key=lambda part: part[0])]
        if len(parts) == 1:
            return parts[0]
        return [
            jnp.concatenate([jax.device_put(part[i], self.home) for part in parts]) if flag else parts[-1][i]
            for i, flag in enumerate(self.own)
        ]


def in_flight(devices: Sequence[jax.Device]) -> int:
    """How many calls are under way at a time in one memory."""
    return dev.side_by_side(devices) if dev.is_host(devices[0]) else AHEAD


def stays(block: Block, count: int) -> bool:
    """Whether an accelerator has room for all results of a batch, twice while they are put together."""
    room = dev.room(block.devices[0])
    lane = sum(
        s.dtype.itemsize * s.size // block.size for s, own in zip(block.out_shapes, block.out_own, strict=True) if own
    )
    return room is None or AHEAD * block.need + 2 * count * lane <= memory.SHARE * room


def pieces(block: Block, left: list[tuple[int, int]], lanes: int) -> list[tuple[int, int]]:
    """What is left of a batch cut into pieces that fit a block, spread evenly over the workers: at tile boundaries on
    one device; over several to the last problem, so that none is idle while there is work."""
    return [piece for begin, end in left for piece in spread(block, begin, end, lanes)]


def spread(block: Block, begin: int, end: int, lanes: int) -> list[tuple[int, int]]:
    count = end - begin
    if len(block.devices) > 1:
        rounds = -(-count // (block.size * lanes))
        step = -(-count // (rounds * lanes))
    else:
        tiles = -(-count // block.plan.tile)
        each = min(block.plan.tiles, max(1, -(-tiles // lanes)))
        rounds = -(-tiles // (each * lanes))
        step = min(block.plan.tiles, -(-tiles // (rounds * lanes))) * block.plan.tile
    return [(first, min(first + step, end)) for first in range(begin, end, step)]


def on_host(
    block: Block,
    leaves: list[Any],
    own: list[bool],
    tree: Any,
    left: list[tuple[int, int]],
    start: int,
    steps: int,
    outputs: Outputs,
    patient: bool,
) -> list[tuple[int, int]]:
    """The devices share the host's memory: slices are views, results are written straight into their place.

    Returns the pieces for which there was no memory, where the caller is `patient`.
    """
    arrays = [np.asarray(leaf) for leaf in leaves]
    lanes = block.lanes
    scalars = np.int32(start), np.int32(steps)

    def run(job: tuple[Any, tuple[int, int]]) -> bool:
        executable, (first, last) = job
        try:
            cut = [
                window(array, first, last, block.size) if flag else array
                for array, flag in zip(arrays, own, strict=True)
            ]
            used = np.int32(-(-(last - first) // block.plan.tile))
            with jax.enable_x64(block.x64):
                results = executable(jax.tree.unflatten(tree, cut), *scalars, used, NEGATIVE_ZERO)
                outputs.put(first, last, jax.tree.leaves(results))
        except (RuntimeError, MemoryError) as error:
            if not (patient and dev.out_of_memory(error)):
                raise
            return False
        return True

    cuts = pieces(block, left, lanes)
    jobs = list(zip(itertools.cycle(block.executables), cuts))
    done = list(map(run, jobs) if len(jobs) == 1 or lanes == 1 else crew(lanes).map(run, jobs))
    return [cut for cut, fine in zip(cuts, done, strict=True) if not fine]


@functools.cache
def crew(lanes: int) -> ThreadPoolExecutor:
    """The threads that run blocks side by side, kept between calls."""
    return ThreadPoolExecutor(lanes, thread_name_prefix="gdjax")


def window(array: np.ndarray, first: int, last: int, size: int) -> np.ndarray:
    """`size` problems from `first` on: a view where there are as many, else padded with the last one."""
    if first + size <= len(array):
        return array[first : first + size]
    out = np.empty((size, *array.shape[1:]), array.dtype)
    held = last - first
    out[:held] = array[first:last]
    out[held:] = array[last - 1]
    return out


def on_accelerators(
    block: Block,
    leaves: list[Any],
    own: list[bool],
    tree: Any,
    left: list[tuple[int, int]],
    start: int,
    steps: int,
    outputs: Outputs,
    patient: bool,
) -> list[tuple[int, int]]:
    """Devices with memory of their own: a few pieces are placed and run ahead of the one whose results are taken.

    Returns the pieces for which there was no memory, where the caller is `patient`.
    """
    lanes = len(block.devices)
    scalars = np.int32(start), np.int32(steps)
    cuts = pieces(block, left, lanes)
    ahead: collections.deque[list[Any]] = collections.deque()
    taken = 0
    try:
        with jax.enable_x64(block.x64):
            shared = [
                [None if flag else jax.device_put(leaf, device) for leaf, flag in zip(leaves, own, strict=True)]
                for device in block.devices[: len(cuts)]
            ]
            for number, (first, last) in enumerate(cuts):
                if len(ahead) == AHEAD * lanes:
                    outputs.put(*cuts[taken], ahead.popleft())
                    taken += 1
                turn = number % lanes
                cut = [
                    jax.device_put(piece_of(leaf, first, last, block.size), block.devices[turn]) if flag else here
                    for leaf, flag, here in zip(leaves, own, shared[turn], strict=True)
                ]
                used = np.int32(-(-(last - first) // block.plan.tile))
                results = block.executables[turn](jax.tree.unflatten(tree, cut), *scalars, used, NEGATIVE_ZERO)
                ahead.append(jax.tree.leaves(results))
            while ahead:
                outputs.put(*cuts[taken], ahead.popleft())
                taken += 1
    except (RuntimeError, MemoryError) as error:
        if not (patient and dev.out_of_memory(error)):
            raise
    return cuts[taken:]


def piece_of(leaf: Any, first: int, last: int, size: int) -> Any:
    if isinstance(leaf, np.ndarray):
        return window(leaf, first, last, size)
    held = last - first
    piece = leaf if held == leaf.shape[0] else lax.slice_in_dim(leaf, first, last)
    return piece if held == size else jnp.pad(piece, [(0, size - held)] + [(0, 0)] * (leaf.ndim - 1), mode="edge")
