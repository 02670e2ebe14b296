"""The two forms in which a tile runs one problem's functions: `lanes` (problems last) and `vmap` (problems first)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun

from gdjax.engine import lanes, streamed
from gdjax.engine.evaluator import UnsupportedError, Value, reaches


class Kernel:
    """Calls functions of one problem on a tile of `size` problems.

    Values travel as pytrees with pytrees of flags: whether a leaf has the problem axis, which lies at `axis`. What no
    problem owns (a step counter, shared data) stays without it. `on_host` says that a CPU is compiled for.
    """

    axis: int

    def __init__(self, size: int):
        self.size = size
        self.zero: Any = np.float32(-0.0)
        self.on_host = False
        self.traced: dict[Any, Any] = {}

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], flags: tuple[Any, ...], carried: int | None = None
    ) -> tuple[Any, Any]:
        """`(outputs, flags of the outputs)` of a function of one problem.

        In the body of a loop, `carried` says how many of the arguments change from turn to turn.
        """
        closed, tree = self.trace(function, args, flags)
        own = jax.tree.leaves(flags)
        out = reaches(closed.jaxpr, own)
        varies = [
            n < (len(args) if carried is None else carried) for n, a in enumerate(args) for _ in jax.tree.leaves(a)
        ]
        arrays = [jnp.asarray(a) for a in self.run(closed, jax.tree.leaves(args), own, varies, out)]
        return jax.tree.unflatten(tree, arrays), jax.tree.unflatten(tree, out)

    def flags(self, function: Callable[..., Any], args: tuple[Any, ...], flags: tuple[Any, ...]) -> Any:
        """The flags that `call` would return, without calling."""
        closed, tree = self.trace(function, args, flags)
        return jax.tree.unflatten(tree, reaches(closed.jaxpr, jax.tree.leaves(flags)))

    def trace(self, function: Callable[..., Any], args: tuple[Any, ...], flags: tuple[Any, ...]) -> tuple[Any, Any]:
        """The jaxpr of a function of one problem and the structure of what it returns."""
        leaves, treedef = jax.tree.flatten(args)
        own = jax.tree.leaves(flags)
        avals = tuple(self.one(leaf, flag) for leaf, flag in zip(leaves, own, strict=True))
        key = (function, treedef, tuple((a.shape, a.dtype) for a in avals))
        if key not in self.traced:
            closed, shapes = jax.make_jaxpr(
                lambda *flat: function(*jax.tree.unflatten(treedef, flat)), return_shape=True
            )(*avals)
            self.traced[key] = closed, jax.tree.structure(shapes)
        return self.traced[key]

    def traces_of(self, function: Callable[..., Any]) -> list[Any]:
        """The jaxprs in which a function has been called."""
        return [closed.jaxpr for (called, *_), (closed, _) in self.traced.items() if called == function]

    def one(self, leaf: Any, flag: bool) -> jax.ShapeDtypeStruct:
        """Shape and dtype for one problem."""
        shape = tuple(leaf.shape)
        if flag:
            shape = shape[1:] if self.axis == 0 else shape[:-1]
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    def run(self, closed: Any, leaves: list[Any], own: list[bool], varies: list[bool], out: list[bool]) -> list[Any]:
        raise NotImplementedError

    def spread(self, tree: Any, flags: Any, wanted: Any) -> Any:
        """`tree` with the problem axis wherever `wanted` says, repeated where it was missing."""

        def widen(leaf: Any, flag: bool, want: bool) -> Any:
            if flag or not want:
                return leaf
            shape = (self.size, *leaf.shape) if self.axis == 0 else (*leaf.shape, self.size)
            dims = range(1, leaf.ndim + 1) if self.axis == 0 else range(leaf.ndim)
            return lax.broadcast_in_dim(leaf, shape, tuple(dims))

        return jax.tree.map(widen, tree, flags, wanted)


class Lanes(Kernel):
    """Problems along the last axis, sums written out: see `gdjax.engine.lanes`."""

    axis = -1

    def run(self, closed: Any, leaves: list[Any], own: list[bool], varies: list[bool], out: list[bool]) -> list[Any]:
        values = [Value(*each) for each in zip(leaves, own, varies, strict=True)]
        walk = lanes.Lanes(self.size, self.zero, self.on_host)
        if self.on_host:  # on an accelerator a matrix product is one kernel, and a loop many
            results = streamed.run(walk, closed, values, own)
        else:
            results = walk.run(closed.jaxpr, closed.consts, values)
        return [
            lanes.spread(r, lanes.shape_of(r), self.size) if flag else r.array
            for r, flag in zip(results, out, strict=True)
        ]


class Vmap(Kernel):
    """Problems in front, through `jax.vmap`: takes every loss; its sums are ordered as the platform's kernels like."""

    axis = 0

    def run(self, closed: Any, leaves: list[Any], own: list[bool], varies: list[bool], out: list[bool]) -> list[Any]:
        function = jaxpr_as_fun(closed)
        if not any(own):
            return list(function(*leaves))
        axes = [0 if flag else None for flag in own]
        return list(jax.vmap(function, axes, [0 if flag else None for flag in out], axis_size=self.size)(*leaves))


def ahead(kernel: Kernel, function: Callable[[Kernel], Any]) -> Any:
    """`function` of the form in which XLA does what comes before a kernel: lanes, where the problem has that form."""
    for form in (Lanes, Vmap):
        before = form(kernel.size)
        before.zero = kernel.zero
        try:
            return function(before)
        except UnsupportedError as error:
            reason = error
    raise reason


# In registers the whole descent is one kernel (`gdjax.engine.registers`), which calls nothing by this class.
KERNELS: dict[str, type[Kernel]] = {"lanes": Lanes, "vmap": Vmap, "registers": Kernel}
