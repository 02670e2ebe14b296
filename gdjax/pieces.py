"""Batches and pytrees of problems cut, picked, joined: NumPy views and copies, problems in front."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import lax

from gdjax import device as dev
from gdjax.arena import aligned_empty, aligned_full, end_to_end
from gdjax.batch import Batch
from gdjax.placed import within_reach

SHARED_BYTES = 64 * 1024
"""Less than this is copied for every piece sooner than it is looked at."""


def own(tree: Any) -> Any:
    return jax.tree.map(lambda _: True, tree)


def hashable(flags: Any) -> Any:
    return tuple(jax.tree.leaves(flags))


def unhashed(flags: Any, like: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), flags)


def shared_once(batch: Batch, home: jax.Device) -> Batch:
    """The batch with what all its problems share where it is read without a copy: it is needed for every piece."""
    if all(jax.tree.leaves(batch.data_flags)):
        return batch

    def settled(leaf: Any, flag: bool) -> Any:
        return leaf if flag or leaf.nbytes < SHARED_BYTES else within_reach(leaf, home)

    return dataclasses.replace(batch, data=jax.tree.map(settled, batch.data, batch.data_flags))


def cut(batch: Batch, which: Any) -> Batch:
    """Some problems of a batch: a slice, or the numbers of those wanted."""
    weights = pick(batch.weights, own(batch.weights), which)
    return dataclasses.replace(
        batch,
        weights=weights,
        data=pick(batch.data, batch.data_flags, which),
        hyper=pick(batch.hyper, batch.hyper_flags, which),
        count=len(jax.tree.leaves(weights)[0]),
    )


def pick(tree: Any, flags: Any, which: Any) -> Any:
    """The problems at `which` of a pytree; what no problem owns stays. A slice of a device's array stays there."""

    def taken(leaf: Any, flag: bool) -> Any:
        if not flag:
            return leaf
        if isinstance(which, slice) and isinstance(leaf, jax.Array) and not dev.is_host(next(iter(leaf.devices()))):
            first, last, _ = which.indices(len(leaf))
            return lax.slice_in_dim(leaf, first, last)
        return np.asarray(leaf)[which]

    return jax.tree.map(taken, tree, flags)


def join(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return jax.tree.map(np.asarray, parts[0])

    return jax.tree.map(lambda *leaves: end_to_end(leaves), *parts)


def joined(whole: Any, part: Any, first: int, count: int) -> Any:
    """`whole`, arrays for `count` problems, with a part of them written in from `first` on; None: not made yet.

    A part that is the whole stays on the accelerator where it lies."""
    if len(jax.tree.leaves(part)[0]) == count:
        return jax.tree.map(lambda leaf: leaf if dev.on_accelerator(leaf) else np.asarray(leaf), part)
    if whole is None:
        whole = jax.tree.map(lambda leaf: aligned_empty((count, *leaf.shape[1:]), leaf.dtype), part)
    for into, leaf in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        into[first : first + len(leaf)] = leaf
    return whole


def scatter(whole: Any, part: Any, which: np.ndarray) -> np.ndarray:
    """`whole` with `part` at `which`: in place where it is ours in host memory, as results are."""
    out = np.asarray(whole)
    if not out.flags.writeable:
        out = aligned_full(out.shape, out, out.dtype)
    out[which] = np.asarray(part)
    return out
