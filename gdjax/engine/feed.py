"""Takes a batch through a compiled block of tiles: cut, padded, run on every worker, put together again."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax import device as dev
from gdjax import memory
from gdjax.arena import LEAST, aligned_together
from gdjax.engine.block import Block
from gdjax.engine.cuts import Cut, pieces
from gdjax.engine.host import on_host, scalars
from gdjax.placed import number

AHEAD = 2
"""Pieces in flight on an accelerator: one runs while the next is placed. The inputs of more would pile up there."""


def run_block(
    block: Block,
    inputs: Any,
    flags: Any,
    count: int,
    start: int,
    steps: int,
    smaller: Callable[[Block], Block] | None = None,
    updates: int | None = None,
    wanted: Any = None,
) -> Any:
    """The outputs for all `count` problems, leaves `[count, ...]` (or without the axis where no problem owns them).

    `updates` is how many each takes, where that is known: few of them are not spread over many workers. `wanted`, a
    prefix of the outputs, says which of them are: the others are None.
    Where the device runs out of memory, what is left of the batch goes through the block that `smaller` gives.
    """
    leaves, tree = jax.tree.flatten(inputs)
    own = jax.tree.leaves(flags)
    on_device = not dev.is_host(block.devices[0])
    drive = on_accelerators if on_device else functools.partial(on_host, updates=updates)
    outputs = Outputs(block, count, on_device and stays(block, count), chosen(block.out_tree, wanted))
    left = [(0, count)]
    while left:
        left = drive(block, leaves, own, tree, left, start, steps, outputs, smaller is not None)
        if left and smaller is not None:
            outputs.fetch()
            block = smaller(block)
    return jax.tree.unflatten(block.out_tree, outputs.whole())


@functools.lru_cache(1024)
def chosen(tree: Any, wanted: Any) -> tuple[bool, ...]:
    """Which of a block's outputs are wanted, of what a prefix of their `tree` says; None: all are."""
    everything = [True] * tree.num_leaves
    if wanted is None:
        return tuple(everything)
    return tuple(jax.tree.leaves(jax.tree.broadcast(wanted, jax.tree.unflatten(tree, everything))))


class Outputs:
    """The results of a batch as they come in: written into their place in host memory, or left on the device.

    What no problem owns is the same in all pieces, save the lowest status, of which the least is taken, and the counts
    of blocks that are told how many problems they have, which add up.
    """

    def __init__(self, block: Block, count: int, stay: bool, wanted: tuple[bool, ...]):
        self.wanted, self.count = wanted, count
        self.own = block.out_own
        self.joined = np.add if block.by_problem else common
        self.shapes = [(count, *s.shape[1:]) for s in block.out_shapes]
        self.dtypes = [s.dtype for s in block.out_shapes]
        self.home = block.devices[0]
        self.arrays: list[Any] = [None] * len(self.own)
        self.parts: list[tuple[int, int, list[Any]]] = []
        self.stay = stay
        self.handed = self.roomy = False

    def expect(self, block: Block, cuts: list[Cut]) -> None:
        """Make room for the results of these pieces. Those of a single small one are given away as they are, with the
        padding behind them."""
        if not (self.stay or self.roomy):
            size = sum([s.dtype.itemsize * s.size for s in block.out_shapes])
            mine = np.dtype(np.float64) in self.dtypes  # may become the caller's own NumPy arrays, to be written to
            self.handed = len(cuts) == 1 and not (block.room or mine) and size <= LEAST
            if not self.handed:
                self.make_room()

    def make_room(self) -> None:
        self.roomy = True
        mine = [index for index, flag in enumerate(self.own) if flag and self.wanted[index]]
        rooms = aligned_together([(self.shapes[index], self.dtypes[index]) for index in mine])
        for index, room in zip(mine, rooms, strict=True):
            self.arrays[index] = room

    def put(self, first: int, last: int, results: list[Any]) -> None:
        """The results of the problems from `first` to `last`, padding behind them."""
        if self.stay:
            held = trimmed(results, self.own, last - first)
            if last - first < self.count:  # no more inputs shall pile up there than those of the pieces under way
                jax.block_until_ready(held)
            self.parts.append((first, last, held))
            return
        if self.handed:
            held = [np.asarray(result) for result in results]
            self.arrays = [array[:last] if flag else array for array, flag in zip(held, self.own, strict=True)]
            return
        for index, (result, flag) in enumerate(zip(results, self.own, strict=True)):
            if not self.wanted[index]:
                continue
            if flag:
                self.arrays[index][first:last] = np.asarray(result)[: last - first]
            else:
                mine = np.array(result)  # the memory of the result itself is written over later
                self.arrays[index] = mine if self.arrays[index] is None else self.joined(self.arrays[index], mine)

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
            jnp.concatenate([jax.device_put(part[i], self.home) for part in parts])
            if flag
            else functools.reduce(common, (part[i] for part in parts))
            for i, flag in enumerate(self.own)
        ]


