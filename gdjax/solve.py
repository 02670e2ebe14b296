"""What `gdjax solve` makes of its options, and of what was fitted."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gdjax.files import check_output
from gdjax.formats import WRITERS
from gdjax.losses import named_loss
from gdjax.plot import DRAWABLE, fits, save, steps_to_convergence
from gdjax.regression import Fit
from gdjax.solution import Status

STREAMED_BYTES = 2 << 30
"""Tables at least this big are streamed without being asked."""


def streamed(table: Path, asked: bool | None, beside_others: bool = False) -> bool:
    """Whether a table is gone through in parts: as asked, if it is big, or if several processes divide it."""
    if beside_others:
        if asked is False:
            raise ValueError("several processes were started, which divide a table in parts; leave --no-stream out")
        return True
    if asked is not None:
        return asked
    return table.is_dir() or (table.exists() and table.stat().st_size >= STREAMED_BYTES)


def steps_hint(loss: str) -> str:
    """What to say of models that took all their steps."""
    if loss in ("absolute", "quantile"):
        return f"The {loss} loss has kinks: all steps are taken, ever smaller ones."
    return "Those that took all steps may need more --steps, or --optimizer lbfgs."


def check_outputs(table: Path, out: Path | None, plot: Path | None, stream: bool = False) -> None:
    """Refuse files that cannot be written, and the table that is read."""
    for option, path, endings in (("--out", out, tuple(WRITERS)), ("--plot", plot, DRAWABLE)):
        if path is None:
            continue
        if stream and option == "--plot":
            raise ValueError("--plot needs the table in memory; leave it out, or give --no-stream")
        if stream and path.suffix.lower() not in endings and (path.is_dir() or not path.suffix):
            continue  # a folder, for the parts
        check_output(path, endings)
        if path.exists() and table.exists() and path.samefile(table):
            raise ValueError(f"{option} names {path}, the table that is read; name another file")


def check_names(group: str | None, names: Sequence[str], target: str) -> None:
    if not names:
        raise ValueError("--inputs names no column; give at least one, such as --inputs year")
    result = ("intercept", "loss", "gradient_norm", "steps", "status", "note")
    taken = dict.fromkeys(result, "a column of the result")
    for role, name in [*([("--group", group)] if group else []), *(("--inputs", name) for name in names)]:
        if name in taken:
            raise ValueError(f"{role} names '{name}', which is {taken[name]} already; leave it out or rename it")
        taken[name] = f"named by {role}"
    if target in (group, *names):
        raise ValueError(f"--target names '{target}', which is {taken[target]} already; leave it out there")


def parse_rate(learning_rate: str) -> float | None:
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


def columns_of(result: Fit, group: str | None, labels: Any, names: Sequence[str]) -> dict[str, Any]:
    """The result as a table, one row per group."""
    columns: dict[str, Any] = {group: labels} if group else {}
    if result.intercept is not None:
        columns["intercept"] = result.intercept
    columns |= {name: result.weights[:, number] for number, name in enumerate(names)}
    columns |= {"loss": result.loss, "gradient_norm": result.gradient_norm, "steps": result.steps}
    columns["status"] = np.array([status.name for status in Status])[result.status]
    if (result.notes != "").any():
        columns["note"] = result.notes
    return columns


def save_picture(
    path: Path,
    kind: str,
    result: Fit,
    x: np.ndarray,
    t: np.ndarray,
    codes: np.ndarray,
    labels: Any,
    names: Sequence[str],
    target: str,
    group: str | None,
    loss: str,
) -> None:
    if kind == "steps":
        save(steps_to_convergence(result), path)
        return
    figure = fits(
        x,
        t,
        result.weights,
        result.intercept,
        groups=codes,
        labels=[str(label) for label in labels] if group else [],
        status=result.status,
        input_names=names,
        target_name=target,
        group_name=group or "",
        response=named_loss(loss).response,
    )
    save(figure, path)
