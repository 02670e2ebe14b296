"""Labels looked up on an axis, and figures under names: the small change of `gdjax.sweep_result`."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from gdjax.over import Axis
from gdjax.solution import Status

SAME = 1e-6
"""Relative distance at which two numbers are one label: nobody types 0.0316227766 in full."""


WORSE = (Status.CONVERGED, Status.RAN_ALL_STEPS, Status.STOPPED, Status.DIVERGED)
"""Statuses from good to bad."""


def worst(status: np.ndarray) -> np.ndarray:
    """The worst status along the last axis."""
    rank = np.argsort(WORSE)
    return np.array(WORSE, np.int8)[rank[status].max(axis=-1)]


def indexed(index: Any, leaf: np.ndarray) -> Any:
    """`leaf[index]`, the index first so that it can be bound."""
    return leaf[index]


def position(name: str, axis: Axis, label: Any) -> Any:
    """Where on an axis labels lie."""
    if isinstance(label, slice):
        if label.step is not None:
            raise ValueError(f"{name}={label}; a slice of labels has a lower and an upper end only")
        inside = np.ones(len(axis), bool)
        if label.start is not None:
            inside &= axis.labels >= label.start
        if label.stop is not None:
            inside &= axis.labels <= label.stop
        return np.flatnonzero(inside)
    if isinstance(label, (list, tuple, np.ndarray, range)) and np.ndim(np.asarray(label)) == 1:
        return np.array([position(name, axis, one) for one in label], np.int64)
    if axis.labels.dtype.kind == "f" and isinstance(label, (int, float, np.number)):
        found = np.flatnonzero(np.isclose(axis.labels, label, rtol=SAME, atol=0))
    else:
        found = np.flatnonzero(axis.labels == label)
    if len(found) == 0:
        known = [str(known) for known in axis.labels]
        if axis.labels.dtype.kind in "fiu" and isinstance(label, (int, float, np.number)):
            known = [str(axis.labels[at]) for at in np.sort(np.argsort(np.abs(axis.labels - label))[:2])]
        shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        near = "next to it is" if axis.labels.dtype.kind in "fiu" else "it has"
        raise ValueError(f"{name} has no {label!r}; {near} {shown}. isel picks by position")
    return int(found[0])


def blanked(leaf: np.ndarray, where: np.ndarray, always: bool = False) -> np.ndarray:
    """`leaf` with NaN at the runs in `where`; `always`: also whole numbers, as floats, and words, as empty ones."""
    if not where.any():
        return leaf
    where = where.reshape(where.shape + (1,) * (leaf.ndim - where.ndim))
    if jax.numpy.issubdtype(leaf.dtype, np.floating):
        return np.where(where, np.asarray(np.nan, leaf.dtype), leaf)
    if always:
        return np.where(where, "", leaf) if leaf.dtype.kind == "U" else np.where(where, np.nan, leaf)
    return leaf


def spelled(name: str, tree: Any, dims: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A column for every number that a run has in a pytree, called `name.leaf[i]`."""
    columns = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = [name, jax.tree_util.keystr(path, simple=True, separator=".")]
        stem, rest = ".".join(part for part in parts if part), leaf.shape[len(dims) :]
        flat = leaf.reshape(math.prod(dims), -1)
        for number, index in enumerate(np.ndindex(*rest)):
            columns[f"{stem}[{','.join(map(str, index))}]" if rest else stem] = flat[:, number]
    return columns
