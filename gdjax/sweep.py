"""Experiment grids: all combinations of rates, hyperparameters, starts, data sets and loss parameters, as one batch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from gdjax import batch
from gdjax import device as dev
from gdjax.minimize import minimize, watching
from gdjax.over import Axis, points
from gdjax.progress import Progress
from gdjax.solution import Status
from gdjax.sweep_places import Bound, Places, place
from gdjax.sweep_result import SweepResult

KEPT = ("loss", "gradient_norm", "steps", "status", "weights", "record")

MEASURED = 1024
"""Runs whose measures are computed side by side."""


def sweep(
    loss: Callable[..., Any],
    weights: Any,
    data: tuple[Any, ...] = (),
    *,
    over: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    learning_rate: Any = None,
    optimizer: Any = None,
    hyperparams: dict[str, Any] | None = None,
    steps: int,
    stop: Any = None,
    record: Any = None,
    measures: Mapping[str, Callable[..., Any]] | None = None,
    device: Any = "auto",
    dtype: Any = None,
    plan: Any = "auto",
    progress: bool = False,
    callback: Any = None,
) -> SweepResult:
    """Run a loss over every combination of the axes in `over`, as one batch that shares its data.

    An axis goes where its name is: `learning_rate`, a hyperparameter of `optimizer`, an argument of `loss`, and an
    argument of `weights` where that is a function. The data that is not swept is passed once and never copied; neither
    are data sets, which the runs look up.

    Args:
        loss: `loss(weights, *arguments) -> scalar`, the loss of ONE run, a pure JAX function with named arguments.
        weights: the start of one run, a pytree of floating point arrays; or a function of axes that returns one, such
            as `lambda seed: np.random.default_rng(seed).normal(size=3)`, called once per combination of them.
        data: what all runs share: the arguments of `loss` that are no axes, in their order.
        over: the axes by name: numbers, arrays `[K, ...]`, pytrees of such, or what `gdjax.over` makes (`points`,
            `draws`, `folds`, `bootstrap`); or a list of dicts, one per run. The numbers of an axis are brought to the
            dtype of the weights, as learning rates are, and arrays where that changes no value.
        learning_rate: as in `gdjax.minimize`, for all runs, where it is no axis.
        optimizer: as in `gdjax.minimize`.
        hyperparams: as in `gdjax.minimize`, numbers for all runs.
        steps: as in `gdjax.minimize`.
        stop: as in `gdjax.minimize`.
        record: as in `gdjax.minimize`.
        measures: further figures of the final weights, by name: JAX functions like `loss`, of the weights and any
            of the loss's arguments and axes by their names, such as a loss on the rows held out.
        device: as in `gdjax.minimize`.
        dtype: as in `gdjax.minimize`.
        plan: as in `gdjax.minimize`.
        progress: as in `gdjax.minimize`.
        callback: as in `gdjax.minimize`.

    Returns:
        A `SweepResult`: figures with one dimension per axis, in the order of `over`.

    Raises:
        ValueError: an axis whose name is found nowhere, an argument of the loss that nothing gives, values that do not
            fit, and what `gdjax.minimize` raises.
        TypeError: as in `gdjax.minimize`.

    Three rates for each of two targets, f(x, w) = xw with x = 2 and w = 1:

    >>> import gdjax
    >>> axes = {"learning_rate": [0.1, 0.2, 0.25], "t": [4.0, 8.0]}
    >>> result = gdjax.sweep(gdjax.kernel.squared_loss, 1.0, (2.0,), over=axes, steps=3)
    >>> print(result.loss.round(3))
    [[0.093 0.84 ]
     [0.    0.001]
     [0.    0.   ]]
    >>> print(result.best("learning_rate").chosen["learning_rate"], result.sel(t=4, learning_rate=0.1).weights)
    [0.25 0.25] 1.784
    """
    axes = named_axes(over)
    given = {"learning_rate": learning_rate, **(hyperparams or {})}
    places = place(loss, weights, data, axes, optimizer, given, dtype)
    measures = dict(measures or {})
    asked = {name: places.asked(function, f"measures[{name!r}]") for name, function in measures.items()}
    check_names(asked, axes)
    found = Figures(math.prod(len(axis) for axis in axes.values()))
    pieces = list(places.pieces())
    for name, names in asked.items():
        bound, some_data = places.bind(measures[name], names), places.data(names, pieces[0])
        check_measure(f"measures[{name!r}]", bound, places.weights(pieces[0]), *some_data, dtype)
    function = places.bind(loss, places.loss)
    with counted(found.count, len(pieces), callback, progress) as watched:
        for piece in pieces:
            entries, in_axes = places.data(places.loss, piece)
            swept = places.hyperparams(piece)
            solution = minimize(
                function,
                places.weights(piece),
                entries,
                in_axes=in_axes,
                learning_rate=swept.pop("learning_rate", learning_rate) if optimizer is None else learning_rate,
                optimizer=optimizer,
                hyperparams={**(hyperparams or {}), **swept} or None,
                steps=steps,
                stop=stop,
                record=record,
                device=device,
                dtype=dtype,
                plan=plan,
                **watched,
            )
            found.store(piece.first, {n: getattr(solution, n) for n in KEPT if getattr(solution, n) is not None})
            for name, names in asked.items():
                bound, (entries, in_axes) = places.bind(measures[name], names), places.data(names, piece)
                found.store(piece.first, {name: measured(bound, solution.weights, entries, in_axes, device, dtype)})
    return SweepResult(axes, found.shaped(places), {}, solution.record_steps, solution.device)


@contextmanager
def counted(runs: int, pieces: int, callback: Any, progress: Any) -> Iterator[dict[str, Any]]:
    """The callback and progress options of each piece, so that counts and bar are those of all runs together."""
    if pieces == 1 or (callback is None and not progress):
        yield {"callback": callback, "progress": progress}
        return
    with watching(runs, callback, progress) as watch:
        assert watch is not None
        before = Progress(0, 0, 0, 0, 0, 0.0, None)

        def tell(counts: Progress) -> bool:
            nonlocal before
            watch.ended = {
                Status.CONVERGED: before.converged + counts.converged,
                Status.DIVERGED: before.diverged + counts.diverged,
            }
            watch.updates, done = before.updates + counts.updates, before.done + counts.done
            stopped = watch.tell(done=done, share=done / runs)
            if counts.done == counts.problems:  # the piece is done
                before = dataclasses.replace(
                    before,
                    done=done,
                    converged=watch.ended[Status.CONVERGED],
                    diverged=watch.ended[Status.DIVERGED],
                    updates=watch.updates,
                )
            return stopped

        yield {"callback": tell, "progress": False}


def named_axes(over: Any) -> dict[str, Axis]:
    """The axes by name; errors say which one is meant."""
    if isinstance(over, (list, tuple)):
        over = {"point": points(over)}
    if not isinstance(over, Mapping) or not over:
        what = "has no axis" if isinstance(over, Mapping) else f"is a {type(over).__name__}"
        raise ValueError(f"over {what}; pass a dict of axes by name, such as {{'learning_rate': [0.1, 0.2]}}")
    axes = {}
    for name, values in over.items():
        try:
            axes[name] = values if isinstance(values, Axis) else Axis(values)
        except (ValueError, TypeError) as error:
            raise type(error)(f"over[{name!r}]: {error}") from None
    return axes


def check_names(asked: Mapping[str, Any], axes: Mapping[str, Axis]) -> None:
    """A figure, a measure and a label each need a name of their own."""
    columns = [column for name, axis in axes.items() for column in axis.columns(name)]
    for name in [*asked, *columns]:
        if name in KEPT or (name in asked and name in columns):
            kind = "measures" if name in asked else "over"
            raise ValueError(f"{kind} has {name!r}, which is the name of a figure or an axis; take another name")


class Figures:
    """Figures of all runs, filled in piece by piece."""

    def __init__(self, count: int):
        self.count = count
        self.arrays: dict[str, Any] = {}

    def store(self, first: int, figures: dict[str, Any]) -> None:
        """The figures of the runs from number `first` on; all runs at once are kept as they come."""
        for name, given in figures.items():
            tree = jax.tree.map(np.asarray, given)
            length = len(jax.tree.leaves(tree)[0])
            if length == self.count:
                self.arrays[name] = tree
                continue
            if name not in self.arrays:
                whole = lambda leaf: np.empty((self.count, *leaf.shape[1:]), leaf.dtype)  # noqa: E731
                self.arrays[name] = jax.tree.map(whole, tree)
            for into, leaf in zip(jax.tree.leaves(self.arrays[name]), jax.tree.leaves(tree), strict=True):
                into[first : first + length] = leaf

    def shaped(self, places: Places) -> dict[str, Any]:
        """With a dimension per axis, in the order of the axes."""
        lengths = [len(places.axes[name]) for name in places.order]
        back = [places.order.index(name) for name in places.axes]

        def shape(leaf: np.ndarray) -> np.ndarray:
            rest = range(len(back), len(back) + leaf.ndim - 1)
            return leaf.reshape(*lengths, *leaf.shape[1:]).transpose(*back, *rest)

        return {name: jax.tree.map(shape, tree) for name, tree in self.arrays.items()}


def measured(bound: Bound, weights: Any, data: Any, in_axes: Any, device: Any, dtype: Any) -> Any:
    """A measure of every run of a piece."""
    data = batch.convert(data, "data", batch.checked_dtype(dtype))
    flags = batch.spread_axes(in_axes, data)
    function = over_runs(bound, in_axes)
    count = len(jax.tree.leaves(weights)[0])
    parts = []
    with wide_enough(weights, data), jax.default_device(dev.select_devices(device)[0]):
        for first in range(0, count, MEASURED):
            which = slice(first, first + MEASURED)
            cut = [some(leaf, axis, which) for leaf, axis in zip(data, flags, strict=True)]
            parts.append(jax.tree.map(np.asarray, function(some(weights, 0, which), *cut)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def check_measure(what: str, bound: Bound, weights: Any, data: Any, in_axes: Any, dtype: Any) -> None:
    """Call a measure on shapes alone: an error of the user's is told before anything is run."""
    data = batch.convert(data, "data", batch.checked_dtype(dtype))
    with wide_enough(weights, data):
        try:
            jax.eval_shape(over_runs(bound, in_axes), weights, *data)
        except Exception as error:
            raise ValueError(f"{what} raised {type(error).__name__} on the shapes of the runs: {error}") from error


def wide_enough(*trees: Any) -> Any:
    """64-bit types where the arrays have them."""
    wide = any(np.dtype(leaf.dtype).itemsize == 8 for leaf in jax.tree.leaves(trees))
    return jax.enable_x64(wide or jax.config.jax_enable_x64)  # type: ignore[attr-defined]


def some(tree: Any, axes: Any, which: slice) -> Any:
    """Some runs of a pytree whose leaves have the runs in front, or, where `axes` says None, all of it."""
    if axes is None or axes == 0:
        return tree if axes is None else jax.tree.map(lambda leaf: leaf[which], tree)
    picked = lambda axis, leaf: leaf if axis is None else leaf[which]  # noqa: E731
    return jax.tree.map(picked, axes, tree, is_leaf=lambda axis: axis is None)


@functools.lru_cache(maxsize=64)
def over_runs(bound: Bound, in_axes: tuple[Any, ...]) -> Any:
    return jax.jit(jax.vmap(bound, (0, *in_axes)))
