"""The commands of `gdjax`, one function each; what takes long to import is imported when a command runs."""

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import numpy as np

    from gdjax.regression import Fit

app = typer.Typer(
    name="gdjax",
    help="Descend millions of independent weight problems at once, on CPU, GPU or TPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
output = Console()
errors = Console(stderr=True)


class Dtype(StrEnum):
    """The arithmetic of the descent."""

    float32 = "float32"
    float64 = "float64"


@contextmanager
def bad_input_told() -> Iterator[None]:
    """Tell a ValueError as one message on stderr and exit with 2."""
    try:
        yield
    except ValueError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None


def _version(wanted: bool) -> None:
    if wanted:
        from gdjax import __version__

        output.print(f"gdjax {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Descend millions of independent weight problems at once, on CPU, GPU or TPU."""


@app.command()
def devices() -> None:
    """List the processors that gdjax can run on."""
    from gdjax.device import devices as seen
    from gdjax.device import select_device

    automatic = str(select_device("auto"))
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("device", "platform", "kind", "memory", ""):
        table.add_column(heading)
    for info in seen():
        memory = "unknown" if info.memory_bytes is None else f"{info.memory_bytes / 2**30:.1f} GiB"
        chosen = "auto" if str(info.device) == automatic else ""
        table.add_row(info.name, info.platform, escape(info.kind), memory, chosen)
    output.print(table)


@app.command()
def solve(
    table: Annotated[
        Path, typer.Argument(help="A tidy table: .csv, .parquet or .npz (1-d arrays).", metavar="TABLE")
    ],
    inputs: Annotated[str, typer.Option(help="The input columns, separated by commas.", metavar="COL,COL")],
    target: Annotated[str, typer.Option(help="The column to predict.", metavar="COL")],
    group: Annotated[
        str | None,
        typer.Option(
            help="One model per value of this column; without it, one for the table.", metavar="COL"
        ),
    ] = None,
    no_intercept: Annotated[bool, typer.Option("--no-intercept", help="Fit no constant term.")] = False,
    loss: Annotated[
        str,
        typer.Option(
            help="squared (half the square), absolute, huber, logistic, poisson, quantile, or as "
            "module:function your own elementwise JAX function (predictions, targets) -> losses; "
            "averaged over a group's rows."
        ),
    ] = "squared",
    delta: Annotated[
        float, typer.Option(help="Where the huber loss turns straight, in units of the target.")
    ] = 1.0,
    quantile: Annotated[float, typer.Option(help="The quantile that the quantile loss looks for.")] = 0.5,
    learning_rate: Annotated[
        str,
        typer.Option(
            help="auto (1/L per group, L the largest curvature; for absolute and quantile a falling rate) or "
            "a number, for inputs in standard units.",
            metavar="auto|R",
        ),
    ] = "auto",
    optimizer: Annotated[
        str | None,
        typer.Option(help="Any optimizer of optax by name, such as adam or lbfgs, instead of plain descent."),
    ] = None,
    steps: Annotated[int, typer.Option(help="At most this many updates per group.")] = 10_000,
    tol: Annotated[
        float | None,
        typer.Option(
            help="A group has converged when no entry of its gradient, in standard units, exceeds this.",
            show_default="1e-10, or 1e-5 in float32",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, gpu, tpu, gpu:1, ... (see gdjax devices).")
    ] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="The arithmetic of the descent.")] = Dtype.float64,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Start at random weights drawn from this seed.",
            show_default="start at zero in standard units: each prediction is the target's mean",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write all fitted models: .csv, .parquet, .npz or .json.", metavar="FILE"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the fits: .png or .svg.", metavar="FILE")] = None,
) -> None:
    """Fit one linear model per group of a table, all groups at once.

    Inputs are standardised per group for the descent; weights come back in your units. With --out the columns
    are the group, intercept, one per input, loss, gradient_norm (in standard units: what --tol is compared
    with), steps and status, and a note where some group needs one. Exit status: 0 all fine, 1 some group
    diverged, 2 bad usage or input.

    Example: gdjax solve gapminder.csv --group country --inputs year --target lifeExp --out trends.csv
    """
    import numpy as np

    from gdjax.files import check_output
    from gdjax.formats import WRITERS
    from gdjax.optimizers import named_optimizer
    from gdjax.plot import DRAWABLE
    from gdjax.printing import print_fit, print_whereabouts
    from gdjax.regression import fit
    from gdjax.solution import Status
    from gdjax.table import label_column, number_column, read_table, write_table

    with bad_input_told():
        names = [name.strip() for name in inputs.split(",") if name.strip()]
        _check_names(group, names, target)
        if out is not None:
            check_output(out, tuple(WRITERS))
        if plot is not None:
            check_output(plot, DRAWABLE)
        rate = _rate(learning_rate)
        rule, hyperparams = named_optimizer(optimizer, rate) if optimizer else (None, None)

        began = time.perf_counter()
        data = read_table(table, [*([group] if group else []), *names, target])
        x, t = np.column_stack([number_column(data, name) for name in names]), number_column(data, target)
        labels, codes = label_column(data, group) if group else ([""], np.zeros(len(t), np.int32))
        read = time.perf_counter()

        sys.path.insert(0, os.getcwd())  # where a user's module:function is looked for
        with errors.status(f"fitting {len(labels):,} models"):
            result = fit(
                x,
                t,
                codes,
                intercept=not no_intercept,
                loss=loss,
                delta=delta,
                quantile=quantile,
                steps=steps,
                tol=tol,
                seed=seed,
                dtype=dtype.value,
                device=device,
                names=names,
                learning_rate="auto" if rate is None else rate,
                optimizer=rule,
                hyperparams=hyperparams,
            )
        solved = time.perf_counter()
        if out is not None:
            write_table(out, _columns(result, group, labels, names))
        if plot is not None:
            _plot(plot, result, x, t, codes, labels, names, target, group, loss)

    hint = "Those that took all steps may need more --steps, or --optimizer lbfgs."
    if loss in ("absolute", "quantile"):
        hint = f"The {loss} loss has kinks: all steps are taken, ever smaller ones."
    print_fit(output, result, labels if group else None, names, group, hint)
    spent = f"read in {read - began:.2f} s, fitted in {solved - read:.2f} s, compiling included"
    output.print(f"{len(t):,} rows {spent}, on {result.device}.")
    print_whereabouts(output, out, plot, len(labels))
    if (result.status == Status.DIVERGED).any():
        raise typer.Exit(1)


