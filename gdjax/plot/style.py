"""What all pictures have in common: colours, dashes, frames, scales, and how they are written to a file.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), told apart by every kind of colour vision; whatever a
colour says is said by a dash, a marker or a hatch as well, so that nothing is lost in grey.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gdjax.files import check_output, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DRAWABLE = (".png", ".svg")

BLUE, VERMILLION, INK, GREY, PALE = "#0072B2", "#D55E00", "#4D4D4D", "#8C8C8C", "#DDDDDD"
LOOKS: tuple[dict[str, Any], ...] = tuple(
    {"color": colour, "linestyle": dash, "marker": marker}
    for colour, dash, marker in (
        ("#000000", "-", "o"),
        ("#E69F00", "--", "s"),
        ("#009E73", "-.", "^"),
        ("#CC79A7", ":", "D"),
        ("#56B4E9", (0, (6, 1, 1, 1, 1, 1)), "v"),
        ("#D55E00", (0, (1, 1)), "P"),
    )
)
BAD: dict[str, Any] = {"color": VERMILLION, "linestyle": "--"}
HATCH = "////"
_HUGE = 1e100  # some way beyond this, logarithmic scales and colour bars of matplotlib overflow
_LETTERS = 12  # of a legend, to an inch


def figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed; it says which extra has it.
    """
    try:
        from gdjax.plot.canvas import canvas
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] != "matplotlib":
            raise
        raise ModuleNotFoundError(
            'gdjax.plot needs matplotlib: pip install "gdjax[cli]"', name="matplotlib"
        ) from missing
    return canvas(width, height)


def save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Write a figure, whole or not at all.

    Args:
        figure: what a function of `gdjax.plot` returned, or any other figure of matplotlib.
        path: a `.png` or `.svg` file.

    Raises:
        ValueError: if the ending is another or the folder is missing.

    >>> import gdjax, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "steps.svg"
    >>> save(gdjax.plot.steps_to_convergence([3, 5, 8]), path)
    >>> path.read_text()[:5]
    '<?xml'
    """
    path = check_output(path, DRAWABLE)
    kind = path.suffix[1:].lower()
    # Without a date, and with names drawn from one salt, the same picture is the same file.
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "gdjax"}), replacing(path) as file:
        figure.savefig(file, format=kind, dpi=160, metadata=metadata)


def tidy(axes: "Axes", grid: str = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=PALE, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5)


def legend_below(figure: "Figure", handles: Sequence[Any]) -> None:
    """One legend under everything, in as many columns as there is room for."""
    if not handles:
        return
    lengths = [len(handle.get_label()) + 6 for handle in handles]  # the mark takes six letters
    room = figure.get_figwidth() * _LETTERS
    for rows in range(1, len(handles) + 1):
        columns = [lengths[first : first + rows] for first in range(0, len(handles), rows)]
        if sum(max(column) for column in columns) <= room:
            break
    figure.legend(handles=handles, loc="outside lower center", ncols=len(columns), frameon=False)


def heading(axes: "Axes", title: str, note: str = "") -> None:
    """What is drawn, and below it in smaller print what a reader must know of it."""
    if note:
        axes.annotate(note, (0, 1), (0, 6), "axes fraction", "offset points", fontsize=9, color=INK, gid="note")
    axes.set_title(plain(short(title, 62)), fontsize=12, loc="left", pad=22 if note else 8)


def nothing(axes: "Axes", why: str) -> None:
    """Say in an empty frame why there is nothing to see."""
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", fontsize=12)


def short(text: str, longest: int = 24) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def plain(text: str) -> str:
    """A dollar sign would start mathematics."""
    return text.replace("$", r"\$")


def star(axes: "Axes", x: float, y: float, told: str, raised: float = 0.0) -> list[Any]:
    """Mark the best, `raised` by so many points."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation

    look: dict[str, Any] = {"marker": "*", "linestyle": "none", "markersize": 14}
    look |= {"markerfacecolor": "white", "markeredgecolor": "black"}
    scale = axes.get_figure(root=True).dpi_scale_trans  # type: ignore[union-attr]
    lift = ScaledTranslation(0, raised / 72, scale)
    axes.plot([x], [y], transform=axes.transData + lift, clip_on=False, zorder=4, **look)
    return [Line2D([], [], label=plain(f"best: {told}"), **look)]


def spans_decades(values: np.ndarray, factor: float = 50.0) -> bool:
    """Whether a logarithmic scale reads better: no value below 0, and those above it far apart."""
    positive = values[np.isfinite(values) & (values > 0)]
    return bool(len(positive) and not (values < 0).any() and positive.max() > factor * positive.min())


def reach(values: np.ndarray) -> tuple[float, float, bool, bool]:
    """What a scale should show of these values: low end, high end, whether logarithmic, whether it leaves some out.

    Losses that run away without having overflowed yet lie many decades above the rest: a logarithmic scale ends as far
    above the median as it begins below it.
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0, False, False
    log = spans_decades(finite)
    finite = finite[finite > 0] if log else finite
    low, median, high = finite.min(), np.median(finite), finite.max()
    if not log:
        return float(low), float(high), False, False
    cap = min(float(median) * max(float(median) / float(low), 1e3), _HUGE)
    return max(float(low), 1 / _HUGE), min(float(high), cap), True, bool(high > cap)


def scale(axes: "Axes", values: np.ndarray, above: float = 1.0) -> None:
    """Set the y axis to show these values, with a little room below and `above` times as much above."""
    low, high, log, _ = reach(values)
    if log:
        axes.set_yscale("log")
        if high < 100 * low:
            few_decades(axes.yaxis)
        first, last = np.log10([low, high])
        room = 0.06 * (last - first)
        axes.set_ylim(max(10 ** (first - room), 1 / _HUGE), min(10 ** (last + room * above), _HUGE))
    else:
        room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room * above)


def few_decades(axis: "Axis") -> None:
    """Ticks at 1, 2, 5, 10, ... in plain numbers, where powers of ten alone are too few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())


def colour_scale(values: np.ndarray) -> tuple[Any, str]:
    """The norm that colours these values, and on which side of the colour bar there is more."""
    from matplotlib.colors import LogNorm, Normalize

    low, high, log, more = reach(values)
    if high <= low:  # one value only
        high = low + (abs(low) or 1.0)
    return (LogNorm if log else Normalize)(low, high, clip=True), "max" if more else "neither"


def number(value: float) -> str:
    """Three digits, whole numbers with separators."""
    return f"{value:,.0f}" if value == round(value) and 1 <= abs(value) < 1e6 else f"{value:.3g}"


def few_ticks(most: int = 4, whole: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, steps=[1, 2, 5, 10], integer=whole)


def whole_numbers(axis: "Axis") -> None:
    """Ticks at whole numbers, written with separators."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_locator(few_ticks(7, whole=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
