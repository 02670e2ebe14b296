"""Host memory of results that nobody holds any more, kept for the next ones.

A fresh page must be asked of the system and filled with zeros: for scalar problems that takes as long as the descent.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np

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
