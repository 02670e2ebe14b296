"""Memory that calls of a block on the host work in, kept for the next ones.

A block writes its results into arrays that are handed to it and taken back when the results have been copied out: fresh
memory must be asked of the system and filled with zeros, which takes as long as many updates. The inputs of a small
block are copied to where JAX has been shown them once: to show it an array takes longer than to copy a small one.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np

from gdjax.arena import aligned_empty
from gdjax.engine.block import Block
from gdjax.placed import adopted

KEPT_BYTES = 64 << 20
"""Most bytes of either that are kept."""


class Kept:
    """Things by what they can be used for, each with its bytes, up to `KEPT_BYTES` of them."""

    def __init__(self) -> None:
        self.things: dict[Hashable, list[tuple[Any, int]]] = {}
        self.bytes = 0
        self.lock = threading.Lock()

    def take(self, key: Hashable) -> Any:
        """One that nobody uses; None: there is none."""
        with self.lock:
            found = self.things.get(key)
            if not found:
                return None
            thing, size = found.pop()
            self.bytes -= size
            return thing

    def give(self, key: Hashable, thing: Any, size: int) -> None:
        with self.lock:
            if self.bytes + size <= KEPT_BYTES:
                self.things.setdefault(key, []).append((thing, size))
                self.bytes += size


ROOMS, STAGES = Kept(), Kept()


def room_for(block: Block, device: jax.Device) -> Any:
    """What one call of the block may write its results into; what is in it means nothing."""
    if not block.room:
        return ()
    results = ROOMS.take((device, block.room))
    if results is None:
        fresh = [np.zeros(shape, dtype) for shape, dtype in block.room]
        results = jax.device_put(fresh, device, may_alias=False)
    return jax.tree.unflatten(block.out_tree, results)


def room_back(block: Block, device: jax.Device, results: list[jax.Array]) -> None:
    """Take back what a call of the block has returned, which nobody looks at any more."""
    if block.room:
        ROOMS.give((device, block.room), results, block.room_bytes)


class Stage:
    """Memory for the inputs of one call at a time: `arrays` are written, `placed` are the same to JAX."""

    def __init__(self, block: Block, device: jax.Device):
        self.arrays = [None if shape is None else aligned_empty(*shape) for shape in block.stage]
        self.bytes = sum(array.nbytes for array in self.arrays if array is not None)
        self.placed = [None if array is None else adopted(array, device) for array in self.arrays]

    def filled(self, leaves: Sequence[np.ndarray], first: int, last: int, used: int) -> list[Any]:
        """The inputs of a call: the problems from `first` to `last`, padded with the last one up to `used` of them."""
        held = last - first
        for leaf, array in zip(leaves, self.arrays, strict=True):
            if array is not None:
                array[:held] = leaf[first:last]
                if held < used:
                    array[held:used] = leaf[last - 1]
        return [leaf if placed is None else placed for leaf, placed in zip(leaves, self.placed, strict=True)]

    def shared(self) -> bool:
        """Whether JAX reads this memory itself and not a copy of it."""
        return all(
            placed.unsafe_buffer_pointer() == array.__array_interface__["data"][0]
            for array, placed in zip(self.arrays, self.placed, strict=True)
            if array is not None and placed is not None
        )


def stage_for(block: Block, device: jax.Device) -> Stage | None:
    """Where to copy the inputs of one call of the block; None: they are better read where they are."""
    if not block.stage:
        return None
    stage = STAGES.take((device, block.stage))
    if stage is None:
        stage = Stage(block, device)
        return stage if stage.shared() else None
    return stage


def stage_back(block: Block, device: jax.Device, stage: Stage | None) -> None:
    """Take back a stage whose call is over."""
    if stage is not None:
        STAGES.give((device, block.stage), stage, stage.bytes)
