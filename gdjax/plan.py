"""How a batch is run on a device: which kernel, how many lanes, how many tiles per call, how many steps per pass.

A plan changes speed alone. Which kernel a problem gets follows from the problem; tile, tiles and chunk may be chosen by
measuring, since the lanes kernel gives every problem the same bits under all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax

from gdjax import device as dev

CACHE_BYTES = 24 * 1024
"""A tile of vector problems should stay in the fastest cache for the whole descent."""

BLOCK_BYTES = 4 * 1024 * 1024
"""Problems handed over in one call: enough that the call costs little beside them."""

DEVICE_BYTES = 1024 * 1024 * 1024
"""Problems brought into a kernel's layout at a time on a device with memory of its own."""

ACCELERATOR_BYTES = 256 * 1024 * 1024
"""A tile under vmap should take little of an accelerator's memory: it cannot be made smaller where that is full."""

TILE_OPERATIONS = 1 << 28
"""And have work for some ten microseconds a step: more would be idle lanes for a small batch of large problems."""

VECTOR = 32
"""Tiles are whole pairs of the widest vectors: less would be computed by other instructions, with other rounding."""

SMALL = 256
"""Scalar batches up to this size get a tile of this size."""

LARGE = 1024
"""Others get tiles of this size: what a step of them reads and writes stays in the fastest cache, and some ten thousand
problems divide evenly among the workers."""

MIDDLE = 384
"""And of this size with a stop rule: the lanes of one hold twice as much."""

MANY = 1 << 30
"""More problems than one block holds."""

SHARED = 192
"""Problems to a tile under vmap where they share data: what lies between two matrix products stays in the cache."""

SHARED_LANES = 64
"""And in lanes, where what lies between two sums over a few points stays in the fastest one."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a batch is run.

    Attributes:
        kernel: `"lanes"` (problems along the vector units, sums written out), `"vmap"`, or `"registers"` (the whole
            descent of small problems in one kernel, for accelerators; on the CPU it is interpreted, for tests).
        tile: lanes per tile.
        tiles: tiles per call of the compiled program.
        chunk: steps fused into one pass over a tile. A stop rule in registers looks after strides of its own instead.
        reason: why the kernel is not the device's first choice (`"registers"` on an accelerator that can run them,
            else `"lanes"`); empty where it is.

    Raises:
        ValueError: a field that no plan can have.

    >>> Plan(tile=1024, tiles=4)
    Plan(kernel='lanes', tile=1024, tiles=4, chunk=1, reason='')
    >>> Plan(tile=1000)
    Traceback (most recent call last):
    ValueError: tile=1000; pass a multiple of 32
    """

    kernel: str = "lanes"
    tile: int = 256
    tiles: int = 1
    chunk: int = 1
    reason: str = ""

    def __post_init__(self) -> None:
        if self.kernel not in ("lanes", "vmap", "registers"):
            raise ValueError(f"kernel={self.kernel!r}; pass 'lanes', 'vmap' or 'registers'")
        if self.tile < VECTOR or self.tile % VECTOR:
            raise ValueError(f"tile={self.tile}; pass a multiple of {VECTOR}")
        if self.tiles < 1 or self.chunk < 1:
            raise ValueError(f"tiles={self.tiles}, chunk={self.chunk}; pass whole numbers of at least 1")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a plan depends on besides the device: the size of one problem, and whether it is scalars throughout."""

    bytes: int
    elementwise: bool
    shared: bool


def kind_of(inputs: Any, flags: Any) -> Kind:
    """The kind of problem that these inputs hold."""
    pairs = list(zip(jax.tree.leaves(inputs), jax.tree.leaves(flags), strict=True))
    own = [leaf for leaf, flag in pairs if flag]
    shared = [leaf for leaf, flag in pairs if not flag]
    size = sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in own)
    return Kind(
        max(1, size),
        all(leaf.ndim == 1 for leaf in own) and all(leaf.ndim == 0 for leaf in shared),
        any(leaf.ndim > 0 for leaf in shared),
    )


def fitted(plan: Plan, fusable: int) -> Plan:
    """The plan with no more steps fused than this problem's program bears."""
    return dataclasses.replace(plan, chunk=min(plan.chunk, fusable)) if plan.kernel == "lanes" else plan


