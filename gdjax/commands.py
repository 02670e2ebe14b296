"""The commands of `gdjax`, one function each; what takes long to import is imported when a command runs."""

import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from gdjax.console import bad_input_told, errors, output
from gdjax.sweep_command import sweep

app = typer.Typer(
    name="gdjax",
    help="Descend millions of independent weight problems at once, on CPU, GPU or TPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


class Dtype(StrEnum):
    """The arithmetic of the descent."""

    float32 = "float32"
    float64 = "float64"


class PlotKind(StrEnum):
    """What `gdjax solve --plot` draws."""

    fits = "fits"
    steps = "steps"


class VerifiedLoss(StrEnum):
    """What a verified kernel descends."""

    squared = "squared"
    residual = "residual"


class Claim(StrEnum):
    """What a verified kernel claims."""

    bits = "bits"
    bound = "bound"


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
        Path,
        typer.Argument(
            help="A tidy table: .csv, .parquet or .npz (1-d arrays), or a folder of Parquet files.", metavar="TABLE"
        ),
    ],
    inputs: Annotated[str, typer.Option(help="The input columns, separated by commas.", metavar="COL,COL")],
    target: Annotated[str, typer.Option(help="The column to predict.", metavar="COL")],
    group: Annotated[
        str | None,
        typer.Option(help="One model per value of this column; without it, one for the table.", metavar="COL"),
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
    delta: Annotated[float, typer.Option(help="Where the huber loss turns straight, in units of the target.")] = 1.0,
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
    device: Annotated[str, typer.Option(help="auto, cpu, gpu, tpu, gpu:1, ... (see gdjax devices).")] = "auto",
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
        typer.Option(
            help="Write all fitted models: .csv, .parquet, .npz or .json; with --stream also a folder, in parts.",
            metavar="FILE",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the fits: .png or .svg.", metavar="FILE")] = None,
    plot_kind: Annotated[
        PlotKind, typer.Option(help="What --plot draws: the fits, or a histogram of the steps they took to converge.")
    ] = PlotKind.fits,
    stream: Annotated[
        bool | None,
        typer.Option(
            help="Go through the table in parts, for tables larger than memory: the same command goes on after any "
            "interruption. Needs --out.",
            show_default="for tables from 2 GiB on, and folders",
        ),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            help="Where process 0 of several listens, at a free port. The table is gone through in parts, which they "
            "divide among them; --out must lie on a file system that they share. Under srun or mpirun leave these out.",
            metavar="HOST:PORT",
        ),
    ] = None,
    processes: Annotated[int | None, typer.Option(help="How many processes there are.", min=1)] = None,
    process_id: Annotated[int | None, typer.Option(help="Which of them this one is, from 0.", min=0)] = None,
) -> None:
    """Fit one linear model per group of a table, all groups at once.

    Inputs are standardised per group for the descent; weights come back in your units. With --out the columns
    are the group, intercept, one per input, loss, gradient_norm (in standard units: what --tol is compared
    with), steps and status, and a note where some group needs one. Exit status: 0 all fine, 1 some group
    diverged, 2 bad usage or input, 3 parts are missing since another process died: run the same again.

    Example: gdjax solve gapminder.csv --group country --inputs year --target lifeExp --out trends.csv
    """
    import numpy as np

    from gdjax.distributed import launched
    from gdjax.optimizers import named_optimizer
    from gdjax.printing import print_fit, print_whereabouts
    from gdjax.regression import fit
    from gdjax.solution import Status
    from gdjax.solve import check_names, check_outputs, columns_of, parse_rate, save_picture, steps_hint, streamed
    from gdjax.streamed_solve import solve_streamed
    from gdjax.table import label_column, number_column, read_table, write_table

    with bad_input_told():
        names = [name.strip() for name in inputs.split(",") if name.strip()]
        check_names(group, names, target)
        launch = launched(coordinator, processes, process_id)
        in_parts = streamed(table, stream, launch is not None)
        check_outputs(table, out, plot, in_parts)
        if plot_kind is not PlotKind.fits and plot is None:
            raise ValueError(f"--plot-kind {plot_kind} says what --plot draws; give --plot FILE as well")
        rate = parse_rate(learning_rate)
        rule, hyperparams = named_optimizer(optimizer, rate) if optimizer else (None, None)
        options: dict[str, Any] = {
            "intercept": not no_intercept,
            "loss": loss,
            "delta": delta,
            "quantile": quantile,
            "steps": steps,
            "tol": tol,
            "seed": seed,
            "dtype": dtype.value,
            "device": device,
            "learning_rate": "auto" if rate is None else rate,
            "optimizer": rule,
            "hyperparams": hyperparams,
        }
        sys.path.insert(0, os.getcwd())  # where a user's module:function is looked for
        if in_parts:
            raise typer.Exit(solve_streamed(table, out, plot, group, names, target, options, launch))

        began = time.perf_counter()
        data = read_table(table, [*([group] if group else []), *names, target])
        x, t = np.column_stack([number_column(data, name) for name in names]), number_column(data, target)
        labels, codes = label_column(data, group) if group else ([""], np.zeros(len(t), np.int32))
        read = time.perf_counter()

        with errors.status(f"fitting {len(labels):,} models"):
            result = fit(x, t, codes, names=names, **options)
        solved = time.perf_counter()
        if out is not None:
            write_table(out, columns_of(result, group, labels, names))
        if plot is not None:
            save_picture(plot, plot_kind, result, x, t, codes, labels, names, target, group, loss)

    print_fit(output, result, labels if group else None, names, group, steps_hint(loss))
    spent = f"read in {read - began:.2f} s, fitted in {solved - read:.2f} s, compiling included"
    output.print(f"{len(t):,} rows {spent}, on {result.device}.")
    print_whereabouts(output, out, plot, len(labels))
    if (result.status == Status.DIVERGED).any():
        raise typer.Exit(1)


