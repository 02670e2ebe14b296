"""Host memory of results that nobody holds any more, kept for the next ones.

A fresh page must be asked of the system and filled with zeros: for scalar problems that takes as long as the descent.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ALIGNED = 64
"""XLA reads NumPy's memory without a copy where it begins at a multiple of so many bytes."""

LIMIT = 256 << 20
"""Most bytes that are kept."""

LEAST = 1 << 16
"""Smaller blocks are better served by the system's own allocator."""


class Arena:
    """Blocks of memory, given out as arrays and taken back when the last view of one is gone."""

    def __init__(self) -> None:
        self.free: list[np.ndarray] = []
        self.lock = threading.RLock()  # a block may come back at any moment, also while one is being looked for

    def take(self, size: int) -> np.ndarray:
        """`size` bytes, uninitialised."""
        if size < LEAST:
            return np.empty(size, np.uint8)
        with self.lock:
            fits = [n for n, block in enumerate(self.free) if size <= block.size <= 2 * size]
            best = min(fits, key=lambda n: self.free[n].size, default=None)
            block = np.empty(size, np.uint8) if best is None else self.free.pop(best)
        # Behind a memoryview, so that views hold on to `given` and not to the block itself.
        given = np.frombuffer(block.data, np.uint8, size)
        weakref.finalize(given, self.back, block).atexit = False
        return given

    def back(self, block: np.ndarray) -> None:
        with self.lock:
            self.free.append(block)
            while sum(held.size for held in self.free) > LIMIT:
                self.free.pop(0)


ARENA = Arena()


def aligned(array: np.ndarray) -> bool:
    """Whether XLA reads an array in host memory without a copy."""
    return array.flags.c_contiguous and array.__array_interface__["data"][0] % ALIGNED == 0


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised NumPy array that JAX can adopt without a copy."""
    dtype = np.dtype(dtype)
    raw = ARENA.take(math.prod(shape) * dtype.itemsize + ALIGNED)
    address = raw.__array_interface__["data"][0]  # at half the cost of `ctypes.data`
    return np.ndarray(shape, dtype, raw, -address % ALIGNED)


def aligned_together(wanted: Sequence[tuple[tuple[int, ...], Any]]) -> list[np.ndarray]:
    """Such arrays of several shapes and dtypes. Little ones lie side by side in one block: asking for it costs most."""
    types = [np.dtype(dtype) for _, dtype in wanted]
    sizes = [math.prod(shape) * dtype.itemsize for (shape, _), dtype in zip(wanted, types, strict=True)]
    ends = list(itertools.accumulate([-(-size // ALIGNED) * ALIGNED for size in sizes]))
    if not ends or ends[-1] > LEAST:
        return [aligned_empty(shape, dtype) for shape, dtype in wanted]
    raw = np.empty(ends[-1] + ALIGNED, np.uint8)
    begin = -raw.__array_interface__["data"][0] % ALIGNED
    places = [begin, *[begin + end for end in ends[:-1]]]
    return [np.ndarray(shape, dtype, raw, at) for (shape, _), dtype, at in zip(wanted, types, places, strict=True)]


def aligned_full(shape: tuple[int, ...], value: Any, dtype: Any) -> np.ndarray:
    """As `np.full`, in memory that JAX can adopt."""
    out = aligned_empty(shape, dtype)
    out[...] = value
    return out


def end_to_end(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays of one dtype one behind the other, in memory that JAX can adopt: that of earlier results, if it fits."""
    first = arrays[0]
    out = aligned_empty((sum(len(array) for array in arrays), *first.shape[1:]), first.dtype)
    return np.concatenate(arrays, out=out)


def host_room() -> int | None:
    """Bytes of host memory that are free, or that the container leaves, where the system tells."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError, IndexError):
        group = Path("/sys/fs/cgroup")
        held = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
        anonymous = next(int(line.split()[1]) for line in held if line.startswith("anon "))
        found.append(max(0, int((group / "memory.max").read_text(encoding="utf-8")) - anonymous))
    return min(found, default=None)
