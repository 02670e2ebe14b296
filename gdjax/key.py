"""What makes a kind of problem: compiled programs, and what they cost, are looked up by it."""

from __future__ import annotations

from collections.abc import Hashable

import jax

from gdjax.batch import Batch
from gdjax.engine.program import Program
from gdjax.pieces import own


class Key:
    """A kind of problem, hashed once: it is looked up several times in a call."""

    __slots__ = ("hashed", "parts")

    def __init__(self, *parts: Hashable):
        self.parts, self.hashed = parts, hash(parts)

    def __hash__(self) -> int:
        return self.hashed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.hashed == other.hashed and self.parts == other.parts


def key_of(program: Program, batch: Batch) -> Key:
    leaves, tree = jax.tree.flatten((batch.weights, batch.data, batch.hyper))
    flags = tuple(jax.tree.leaves((own(batch.weights), batch.data_flags, batch.hyper_flags)))
    shapes = tuple(
        (leaf.shape[1:] if flag else leaf.shape, leaf.dtype) for leaf, flag in zip(leaves, flags, strict=True)
    )
    return Key(program, tree, shapes, flags, bool(jax.config.jax_enable_x64))  # type: ignore[attr-defined]
