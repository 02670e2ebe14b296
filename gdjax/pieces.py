"""Batches and pytrees of problems cut, picked, joined: NumPy views and copies, problems in front."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from gdjax import device as dev
from gdjax.batch import Batch


def own(tree: Any) -> Any:
    return jax.tree.map(lambda _: True, tree)


def hashable(flags: Any) -> Any:
    return tuple(jax.tree.leaves(flags))


def unhashed(flags: Any, like: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), flags)


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
    """The problems at `which` of a pytree; what no problem owns stays."""
    return jax.tree.map(lambda leaf, flag: np.asarray(leaf)[which] if flag else leaf, tree, flags)


def join(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return jax.tree.map(np.asarray, parts[0])

    def whole(*leaves: Any) -> np.ndarray:
        out = dev.aligned_empty((sum(len(leaf) for leaf in leaves), *leaves[0].shape[1:]), leaves[0].dtype)
        return np.concatenate(leaves, out=out)

    return jax.tree.map(whole, *parts)


def scatter(whole: Any, part: Any, which: np.ndarray) -> np.ndarray:
    whole = np.asarray(whole)
    out = dev.aligned_empty(whole.shape, whole.dtype)
    out[...] = whole
    out[which] = np.asarray(part)
    return out
