"""`gdjax solve` on tables that it goes through in parts: what runs, and what is printed."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.markup import escape

from gdjax.console import errors, output
from gdjax.distributed import Launch, together
from gdjax.jobs import StreamStopped
from gdjax.printing import SHOWN_GROUPS, print_ends, print_models, print_whereabouts
from gdjax.regression import Fit
from gdjax.sink import read_part
from gdjax.solution import Status
from gdjax.solve import steps_hint
from gdjax.stream import places
from gdjax.streamed_fit import FitJob, open_fit_job

INTERRUPTED = 130
PARTS_MISSING = 3


def solve_streamed(
    table: Path,
    out: Path | None,
    plot: Path | None,
    group: str | None,
    names: Sequence[str],
    target: str,
    options: dict[str, Any],
    launch: Launch | None = None,
) -> int:
    """Fit a table in parts and print what came out, as the first of the processes; returns the exit status."""
    if out is None:
        raise ValueError("a table that is gone through in parts needs --out: a file, or a folder for the parts")

    def say(text: str) -> None:
        errors.print(escape(text), soft_wrap=True, highlight=False)

    began = ready = time.perf_counter()

    def open_job() -> FitJob:
        nonlocal ready
        opened = open_fit_job(table, out, group=group, names=names, target=target, say=say, **options)
        ready = time.perf_counter()
        return opened

    try:
        if launch is None:
            job = open_job()
            job.run(progress=True)
        else:
            ending = together(launch, places(out)[0], open_job, progress=True, say=say)
            if ending.lost or ending.missing:
                say(ending.told)
            if ending.missing or not ending.leads:
                return PARTS_MISSING if ending.missing else 0
            job = cast(FitJob, ending.job)
    except StreamStopped as stopped:
        say(str(stopped))
        return INTERRUPTED
    first, labels = first_models(job, group, names)
    totals = job.finish()
    solved = time.perf_counter()
    print_models(output, first, labels, names, group)
    counts = {status: totals.counts.get(status.name, 0) for status in Status}
    print_ends(output, counts, totals.notes, steps_hint(options["loss"]))
    spent = f"looked through in {ready - began:.2f} s, fitted in {solved - ready:.2f} s, compiling included"
    where = job.device if launch is None else f"{job.device} of each of {launch.processes} processes"
    output.print(f"{job.rows_read:,} rows {spent}, on {where}.")
    print_whereabouts(output, out, None, totals.problems)
    return 1 if counts[Status.DIVERGED] else 0


def first_models(job: FitJob, group: str | None, names: Sequence[str]) -> tuple[Fit, list[Any]]:
    """The models that are shown, and their labels."""
    held = read_part(job.sink.path(0)).slice(0, SHOWN_GROUPS)
    columns = {name: held[name].to_numpy() for name in held.column_names if name != group}
    status = np.array([Status[name] for name in columns["status"]], np.int8)
    fitted = Fit(
        weights=np.column_stack([columns[name] for name in names]),
        intercept=columns.get("intercept"),
        loss=columns["loss"],
        gradient_norm=columns["gradient_norm"],
        steps=columns["steps"],
        status=status,
        rows=np.zeros(len(status), np.int64),
        notes=columns["note"].astype(str),
        device=job.device,
    )
    return fitted, held[group].to_pylist() if group else [""]
