"""Pictures of fitted models: lines through the groups' data, or an overview of weights and residuals.

Drawn on matplotlib's `Figure` without pyplot, so that nothing global is touched and no display is needed.
Colours are Okabe and Ito's, told apart by every kind of colour vision and in grey by marker and dash as well.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gdjax.files import check_output, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWABLE = (".png", ".svg")
_FIT, _BAD, _DATA, _GRID = "#0072B2", "#D55E00", "#4D4D4D", "#DDDDDD"
_PANELS = 12  # groups drawn one by one
_DOTS = 30  # groups that have a line of their own in an overview
_POINTS = 4000  # rows drawn in an overview


@dataclass(frozen=True)
class Picture:
    """What there is to draw: N groups, P inputs.

    Attributes:
        inputs: `[rows, P]`.
        target: `[rows]`.
        codes: `[rows]`, each row's group, 0 to N - 1.
        labels: the N groups' names; empty for one model of the whole table.
        weights: `[N, P]`.
        intercept: `[N]`, zeros for models without one.
        good: `[N]`, False where the fit diverged.
        input_names: P names.
        target_name: the target's name.
        group_name: the name of what the groups are, such as "country".
        response: turns `x · w + b` into the target's expected value.
    """

    inputs: np.ndarray
    target: np.ndarray
    codes: np.ndarray
    labels: Sequence[str]
    weights: np.ndarray
    intercept: np.ndarray
    good: np.ndarray
    input_names: Sequence[str]
    target_name: str
    group_name: str
    response: Callable[[np.ndarray], np.ndarray]


def draw(picture: Picture) -> "Figure":
    """Draw the fitted models: lines for one input, an overview for several.

    Args:
        picture: the models and the data.

    Returns:
        A matplotlib figure, which `save` writes.

    >>> one = Picture(np.array([[1.0], [2.0]]), np.array([3.0, 5.0]), np.array([0, 0]), [], np.array([[2.0]]),
    ...               np.array([1.0]), np.array([True]), ["day"], "sales", "", lambda prediction: prediction)
    >>> [axes.get_xlabel() for axes in draw(one).axes]
    ['day']
    """
    picture = dataclasses.replace(
        picture,
        labels=[_plain(label) for label in picture.labels],
        input_names=[_plain(name) for name in picture.input_names],
        target_name=_plain(picture.target_name),
        group_name=_plain(picture.group_name),
    )
    return _lines(picture) if len(picture.input_names) == 1 else _overview(picture)


def save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Write a figure, whole or not at all.

    Args:
        figure: what `draw` returned.
        path: a `.png` or `.svg` file.

    Raises:
        ValueError: if the ending is another or the folder is missing.
    """
    path = check_output(path, DRAWABLE)
    kind = path.suffix[1:].lower()
    # Without a date the same picture is the same file.
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
    with replacing(path) as file:
        figure.savefig(file, format=kind, dpi=160, metadata=metadata)


