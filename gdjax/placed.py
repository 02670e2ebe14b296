"""Arrays brought to where they are wanted, without a copy where they are there already."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jaxlib.xla_client
import numpy as np

from gdjax import device as dev
from gdjax.arena import aligned, aligned_full

adopt = getattr(jaxlib.xla_client, "batched_device_put", None)

FILLED: dict[jax.Device | None, tuple[int, int, Any]] = {}
"""The last array of equal numbers in each memory (None: the host's), its length and its number."""

FILLED_BYTES = 64 << 20
"""Most bytes of an array of equal numbers that is kept."""


def give(tree: Any, home: jax.Device) -> Any:
    """Results as `jax.Array`s on `home`, without a copy where they are there already.

    What has no room there stays in host memory, a NumPy array. 64-bit leaves become NumPy arrays while
    `jax_enable_x64` is off: the first operation on such a `jax.Array` would narrow it without a word.
    """
    keeps = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
    put = adopted if dev.is_host(home) else put_one

    def given(leaf: Any) -> Any:
        if leaf.dtype.itemsize == 8 and not keeps:
            return np.asarray(leaf)
        return put(leaf, home) if isinstance(leaf, np.ndarray) else leaf

    return jax.tree.map(given, tree)


def filled(count: int, value: int, device: jax.Device) -> Any:
    """`count` times the same int32, made where it will lie: in the memory of the call before, where that was the same.
    Nobody may write there."""
    place = None if dev.is_host(device) else device
    *same, kept = FILLED.get(place, (0, 0, None))
    if kept is not None and same == [count, value] and not (place and kept.is_deleted()):  # a user may have donated it
        return kept
    if place:
        out = filled_there(number(value, place), count)
    else:
        out = aligned_full((count,), value, np.int32)
        out.flags.writeable = False
    if out.nbytes <= FILLED_BYTES:
        FILLED[place] = count, value, out
    return out


@functools.partial(jax.jit, static_argnums=1)
def filled_there(value: jax.Array, count: int) -> jax.Array:
    return jax.numpy.broadcast_to(value, count)


@functools.lru_cache(4096)
def number(value: int, device: jax.Device) -> jax.Array:
    """A whole number where a program reads it: handing over one that lies there costs a tenth."""
    return jax.device_put(np.int32(value), device)


def adopted(array: np.ndarray, home: jax.Device) -> jax.Array:
    """The array as one of JAX's, in its own memory.

    By the call that `jax.device_put` ends in, at a tenth of its cost, where jaxlib has that under this name.
    """
    if adopt is None:
        return jax.make_array_from_callback(array.shape, place(home), lambda _: array)
    return adopt(abstract(array.shape, array.dtype), place(home), [array], [home], True)


@functools.lru_cache(1024)
def abstract(shape: tuple[int, ...], dtype: np.dtype) -> jax.core.ShapedArray:
    return jax.core.ShapedArray(shape, dtype)


@functools.cache
def place(home: jax.Device) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(home)


def put_one(array: np.ndarray, home: jax.Device) -> jax.Array | np.ndarray:
    """The array on a device with memory of its own, or where it is if there is no room for it there."""
    free = dev.room(home)
    if free is not None and array.nbytes > free:
        return array
    try:
        return jax.device_put(array, home)
    except RuntimeError as error:
        if not dev.out_of_memory(error):
            raise
    return array


def within_reach(array: Any, home: jax.Device) -> Any:
    """The array where programs on `home` read it without a copy of their own: there, or aligned in host memory."""
    if not dev.is_host(home):
        return jax.device_put(array, home)
    found = np.asarray(array)
    if aligned(found):
        return found
    return aligned_full(found.shape, found, found.dtype)
