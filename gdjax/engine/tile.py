"""What is compiled: a block of tiles, each tile a fixed number of lanes, brought into the kernel's layout once.

A block's shape is fixed by the plan, the number of its tiles in use is an argument: one compiled program serves every
batch size.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gdjax.engine.inplace import placed
from gdjax.engine.kernels import Kernel
from gdjax.engine.materialise import materialised

ROW = 16
"""Lanes in a vector of the widest kind."""


def by_problem(engine: Any, room: Callable[..., Any] | None = None) -> Any:
    """Marks an engine that takes a whole block and the number of its problems, instead of a tile.

    On a CPU it is given memory to write its results into, where `room(kernel, program, flags, problems)` says of which
    shapes and dtypes they are. Outputs that no problem owns are counts, which add up over blocks.
    """
    engine.by_problem, engine.room = True, room
    return engine


def inward(kernel: Kernel, tree: Any, flags: Any) -> Any:
    """A tile as the user lays it, problems in front, brought into the kernel's layout.

    The barrier keeps the transposition out of the loop: XLA would otherwise merge it into every step's reads. On the
    CPU it would still go back to the user's layout before and after the loop.
    """
    moved = jax.tree.map(lambda leaf, flag: jnp.moveaxis(leaf, 0, kernel.axis) if flag else leaf, tree, flags)
    if kernel.axis == 0:
        return moved
    leaves, structure = jax.tree.flatten(lax.optimization_barrier(moved))
    turned = [n for n, flag in enumerate(jax.tree.leaves(flags)) if flag and leaves[n].ndim > 1]
    if kernel.on_host and turned:
        for n, leaf in zip(turned, materialised([leaves[n] for n in turned], kernel.zero), strict=True):
            leaves[n] = leaf
    return jax.tree.unflatten(structure, leaves)


def outward(kernel: Kernel, tree: Any, flags: Any) -> Any:
    return jax.tree.map(lambda leaf, flag: jnp.moveaxis(leaf, kernel.axis, 0) if flag else leaf, tree, flags)


def over_tiles(
    tile: Callable[[Any], tuple[Any, Any]], size: int, count: int, args: Any, flags: Any, used: Any
) -> Any:
    """`tile` on each of the first `used` of `count` tiles; `tile` returns its outputs and their flags."""
    if count == 1:
        return tile(args)[0]
    own: list[Any] = []

    def at(first: Any) -> tuple[Any, Any]:
        out, out_own = tile(following(args, flags, size, first))
        own.append(out_own)
        return out, out_own

    shapes = jax.eval_shape(lambda: at(0)[0])
    return each_tile(at, size, used, blank(shapes, own[0], count * size))


def each_tile(tile: Callable[[Any], tuple[Any, Any]], size: int, used: Any, buffers: Any) -> Any:
    """What `tile(first)` returns, outputs and their flags, for each of the tiles in use, whose problems begin at
    `first`, written over `buffers`.

    Outputs that no problem owns are those of the last tile: they are the same for all.
    """

    def written(buffer: Any, leaf: Any, flag: bool, first: Any) -> Any:
        return placed(buffer, leaf, first) if flag else leaf

    def body(state: Any) -> Any:
        first, buffers = state
        out, own = tile(first)
        return first + size, jax.tree.map(functools.partial(written, first=first), buffers, out, own)

    end = used * size
    return lax.while_loop(lambda state: state[0] < end, body, (jnp.int32(0), buffers))[1]


def blank(shapes: Any, own: Any, count: int) -> Any:
    """Zeros for the outputs of so many problems, where those of a tile have these shapes."""
    return jax.tree.map(lambda s, flag: jnp.zeros((count, *s.shape[1:]) if flag else s.shape, s.dtype), shapes, own)


def following(args: Any, flags: Any, size: int, first: Any) -> Any:
    """The arguments of `size` problems from `first` on."""
    cut = lambda leaf: lax.dynamic_slice_in_dim(leaf, first, size, allow_negative_indices=False)  # noqa: E731
    return jax.tree.map(lambda leaf, flag: cut(leaf) if flag else leaf, args, flags)


def total(numbers: Any) -> Any:
    """The sum of one number per lane.

    By way of `ROW` partial ones: the CPU compiler adds up a row number by number, and rows side by side. The barrier
    keeps it from making one sum of both. The last additions are written out: a call pays for every sum it may take.
    """
    if numbers.shape[0] % ROW:
        return jnp.sum(numbers, dtype=numbers.dtype)
    parts = lax.optimization_barrier(jnp.sum(numbers.reshape(-1, ROW), axis=0, dtype=numbers.dtype))
    return functools.reduce(operator.add, [parts[n] for n in range(ROW)])


def some(flags: Any) -> Any:
    """Whether any lane's flag is set; counted, since the CPU compiler goes through flags one by one to join them."""
    return total(flags.astype(jnp.int32)) > 0


def settle(
    kernel: Kernel, function: Callable[..., Any], carry: Any, flags: Any, rest: Any, rest_flags: Any
) -> tuple[Any, Any]:
    """The carry of a loop over `function(*carry, *rest)`, with the problem axis wherever a step would add it."""
    while True:
        after = kernel.flags(function, (*carry, *rest), (*flags, *rest_flags))
        wider = jax.tree.map(lambda a, b: a or b, flags, after if len(carry) > 1 else (after,))
        if jax.tree.leaves(wider) == jax.tree.leaves(flags):  # a user's own node may not compare by value
            return carry, flags
        carry, flags = kernel.spread(carry, flags, wider), wider


def repeat(count: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`body(number, carry)` for every number below `count`.

    Each pass itself says whether another follows: a condition of its own, as in `fori_loop`, would be one more launch
    per pass on a GPU.
    """

    def one(state: Any) -> Any:
        number, _, carry = state
        return number + 1, number + 1 < count, body(number, carry)

    start = jnp.int32(0)
    return lax.while_loop(lambda state: state[1], one, (start, start < count, carry))[2]
