"""The final loss over the axes of a sweep."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gdjax.plot import along, heat, style
from gdjax.plot.axis import Axis, axis_of, is_floating
from gdjax.plot.check import numbers, statuses
from gdjax.solution import Status

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def final_loss(
    axes: Mapping[str, Any],
    loss: Any,
    status: Any = None,
    *,
    over: str | Sequence[str] | None = None,
    title: str | None = None,
    label: str = "final loss",
) -> "Figure":
    """Draw the final loss over one swept axis (median and quantiles over all others) or two (a heat map of medians).

    A problem that diverged counts as an infinite loss: where more than half of them diverge there is no median, and
    that region is hatched. Under a line, a strip shows which share of the problems converged, took all steps and
    diverged.

    Args:
        axes: the values of each axis of `loss` by name, in their order: numbers (on a logarithmic scale where that
            suits them) or names. For draws of a random search, all of them `[N]` like `loss`.
        loss: the final losses, one dimension per axis; for random draws of two or more parameters `[N]`.
        status: a `gdjax.Status` for each; without it, losses that are not finite count as diverged.
        over: the name of the axis to draw over, or two names. By default the axes of floating point numbers if there
            are one or two of them, else the first axis.
        title: a heading.
        label: what the loss is called.

    Returns:
        A matplotlib figure, which `save` writes.

    Raises:
        ValueError: shapes that do not fit, or an axis that is not there.
        ModuleNotFoundError: matplotlib is not installed.

    >>> import numpy as np
    >>> rates, seeds = np.logspace(-2, 0, 3), range(4)
    >>> losses = np.array([[3.0] * 4, [1.0] * 4, [np.inf] * 4])
    >>> final_loss({"learning_rate": rates, "seed": seeds}, losses).axes[-1].get_xlabel()
    'learning_rate'
    """
    _check_axes(axes)
    losses = numbers("loss", loss)
    drawn = _drawn_at_random(axes, losses)
    if not drawn:
        _check_shape(axes, losses)
    ends = statuses(status, losses.shape, ~np.isfinite(losses))
    worth = np.where((ends == Status.DIVERGED) | np.isnan(losses), np.inf, losses)
    names = _over(axes, over)
    called = " and ".join(style.short(name) for name in names)
    chosen = [axis_of(name, axes[name], cells=len(names) == 2) for name in names]
    note = _note(ends)
    figure = style.figure(7.2, 4.8)
    if drawn:
        points = [numbers(f"axes[{name!r}]", axes[name], 1) for name in names]
        heading = title or f"{label[:1].upper()}{label[1:]} over {called}, {losses.size:,} draws"
        (along.points if len(names) == 1 else heat.points)(figure, names, points, worth, label, heading, note)
        return figure
    where = [list(axes).index(name) for name in names]
    rest = [name for name in axes if name not in names]
    heading = title or f"{label[:1].upper()}{label[1:]} over {called}"
    worth, ends = (_front(array, where, chosen) for array in (worth, ends))
    if rest:
        note = f"{note}; " * bool(note) + f"{worth.shape[-1]:,} problems each: {_listed(rest)}"
    if len(names) == 1:
        along.line(figure, chosen[0], worth, ends, label, heading, note)
    else:
        heat.grid(figure, chosen, worth, label, heading, note)
    return figure


def _drawn_at_random(axes: Mapping[str, Any], losses: np.ndarray) -> bool:
    return len(axes) > 1 and losses.ndim == 1 and all(len(values) == len(losses) for values in axes.values())


def _check_axes(axes: Any) -> None:
    example = "pass the values of each axis of loss by name, such as {'learning_rate': rates}"
    if not isinstance(axes, Mapping) or not axes:
        raise ValueError(f"axes is {'empty' if isinstance(axes, Mapping) else f'a {type(axes).__name__}'}; {example}")
    for name, values in axes.items():
        if not hasattr(values, "__len__") or getattr(values, "ndim", 1) == 0 or isinstance(values, str):
            raise ValueError(f"axes[{name!r}] is {values!r}, without a length; pass a sequence of its values")


def _check_shape(axes: Mapping[str, Any], losses: np.ndarray) -> None:
    wanted = tuple(len(values) for values in axes.values())
    if losses.shape != wanted:
        told = ", ".join(f"{name} {length}" for name, length in zip(axes, wanted, strict=True))
        raise ValueError(f"loss has shape {losses.shape}, axes has {told}; pass loss as {wanted}")
    if not losses.size:
        raise ValueError(f"loss has shape {losses.shape}; pass at least one value on each axis")


def _over(axes: Mapping[str, Any], over: str | Sequence[str] | None) -> list[str]:
    if over is None:
        floating = [name for name, values in axes.items() if is_floating(values)]
        return floating if 1 <= len(floating) <= 2 else list(axes)[:1]
    names: list[Any] = list(over) if isinstance(over, (list, tuple)) else [over]
    for name in names:
        if name not in axes:
            raise ValueError(f"over names {name!r}; the axes are {', '.join(axes)}")
    if not 1 <= len(names) <= 2 or len(set(names)) < len(names):
        raise ValueError(f"over has {len(names)} names; pass one axis, or two different ones")
    return names


def _front(array: np.ndarray, where: list[int], chosen: list[Axis]) -> np.ndarray:
    """The axes to draw in front, in the order in which they are drawn; all others as one behind them."""
    moved = np.moveaxis(array, where, range(len(where)))
    for number, axis in enumerate(chosen):
        moved = np.take(moved, axis.order, axis=number)
    return moved.reshape(*moved.shape[: len(where)], -1)


def _note(ends: np.ndarray) -> str:
    bad = int((ends == Status.DIVERGED).sum())
    return f"{bad:,} of {ends.size:,} diverged" if bad else ""


def _listed(names: list[str]) -> str:
    return style.plain(style.short(" × ".join(names), 60))
