"""Fitted models: lines through the groups' data, or an overview of weights and residuals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gdjax.plot import style
from gdjax.plot.check import numbers, statuses
from gdjax.solution import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def fits(
    inputs: Any,
    target: Any,
    weights: Any,
    intercept: Any = None,
    *,
    groups: Any = None,
    labels: Sequence[Any] = (),
    status: Any = None,
    input_names: Sequence[str] = (),
    target_name: str = "target",
    group_name: str = "group",
    response: Callable[[np.ndarray], np.ndarray] | None = None,
) -> "Figure":
    """Draw fitted models `response(x · w + b)` of N groups: lines through the data for one input, else an overview.

    Args:
        inputs: `[rows]` or `[rows, P]`, in the users' units, as everything here.
        target: `[rows]`.
        weights: `[N]` or `[N, P]`, a row per group; a number for a single group and input.
        intercept: `[N]`, or a number; 0 if not given.
        groups: `[rows]`, which group a row belongs to, 0 to N - 1; may be left out for a single group.
        labels: the groups' N names.
        status: `[N]`, a `gdjax.Status` for each group; without it, weights that are not finite count as diverged.
        input_names: P names; a text for a single input.
        target_name: the target's name.
        group_name: the name of what the groups are, such as "country".
        response: turns `x · w + b` into the target's expected value; by default nothing is done to it.

    Returns:
        A matplotlib figure, which `save` writes.

    Raises:
        ValueError: arrays that do not fit together.
        ModuleNotFoundError: matplotlib is not installed.

    >>> fits([1.0, 2.0], [3.0, 5.0], [2.0], [1.0], input_names=["day"]).axes[0].get_xlabel()
    'day'
    """
    t = numbers("target", target, 1)
    x = numbers("inputs", inputs)
    x = x[:, None] if x.ndim == 1 else x
    w = np.atleast_1d(numbers("weights", weights))
    w = w[:, None] if w.ndim == 1 else w
    b = np.zeros(len(w)) if intercept is None else np.atleast_1d(numbers("intercept", intercept))
    _check_rows(x, t, w, b, groups)
    codes = np.zeros(len(t), np.int64) if groups is None else np.asarray(groups)
    names = [input_names] if isinstance(input_names, str) else input_names
    names = names if len(names) else [f"input {number}" for number in range(x.shape[1])]
    for name, given, wanted in (
        ("labels", labels if len(labels) else [""] * len(w), len(w)),
        ("input_names", names, x.shape[1]),
    ):
        if len(given) != wanted:
            raise ValueError(f"{name} has {len(given)} entries; pass {wanted}")
    if not len(labels) and len(w) > 1:
        labels = [f"{group_name} {number}" for number in range(len(w))]
    picture = Picture(
        inputs=x,
        target=t,
        codes=codes,
        labels=[style.plain(str(label)) for label in labels],
        weights=w,
        intercept=b,
        good=statuses(status, (len(w),), ~np.isfinite(w).all(axis=1)) != Status.DIVERGED,
        input_names=[style.plain(name) for name in names],
        target_name=style.plain(target_name),
        group_name=style.plain(group_name),
        response=response or (lambda prediction: prediction),
    )
    return _lines(picture) if x.shape[1] == 1 else _overview(picture)


def _check_rows(x: np.ndarray, t: np.ndarray, w: np.ndarray, b: np.ndarray, groups: Any) -> None:
    if x.ndim != 2 or len(x) != len(t) or not len(t):
        raise ValueError(f"inputs has shape {x.shape}, target {t.shape}; pass [rows] or [rows, P], and [rows]")
    if w.ndim != 2 or w.shape[1] != x.shape[1] or not len(w):
        raise ValueError(f"weights has shape {w.shape}, inputs {x.shape}; pass one weight per input for each group")
    if b.shape != (len(w),):
        raise ValueError(f"intercept has {len(b)} entries, weights {len(w)} groups; pass one for each")
    if groups is None and len(w) > 1:
        raise ValueError(f"weights has {len(w)} groups; pass groups=, which of them each row belongs to")
    if groups is not None:
        codes = np.asarray(groups)
        if codes.shape != t.shape or codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= len(w):
            raise ValueError(f"groups must be whole numbers from 0 to {len(w) - 1}, one for each row")


def _lines(picture: Picture) -> "Figure":
    """Small multiples of the first groups: data, and the fitted line or curve."""
    shown = min(_PANELS, len(picture.weights))
    columns = min(4, int(np.ceil(np.sqrt(shown))))
    rows = -(-shown // columns)
    figure = style.figure(*((6.4, 4.6) if shown == 1 else (2.5 * columns + 0.6, 2.0 * rows + 1.0)))
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
    if picture.labels:
        axes.set_title(style.short(picture.labels[group]), fontsize=10, loc="left")
    style.tidy(axes)
    if not own.any():
        return
    x, t = picture.inputs[own, 0], picture.target[own]
    drawn = _some(np.arange(len(x)))
    axes.plot(x[drawn], t[drawn], zorder=2, **dots)
    reach = np.linspace(x.min(), x.max(), 100) if x.max() > x.min() else x[:1] + np.array([-0.5, 0.5])
    with np.errstate(all="ignore"):  # of a fit that diverged
        curve = picture.response(reach * picture.weights[group, 0] + picture.intercept[group])
    good = picture.good[group]
    if not good:  # a line that ran away must not take the scale with it
        room = 0.5 * (t.max() - t.min()) or 1.0
        curve = np.where((curve > t.min() - room) & (curve < t.max() + room), curve, np.nan)
    axes.plot(reach, curve, linewidth=2, zorder=3, **({"color": style.BLUE} if good else style.BAD))


def _dots(rows: int) -> dict[str, Any]:
    """How data is marked: rings, which show the line beneath, or where there are many, see-through dots."""
    many = rows > 300
    return {
        "marker": "o",
        "linestyle": "none",
        "markersize": 3 if many else 4,
        "markeredgewidth": 0 if many else 1,
        "markerfacecolor": style.INK if many else "white",
        "markeredgecolor": style.INK,
        "alpha": 0.4 if many else 1,
    }


def _comparable(picture: Picture, shown: int) -> bool:
    """Whether one vertical scale does justice to all groups drawn."""
    spans = []
    for group in range(shown):
        own = picture.target[picture.codes == group]
        if len(own):
            spans.append((own.min(), own.max()))
    low, high = np.array(spans or [(0, 0)]).T
    return bool(np.median(high - low) >= 0.1 * (high.max() - low.min()))


def _overview(picture: Picture) -> "Figure":
    """Each input's weights over the groups, and how far predictions lie from the data."""
    many = len(picture.weights) > 1
    weights = min(len(picture.input_names), 6) if many else 0
    height = 4.4 if not many or len(picture.labels) > _DOTS else 1.8 + 0.24 * len(picture.labels)
    figure = style.figure(10.0, height + 3.8 if many else height)
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
    axes.axvline(0, color=style.INK, linewidth=1, zorder=1)
    axes.set_xlabel(f"weight of {style.short(picture.input_names[number])}")
    axes.xaxis.set_major_locator(style.few_ticks())
    if not len(values):
        axes.set_title("all fits diverged", fontsize=9, loc="left")
    elif len(picture.labels) > _DOTS:
        low, high = np.quantile(values, [0.005, 0.995])
        inside = values[(values >= low) & (values <= high)]
        axes.hist(inside, bins=30, color=style.BLUE, edgecolor="white", linewidth=0.5, zorder=2)
        axes.axvline(np.median(values), color=style.VERMILLION, linestyle="--", linewidth=2, zorder=3)
        axes.set_ylabel(f"groups ({picture.group_name})" if number == 0 else "")
        axes.set_title(f"median {np.median(values):.3g} (dashed)", fontsize=9, loc="left")
    else:
        places = np.arange(len(picture.labels))
        axes.plot(values, places[picture.good], "o", color=style.BLUE, markersize=6, zorder=2)
        axes.set_yticks(places, [style.short(label) for label in picture.labels])
        axes.set_ylim(len(places) - 0.5, -0.5)
    style.tidy(axes)