def _check_names(group: str | None, names: Sequence[str], target: str) -> None:
    if not names:
        raise ValueError("--inputs names no column; give at least one, such as --inputs year")
    result = ("intercept", "loss", "gradient_norm", "steps", "status", "note")
    taken = dict.fromkeys(result, "a column of the result")
    for role, name in [*([("--group", group)] if group else []), *(("--inputs", name) for name in names)]:
        if name in taken:
            raise ValueError(
                f"{role} names '{name}', which is {taken[name]} already; leave it out or rename it"
            )
        taken[name] = f"named by {role}"
    if target in (group, *names):
        raise ValueError(f"--target names '{target}', which is {taken[target]} already; leave it out there")


def _rate(learning_rate: str) -> float | None:
    """The number given, None for auto."""
    if learning_rate == "auto":
        return None
    try:
        rate = float(learning_rate)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ValueError(f"--learning-rate must be auto or a positive number, got '{learning_rate}'")
    return rate


def _columns(result: "Fit", group: str | None, labels: Any, names: Sequence[str]) -> dict[str, Any]:
    """The result as a table, one row per group."""
    import numpy as np

    from gdjax.solution import Status

    columns: dict[str, Any] = {group: labels} if group else {}
    if result.intercept is not None:
        columns["intercept"] = result.intercept
    columns |= {name: result.weights[:, number] for number, name in enumerate(names)}
    columns |= {"loss": result.loss, "gradient_norm": result.gradient_norm, "steps": result.steps}
    columns["status"] = np.array([status.name for status in Status])[result.status]
    if (result.notes != "").any():
        columns["note"] = result.notes
    return columns


def _plot(
    path: Path,
    result: "Fit",
    x: "np.ndarray",
    t: "np.ndarray",
    codes: "np.ndarray",
    labels: Any,
    names: Sequence[str],
    target: str,
    group: str | None,
    loss: str,
) -> None:
    from gdjax.losses import named_loss
    from gdjax.plot import Picture, draw, save
    from gdjax.solution import Status

    picture = Picture(
        inputs=x,
        target=t,
        codes=codes,
        labels=[str(label) for label in labels] if group else [],
        weights=result.weights,
        intercept=0 * result.weights[:, 0] if result.intercept is None else result.intercept,
        good=result.status != Status.DIVERGED,
        input_names=names,
        target_name=target,
        group_name=group or "",
        response=named_loss(loss).response,
    )
    save(draw(picture), path)