app.command()(sweep)


@app.command()
def bench(
    device: Annotated[str, typer.Option(help="A device, or 'all' for one of each kind.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes: under two minutes.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures: .json.", metavar="FILE")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them: .png or .svg.", metavar="FILE")] = None,
) -> None:
    """Measure what this machine's devices reach, against their own limits.

    Exit status: 0 all fine, 2 bad usage.

    Example: gdjax bench --device all --plot speed.png
    """
    from gdjax import measure
    from gdjax.files import check_output
    from gdjax.plot import DRAWABLE

    with bad_input_told():
        for path, endings in ((out, measure.ENDINGS), (plot, DRAWABLE)):
            if path is not None:
                check_output(path, endings)
        found = measure.measure(device, quick=quick, progress=True)
        header, rows = measure.rows(found)
        table = Table(*header, box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*row)
        output.print(table, *measure.limit_lines(found), *measure.verdicts(found), sep="\n")
        if out is not None:
            measure.save(found, out)
        if plot is not None:
            measure.plot(found, plot)


@app.command()
def verify(
    kernel: Annotated[
        str | None,
        typer.Option(
            help="Your function kernel(w, x, t, learning_rate, steps) -> w over NumPy arrays of N problems; "
            "without it, every way in which gdjax itself runs is verified.",
            metavar="MODULE:FUNCTION",
        ),
    ] = None,
    loss: Annotated[
        VerifiedLoss | None,
        typer.Option(help="What it descends: half the squared residual, or the residual.", show_default="squared"),
    ] = None,
    claim: Annotated[
        Claim, typer.Option(help="What it claims: the bits of a declared rounding, or the error bound only.")
    ] = Claim.bits,
    device: Annotated[str, typer.Option(help="auto, cpu, gpu, tpu, gpu:1, ... (see gdjax devices).")] = "auto",
    seed: Annotated[int, typer.Option(help="What the random problems are drawn from.", min=0)] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller batches.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write every figure: .json.", metavar="FILE")] = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Write test vectors for a kernel in any language, and stop.", metavar="FOLDER"),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(help="Judge the answers to exported vectors instead of a kernel.", metavar="FOLDER"),
    ] = None,
) -> None:
    """Prove a kernel's arithmetic: bit for bit, within its error bound, alone as in any batch.

    Exit status: 0 nothing fails, 1 something does, 2 bad usage or input.

    Example: gdjax verify --kernel my_kernels:descend --json report.json
    """
    from gdjax.files import check_output
    from gdjax.vectors import check_vectors, export_vectors
    from gdjax.verify import load_kernel
    from gdjax.verify import verify as run

    with bad_input_told():
        _one_of({"--kernel": kernel, "--export": export, "--check": check})
        _one_of({"--export": export, "--json": json})
        if json is not None:
            check_output(json, [".json"])
        if export is not None:
            losses = [loss.value] if loss else [known.value for known in VerifiedLoss]
            for path in export_vectors(export, losses=losses, seed=seed):
                output.print(escape(str(path)), soft_wrap=True, highlight=False)
            return
        with errors.status("verifying"):
            if check is not None:
                report = check_vectors(check, claim=claim.value)
            else:
                report = run(
                    load_kernel(kernel) if kernel else None,
                    loss=(loss or VerifiedLoss.squared).value,
                    claim=claim.value,
                    device=device,
                    seed=seed,
                    quick=quick,
                )
        output.print(report)
        if json is not None:
            report.save(json)
    if not report.passed:
        raise typer.Exit(1)


def _one_of(options: dict[str, object]) -> None:
    """At most one of these may be given."""
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[1]} cannot go with {given[0]}; leave one of them out")
