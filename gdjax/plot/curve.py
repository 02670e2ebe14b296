"""The descent of one problem on its loss: a curve over one weight, contours over two."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gdjax.plot import style
from gdjax.plot.check import numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROOM = 0.6  # how far the curve is drawn beyond the points, in their span
_VALLEY = 1.5  # and how much farther, in what is drawn then, it is drawn to show its minimum
_CURVE, _PLANE = 241, 121  # weights at which the loss is taken, along each axis
_TANGENTS = 3
_LABELLED = 12  # points apart from the start that may have a name
_TOLD = 4  # points up to this number have their weight written
_FAR = 30.0  # losses this many times above the start are left out
_ORANGE = "#E69F00"


def descent(
    loss: Callable[..., Any], weights: Any, data: tuple[Any, ...] = (), *, title: str | None = None
) -> "Figure":
    """Draw how one problem descends: its loss, the weights it visited, and the slopes it followed.

    Over one weight: the curve `l(w)`, the points `(w₀, l(w₀))`, `(w₁, l(w₁))`, ... and the tangents at the first ones.
    Over two: contours and the path. Points whose loss is far above the start's are left out and counted.

    Args:
        loss: `loss(weights, *data) -> scalar` of one problem, as for `minimize`; plain Python does as well.
        weights: the weights visited, `[K + 1]` or `[K + 1, 2]`, such as one problem's of `record=(1, lambda step:
            step.weights)`, or `gdjax.reference.descend(...).weights`.
        data: that problem's data.
        title: a heading.

    Returns:
        A matplotlib figure, which `save` writes.

    Raises:
        ValueError: weights of another shape, or a loss that is no scalar.
        ModuleNotFoundError: matplotlib is not installed.

    >>> from gdjax import reference
    >>> path = reference.descend(1.0, 2.0, 4.0, learning_rate=0.1, steps=3)
    >>> descent(reference.squared_loss, path.weights, (2.0, 4.0)).axes[0].get_xlabel()
    'weight'
    """
    if not isinstance(data, tuple):
        raise ValueError(f"data is a {type(data).__name__}; pass a tuple of one problem's data, such as (x, t)")
    path = numbers("weights", weights)
    plane = path.ndim == 2 and path.shape[1] == 2
    path = path[:, 0] if path.ndim == 2 and path.shape[1] == 1 else path
    if not (path.ndim == 1 or plane) or not len(path) or not np.isfinite(path[0]).all():
        raise ValueError(
            f"weights has shape {np.shape(weights)}; pass the weights that one problem visited, [K + 1] or [K + 1, 2], "
            "beginning with finite ones"
        )
    path = path[np.isfinite(path.reshape(len(path), -1)).all(axis=1)]
    data = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[()], data)
    heights = _losses(loss, path, data)
    far = ~(heights <= heights[0] + _FAR * (abs(heights[0]) or 1.0))
    shown = int(np.argmax(far)) if far.any() else len(path)
    note = "" if shown == len(path) else f"the {len(path) - shown:,} steps after step {shown - 1:,} lie outside"
    steps = len(path) - 1
    path, heights = path[: max(shown, 1)], heights[: max(shown, 1)]
    figure = style.figure(7.2, 4.8)
    axes = figure.add_subplot()
    (_contours if plane else _curve)(axes, loss, path, heights, data)
    many = f"{steps:,} steps" if steps != 1 else "one step"
    style.tidy(axes)
    style.heading(axes, title or f"Descent of one problem, {many}", note)
    handles, _ = axes.get_legend_handles_labels()
    style.legend_below(figure, handles)
    return figure


def _losses(loss: Callable[..., Any], weights: np.ndarray, data: tuple[Any, ...]) -> np.ndarray:
    """The loss at each of these weights, `[K]` or `[K, 2]`, in float64."""
    with jax.enable_x64(True):
        try:
            found = np.asarray(jax.vmap(lambda w: loss(w, *data))(weights), np.float64)
        except Exception:  # plain Python that JAX cannot trace; what is wrong with the loss itself is raised again here
            found = np.asarray([loss(w, *data) for w in weights], np.float64)
    if found.shape != weights.shape[:1]:
        raise ValueError(f"loss returns shape {found.shape[1:]} for one problem; return a scalar")
    return found


def _around(path: np.ndarray) -> tuple[float, float]:
    low, high = path.min(), path.max()
    room = _ROOM * (high - low) or 0.5 * abs(low) or 1.0
    return low - room, high + room


def _curve(
    axes: "Axes", loss: Callable[..., Any], path: np.ndarray, heights: np.ndarray, data: tuple[Any, ...]
) -> None:
    low, high = _around(path)
    wide = np.linspace(low - _VALLEY * (high - low), high + _VALLEY * (high - low), _CURVE)
    lowest = int(np.argmin(np.nan_to_num(_losses(loss, wide, data), nan=np.inf)))
    if 0 < lowest < _CURVE - 1:  # the valley is near: show it
        room = 0.15 * (high - low)
        low, high = min(low, wide[lowest] - room), max(high, wide[lowest] + room)
    reach = np.linspace(low, high, _CURVE)
    curve = _losses(loss, reach, data)
    axes.plot(reach, curve, color=style.BLUE, linewidth=2, label="loss")
    floor = min(heights.min(), curve[np.isfinite(curve)].min(initial=np.inf))
    room = heights.max() - floor or np.abs(curve[np.isfinite(curve)] - floor).max(initial=0) or 1.0
    axes.set(xlim=(low, high), ylim=(floor - 0.1 * room, heights.max() + 0.4 * room))
    _tangents(axes, loss, path, heights, data, high - low, curve)
    _path(axes, path, heights, True)
    axes.set(xlabel="weight", ylabel="loss")


def _tangents(
    axes: "Axes",
    loss: Callable[..., Any],
    path: np.ndarray,
    heights: np.ndarray,
    data: tuple[Any, ...],
    span: float,
    curve: np.ndarray,
) -> None:
    """The slope at the first points, unless the curve is its own tangent."""
    bent = np.abs(np.diff(curve, 2)).max() if np.isfinite(curve).all() else np.inf
    if bent <= 1e-9 * np.abs(curve).max():
        return
    first = path[:_TANGENTS]
    apart = np.array([all(abs(w - other) > 0.12 * span for other in first[:k]) for k, w in enumerate(first)])
    h = 1e-5 * span
    slopes = (_losses(loss, first + h, data) - _losses(loss, first - h, data)) / (2 * h)
    half = np.array([-0.14, 0.14]) * span
    look: dict[str, Any] = {"color": _ORANGE, "linestyle": "--", "linewidth": 2, "zorder": 2, "label": "slope"}
    for w, height, slope in zip(first[apart], heights[:_TANGENTS][apart], slopes[apart], strict=True):
        axes.plot(w + half, height + slope * half, **look)
        look["label"] = "_"  # one entry in the legend


def _path(axes: "Axes", x: np.ndarray, y: np.ndarray, bowed: bool) -> None:
    """Points and arrows between them, the first ones and the last with their names."""
    from matplotlib.patheffects import withStroke

    inside = axes.transData.transform(np.column_stack([x, y]))
    gaps = np.hypot(*np.diff(inside, axis=0).T)
    arrow: dict[str, Any] = {"arrowstyle": "-|>", "color": "black", "linewidth": 1, "shrinkA": 3, "shrinkB": 3}
    for number in np.flatnonzero(gaps > 9):  # pixels; below that points touch
        bow = (-0.25 if x[number + 1] > x[number] else 0.25) if bowed else 0  # above the curve
        arrow["connectionstyle"] = f"arc3,rad={bow}"
        axes.annotate("", (x[number + 1], y[number + 1]), (x[number], y[number]), arrowprops=arrow, zorder=3)
    look: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 6, "markeredgecolor": "black"}
    axes.plot(x[1:], y[1:], markerfacecolor="white", zorder=4, label="after each step", **look)
    axes.plot(x[:1], y[:1], markerfacecolor="black", zorder=4, label="start", **look)
    named: list[np.ndarray] = []
    halo = [withStroke(linewidth=3, foreground="white")]
    told = bowed and len(x) <= _TOLD
    for number in [0, len(x) - 1, *range(1, min(len(x) - 1, _LABELLED))]:
        if any(np.hypot(*(inside[number] - other)) < 26 for other in named):
            continue
        named.append(inside[number])
        text = f"$w_{{{number}}}$" + (f" = {style.number(float(x[number]))}" if told else "")
        look = {"textcoords": "offset points", "fontsize": 11, "path_effects": halo, "zorder": 5}
        axes.annotate(text, (x[number], y[number]), (7, 5), **look)


def _contours(
    axes: "Axes", loss: Callable[..., Any], path: np.ndarray, heights: np.ndarray, data: tuple[Any, ...]
) -> None:
    sides = [np.linspace(*_around(path[:, side]), _PLANE) for side in (0, 1)]
    points = np.stack(np.meshgrid(*sides), axis=-1).reshape(-1, 2)
    plane = _losses(loss, points, data).reshape(_PLANE, _PLANE)
    axes.contour(*sides, plane, levels=_levels(plane), colors=style.BLUE, linewidths=0.9)
    axes.set(xlim=sides[0][[0, -1]], ylim=sides[1][[0, -1]], xlabel="first weight", ylabel="second weight")
    axes.plot([], [], color=style.BLUE, linewidth=0.9, label="equal loss")
    _path(axes, path[:, 0], path[:, 1], False)


def _levels(plane: np.ndarray) -> np.ndarray:
    """Heights of contours that lie evenly on the page: shares of the plane's points below them."""
    finite = plane[np.isfinite(plane)]
    return np.unique(np.quantile(finite, np.linspace(0.05, 0.98, 13)))
