"""Takes the pieces of a batch through devices that share the host's memory, several at a time.

Slices of the batch are views, results are written straight into their place.
"""

from __future__ import annotations

import collections
import functools
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from gdjax import device as dev
from gdjax.engine.block import Block
from gdjax.engine.cuts import Cut, pieces, unaligned, window
from gdjax.engine.spares import room_back, room_for, stage_back, stage_for
from gdjax.placed import number


@functools.cache
def negative_zero(device: jax.Device) -> jax.Array:
    return jax.device_put(np.float32(-0.0), device)


def scalars(start: int, steps: int, used: int, device: jax.Device) -> tuple[jax.Array, ...]:
    """What a compiled block is told beside its inputs."""
    return number(start, device), number(steps, device), number(used, device), negative_zero(device)


def on_host(
    block: Block,
    leaves: list[Any],
    own: list[bool],
    tree: Any,
    left: list[Cut],
    start: int,
    steps: int,
    outputs: Any,
    patient: bool,
    updates: int | None,
) -> list[Cut]:
    """The pieces for which there was no memory, where the caller is `patient`; the results of the others are put into
    `outputs`."""
    arrays = [np.asarray(leaf) for leaf in leaves]
    ahead = (updates or 0) * sum([last - first for first, last in left])
    everyone = block.lanes
    lanes = block.pace.crew(ahead, everyone) if ahead and len(block.devices) == 1 else everyone
    cuts = pieces(block, left, lanes, shift_of(block, left, arrays, own))
    outputs.expect(block, cuts)
    ways = itertools.cycle(zip(block.executables, block.devices, strict=True))
    waiting = collections.deque(zip(ways, cuts, strict=False))
    failed: list[Cut] = []
    workers = min(lanes, len(cuts))

    def solved(executable: Any, device: jax.Device, first: int, last: int) -> None:
        """One piece: its inputs, the call, its results put into their place."""
        tiles = -(-(last - first) // block.plan.tile)
        padded, used = tiles * block.plan.tile, last - first if block.by_problem else tiles
        stage = stage_for(block, device)
        if stage is not None:
            inputs = stage.filled(arrays, first, last, padded)
        else:
            inputs = [
                window(array, first, last, padded, block.size) if flag else array
                for array, flag in zip(arrays, own, strict=True)
            ]
        told = scalars(start, steps, used, device)
        results = jax.tree.leaves(executable(jax.tree.unflatten(tree, inputs), *told, room_for(block, device)))
        # Waiting here lets other threads run; waiting inside NumPy would not.
        outputs.put(first, last, jax.block_until_ready(results))
        room_back(block, device, results)
        stage_back(block, device, stage)

    def work() -> None:
        """Takes pieces while there are any."""
        with jax.enable_x64(block.x64):
            while True:
                try:
                    (executable, device), cut = waiting.popleft()
                except IndexError:
                    return
                try:
                    solved(executable, device, *cut)
                except (RuntimeError, MemoryError) as error:
                    if not (patient and dev.out_of_memory(error)):
                        raise
                    failed.append(cut)

    begin = time.perf_counter()
    others = [crew(everyone).submit(work) for _ in range(workers - 1)]
    work()
    for other in others:
        other.result()
    if ahead:
        block.pace.note(time.perf_counter() - begin, ahead, workers)
    return sorted(failed)


def shift_of(block: Block, left: list[Cut], arrays: list[np.ndarray], own: list[bool]) -> int:
    """How far behind the tile boundaries to cut a batch of several pieces, so that most are read without a copy."""
    if sum([last - first for first, last in left]) <= block.size:
        return 0
    return unaligned([array for array, flag in zip(arrays, own, strict=True) if flag])


@functools.cache
def crew(lanes: int) -> ThreadPoolExecutor:
    """The threads that run blocks side by side with the caller's, kept between calls."""
    return ThreadPoolExecutor(lanes, thread_name_prefix="gdjax")
