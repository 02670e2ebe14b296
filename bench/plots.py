"""Pictures of a run: speed over batch size, over the spread of step counts, share of the limit, precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.cases import SIZE_SWEEPS
from bench.rounds import LIMITS, Result
from gdjax.files import replacing

# Okabe and Ito's colours, told apart by colour-blind readers too; each program also has a marker of its own.
STYLES = {
    "gdjax": ("#D55E00", "o"),
    "gdjax, fixed steps": ("#D55E00", "*"),
    "gdjax, 2,400 steps": ("#D55E00", "*"),
    "gdjax, 24,000 steps": ("#D55E00", "^"),
    "vmap": ("#0072B2", "s"),
    "optax": ("#56B4E9", "^"),
    "jaxopt": ("#56B4E9", "v"),
    "optimistix": ("#0072B2", "D"),
    "torch eager": ("#CC79A7", "<"),
    "torch compiled": ("#CC79A7", ">"),
    "torch compiled, 12 steps": ("#CC79A7", "P"),
    "numba": ("#009E73", "X"),
    "numpy": ("#E69F00", "h"),
    "scipy": ("#E69F00", "p"),
    "reference": ("#888888", "d"),
    "c loop": ("#000000", "_"),
}


def canvas(height: float) -> tuple[Any, Any]:
    """An empty figure of our usual width; drawn without a screen and without touching pyplot's state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.add_subplot()


def line(axes: Any, program: str, xs: list[float], ys: list[float]) -> None:
    """One program's line."""
    colour, marker = STYLES.get(program, ("#888888", "."))
    style = "--" if program in LIMITS else "-"
    axes.plot(xs, ys, style, color=colour, marker=marker, label=program, linewidth=3 if program == "gdjax" else 1.5)


def sizes(results: list[Result]) -> Any:
    """Steps per second over the number of problems."""
    sweep = sorted((result for result in results if result.sweep == "size"), key=lambda result: result.problems)
    if len(sweep) < 2:
        return None
    figure, axes = canvas(5)
    for program in dict.fromkeys(row.program for result in sweep for row in result.rows):
        points = [(result.problems, result.row(program)) for result in sweep]
        kept = [(n, row.steps_per_second / 1e9) for n, row in points if row and row.steps_per_second]
        if kept:
            line(axes, program, *map(list, zip(*kept, strict=True)))
    for name, (steps, _) in list(SIZE_SWEEPS.items())[1:]:
        rows = [(result.problems, result.row("gdjax")) for result in results if result.sweep == name]
        longer = sorted((n, row.steps_per_second / 1e9) for n, row in rows if row and row.steps_per_second)
        if longer:
            line(axes, f"gdjax, {steps:,} steps", *map(list, zip(*longer, strict=True)))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="problems",
        ylabel="steps per second (billions)",
        title="Scalar problems, 240 steps where not said: speed over batch size",
    )
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right center")  # within, it would hide a line
    return figure


def spreads(results: list[Result]) -> Any:
    """Useful steps per second over how far the step counts lie apart."""
    sweep = [result for result in results if result.sweep == "spread"]
    if len(sweep) < 2:
        return None
    figure, axes = canvas(5)
    labels = [result.case.removeprefix("spread-").replace("-", " to ") for result in sweep]
    for program in dict.fromkeys(row.program for result in sweep for row in result.rows):
        points = [(i, result.row(program)) for i, result in enumerate(sweep)]
        kept = [(i, row.steps_per_second / 1e9) for i, row in points if row and row.steps_per_second]
        if kept:
            line(axes, program, *map(list, zip(*kept, strict=True)))
    axes.set(
        yscale="log",
        xlabel="steps needed, log-uniform between",
        ylabel="useful steps per second (billions)",
        title="Stop rule: speed over the spread of step counts",
    )
    axes.set_xticks(range(len(sweep)), labels)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def dots(results: list[Result], value: Callable[[Result, str], float | None], title: str, label: str) -> Any:
    """One line per case, one mark per program."""
    shown = [result for result in results if result.sweep is None]
    marks = [
        (i, row.program, found)
        for i, result in enumerate(shown)
        for row in result.rows
        if row.program not in LIMITS and row.times and (found := value(result, row.program))
    ]
    if not marks:
        return None
    figure, axes = canvas(1.8 + 0.9 * len(shown))
    order = [name for name in STYLES if any(program == name for _, program, _ in marks)]
    for place, program in enumerate(order):
        colour, marker = STYLES[program]
        # Each program a little lower than the one before, so that equals do not hide each other.
        own = [(x, i + 0.7 * (place + 0.5) / len(order) - 0.35) for i, name, x in marks if name == program]
        xs, ys = zip(*own, strict=True)
        axes.scatter(xs, ys, s=110 if program == "gdjax" else 45, color=colour, marker=marker, label=program)
    axes.set_yticks([i + 0.5 for i in range(len(shown) - 1)], minor=True)
    axes.grid(which="minor", axis="y")
    axes.set(xscale="log", xlabel=label, title=title, ylim=(len(shown) - 0.5, -0.5))
    axes.set_yticks(range(len(shown)), [result.case for result in shown])
    axes.grid(alpha=0.3, axis="x", which="both")
    axes.tick_params(which="minor", axis="y", length=0)
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def limits(results: list[Result]) -> Any:
    """Speed as a share of the limit."""

    def value(result: Result, program: str) -> float | None:
        share = result.share(program)
        return share[0] * 100 if share else None

    figure = dots(results, value, "Share of the limit (the loop in C, or nothing but multiply-adds)", "% of the limit")
    if figure is not None:
        figure.axes[0].axvline(100, color="black", linestyle="--", linewidth=1)
    return figure


def precision(results: list[Result]) -> Any:
    """Largest error of the weights after all steps."""
    fixed = [result for result in results if result.error_means == "largest error of the weights"]

    def value(result: Result, program: str) -> float | None:
        row = result.row(program)
        # The reference is no float32 program.
        return row.error if row and program != "reference" else None

    return dots(fixed, value, "Precision: float32 programs against float64", "largest error of the weights")


def draw(stem: Path, results: list[Result]) -> list[Path]:
    """Write the pictures that these results can fill beside `stem`; returns their paths."""
    written = []
    pictures = {"sizes": sizes, "spreads": spreads, "limit": limits, "precision": precision}
    for name, picture in pictures.items():
        figure = picture(results)
        if figure is not None:
            path = stem.with_name(f"{stem.name}-{name}.png")
            with replacing(path) as file:
                figure.savefig(file, format="png", dpi=150)
            written.append(path)
    return written
