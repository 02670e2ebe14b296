"""One swept axis as it is drawn: where its values lie, on which scale, and with which words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gdjax.plot import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = 30  # names along an axis that can be read
_CELLS = 12  # values along an axis whose cells are of one size, each with its value written


@dataclass(frozen=True)
class Axis:
    """A swept axis with V values.

    Attributes:
        name: what it is called.
        order: `[V]`, which entry comes first, second, ... on the page.
        places: `[V]`, where they are drawn, ascending.
        labels: what to write there instead of numbers; empty where numbers are written.
        log: whether the scale is logarithmic.
        words: `[V]`, each value in words.
    """

    name: str
    order: np.ndarray
    places: np.ndarray
    labels: Sequence[str]
    log: bool
    words: Sequence[str]

    def edges(self) -> np.ndarray:
        """`[V + 1]`, half-way between neighbours."""
        places = np.log(self.places) if self.log else self.places
        if len(places) == 1:
            room = np.log(2) if self.log else 0.5
            edges = places[0] + np.array([-room, room])
        else:
            middle = (places[1:] + places[:-1]) / 2
            edges = np.concatenate([[2 * places[0] - middle[0]], middle, [2 * places[-1] - middle[-1]]])
        return np.exp(edges) if self.log else edges

    def label(self, axes: "Axes", side: str) -> None:
        """Write name and values along the x or the y axis."""
        axis = axes.xaxis if side == "x" else axes.yaxis
        axis.set_label_text(style.plain(style.short(self.name, 40)))
        if self.log:
            axes.set_xscale("log") if side == "x" else axes.set_yscale("log")
        if not len(self.labels):
            if not self.log:
                axis.set_major_locator(style.few_ticks(7))
            return
        every = -(-len(self.labels) // _LABELS)
        shown = [style.plain(style.short(label, 18)) for label in self.labels[::every]]
        crowded = side == "x" and sum(len(label) + 2 for label in shown) > 70
        turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axis.set_ticks(self.places[::every], shown, **turned)
        axis.set_tick_params(which="minor", length=0)


def axis_of(name: str, values: Any, cells: bool = False) -> Axis:
    """How an axis is drawn: numbers on a scale that suits them, anything else as names side by side.

    So are numbers no scale suits, such as 0, 0.001, 0.01, 0.1, and a few of them where they name `cells` of a grid.
    """
    array = _numbers(values)
    if array is None:
        return _named(name, [str(entry) for entry in values])
    numbers = array.astype(np.float64)
    order = np.argsort(numbers, kind="stable")
    places = numbers[order]
    words = [style.number(value) for value in places]
    log = geometric(places)
    gaps = np.diff(places)
    if (cells and len(places) <= _CELLS) or len(places) == 1 or (not log and gaps.min() < 0.03 * gaps.max()):
        named = _named(name, words)
        return Axis(name, order, named.places, words, False, words)
    return Axis(name, order, places, [], log, words)


def is_floating(values: Any) -> bool:
    """Whether an axis has floating point values, as rates have and seeds have not."""
    array = _numbers(values)
    return array is not None and array.dtype.kind == "f"


def _numbers(values: Any) -> np.ndarray | None:
    """The values as an array, None unless they are finite numbers."""
    try:
        array = np.asarray(values)
    except ValueError:  # entries of different shapes
        return None
    return array if array.ndim == 1 and array.dtype.kind in "fiu" and np.isfinite(array).all() else None


def _named(name: str, labels: Sequence[str]) -> Axis:
    places = np.arange(len(labels))
    return Axis(name, places, places.astype(np.float64), labels, False, labels)


def geometric(values: np.ndarray) -> bool:
    """Whether values lie more evenly on a logarithmic scale: their median nearer to the middle there."""
    low, high = values.min(), values.max()
    if low <= 0 or high < 10 * low:
        return False
    median = np.median(values)
    off = abs(median - (low + high) / 2) / (high - low)
    return bool(abs(np.log(median) - np.log(low * high) / 2) / np.log(high / low) < off)
