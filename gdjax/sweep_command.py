"""The command `gdjax sweep`: a sweep written down in a file."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from gdjax.console import bad_input_told, errors, output

if TYPE_CHECKING:
    from gdjax.sweep_result import SweepResult

SHOWN = 20
"""Positions of an axis that are shown."""


def sweep(
    config: Annotated[Path, typer.Argument(help="What to sweep: a .toml file.", metavar="CONFIG")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write a table with a row per run: .csv, .parquet, .npz or .json.",
            show_default="[output] table",
            metavar="FILE",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the loss over the swept axes: .png or .svg.", show_default="[output] plot", metavar="FILE"
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Check the file and its table, and run nothing.")] = False,
) -> None:
    """Fit a linear model for every combination of rates, hyperparameters, starts and data sets in a file.

    The file has the sections [data] (table, inputs, target), [model] (loss, l2, intercept, delta, quantile), [run]
    (learning_rate, optimizer, hyperparams, steps, tol, dtype, device), [output] (table, plot) and what is swept: [over]
    for every combination, [draw] for random draws, [[point]] for listed points. learning_rate, l2 and the optimizer's
    hyperparameters are lists, or ranges such as { log = [0.01, 1.0], count = 20 }; seed, fold and bootstrap say how
    many. Files are looked for beside it.

    Exit status: 0 all fine, 1 every run diverged, 2 bad usage or input.

    Example: gdjax sweep sweep.toml --out runs.csv --plot runs.png
    """
    from gdjax.files import check_output
    from gdjax.formats import WRITERS
    from gdjax.plot import DRAWABLE, save
    from gdjax.solution import Status
    from gdjax.sweep_config import read_config
    from gdjax.sweep_model import prepared, run

    with bad_input_told():
        asked = read_config(config)
        beside = {kind: config.parent / name for kind, name in asked.output.items() if name is not None}
        out, plot = out or beside.get("table"), plot or beside.get("plot")
        for path, endings in ((out, tuple(WRITERS)), (plot, DRAWABLE)):
            if path is not None:
                check_output(path, endings)
        sys.path.insert(0, os.getcwd())  # where a user's module:function is looked for
        began = time.perf_counter()
        model = prepared(asked)
        if check:
            output.print(f"{escape(str(config))} is fine: {described(asked)}.", highlight=False, soft_wrap=True)
            return
        result = run(asked, model, progress=True)
        spent = time.perf_counter() - began
        if out is not None:
            result.save(out)
        if plot is not None:
            save(result.plot(by=judged(result)), plot)
    print_result(result)
    output.print(f"{result.status.size:,} runs in {spent:.2f} s, compiling included, on {result.device}.")
    for path, what in ((out, "All runs are"), (plot, "The picture is")):
        if path is not None:
            output.print(f"{what} in {escape(str(path))}.", highlight=False, soft_wrap=True)
    if (result.status == Status.DIVERGED).all():
        raise typer.Exit(1)


def described(asked: Any) -> str:
    """How many runs a file makes: `50 learning_rate x 10 fold = 500 runs`."""
    lengths = {name: entry if isinstance(entry, int) else len(entry) for name, entry in asked.axes.items()}
    runs = 1
    for length in lengths.values():
        runs *= length
    return " x ".join(f"{length:,} {name}" for name, length in lengths.items()) + f" = {runs:,} runs"


def judged(result: "SweepResult") -> str:
    """The figure that runs are compared by."""
    return "held_out" if "held_out" in result.figures else "loss"


def print_result(result: "SweepResult") -> None:
    """A line per position of the first axis, how runs ended, and the best of them."""
    import numpy as np

    from gdjax.solution import Status

    name, by = next(iter(result.axes)), judged(result)
    axis = result.axes[name]
    labels = {column: values for column, values in axis.columns(name).items() if not axis.joint or column != name}
    labels = labels or {name: axis.labels}
    table = Table(*labels, f"best {by}", f"median {by}", "converged", "diverged", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[len(labels) :]:
        column.justify = "right"
    listed = len(axis.columns(name)) > 1  # draws or points, in no order of their own: the best first
    reached = np.where(result.status == Status.DIVERGED, np.inf, result[by]).reshape(len(axis), -1).min(axis=1)
    for at in (np.argsort(reached) if listed else np.arange(len(axis)))[:SHOWN]:
        part = result.isel(**{name: at})
        status, good = part.status, part[by][part.status != Status.DIVERGED]
        figures = [f"{good.min():.6g}", f"{np.median(good):.6g}"] if good.size else ["–", "–"]
        shares = [f"{(status == kind).mean():.0%}" for kind in (Status.CONVERGED, Status.DIVERGED)]
        table.add_row(*(escape(shown(values[at])) for values in labels.values()), *figures, *shares)
    output.print(table)
    if len(axis) > SHOWN:
        output.print(f"These are the {'best' if listed else 'first'} {SHOWN} of {len(axis):,}.", highlight=False)
    ended = ", ".join(f"{count:,} {key.lower().replace('_', ' ')}" for key, count in result.summary().items() if count)
    output.print(f"{result.status.size:,} runs: {ended}.", highlight=False)
    print_best(result, by)


def print_best(result: "SweepResult", by: str) -> None:
    """The best setting: the mean over data sets decides, of the best start on each."""
    sets = [name for name in ("fold", "bootstrap") if name in result.axes]
    starts = [name for name in ("seed",) if name in result.axes]
    best = result.best(*starts) if starts else result
    best = best.mean(*sets) if sets else best
    best = best.best(by=by) if best.axes else best
    if not float(best[by]) == float(best[by]):
        errors.print("There is no best run: all diverged. A smaller learning_rate may help.", style="dim")
        return
    chosen = [f"{name} = {shown(value[()])}" for name, value in best.chosen.items()]
    where = f", the mean over {len(result.axes[sets[0]])} {sets[0]}s" if sets else ""
    said = f"Best: {by} {float(best[by]):.6g}{where}, at {', '.join(chosen) or 'these settings'}."
    output.print(escape(said), highlight=False, soft_wrap=True)


def shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
