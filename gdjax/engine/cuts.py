"""Where a batch is cut into pieces for a compiled block, and the pieces themselves."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence

import numpy as np

from gdjax.arena import ALIGNED, aligned, aligned_empty
from gdjax.engine.block import Block

Cut = tuple[int, int]
"""The first problem of a piece, and the first one behind it."""

PARTS = 8
"""The first piece is 1/PARTS of a block where it has to be copied, so that those behind it need not be."""


def pieces(block: Block, left: list[Cut], lanes: int, shift: int = 0) -> list[Cut]:
    """What is left of a batch cut into pieces that fit a block, spread evenly over the workers.

    On one device at tile boundaries (`shift` problems behind them); over several to the last problem, so that none is
    idle while there is work.
    """
    return [piece for begin, end in left for piece in spread(block, begin, end, lanes, shift)]


def spread(block: Block, begin: int, end: int, lanes: int, shift: int) -> list[Cut]:
    count, tile, small = end - begin, block.plan.tile, 0
    if len(block.devices) > 1:
        rounds = -(-count // (block.size * lanes))
        step = -(-count // (rounds * lanes))
    else:
        if 0 < shift < tile < block.size // PARTS and count > block.size:
            small = block.size // PARTS - tile + shift
        # The small piece counts: the last one is as much shorter, for the worker that took it.
        tiles = -(-count // tile)
        each = min(block.plan.tiles, max(1, -(-tiles // lanes)))
        rounds = -(-tiles // (each * lanes))
        step = min(block.plan.tiles, -(-tiles // (rounds * lanes))) * tile
    cuts = [begin, *range(begin + (small or step), end, step), end]
    return list(itertools.pairwise(cuts))


def unaligned(arrays: Sequence[np.ndarray]) -> int:
    """How many problems come before the first from which on XLA reads most without a copy.

    NumPy's own large arrays begin 16 bytes behind a page.
    """
    read: collections.Counter[int] = collections.Counter({0: 0})
    for array in arrays:
        address, row = array.__array_interface__["data"][0], array.strides[0]
        if array.flags.c_contiguous:
            read.update({shift: row for shift in range(ALIGNED) if (address + shift * row) % ALIGNED == 0})
    return max(read, key=lambda shift: (read[shift], -shift))


def window(array: np.ndarray, first: int, last: int, used: int, size: int) -> np.ndarray:
    """`size` problems from `first` on: a view where there are as many and XLA reads them without a copy.

    Else a copy, padded with the last problem up to the end of the tiles that are used. What lies behind them is never
    looked at. (XLA's own copy would be made of fresh memory, while no other thread may run.)
    """
    whole = first + size <= len(array)
    if whole and aligned(array[first:]):
        return array[first : first + size]
    out = aligned_empty((size, *array.shape[1:]), array.dtype)
    held = used if whole else last - first
    out[:held] = array[first : first + held]
    if not whole:
        out[held:used] = array[last - 1]
    return out
