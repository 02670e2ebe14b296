"""The final loss along one axis: median, quantiles, the best value, and what became of the problems."""

from typing import TYPE_CHECKING, Any

import numpy as np

from gdjax.plot import style
from gdjax.plot.axis import Axis, geometric
from gdjax.plot.check import WORDS, quantile
from gdjax.solution import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BANDS = ((0.05, 0.95, 0.18), (0.25, 0.75, 0.35))
_RUNAWAY = 100  # times the loss of steps too short is a loss that has run away
_DOTTED = 40  # values up to this number get a dot each
_LOOKS: dict[Status, dict[str, Any]] = {
    Status.CONVERGED: {"color": style.BLUE},
    Status.RAN_ALL_STEPS: {"color": style.PALE},
    Status.STOPPED: {"facecolor": "white", "edgecolor": style.GREY, "hatch": ".."},
    Status.DIVERGED: {"facecolor": "white", "edgecolor": style.VERMILLION, "hatch": style.HATCH},
}


def line(
    figure: "Figure", axis: Axis, worth: np.ndarray, ends: np.ndarray, label: str, heading: str, note: str
) -> None:
    """Draw losses `[V, M]`, infinite where diverged, of M problems for each of V values."""
    strip = len(np.unique(ends)) > 1
    parts: Any = figure.subplots(2 if strip else 1, 1, sharex=True, squeeze=False, height_ratios=[5, 1][: 1 + strip])
    top, bottom = parts[0, 0], parts[-1, 0]
    handles = _median(top, axis, worth)
    lost = _lost(top, axis, worth)
    handles += lost if worth.shape[1] > 1 or not strip else []  # the strip says it too
    if not np.isfinite(worth).any():
        handles = lost
        top.set_yticks([])
    style.scale(top, _shown(worth))
    handles += _best(top, axis, worth)
    top.set_ylabel(style.plain(label))
    style.tidy(top)
    style.heading(top, heading, note)
    if strip:
        handles += _strip(bottom, axis, ends)
    axis.label(bottom, "x")
    edges = axis.edges()
    bottom.set_xlim(edges[0], edges[-1])
    style.legend_below(figure, handles)


def _shown(worth: np.ndarray) -> np.ndarray:
    """The losses that the scale is made for.

    On one side of the best value steps grow too short, and the loss there stays below where it started; on the other
    they grow too long and it runs away, be it without overflowing. What is far above the lower side leaves the picture.
    """
    quantiles = np.array([quantile(worth.T, share) for share in (0.05, 0.5, 0.95)])
    median = quantiles[1]
    best = int(np.argmin(median))
    sides = [side[np.isfinite(side)].max(initial=-np.inf) for side in (median[:best], median[best + 1 :])]
    lower, higher = sorted(sides)
    if 0 < lower and higher > _RUNAWAY * lower:
        top = quantiles[2][median <= lower].max()
        return np.minimum(quantiles, 2 * (lower if np.isinf(top) else top))
    return quantiles


def _median(axes: "Axes", axis: Axis, worth: np.ndarray) -> list[Any]:
    median = quantile(worth.T, 0.5)
    many = worth.shape[1] > 1
    joined = not len(axis.labels)
    handles: list[Any] = []
    for low, high, alpha in _BANDS if many else ():
        bottom, top = quantile(worth.T, low), quantile(worth.T, high)
        # What is infinite runs out of the picture rather than ending in it.
        top = np.where(np.isinf(top) & np.isfinite(bottom), np.finfo(np.float32).max, top)
        look: dict[str, Any] = {"color": style.BLUE, "alpha": alpha, "label": f"{high - low:.0%} of problems"}
        if joined:
            handles.append(axes.fill_between(axis.places, bottom, top, linewidth=0, **look))
        else:
            width = 10 if alpha > 0.2 else 6
            handles.append(axes.vlines(axis.places, bottom, top, linewidth=width, **look))
    (drawn,) = axes.plot(
        axis.places,
        np.where(np.isfinite(median), median, np.nan),
        color=style.BLUE,
        linewidth=2 if joined else 0,
        marker="o" if len(median) <= _DOTTED or not joined else "",
        markersize=4,
        label="median" if many else "loss",
    )
    return [drawn, *reversed(handles)]


def _lost(axes: "Axes", axis: Axis, worth: np.ndarray) -> list[Any]:
    """Hatch the values at which more than half of the problems diverge."""
    bad = np.isinf(quantile(worth.T, 0.5))
    edges = axis.edges()
    ends = np.flatnonzero(np.diff(np.concatenate([[False], bad, [False]]).astype(int)))
    label = "over half diverge" if worth.shape[1] > 1 else "diverged"
    look: dict[str, Any] = {"facecolor": "none", "edgecolor": style.VERMILLION, "hatch": style.HATCH, "linewidth": 0}
    spans = [
        axes.axvspan(edges[first], edges[last], alpha=0.6, zorder=0, label=label, **look)
        for first, last in ends.reshape(-1, 2)
    ]
    return spans[:1]


def _best(axes: "Axes", axis: Axis, worth: np.ndarray) -> list[Any]:
    median = quantile(worth.T, 0.5)
    if not np.isfinite(median).any():
        return []
    best = int(np.argmin(median))
    told = f"{style.short(axis.words[best])}, {style.number(float(median[best]))}"
    return style.star(axes, axis.places[best], median[best], told)


def _strip(axes: "Axes", axis: Axis, ends: np.ndarray) -> list[Any]:
    """Which share of the problems came to which end, stacked."""
    edges = axis.edges()
    base = np.zeros(len(ends))
    handles = []
    for status, word in WORDS.items():
        share = (ends == status).mean(axis=1)
        if share.any():
            handles.append(
                axes.bar(
                    edges[:-1], share, np.diff(edges), base, align="edge", linewidth=0, label=word, **_LOOKS[status]
                )
            )
        base += share
    axes.set(ylim=(0, 1), yticks=[0, 1], yticklabels=["0", "all"], ylabel="share")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    return handles


def points(
    figure: "Figure",
    names: list[str],
    places: list[np.ndarray],
    worth: np.ndarray,
    label: str,
    heading: str,
    note: str,
) -> None:
    """Draw random draws one by one; those that diverged as crosses along the upper edge."""
    axes = figure.add_subplot()
    good = np.isfinite(worth)
    look: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 4, "color": style.BLUE, "alpha": 0.6}
    handles = axes.plot(places[0][good], worth[good], markeredgewidth=0, label="one draw", **look)
    if geometric(places[0]):
        axes.set_xscale("log")
    style.scale(axes, worth)
    if good.any():
        best = int(np.argmin(worth))
        place, height = float(places[0][best]), float(worth[best])
        handles += style.star(axes, place, height, f"{style.number(place)}, {style.number(height)}")
    if not good.all():
        above = np.full((~good).sum(), 0.98)
        cross: dict[str, Any] = {"marker": "x", "linestyle": "none", "color": style.VERMILLION, "markersize": 5}
        handles += axes.plot(places[0][~good], above, transform=axes.get_xaxis_transform(), label="diverged", **cross)
    axes.set(xlabel=style.plain(style.short(names[0], 40)), ylabel=style.plain(label))
    style.tidy(axes)
    style.heading(axes, heading, note)
    style.legend_below(figure, handles)