def common(one: Any, other: Any) -> Any:
    """What two pieces say of something that no problem owns: the same, or the lower of two statuses."""
    return np.minimum(one, other) if other.dtype == np.int8 else other


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


def on_accelerators(
    block: Block,
    leaves: list[Any],
    own: list[bool],
    tree: Any,
    left: list[Cut],
    start: int,
    steps: int,
    outputs: Outputs,
    patient: bool,
) -> list[Cut]:
    """Devices with memory of their own: a few pieces are placed and run ahead of the one whose results are taken.

    Returns the pieces for which there was no memory, where the caller is `patient`.
    """
    lanes = len(block.devices)
    cuts = pieces(block, left, lanes)
    outputs.expect(block, cuts)
    ahead: collections.deque[list[Any]] = collections.deque()
    taken = 0
    try:
        with jax.enable_x64(block.x64):
            shared = [
                [None if flag else jax.device_put(leaf, device) for leaf, flag in zip(leaves, own, strict=True)]
                for device in block.devices[: len(cuts)]
            ]
            for count, (first, last) in enumerate(cuts):
                if len(ahead) == AHEAD * lanes:
                    outputs.put(*cuts[taken], ahead.popleft())
                    taken += 1
                turn = count % lanes
                mine = iter(brought(block, leaves, own, first, last, block.devices[turn]))
                cut = [next(mine) if flag else here for flag, here in zip(own, shared[turn], strict=True)]
                used = last - first if block.by_problem else -(-(last - first) // block.plan.tile)
                told = scalars(start, steps, used, block.devices[turn])
                results = jax.tree.leaves(block.executables[turn](jax.tree.unflatten(tree, cut), *told, ()))
                for result in results:
                    if result.ndim == 0:  # the lowest status, which is looked at first of all
                        result.copy_to_host_async()
                ahead.append(results)
            while ahead:
                outputs.put(*cuts[taken], ahead.popleft())
                taken += 1
    except (RuntimeError, MemoryError) as error:
        if not (patient and dev.out_of_memory(error)):
            raise
    return cuts[taken:]


def brought(
    block: Block, leaves: list[Any], own: list[bool], first: int, last: int, device: jax.Device
) -> list[jax.Array]:
    """What the problems of a piece own, on the device and padded there: only the problems go over the bus."""

    def there(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.devices() == {device}:
            return leaf
        return jax.device_put(leaf[first:last], device)

    mine = [there(leaf) for leaf, flag in zip(leaves, own, strict=True) if flag]
    if all(len(leaf) == block.size == last - first for leaf in mine):
        return mine
    return fitted(mine, number(first, device), last - first, block.size)


@functools.partial(jax.jit, static_argnums=(2, 3))
def fitted(leaves: list[jax.Array], first: Any, held: int, size: int) -> list[jax.Array]:
    """`held` problems from the `first` on, where an array has more of them, and behind these the last one again."""

    def fit(leaf: jax.Array) -> jax.Array:
        piece = leaf if len(leaf) == held else lax.dynamic_slice_in_dim(leaf, first, held)
        return jnp.pad(piece, [(0, size - held)] + [(0, 0)] * (leaf.ndim - 1), mode="edge")

    return [fit(leaf) for leaf in leaves]


def trimmed(results: list[Any], own: Sequence[bool], held: int) -> list[Any]:
    """Results on an accelerator without the padding."""
    padded = [r for r, flag in zip(results, own, strict=True) if flag]
    if all(len(r) == held for r in padded):
        return results
    mine = iter(shortened(padded, held))
    return [next(mine) if flag else r for r, flag in zip(results, own, strict=True)]


@functools.partial(jax.jit, static_argnums=1)
def shortened(results: list[jax.Array], held: int) -> list[jax.Array]:
    return [result[:held] for result in results]