def _lines(picture: Picture) -> "Figure":
    """Small multiples of the first groups: data, and the fitted line or curve."""
    from matplotlib.figure import Figure

    shown = min(_PANELS, len(picture.weights))
    columns = min(4, int(np.ceil(np.sqrt(shown))))
    rows = -(-shown // columns)
    figure = Figure(figsize=(6.4, 4.6) if shown == 1 else (2.5 * columns + 0.6, 2.0 * rows + 1.0), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=_comparable(picture, shown), squeeze=False)
    dots = _dots(int(np.bincount(picture.codes)[:shown].max()))
    for group, axes in enumerate(grid.flat):
        if group >= shown:
            axes.remove()
            continue
        _line(axes, picture, group, dots)
        if group + columns >= shown:  # nothing below it
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(picture.input_names[0])
        if group % columns == 0:
            axes.set_ylabel(picture.target_name)
    per = f", one fit per {picture.group_name}" if picture.labels else ""
    total = f", first {shown} of {len(picture.weights):,}" if shown < len(picture.weights) else ""
    figure.suptitle(f"{picture.target_name} by {picture.input_names[0]}{per}{total}", fontsize=12)
    _legend(figure, picture.good[:shown], dots)
    return figure


def _line(axes: "Axes", picture: Picture, group: int, dots: dict[str, Any]) -> None:
    own = picture.codes == group
    x, t = picture.inputs[own, 0], picture.target[own]
    drawn = _some(np.arange(len(x)))
    axes.plot(x[drawn], t[drawn], zorder=2, **dots)
    reach = np.linspace(x.min(), x.max(), 100) if x.max() > x.min() else x[:1] + np.array([-0.5, 0.5])
    curve = picture.response(reach * picture.weights[group, 0] + picture.intercept[group])
    good = picture.good[group]
    if not good:  # a line that ran away must not take the scale with it
        room = 0.5 * (t.max() - t.min()) or 1.0
        curve = np.where((curve > t.min() - room) & (curve < t.max() + room), curve, np.nan)
    axes.plot(reach, curve, color=_FIT if good else _BAD, linestyle="-" if good else "--", linewidth=2, zorder=3)
    if picture.labels:
        axes.set_title(_short(picture.labels[group]), fontsize=10, loc="left")
    _tidy(axes)


def _dots(rows: int) -> dict[str, Any]:
    """How data is marked: rings, which show the line beneath, or where there are many, see-through dots."""
    many = rows > 300
    return {
        "marker": "o",
        "linestyle": "none",
        "markersize": 3 if many else 4,
        "markeredgewidth": 0 if many else 1,
        "markerfacecolor": _DATA if many else "white",
        "markeredgecolor": _DATA,
        "alpha": 0.4 if many else 1,
    }


def _comparable(picture: Picture, shown: int) -> bool:
    """Whether one vertical scale does justice to all groups drawn."""
    spans = []
    for group in range(shown):
        own = picture.target[picture.codes == group]
        spans.append((own.min(), own.max()))
    low, high = np.array(spans).T
    return bool(np.median(high - low) >= 0.1 * (high.max() - low.min()))


def _overview(picture: Picture) -> "Figure":
    """Each input's weights over the groups, and how far predictions lie from the data."""
    from matplotlib.figure import Figure

    many = len(picture.weights) > 1
    weights = min(len(picture.input_names), 6) if many else 0
    height = 4.4 if not many or len(picture.labels) > _DOTS else 1.8 + 0.24 * len(picture.labels)
    figure = Figure(figsize=(10.0, height + 3.8 if many else height), layout="constrained")
    bottom = None
    if many:
        parts: Any = figure.subfigures(2, 1, height_ratios=[height, 3.8])
        top, bottom = parts
        row = top.subplots(1, weights, sharey=len(picture.labels) <= _DOTS, squeeze=False)[0]
        for number, axes in enumerate(row):
            _weights(axes, picture, number)
        left_out = len(picture.input_names) - weights
        more = f" (first {weights} of {len(picture.input_names)} inputs)" if left_out else ""
        top.suptitle(f"Weights of {picture.target_name}, one fit per {picture.group_name}{more}", fontsize=12)
    left, right = (bottom or figure).subplots(1, 2)
    _residuals(left, right, picture)
    return figure


def _weights(axes: "Axes", picture: Picture, number: int) -> None:
    values = picture.weights[picture.good, number]
    axes.axvline(0, color=_DATA, linewidth=1, zorder=1)
    axes.set_xlabel(f"weight of {_short(picture.input_names[number])}")
    axes.xaxis.set_major_locator(_few_ticks())
    if not len(values):
        axes.set_title("all fits diverged", fontsize=9, loc="left")
    elif len(picture.labels) > _DOTS:
        low, high = np.quantile(values, [0.005, 0.995])
        inside = values[(values >= low) & (values <= high)]
        axes.hist(inside, bins=30, color=_FIT, edgecolor="white", linewidth=0.5, zorder=2)
        axes.axvline(np.median(values), color=_BAD, linestyle="--", linewidth=2, zorder=3)
        axes.set_ylabel(f"groups ({picture.group_name})" if number == 0 else "")
        axes.set_title(f"median {np.median(values):.3g} (dashed)", fontsize=9, loc="left")
    else:
        places = np.arange(len(picture.labels))
        axes.plot(values, places[picture.good], "o", color=_FIT, markersize=6, zorder=2)
        axes.set_yticks(places, [_short(label) for label in picture.labels])
        axes.set_ylim(len(places) - 0.5, -0.5)
    _tidy(axes)


def _residuals(left: "Axes", right: "Axes", picture: Picture) -> None:
    rows = _some(np.flatnonzero(picture.good[picture.codes]))
    codes, target = picture.codes[rows], picture.target[rows]
    linear = (picture.inputs[rows] * picture.weights[codes]).sum(axis=1) + picture.intercept[codes]
    expected = picture.response(linear)
    dots: dict[str, Any] = {
        "marker": "o",
        "linestyle": "none",
        "markersize": 3.5,
        "color": _FIT,
        "alpha": 0.45,
        "markeredgewidth": 0,
    }
    left.plot(expected, target, **dots)
    right.plot(expected, target - expected, **dots)
    if len(rows):
        ends = [min(expected.min(), target.min()), max(expected.max(), target.max())]
        left.plot(ends, ends, color=_DATA, linestyle="--", linewidth=1.5)
    right.axhline(0, color=_DATA, linestyle="--", linewidth=1.5)
    left.set_ylabel(f"{picture.target_name} observed")
    right.set_ylabel("observed − predicted")
    for axes in (left, right):
        axes.set_xlabel(f"{picture.target_name} predicted")
        _tidy(axes)
    drawn = f"{len(rows):,} of {len(picture.target):,} rows" if len(rows) < len(picture.target) else "all rows"
    left.set_title(f"Observed over predicted, {drawn}", fontsize=10, loc="left")
    right.set_title("Residuals over predicted", fontsize=10, loc="left")


def _legend(figure: "Figure", good: np.ndarray, dots: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], label="data", **dots)]
    if good.any():
        keys.append(Line2D([], [], color=_FIT, linewidth=2, label="fit"))
    if not good.all():
        keys.append(Line2D([], [], color=_BAD, linestyle="--", linewidth=2, label="fit that diverged"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)


def _some(rows: np.ndarray) -> np.ndarray:
    """At most as many rows as a picture can show, always the same ones."""
    return rows if len(rows) <= _POINTS else np.random.default_rng(0).choice(rows, _POINTS, replace=False)


def _tidy(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def _short(text: str, longest: int = 24) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _plain(text: str) -> str:
    """A dollar sign would start mathematics."""
    return text.replace("$", r"\$")