def _residuals(left: "Axes", right: "Axes", picture: Picture) -> None:
    rows = _some(np.flatnonzero(picture.good[picture.codes]))
    codes, target = picture.codes[rows], picture.target[rows]
    linear = (picture.inputs[rows] * picture.weights[codes]).sum(axis=1) + picture.intercept[codes]
    expected = picture.response(linear)
    dots: dict[str, Any] = {
        "marker": "o",
        "linestyle": "none",
        "markersize": 3.5,
        "color": style.BLUE,
        "alpha": 0.45,
        "markeredgewidth": 0,
    }
    left.plot(expected, target, **dots)
    right.plot(expected, target - expected, **dots)
    if len(rows):
        ends = [min(expected.min(), target.min()), max(expected.max(), target.max())]
        left.plot(ends, ends, color=style.INK, linestyle="--", linewidth=1.5)
    right.axhline(0, color=style.INK, linestyle="--", linewidth=1.5)
    left.set_ylabel(f"{picture.target_name} observed")
    right.set_ylabel("observed − predicted")
    for axes in (left, right):
        axes.set_xlabel(f"{picture.target_name} predicted")
        style.tidy(axes)
    drawn = f"{len(rows):,} of {len(picture.target):,} rows" if len(rows) < len(picture.target) else "all rows"
    left.set_title(f"Observed over predicted, {drawn}", fontsize=10, loc="left")
    right.set_title("Residuals over predicted", fontsize=10, loc="left")


def _legend(figure: "Figure", good: np.ndarray, dots: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], label="data", **dots)]
    if good.any():
        keys.append(Line2D([], [], color=style.BLUE, linewidth=2, label="fit"))
    if not good.all():
        keys.append(Line2D([], [], color=style.VERMILLION, linestyle="--", linewidth=2, label="fit that diverged"))
    style.legend_below(figure, keys)


def _some(rows: np.ndarray) -> np.ndarray:
    """At most as many rows as a picture can show, always the same ones."""
    return rows if len(rows) <= _POINTS else np.random.default_rng(0).choice(rows, _POINTS, replace=False)
