"""What a sweep returns: every figure of every run under named axes, to select from, reduce and write down."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gdjax.files import check_output, replacing
from gdjax.over import Axis
from gdjax.solution import Status
from gdjax.sweep_labels import blanked, indexed, position, spelled, worst

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE_WEIGHTS = 64
"""Weights per run up to which a table has them without being asked."""


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The runs of a sweep, their figures as NumPy arrays with one dimension per axis, in the order of `axes`.

    A figure is `result.loss` or `result["loss"]`; `sel` and `isel` pick by label and by position, `best`, `mean` and
    `reduce` take axes away. Each returns a result again, so that they can be strung together.

    Attributes:
        axes: the axes left, by name.
        figures: `loss`, `gradient_norm`, `steps`, `status`, `weights`, what `record=` and `measures=` asked for: each
            a pytree of arrays `[*axes, ...]`.
        chosen: for axes taken away by `best`, the labels chosen: arrays `[*axes]`.
        record_steps: updates taken at each row of the record, or None.
        device: the name of the device that ran it.

    >>> import gdjax
    >>> axes = {"learning_rate": [0.1, 0.2, 0.25], "t": [4.0, 8.0]}
    >>> result = gdjax.sweep(gdjax.kernel.squared_loss, 1.0, (2.0,), over=axes, steps=3)
    >>> list(result.axes), result.loss.shape, result["weights"].shape
    (['learning_rate', 't'], (3, 2), (3, 2))
    """

    axes: dict[str, Axis]
    figures: dict[str, Any]
    chosen: dict[str, np.ndarray]
    record_steps: Any
    device: str

    @property
    def loss(self) -> np.ndarray:
        """`[*axes]`, the loss at the final weights; of a diverged run at its last finite ones."""
        return self.figures["loss"]

    @property
    def gradient_norm(self) -> np.ndarray:
        """`[*axes]`, the largest absolute entry of the gradient there."""
        return self.figures["gradient_norm"]

    @property
    def steps(self) -> np.ndarray:
        """`[*axes]`, updates taken."""
        return self.figures["steps"]

    @property
    def status(self) -> np.ndarray:
        """`[*axes]`, a `gdjax.Status` for each run."""
        return self.figures["status"]

    @property
    def weights(self) -> Any:
        """The final weights: a pytree like the start weights, leaves `[*axes, ...]`."""
        return self.figures["weights"]

    @property
    def record(self) -> Any:
        """What `record=` asked for, leaves `[*axes, R, ...]`, or None."""
        return self.figures.get("record")

    @property
    def shape(self) -> tuple[int, ...]:
        """How many positions each axis has."""
        return tuple(len(axis) for axis in self.axes.values())

    def __getitem__(self, name: str) -> Any:
        known = {**self.figures, **self.chosen, **{n: a.labels for n, a in self.axes.items()}}
        if name not in known:
            raise KeyError(f"no {name!r}; there are {', '.join(known)}")
        return known[name]

    def __repr__(self) -> str:
        axes = ", ".join(f"{name}: {len(axis)}" for name, axis in self.axes.items())
        chosen = "".join(f", {name} chosen" for name in self.chosen)
        counts = ", ".join(f"{count:,} {name}" for name, count in self.summary().items())
        return f"<SweepResult ({axes}){chosen}: {math.prod(self.shape):,} runs, {counts}>"

    def summary(self) -> dict[str, int]:
        """How many runs ended in each status, by its name.

        Returns:
            A dict with a key for every `gdjax.Status`, `STOPPED` only where there are such.
        """
        counts = np.bincount(np.asarray(self.status, np.int64).ravel(), minlength=len(Status))
        return {status.name: int(counts[status]) for status in Status if counts[status] or status != Status.STOPPED}

    def sel(self, **labels: Any) -> SweepResult:
        """Pick by label: one label takes the axis away, a list keeps those, `slice(low, high)` what lies between.

        Args:
            labels: for each axis its label, a list of labels, or a slice with both ends included.

        Returns:
            The result of the runs picked.

        Raises:
            ValueError: there is no such axis, or no such label on it.

        >>> import gdjax
        >>> rates = {"learning_rate": [0.1, 0.2, 0.4]}
        >>> result = gdjax.sweep(gdjax.kernel.squared_loss, 1.0, (2.0, 4.0), over=rates, steps=1)
        >>> print(result.sel(learning_rate=0.2).weights, result.sel(learning_rate=slice(0.15, 1)).weights)
        1.8 [1.8 2.6]
        """
        return self.isel(**{name: position(name, self.axis(name), label) for name, label in labels.items()})

    def isel(self, **positions: Any) -> SweepResult:
        """Pick by position on an axis: a number takes the axis away; a list, slice or mask keeps those.

        Args:
            positions: what to index each axis with.

        Returns:
            The result of the runs picked.

        Raises:
            ValueError: there is no such axis.
            IndexError: there is no such position.
        """
        result = self
        for name, where in positions.items():
            axis, at = result.axis(name), list(result.axes).index(name)
            where = where if isinstance(where, (int, np.integer, slice)) else np.asarray(where)
            index: Any = (slice(None),) * at + (where,)
            left = {n: a for n, a in result.axes.items() if n != name}
            if np.ndim(axis.labels[where]) == 1:
                left = {n: axis.take(where) if n == name else a for n, a in result.axes.items()}
            result = result.mapped(functools.partial(indexed, index), left)
        return result

    def best(self, *names: str, by: str = "loss") -> SweepResult:
        """For each position on the other axes the run with the smallest figure; one that diverged is never the best.

        Args:
            names: the axes to choose along; none for all of them.
            by: the figure that decides, such as `"loss"` or a name from `measures=`.

        Returns:
            The result without these axes; their labels are `result.chosen`. Where every run diverged, or the figure is
            nowhere a number, there is no best: the figures and labels there are NaN (labels that are words: empty).

        Raises:
            ValueError: there is no such axis, or no such figure with one number per run.

        >>> import gdjax
        >>> rates = {"learning_rate": [0.1, 0.2, 0.4]}
        >>> best = gdjax.sweep(gdjax.kernel.squared_loss, 1.0, (2.0, 4.0), over=rates, steps=5).best()
        >>> print(best.chosen["learning_rate"], f"{best.loss:.6f}")
        0.2 0.000000
        """
        names = names or tuple(self.axes)
        where, left = self.moved(names)
        single = [n for n, tree in self.figures.items() if getattr(tree, "shape", None) == self.shape]
        if by not in single:
            known = [name for name in single if name != "status"]
            raise ValueError(f"by={by!r} has not one number per run; choose by {', '.join(known)}")
        figure = self.figures[by].astype(np.float64)
        good = (self.status != Status.DIVERGED) & ~np.isnan(figure)
        pick = np.argmin(where(np.where(good, figure, np.inf)), axis=-1)
        none = np.asarray(~where(good).any(axis=-1))

        def taken(leaf: np.ndarray) -> np.ndarray:
            moved = where(leaf)
            index = pick.reshape(pick.shape + (1,) * (moved.ndim - pick.ndim))
            return blanked(np.take_along_axis(moved, index, axis=pick.ndim).squeeze(pick.ndim), none)

        found = np.unravel_index(pick, [len(self.axes[name]) for name in names])
        chosen = {
            column: blanked(labels[at], none, always=True)
            for name, at in zip(names, found, strict=True)
            for column, labels in self.axes[name].columns(name).items()
        }
        result = self.mapped(taken, left)
        return dataclasses.replace(result, chosen=result.chosen | chosen)

    def reduce(self, function: Callable[..., Any], *names: str) -> SweepResult:
        """Take axes away by a function of NumPy's kind, `function(array, axis=...)`.

        What a diverged run left behind is no result: its figures go into the function as NaN, so that `numpy.mean` says
        NaN where any run diverged, and `numpy.nanmean` the mean of those that did not.

        Args:
            function: such as `numpy.mean` or `numpy.nanmax`.
            names: the axes to take away; none for all of them.

        Returns:
            The result without these axes. Its status is the worst: `DIVERGED` where any run diverged, `CONVERGED` where
            all converged. Labels chosen by an earlier `best` are dropped.

        Raises:
            ValueError: there is no such axis.
        """
        names = names or tuple(self.axes)
        where, left = self.moved(names)
        diverged = self.status == Status.DIVERGED

        def reduced(leaf: np.ndarray) -> np.ndarray:
            return np.asarray(function(where(blanked(leaf, diverged)), axis=len(left)))

        figures = {n: jax.tree.map(reduced, tree) for n, tree in self.figures.items() if n != "status"}
        figures["status"] = worst(where(self.status))
        return SweepResult(left, figures, {}, self.record_steps, self.device)

    def mean(self, *names: str) -> SweepResult:
        """The mean along axes, NaN where any run diverged; see `reduce`.

        Args:
            names: the axes to take away; none for all of them.

        Returns:
            The result without these axes.

        Raises:
            ValueError: there is no such axis.

        >>> import gdjax
        >>> axes = {"learning_rate": [0.1, 0.2], "t": [4.0, 8.0]}
        >>> result = gdjax.sweep(gdjax.kernel.squared_loss, 1.0, (2.0,), over=axes, steps=1)
        >>> print(result.mean("t").weights)
        [1.8 2.6]
        """
        return self.reduce(np.mean, *names)

    def std(self, *names: str) -> SweepResult:
        """The standard deviation along axes, NaN where any run diverged; see `reduce`."""
        return self.reduce(np.std, *names)

    def quantile(self, q: float, *names: str) -> SweepResult:
        """The quantile `q`, between 0 and 1, along axes, NaN where any run diverged; see `reduce`."""
        return self.reduce(lambda leaf, axis: np.quantile(leaf, q, axis=axis), *names)

    def columns(self, weights: bool | None = None) -> dict[str, np.ndarray]:
        """A table with a row per run, its columns by name: labels, figures with one number per run, weights.

        Args:
            weights: whether to have a column per weight; None: where there are no more than 64.

        Returns:
            NumPy arrays `[runs]`; statuses by their names.

        >>> import gdjax
        >>> rates = {"learning_rate": [0.1, 0.2]}
        >>> table = gdjax.sweep(gdjax.kernel.squared_loss, 1.0, (2.0, 4.0), over=rates, steps=1).columns()
        >>> print(list(table), table["weights"])
        ['learning_rate', 'loss', 'gradient_norm', 'steps', 'status', 'weights'] [1.4 1.8]
        """
        dims, table = self.shape, {}
        for at, (name, axis) in enumerate(self.axes.items()):
            for column, labels in axis.columns(name).items():
                shape = [-1 if other == at else 1 for other in range(len(dims))]
                table[column] = np.broadcast_to(labels.reshape(shape), dims).ravel()
        table |= {name: np.asarray(labels).ravel() for name, labels in self.chosen.items()}
        for name, tree in self.figures.items():
            if name not in ("weights", "record"):
                table |= spelled(name, tree, dims)
        table["status"] = np.array([status.name for status in Status])[table["status"]]
        size = sum(math.prod(leaf.shape[len(dims) :]) for leaf in jax.tree.leaves(self.weights))
        if weights or (weights is None and size <= TABLE_WEIGHTS):
            table |= spelled("weights", self.weights, dims)
        return table

    def to_arrow(self, weights: bool | None = None) -> Any:
        """The table as a `pyarrow.Table`; see `columns`. Raises ModuleNotFoundError without pyarrow."""
        try:
            import pyarrow as pa
        except ModuleNotFoundError:
            raise ModuleNotFoundError('pyarrow is not installed; pip install "gdjax[cli]" brings it') from None
        return pa.table(self.columns(weights))

    def to_pandas(self, weights: bool | None = None) -> Any:
        """The table as a `pandas.DataFrame`; see `columns`. Raises ModuleNotFoundError without pandas."""
        try:
            import pandas as pd  # type: ignore[import-untyped]
        except ModuleNotFoundError:
            raise ModuleNotFoundError("pandas is not installed; pip install pandas brings it") from None
        return pd.DataFrame(self.columns(weights))

    def save(self, path: str | os.PathLike[str], weights: bool | None = None) -> None:
        """Write the table, whole or not at all; see `columns`.

        Args:
            path: a `.npz` file, or with pyarrow installed `.csv`, `.parquet` or `.json`; what is there is replaced.
            weights: whether to have a column per weight; None: where there are no more than 64.

        Raises:
            ValueError: another ending, or a folder that is missing.
            ModuleNotFoundError: pyarrow is not installed.
        """
        if os.fspath(path).lower().endswith(".npz"):
            from gdjax.formats import write_arrays

            with replacing(check_output(path, [".npz"])) as file:
                write_arrays(self.columns(weights), file)
            return
        from gdjax.table import write_table

        write_table(path, dict(zip((table := self.to_arrow(weights)).column_names, table.columns, strict=True)))

    def plot(self, over: str | tuple[str, str] | None = None, by: str = "loss") -> Figure:
        """A picture of a figure over one axis or two, the diverging region marked; `gdjax.plot.save` writes it.

        A grid is drawn by the median over the other axes; random draws and listed points one by one, by the mean.

        Args:
            over: the axis, or two of them; None: those with floating point labels.
            by: the figure, one number per run.

        Returns:
            A matplotlib figure, drawn by `gdjax.plot.final_loss`.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from gdjax.plot import final_loss

        shown, axes = self, {name: axis.labels for name, axis in self.axes.items()}
        scattered = [name for name, axis in self.axes.items() if len(axis.columns(name)) > 1]
        if scattered:  # no grid: a point for each draw, the mean over all else
            others = [name for name in self.axes if name != scattered[0]]
            shown = self.mean(*others) if others else self
            axes = {n: v for n, v in self.axes[scattered[0]].columns(scattered[0]).items() if n != scattered[0]}
        label = "final loss" if by == "loss" else by.replace("_", " ")
        return final_loss(axes, shown.figures[by], shown.status, over=over, label=label)

    def axis(self, name: str) -> Axis:
        if name in self.axes:
            return self.axes[name]
        joint = [other for other, axis in self.axes.items() if axis.joint and name in axis.values]
        if joint:
            raise ValueError(f"{name} is part of the axis {joint[0]!r}; pick by {joint[0]}")
        gone = " (it was taken away)" if name in self.chosen else ""
        raise ValueError(f"there is no axis {name!r}{gone}; there are {', '.join(self.axes) or 'none left'}")

    def mapped(self, function: Callable[[np.ndarray], Any], axes: dict[str, Axis]) -> SweepResult:
        """The same with every array changed."""
        figures, chosen = (
            {name: jax.tree.map(lambda leaf: np.asarray(function(leaf)), tree) for name, tree in group.items()}
            for group in (self.figures, self.chosen)
        )
        return dataclasses.replace(self, axes=axes, figures=figures, chosen=chosen)

    def moved(self, names: tuple[str, ...]) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Axis]]:
        """What lays the named axes of an array into one behind the others, and the axes left."""
        for name in names:
            self.axis(name)
        if len(set(names)) < len(names):
            raise ValueError(f"{max(names, key=names.count)!r} is named twice")
        kept = [at for at, name in enumerate(self.axes) if name not in names]
        gone = [list(self.axes).index(name) for name in names]
        left = {name: axis for name, axis in self.axes.items() if name not in names}

        def where(leaf: np.ndarray) -> np.ndarray:
            rest = list(range(len(self.axes), leaf.ndim))
            shape = [leaf.shape[at] for at in kept] + [-1] + [leaf.shape[at] for at in rest]
            return leaf.transpose([*kept, *gone, *rest]).reshape(shape)

        return where, left
