"""What a loop carries computed in one loop over the lanes, on the CPU.

XLA's CPU compiler writes a loop over the lanes for every result. Where new weights and the moments of an optimizer are
made of one another, each loop computes the others anew: Adam's three take one and a half times as long as one. The one
operation of XLA with several results of lanes is a reduction, and what it reduces is computed in its loop. So arrays
become the second row of two, the first is zeros, and the rows are combined by OR, bit by bit. LLVM writes the loop over
two rows out, and nothing is left of the zeros.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax.engine.kernels import Kernel

TURNS = 2
"""Passes that a loop makes between two looks at whether it is at its end. XLA does not see that a reduction's results
may be written where its operands lie, and would copy them there; of two passes in turn, the second finds the place of
the first one's operands free."""

CHECKS = 128
"""Most pairs of arrays, one of them written, of which LLVM compares the places before it runs a loop as vectors: with
more, it leaves the loop as it is, and that is twenty times as slow."""

SCALARS = 8
"""Numbers that a pass may read beside its lanes: its own, powers of it, a zero."""


@dataclasses.dataclass(frozen=True)
class Joint:
    """Which leaves of what a loop carries are computed together, by their places: a tuple for each loop over lanes."""

    groups: tuple[tuple[int, ...], ...] = ()

    @property
    def turns(self) -> int:
        return TURNS if self.groups else 1

    def __call__(self, carry: Any) -> Any:
        """The same, computed so."""
        leaves, structure = jax.tree.flatten(carry)
        for places in self.groups:
            for place, leaf in zip(places, in_one_loop([leaves[place] for place in places]), strict=True):
                leaves[place] = leaf
        return jax.tree.unflatten(structure, leaves)

    def in_turn(self, body: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """`body(number, carry)` so many `turns` in a row, as the body of a loop."""

        def several(number: Any, carry: Any) -> Any:
            for turn in range(self.turns):
                carry = self(body(number * self.turns + turn, carry))
            return carry

        return several


def joint(kernel: Kernel, weights: int, carry: Any, flags: Any, given: Any, given_flags: Any) -> Joint:
    """How a loop should compute what it carries, made of itself and of what is `given`: numbers of each problem.

    There are as many of each kind (moments, say) as there are `weights`; those of one weight stay together. In vectors,
    gradients are sums that all look at, put down once.
    """
    leaves = jax.tree.leaves(carry)
    own = [n for n, flag in enumerate(jax.tree.leaves(flags)) if flag and jnp.issubdtype(leaves[n].dtype, jnp.floating)]
    dtypes = {leaves[n].dtype.name for n in own}
    # XLA takes no reduction of several; narrower numbers it computes in wider ones, which have other bits.
    alike = len(dtypes) == 1 and dtypes <= {"float32", "float64"} and all(leaves[n].ndim == 1 for n in own)
    if not (kernel.on_host and kernel.axis == -1 and alike) or len(own) % weights:
        return Joint()
    read = SCALARS + sum(jax.tree.leaves(flags))
    for leaf, flag in zip(jax.tree.leaves(given), jax.tree.leaves(given_flags), strict=True):
        read += math.prod(leaf.shape[:-1] if flag else leaf.shape)
    most = per_loop(weights, len(own) // weights, read)
    cuts = range(0, weights, most) if most else ()
    groups = (tuple(place for n, place in enumerate(own) if first <= n % weights < first + most) for first in cuts)
    return Joint(tuple(group for group in groups if len(group) > 1))


def per_loop(weights: int, kinds: int, read: int) -> int:
    """The most of so many weights, a value of each kind with them, that a loop may compute; 0 if none."""
    for loops in range(1, weights + 1):
        most = -(-weights // loops)
        written = most * kinds
        if written * read + written * (written - 1) // 2 <= CHECKS:
            return most
    return 0


def in_one_loop(arrays: Sequence[Any]) -> list[Any]:
    """The same arrays, of one shape, as the results of one reduction."""
    zeros = [jnp.zeros((), array.dtype) for array in arrays]
    rows = [lax.pad(array[None], zero, [(1, 0, 0), (0, 0, 0)]) for array, zero in zip(arrays, zeros, strict=True)]
    return list(lax.reduce(rows, zeros, lambda some, others: tuple(map(bitwise_or, some, others)), (0,)))


def bitwise_or(some: Any, other: Any) -> Any:
    """The OR of two numbers, bit by bit."""
    bits = np.dtype(f"int{8 * some.dtype.itemsize}")
    both = lax.bitcast_convert_type(some, bits) | lax.bitcast_convert_type(other, bits)
    return lax.bitcast_convert_type(both, some.dtype)