def power_below(value: float, low: int, high: int) -> int:
    """The largest power of two up to `value`, within the bounds."""
    return max(low, min(high, 1 << max(0, math.floor(math.log2(max(1.0, value))))))


def roomy(count: int, low: int, high: int) -> int:
    """4, 5, 6, 7 or 8 times a power of two that holds `count`, within the bounds: at most a quarter more lanes than
    there are problems, and few enough sizes that programs are met again."""
    unit = 1 << max(0, (count - 1).bit_length() - 3)
    return max(low, min(high, -(-count // unit) * unit))


@functools.lru_cache(1024)
def default(kind: Kind, device: jax.Device, count: int) -> Plan:
    """A sound lanes plan without measuring; its shape depends on `count` by class only, and serves many N."""
    if not dev.is_host(device):
        most = power_below(DEVICE_BYTES / kind.bytes, SMALL, 1 << 24)
        return Plan("lanes", roomy(count, SMALL, most), 1, 16 if kind.elementwise else 1)
    if kind.elementwise:
        last, chunk = LARGE, 4
        ladder = [(SMALL, 1), (SMALL, 8), (LARGE, 16), (LARGE, 64)]
    else:
        last, chunk = power_below(CACHE_BYTES / kind.bytes, VECTOR, SHARED_LANES if kind.shared else 1024), 1
        ladder = [(last, 1), (last, 16)]
    ladder.append((last, power_below(BLOCK_BYTES / (last * kind.bytes), 16, 4096)))
    if count > SMALL * 8:  # several workers share the batch
        count = -(-count // min(2, dev.workers(device)))
    fits = [(tile, tiles) for tile, tiles in ladder if tile * tiles >= count]
    return Plan("lanes", *(fits or ladder[-1:])[0], chunk)


def registers(kind: Kind, lanes: int, count: int, fusable: int) -> Plan:
    """The plan of a kernel in registers whose tiles have `lanes` problems: one launch for as many as fit."""
    most = power_below(DEVICE_BYTES / kind.bytes, 1024, 1 << 24)
    tile = power_below(2 * count - 1, max(lanes, VECTOR), max(lanes, most))
    return Plan("registers", tile, 1, min(16, fusable) if kind.elementwise else 1)


@functools.lru_cache(1024)
def refill(kind: Kind, device: jax.Device, count: int) -> Plan:
    """The plan of a batch with a stop rule: smaller blocks, since rounds grow narrow, and looks every few steps."""
    if not dev.is_host(device):
        return dataclasses.replace(default(kind, device, count), chunk=4 if kind.elementwise else 1)
    if kind.elementwise:
        shape = (SMALL, 1) if count <= SMALL else (SMALL, 64) if count <= 1 << 15 else (MIDDLE, 132)
        return Plan("lanes", *shape, 4)
    plan = default(kind, device, count)
    return dataclasses.replace(plan, tiles=min(plan.tiles, 64))


def lull(kind: Kind) -> int:
    """Updates that cost a lane about as much as being brought to the processor and back."""
    return 800 if kind.elementwise else 12


def fallback(kind: Kind, device: jax.Device, count: int, reason: str, operations: float = 1.0) -> Plan:
    """The vmap plan. Its tile follows from the problem, of so many operations a step, and the device alone: another
    shape might get other bits."""
    tile = SHARED if kind.shared else power_below(64 * 1024 / kind.bytes, VECTOR, 256)
    if not dev.is_host(device):
        tile = power_below(min(ACCELERATOR_BYTES / kind.bytes, TILE_OPERATIONS / operations), VECTOR, 1 << 14)
    most = next((tiles for tiles in (1, 16, 128) if count <= tiles * tile), 1024)
    tiles = power_below(BLOCK_BYTES / (tile * kind.bytes), 1, most)
    return Plan("vmap", tile, tiles, 1, reason)
