"""The loss over the steps of a run: median and quantiles over the batch, or problems one by one."""

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gdjax.plot import style
from gdjax.plot.check import is_solution, numbers, quantile, statuses
from gdjax.solution import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FEW = len(style.LOOKS)  # batches up to this size are drawn problem by problem
_DIVERGED = 8  # diverging problems drawn
_MARKED = 40  # recorded steps up to this number get a marker each
_BANDS = ((0.05, 0.95, 0.18), (0.25, 0.75, 0.35))  # from, to, how dark


def loss_over_steps(
    record: Any,
    steps: Any = None,
    *,
    final: Any = None,
    status: Any = None,
    problems: Sequence[int] = (),
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> "Figure":
    """Draw the loss over the steps: the median over the batch, and the bands that hold 50% and 90% of the problems.

    A problem that ended keeps its last loss to the end of the picture. Problems that diverged are left out of median
    and bands; the first few are drawn by themselves. Batches of up to six problems are drawn problem by problem.

    Args:
        record: what `minimize(..., record=k)` or `sweep(..., record=k)` returned, which brings all of the following but
            `problems`, `names` and `title`; or the losses themselves, `[N, R]`, NaN after a problem's end.
        steps: `[R]`, the steps at which they were recorded; 0, 1, 2, ... if not given.
        final: `[N]`, each problem's loss at its end.
        status: `[N]`, a `gdjax.Status` for each problem; without it, problems with an infinite loss count as diverged.
        problems: numbers of problems to draw by themselves as well, up to six.
        names: what to call them, as many as `problems` (or as the batch has, where it is drawn problem by problem).
        title: a heading, instead of one that says how many problems there are.

    Returns:
        A matplotlib figure, which `save` writes.

    Raises:
        ValueError: shapes that do not fit together, or a problem that is not there.
        ModuleNotFoundError: matplotlib is not installed.

    >>> import numpy as np
    >>> losses = np.array([[4.0, 2.0, 1.0], [4.0, 0.5, np.nan]])
    >>> loss_over_steps(losses, [0, 10, 20]).axes[0].get_xlabel()
    'step'
    """
    losses, steps, final, status = _arrays(record, steps, final, status)
    count = len(losses)
    blown = np.isinf(losses).any(axis=1) | np.isnan(losses).all(axis=1) if final is None else ~np.isfinite(final)
    diverged = statuses(status, (count,), blown) == Status.DIVERGED
    alone = _alone(problems, count)
    few = not alone and count <= _FEW
    alone = alone or (list(range(count)) if few else [])
    if names is not None and len(names) != len(alone):
        raise ValueError(f"names has {len(names)} entries, {len(alone)} problems are drawn; give one name for each")
    labels = [style.short(style.plain(name)) for name in names] if names else [f"problem {i}" for i in alone]

    kept = _kept_on(losses, steps, final, diverged)
    figure = style.figure(7.2, 4.4)
    axes = figure.add_subplot()
    handles: list[Any] = [] if few else [*_quantiles(axes, steps, kept[~diverged])]
    for place, (problem, label) in enumerate(zip(alone, labels, strict=True)):
        handles.append(_problem(axes, steps, losses[problem], kept[problem], diverged[problem], label, place))
    others = [] if few else [i for i in np.flatnonzero(diverged) if i not in alone][:_DIVERGED]
    handles += _runaways(axes, steps, losses[others])
    shown = kept[alone][~diverged[alone]] if few else kept[~diverged]
    style.scale(axes, shown if len(shown) else losses[alone + others], 5.0 if diverged.any() else 1.0)
    axes.set(xlabel="step", ylabel="loss")
    axes.margins(x=0.02)
    if len(steps) > 1:
        style.whole_numbers(axes.xaxis)
    else:
        axes.set_xticks(steps)
    style.tidy(axes)
    style.heading(axes, title or _title(count), _note(diverged, int(np.isfinite(losses[others]).any(axis=1).sum())))
    if not np.isfinite(losses).any():
        style.nothing(axes, "no loss is finite")
    elif count > 1 or names:
        style.legend_below(figure, handles)
    return figure


def _arrays(record: Any, steps: Any, final: Any, status: Any) -> tuple[np.ndarray, np.ndarray, Any, Any]:
    if is_solution(record):
        if record.record is None:
            raise ValueError("the solution has no record; run minimize with record=k, the loss every k steps")
        steps, final, status = record.record_steps, np.ravel(record.loss), np.ravel(record.status)
        record = record.record
    if isinstance(record, (Mapping, tuple)):
        raise ValueError("record holds several figures; pass the losses among them, [N, R], and steps=record_steps")
    losses = numbers("record", record)
    if losses.ndim < 2:
        raise ValueError(f"record has shape {losses.shape}; pass the losses of N problems at R steps, [N, R]")
    if not losses.size:
        raise ValueError(f"record has shape {losses.shape}; pass at least one problem at one step")
    losses = losses.reshape(-1, losses.shape[-1])
    where = np.arange(losses.shape[1]) if steps is None else numbers("steps", steps, 1)
    if not np.isfinite(where).all():
        raise ValueError("steps has entries that are not finite; pass solution.record_steps")
    for name, array, wanted in (("steps", where, losses.shape[1]), ("final", final, len(losses))):
        if array is not None and np.shape(array) != (wanted,):
            raise ValueError(f"{name} has shape {np.shape(array)}, record {losses.shape}; pass {name} as [{wanted}]")
    return losses, where, None if final is None else numbers("final", final, 1), status


def _alone(problems: Sequence[int], count: int) -> list[int]:
    try:
        alone = [operator.index(problem) for problem in problems]
    except TypeError:
        raise ValueError(f"problems={problems!r}; pass a list of problems' numbers, such as [0, 7]") from None
    for problem in alone:
        if not 0 <= problem < count:
            raise ValueError(f"problems has {problem}; there are problems 0 to {count - 1}")
    if len(alone) > _FEW:
        raise ValueError(f"problems has {len(alone)} entries; a picture holds up to {_FEW} that can be told apart")
    return alone


def _kept_on(losses: np.ndarray, steps: np.ndarray, final: np.ndarray | None, diverged: np.ndarray) -> np.ndarray:
    """Losses of problems that ended well, which keep their last value to the end of the picture."""
    there = np.isfinite(losses)
    last = np.where(there.any(axis=1), losses.shape[1] - 1 - np.argmax(there[:, ::-1], axis=1), 0)
    value = losses[np.arange(len(losses)), last] if final is None else final
    after = np.arange(losses.shape[1]) > last[:, None]
    return np.where(after & ~diverged[:, None], value[:, None], losses)


def _quantiles(axes: "Axes", steps: np.ndarray, losses: np.ndarray) -> list[Any]:
    if not len(losses):
        return []
    handles: list[Any] = []
    if len(steps) == 1:  # a band needs a width
        steps, losses = steps[0] + np.array([-0.25, 0.25]), np.repeat(losses, 2, axis=1)
    dots = _marker(steps)
    for low, high, alpha in _BANDS:
        edges = [quantile(losses, share) for share in (low, high)]
        label = f"{high - low:.0%} of problems"
        handles.append(
            axes.fill_between(steps, edges[0], edges[1], color=style.BLUE, alpha=alpha, linewidth=0, label=label)
        )
    median = quantile(losses, 0.5)
    handles += axes.plot(steps, median, color=style.BLUE, linewidth=2, marker=dots, markersize=3.5, label="median")
    return [handles[-1], *handles[-2::-1]]


def _marker(steps: np.ndarray) -> str:
    return "o" if len(steps) <= _MARKED else ""


def _problem(
    axes: "Axes", steps: np.ndarray, own: np.ndarray, kept: np.ndarray, diverged: bool, label: str, place: int
) -> Any:
    """One problem: its losses, and thin from its end on; a cross where it diverged."""
    look = {**style.LOOKS[place], "markersize": 4.5, "linewidth": 1.8}
    every = max(1, len(steps) // 8)
    marks = slice(place % every, None, every) if len(steps) > _MARKED else slice(None)
    (line,) = axes.plot(steps, own, **look, markevery=marks, label=label + (", diverged" if diverged else ""))
    if diverged:
        _cross(axes, steps, own, look["color"])
    else:
        axes.plot(steps, np.where(np.isfinite(own), np.nan, kept), color=look["color"], linewidth=0.8, zorder=1)
    return line


def _runaways(axes: "Axes", steps: np.ndarray, losses: np.ndarray) -> list[Any]:
    lines: list[Any] = []
    for own in losses:
        lines += axes.plot(steps, own, **style.BAD, linewidth=1, zorder=1.5, label="diverged")
        _cross(axes, steps, own, style.VERMILLION)
    return lines[:1]


def _cross(axes: "Axes", steps: np.ndarray, own: np.ndarray, colour: str) -> None:
    ends = np.flatnonzero(np.isfinite(own))
    if len(ends):
        axes.plot(steps[ends[-1]], own[ends[-1]], "x", color=colour, markersize=7, markeredgewidth=2)


def _title(count: int) -> str:
    return "Loss of one problem" if count == 1 else f"Loss of {count:,} problems"


def _note(diverged: np.ndarray, drawn: int) -> str:
    bad = int(diverged.sum())
    if not bad:
        return ""
    some = f", the first {drawn} drawn" if 0 < drawn < bad else ""
    return f"{bad:,} of {len(diverged):,} diverged{some}"
