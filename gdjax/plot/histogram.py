"""How many steps the problems took to converge."""

from typing import TYPE_CHECKING, Any

import numpy as np

from gdjax.plot import style
from gdjax.plot.check import WORDS, is_solution, numbers, statuses
from gdjax.solution import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 40
_NARROW = 8  # fewer whole numbers than this look lost on the page
_ZERO = 0.35  # where problems that needed no step are drawn on a logarithmic scale


def steps_to_convergence(steps: Any, status: Any = None, *, title: str | None = None) -> "Figure":
    """Draw a histogram of the steps that problems took to converge; those that did not are told in words.

    The scale is logarithmic, bins and all, where the slowest took over 50 times as many steps as the fastest.

    Args:
        steps: a `Solution`, or updates taken, integers of any shape.
        status: a `gdjax.Status` for each; without it, all count as converged.
        title: a heading, instead of "Steps to convergence".

    Returns:
        A matplotlib figure, which `save` writes.

    Raises:
        ValueError: steps that are no whole numbers of 0 or more, or a status that does not fit.
        ModuleNotFoundError: matplotlib is not installed.

    >>> steps_to_convergence([3, 5, 8, 8]).axes[0].get_ylabel()
    'problems'
    """
    if is_solution(steps):
        steps, status = steps.steps, steps.status
    counts = numbers("steps", steps)
    if not counts.size or (counts < 0).any() or (counts != np.rint(counts)).any():
        raise ValueError("steps must be whole numbers of 0 or more, at least one; pass solution.steps")
    all_well = np.full(counts.shape, Status.CONVERGED)
    ends = all_well if status is None else statuses(status, counts.shape, counts < 0)
    taken = counts[ends == Status.CONVERGED]

    figure = style.figure(7.2, 4.0)
    axes = figure.add_subplot()
    if len(taken):
        logarithmic = style.spans_decades(np.maximum(taken, 1))
        if logarithmic:
            axes.set_xscale("log")
        edges = _edges(taken, logarithmic)
        axes.hist(
            np.maximum(taken, _ZERO) if logarithmic else taken,
            bins=list(edges),
            color=style.BLUE,
            edgecolor="white",
            linewidth=0.5,
        )
        _median(axes, taken)
        _ticks(axes, taken, logarithmic)
    else:
        style.nothing(axes, "no problem converged")
    axes.set(xlabel="steps", ylabel="problems")
    style.tidy(axes, "y")
    style.heading(axes, title or "Steps to convergence", _note(ends))
    return figure


def _edges(taken: np.ndarray, logarithmic: bool) -> np.ndarray:
    """Edges of bins half-way between whole numbers, so that no bin holds more of them than its neighbour by chance."""
    low, high = taken.min(), taken.max()
    if not logarithmic:
        width = max(1, np.ceil((high - low + 1) / _BINS))
        return np.arange(low, high + width + 1, width) - 0.5
    edges = np.unique(np.ceil(np.geomspace(max(low, 1), high + 1, _BINS + 1))) - 0.5
    return np.concatenate([[_ZERO**2 / 0.5], edges]) if low == 0 else edges


def _median(axes: "Axes", taken: np.ndarray) -> None:
    median = np.quantile(taken, 0.5, method="lower")
    axes.axvline(max(median, _ZERO), color=style.INK, linestyle="--", linewidth=1.5)
    text = f"median {style.number(float(median))}"
    # To the side with more room, above the bars.
    place = axes.transData.transform((max(median, _ZERO), 0))[0]
    right = axes.transAxes.inverted().transform((place, 0))[0] < 0.5
    axes.annotate(
        text,
        (max(median, _ZERO), 1),
        (4 if right else -4, 0),
        ("data", "axes fraction"),
        "offset points",
        ha="left" if right else "right",
        va="top",
        fontsize=9,
        color=style.INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )


def _ticks(axes: "Axes", taken: np.ndarray, logarithmic: bool) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    style.whole_numbers(axes.yaxis)
    if not logarithmic:
        narrow = max(0.0, _NARROW - (taken.max() - taken.min())) / 2
        axes.set_xlim(max(taken.min() - narrow - 1, -0.6), taken.max() + narrow + 1)
        style.whole_numbers(axes.xaxis)
        return
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value < 1 else f"{value:,.0f}"))
    if taken.min() == 0:
        axes.set_xticks([_ZERO, *(tick for tick in axes.get_xticks() if 1 <= tick <= taken.max())])
        axes.xaxis.set_minor_locator(NullLocator())


def _note(ends: np.ndarray) -> str:
    """How many converged and what became of the others."""
    total, well = ends.size, int((ends == Status.CONVERGED).sum())
    words = [
        f"{well:,} of {total:,} converged"
        if well < total
        else f"all {total:,} converged"
        if total > 1
        else "the problem converged"
    ]
    for status, word in WORDS.items():
        if status != Status.CONVERGED and (count := int((ends == status).sum())):
            words.append(f"{count:,} {word}")
    return ", ".join(words)
