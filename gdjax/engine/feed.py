"""Takes a batch through a compiled block of tiles: cut, padded, run on every worker, put together again."""

from __future__ import annotations

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
from gdjax.engine.copies import on_each
from gdjax.engine.kernels import KERNELS
from gdjax.engine.tile import over_tiles
from gdjax.plan import Plan

NEGATIVE_ZERO = np.float32(-0.0)

TileFunction = Callable[..., Callable[[Any], tuple[Any, Any]]]


@dataclasses.dataclass(frozen=True)
class Block:
    """A compiled block: `plan.tiles` tiles of `plan.tile` problems each, one executable per device."""

    plan: Plan
    executables: tuple[Any, ...]
    devices: tuple[jax.Device, ...]
    out_tree: Any
    out_shapes: tuple[Any, ...]
    out_own: tuple[bool, ...]
    x64: bool

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
    return Block(plan, executables, tuple(devices), tree, tuple(leaves), tuple(jax.tree.leaves(out_flags[-1])), x64)


def run_block(block: Block, inputs: Any, flags: Any, count: int, start: int, steps: int) -> Any:
    """The outputs for all `count` problems, leaves `[count, ...]` (or without the axis where no problem owns them)."""
    leaves, tree = jax.tree.flatten(inputs)
    own = jax.tree.leaves(flags)
    if dev.is_host(block.devices[0]):
        outputs = on_host(block, leaves, own, tree, count, start, steps)
    else:
        outputs = on_accelerators(block, leaves, own, tree, count, start, steps)
    return jax.tree.unflatten(block.out_tree, outputs)


def pieces(block: Block, count: int, lanes: int) -> list[tuple[int, int]]:
    """The batch cut into pieces that fit a block, spread evenly over the workers: at tile boundaries on one device;
    over several to the last problem, so that none is idle while there is work."""
    if len(block.devices) > 1:
        rounds = -(-count // (block.size * lanes))
        step = -(-count // (rounds * lanes))
        return [(first, min(first + step, count)) for first in range(0, count, step)]
    tiles = -(-count // block.plan.tile)
    each = min(block.plan.tiles, max(1, -(-tiles // lanes)))
    rounds = -(-tiles // (each * lanes))
    each = min(block.plan.tiles, -(-tiles // (rounds * lanes)))
    step = each * block.plan.tile
    return [(first, min(first + step, count)) for first in range(0, count, step)]


def on_host(
    block: Block, leaves: list[Any], own: list[bool], tree: Any, count: int, start: int, steps: int
) -> list[Any]:
    """The devices share the host's memory: slices are views, results are written straight into their place."""
    arrays = [np.asarray(leaf) for leaf in leaves]
    outputs: list[Any] = [
        dev.aligned_empty((count, *s.shape[1:]), s.dtype) if flag else None
        for s, flag in zip(block.out_shapes, block.out_own, strict=True)
    ]
    lanes = block.lanes
    scalars = np.int32(start), np.int32(steps)

    def run(job: tuple[Any, tuple[int, int]]) -> None:
        executable, (first, last) = job
        cut = [
            window(array, first, last, block.size, count) if flag else array
            for array, flag in zip(arrays, own, strict=True)
        ]
        used = np.int32(-(-(last - first) // block.plan.tile))
        with jax.enable_x64(block.x64):
            results = jax.tree.leaves(executable(jax.tree.unflatten(tree, cut), *scalars, used, NEGATIVE_ZERO))
            for index, (result, flag) in enumerate(zip(results, block.out_own, strict=True)):
                if flag:
                    outputs[index][first:last] = np.asarray(result)[: last - first]
                else:
                    outputs[index] = result

    jobs = list(zip(itertools.cycle(block.executables), pieces(block, count, lanes)))
    if len(jobs) == 1 or lanes == 1:
        for job in jobs:
            run(job)
    else:
        list(crew(lanes).map(run, jobs))
    return outputs


@functools.cache
def crew(lanes: int) -> ThreadPoolExecutor:
    """The threads that run blocks side by side, kept between calls."""
    return ThreadPoolExecutor(lanes, thread_name_prefix="gdjax")


def window(array: np.ndarray, first: int, last: int, size: int, count: int) -> np.ndarray:
    """`size` problems from `first` on: a view where there are as many, else padded with the last one."""
    if first + size <= count:
        return array[first : first + size]
    out = np.empty((size, *array.shape[1:]), array.dtype)
    held = last - first
    out[:held] = array[first:last]
    out[held:] = array[last - 1]
    return out


def on_accelerators(
    block: Block, leaves: list[Any], own: list[bool], tree: Any, count: int, start: int, steps: int
) -> list[Any]:
    """Devices with memory of their own: each piece is placed, run and left there; pieces run one behind the other."""
    lanes = len(block.devices)
    scalars = np.int32(start), np.int32(steps)
    parts: list[list[Any]] = []
    with jax.enable_x64(block.x64):
        for number, (first, last) in enumerate(pieces(block, count, lanes)):
            turn = number % lanes
            cut = [
                jax.device_put(piece_of(leaf, first, last, block.size) if flag else leaf, block.devices[turn])
                for leaf, flag in zip(leaves, own, strict=True)
            ]
            used = np.int32(-(-(last - first) // block.plan.tile))
            results = jax.tree.leaves(
                block.executables[turn](jax.tree.unflatten(tree, cut), *scalars, used, NEGATIVE_ZERO)
            )
            parts.append([r[: last - first] if flag else r for r, flag in zip(results, block.out_own, strict=True)])
        home = block.devices[0]
        return [
            jnp.concatenate([jax.device_put(p[i], home) for p in parts]) if flag and len(parts) > 1 else parts[-1][i]
            for i, flag in enumerate(block.out_own)
        ]


def piece_of(leaf: Any, first: int, last: int, size: int) -> Any:
    if isinstance(leaf, np.ndarray):
        return window(leaf, first, last, size, leaf.shape[0])
    held = last - first
    piece = leaf if held == leaf.shape[0] else lax.slice_in_dim(leaf, first, last)
    return piece if held == size else jnp.pad(piece, [(0, size - held)] + [(0, 0)] * (leaf.ndim - 1), mode="edge")
