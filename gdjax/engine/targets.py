"""How a kernel of register tiles is launched: on NVIDIA GPUs and on TPUs through Pallas, or interpreted.

A kernel here is a function of the scalars of one tile of problems; a target says how large a tile is, reads the tiles
of its arguments into registers, and writes those of its results. Arguments are `[scalars, problems]`, or `[scalars]`
where all problems share them. No scalar is read twice, none leaves a register before the kernel ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

OLD = jax.__version_info__ < (0, 11)
"""JAX 0.10 launches a kernel for GPUs by `pallas_call`, as it does any; later ones only by a function of its own."""


class Leaf(NamedTuple):
    """The scalars of a leaf in memory: brought into registers all together, or one by one, each a tile."""

    all: Callable[[], list[Any]]
    one: Callable[[Any], Any]


class Arguments(NamedTuple):
    """What a kernel is given: uniform values, and the leaves. It takes `steps` of those that lead from `start` to the
    `end`."""

    start: Any
    steps: Any
    end: Any
    zero: Any
    own: list[Leaf]
    shared: list[Leaf]


Compute = Callable[[Arguments], list[list[Any]]]


class Target:
    """A machine whose scalars of one problem are tiles of shape `tile`."""

    tile: tuple[int, ...]

    @property
    def lanes(self) -> int:
        """Problems per tile."""
        return math.prod(self.tile)

    def settle(self, x: Any) -> Any:
        """The tile in the form in which a loop carries it."""
        return x

    def full(self, x: Any) -> Any:
        """A tile of one number."""
        return lax.full(self.tile, x)

    def launch(
        self,
        compute: Compute,
        numbers: Any,
        zero: Any,
        own: Sequence[Any],
        shared: Sequence[Any],
        out: Sequence[tuple[int, Any]],
        size: int,
    ) -> list[Any]:
        """`compute` on every tile of `size` problems; `numbers` are the start, the steps, how many problems there are,
        and the end: a tile behind them takes no steps. `out` has the scalars and the dtype of each result."""
        call = self.call(self.body(compute, len(own), len(shared)), own, shared, out, size)
        results = call(numbers, zero, *(self.laid(leaf, size) for leaf in own), *shared)
        return [leaf.reshape(leaf.shape[0], size) for leaf in results]

    def body(self, compute: Compute, own: int, shared: int) -> Callable[..., None]:
        """The kernel over references to memory."""

        def body(numbers: Any, zero: Any, *refs: Any) -> None:
            mine, common, results = refs[:own], refs[own : own + shared], refs[own + shared :]
            some = self.number() * self.lanes < numbers[2]
            given = Arguments(
                numbers[0],
                jnp.where(some, numbers[1], 0),
                jnp.where(some, numbers[3], numbers[0]),
                self.full(zero[0]),
                [Leaf(partial(self.read, ref), partial(self.one, ref)) for ref in mine],
                [Leaf(partial(self.read_shared, ref), partial(self.one_shared, ref)) for ref in common],
            )
            for ref, tiles in zip(results, compute(given), strict=True):
                self.write(ref, tiles)

        return body

    def number(self) -> Any:
        """Which tile this is."""
        return pl.program_id(0)

    def laid(self, leaf: Any, size: int) -> Any:
        """An argument in the shape in which the kernel reads it."""
        return leaf

    def read(self, ref: Any) -> list[Any]:
        return [self.one(ref, i) for i in range(ref.shape[0])]

    def one(self, ref: Any, index: Any) -> Any:
        return ref[index]

    def read_shared(self, ref: Any) -> list[Any]:
        return [self.one_shared(ref, i) for i in range(ref.shape[0])]

    def one_shared(self, ref: Any, index: Any) -> Any:
        return self.full(ref[index])

    def write(self, ref: Any, tiles: Sequence[Any]) -> None:
        for i, x in enumerate(tiles):
            ref[i] = x

    def call(
        self, body: Any, own: Sequence[Any], shared: Sequence[Any], out: Sequence[tuple[int, Any]], size: int
    ) -> Any:
        raise NotImplementedError


class Interpreted(Target):
    """Pallas' interpreter: shows that the arithmetic is right, and nothing about compilers. For tests."""

    tile = (128,)

    def read(self, ref: Any) -> list[Any]:
        return list(ref[...])  # one operation, where one per scalar would be compiled for seconds

    def write(self, ref: Any, tiles: Sequence[Any]) -> None:
        ref[...] = jnp.stack(tiles)

    def call(
        self, body: Any, own: Sequence[Any], shared: Sequence[Any], out: Sequence[tuple[int, Any]], size: int
    ) -> Any:
        whole = pl.BlockSpec(memory_space=None)
        block = lambda n: pl.BlockSpec((n, self.lanes), lambda i: (0, i))  # noqa: E731
        return pl.pallas_call(
            body,
            out_shape=[jax.ShapeDtypeStruct((n, size), dtype) for n, dtype in out],
            grid=(size // self.lanes,),
            in_specs=[whole, whole, *(block(leaf.shape[0]) for leaf in own), *(whole for _ in shared)],
            out_specs=[block(n) for n, _ in out],
            interpret=True,
        )


class MosaicTPU(Target):
    """A TPU: a tile is one vector register of 8 × 128 problems; what all share lies in scalar memory."""

    tile = (8, 128)

    def laid(self, leaf: Any, size: int) -> Any:
        return leaf.reshape(leaf.shape[0], size // 128, 128)

    def call(
        self, body: Any, own: Sequence[Any], shared: Sequence[Any], out: Sequence[tuple[int, Any]], size: int
    ) -> Any:
        from jax.experimental.pallas import tpu as mosaic

        number = pl.BlockSpec(memory_space=mosaic.SMEM)
        block = lambda n: pl.BlockSpec((n, 8, 128), lambda i: (0, i, 0))  # noqa: E731
        return pl.pallas_call(
            body,
            out_shape=[jax.ShapeDtypeStruct((n, size // 128, 128), dtype) for n, dtype in out],
            grid=(size // self.lanes,),
            in_specs=[number, number, *(block(leaf.shape[0]) for leaf in own), *(number for _ in shared)],
            out_specs=[block(n) for n, _ in out],
            compiler_params=mosaic.CompilerParams(dimension_semantics=("parallel",)),
        )


class MosaicGPU(Target):
    """An NVIDIA GPU from Hopper on: a tile is one register of each of the 128 threads of a warpgroup."""

    tile = (128,)

    def settle(self, x: Any) -> Any:
        from jax.experimental.pallas import mosaic_gpu as mosaic

        return mosaic.layout_cast(x, mosaic.Layout.WG_STRIDED(self.tile, vec_size=1))

    def full(self, x: Any) -> Any:
        # Mosaic forgets that an integer has a sign where it selects between two numbers that are not in registers.
        tile = lax.full(self.tile, x)
        return self.settle(tile) if tile.dtype.kind == "i" else tile

    def one(self, ref: Any, index: Any) -> Any:
        from jax.experimental.pallas import mosaic_gpu as mosaic

        layout = mosaic.Layout.WG_STRIDED(self.tile, vec_size=1)
        apart = [None] if OLD else []  # where an index beside the reference is wanted
        return mosaic.load(ref.at[index, self.here()], *apart, layout=layout)

    def write(self, ref: Any, tiles: Sequence[Any]) -> None:
        for i, x in enumerate(tiles):
            ref[i, self.here()] = self.settle(x)

    def number(self) -> Any:
        return pl.program_id(0) if OLD else lax.axis_index("tile")

    def here(self) -> Any:
        return pl.ds(self.number() * self.lanes, self.lanes)

    def call(
        self, body: Any, own: Sequence[Any], shared: Sequence[Any], out: Sequence[tuple[int, Any]], size: int
    ) -> Any:
        from jax.experimental.pallas import mosaic_gpu as mosaic

        shapes = [jax.ShapeDtypeStruct((n, size), dtype) for n, dtype in out]
        grid = (size // self.lanes,)
        # No thread reads what another wrote, so stores need no barriers. Every value has the layout it is read in: left
        # to find layouts by itself, Mosaic takes minutes for a thousand operations.
        params = mosaic.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=mosaic.LoweringSemantics.Lane
        )
        if OLD:
            whole = pl.BlockSpec(memory_space=mosaic.GMEM)
            ins, outs = [whole] * (2 + len(own) + len(shared)), [whole] * len(out)
            return pl.pallas_call(
                body, out_shape=shapes, grid=grid, in_specs=ins, out_specs=outs, compiler_params=params
            )
        return mosaic.kernel(body, out_type=shapes, grid=grid, grid_names=("tile",), compiler_params=params)


TARGETS: dict[str, Target] = {"gpu": MosaicGPU(), "tpu": MosaicTPU(), "cpu": Interpreted()}
