"""The final loss over two axes: a heat map, dark where it is small, hatched where it diverges."""

from typing import TYPE_CHECKING, Any

import numpy as np

from gdjax.plot import style
from gdjax.plot.axis import Axis, geometric
from gdjax.plot.check import quantile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = "cividis"  # rises evenly in brightness, in grey and for every kind of colour vision
_WRITTEN = 8  # grids up to this size along both axes have their numbers written in


def grid(figure: "Figure", pair: list[Axis], worth: np.ndarray, label: str, heading: str, note: str) -> None:
    """Draw the medians of losses `[V, W, M]`, infinite where diverged."""
    median = quantile(np.moveaxis(worth, -1, 0), 0.5).T  # rows upwards are the second axis
    some = np.isinf(worth).any(axis=-1).T & np.isfinite(median)
    bad = np.isinf(median)
    axes = figure.add_subplot()
    edges = [axis.edges() for axis in pair]
    if not bad.all():
        norm, extend = style.colour_scale(median)
        mesh = axes.pcolormesh(*edges, np.where(bad, np.nan, median), cmap=_COLOURS, norm=norm)
        many = worth.shape[-1] > 1
        figure.colorbar(mesh, ax=axes, label=f"median {label}" if many else label, extend=extend, pad=0.02)
        _numbers(axes, pair, median, mesh)
    handles = _hatched(axes, edges, bad, style.HATCH, "over half diverge" if worth.shape[-1] > 1 else "diverged")
    handles += _hatched(axes, edges, some, "..", "some diverge")
    handles += _best(axes, pair, median)
    for axis, side in zip(pair, "xy", strict=True):
        axis.label(axes, side)
    axes.set(xlim=edges[0][[0, -1]], ylim=edges[1][[0, -1]])
    axes.tick_params(labelsize=8.5)
    style.heading(axes, heading, note)
    style.legend_below(figure, handles)


def _hatched(axes: "Axes", edges: list[np.ndarray], where: np.ndarray, hatch: str, label: str) -> list[Any]:
    """Hatch the cells named, each run of them along a row as one."""
    from matplotlib.patches import Patch

    if not where.any():
        return []
    look: dict[str, Any] = {"facecolor": "none", "edgecolor": style.VERMILLION, "hatch": hatch, "linewidth": 0}
    for row, (bottom, top) in enumerate(zip(edges[1][:-1], edges[1][1:], strict=True)):
        ends = np.flatnonzero(np.diff(np.concatenate([[False], where[row], [False]]).astype(int)))
        for first, last in edges[0][ends].reshape(-1, 2):
            axes.fill([first, last, last, first], [bottom, bottom, top, top], **look)
    return [Patch(label=label, **look)]


def _numbers(axes: "Axes", pair: list[Axis], median: np.ndarray, mesh: Any) -> None:
    if max(median.shape) > _WRITTEN:
        return
    for (row, column), value in np.ndenumerate(median):
        if np.isfinite(value):
            red, green, blue, _ = mesh.cmap(mesh.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5}
            text = style.number(float(value))
            axes.text(
                float(pair[0].places[column]),
                float(pair[1].places[row]),
                text,
                color="white" if dark else "black",
                **look,
            )


def _best(axes: "Axes", pair: list[Axis], median: np.ndarray) -> list[Any]:
    if not np.isfinite(median).any():
        return []
    row, column = divmod(int(np.argmin(median)), median.shape[1])
    words = [style.short(axis.words[place]) for axis, place in zip(pair, (column, row), strict=True)]
    told = f"{words[0]} and {words[1]}, {style.number(float(median[row, column]))}"
    written = max(median.shape) <= _WRITTEN
    return style.star(axes, pair[0].places[column], pair[1].places[row], told, raised=13.0 if written else 0.0)


def points(
    figure: "Figure",
    names: list[str],
    places: list[np.ndarray],
    worth: np.ndarray,
    label: str,
    heading: str,
    note: str,
) -> None:
    """Draw random draws one by one, coloured by their loss; crosses where they diverged."""
    axes = figure.add_subplot()
    good = np.isfinite(worth)
    handles: list[Any] = []
    if good.any():
        norm, extend = style.colour_scale(worth)
        dots: dict[str, Any] = {"s": 36, "edgecolor": "black", "linewidth": 0.4}
        drawn = axes.scatter(places[0][good], places[1][good], c=worth[good], cmap=_COLOURS, norm=norm, **dots)
        figure.colorbar(drawn, ax=axes, label=style.plain(label), extend=extend, pad=0.02)
        best = int(np.argmin(worth))
        told = f"{style.number(places[0][best])} and {style.number(places[1][best])}, {style.number(worth[best])}"
        handles += style.star(axes, places[0][best], places[1][best], told)
    if not good.all():
        cross: dict[str, Any] = {"marker": "x", "linestyle": "none", "color": style.VERMILLION, "markersize": 6}
        handles += axes.plot(places[0][~good], places[1][~good], label="diverged", **cross)
    for side, name, values in zip("xy", names, places, strict=True):
        scale = "log" if geometric(values) else "linear"
        axes.set(**{f"{side}label": style.plain(style.short(name, 40)), f"{side}scale": scale})
    style.tidy(axes)
    style.heading(axes, heading, note)
    style.legend_below(figure, handles)
