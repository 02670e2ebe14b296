"""Fitted models on the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gdjax.regression import Fit
from gdjax.solution import Status

SHOWN_GROUPS = 10
_STATUS_WORDS = {
    Status.CONVERGED: "converged",
    Status.RAN_ALL_STEPS: "took all steps",
    Status.DIVERGED: "diverged",
}


def _count(result: Fit, status: Status) -> int:
    return int((result.status == status).sum())


def print_fit(output: Console, result: Fit, labels: Any, names: Sequence[str], group: str | None, hint: str) -> None:
    """Print the first groups, how many came to which end, and what there is to note.

    Args:
        output: where to.
        result: the fitted models.
        labels: the groups' names, None for one model of the whole table.
        names: the inputs' names.
        group: the name of what the groups are.
        hint: what to say of models that took all their steps.
    """
    print_models(output, result, labels, names, group)
    kinds, first, counts = np.unique(result.notes, return_index=True, return_counts=True)
    firsts = ["" if labels is None else str(labels[int(row)]) for row in first]
    notes = {str(kind): (int(count), label) for kind, count, label in zip(kinds, counts, firsts, strict=True) if kind}
    print_ends(output, {status: _count(result, status) for status in Status}, notes, hint)


def print_models(output: Console, result: Fit, labels: Any, names: Sequence[str], group: str | None) -> None:
    """Print the first groups."""
    left_out = (
        _print_one(output, result, names) if group is None else _print_first(output, result, labels, names, group)
    )
    if left_out:
        output.print(f"{left_out} more {'input has' if left_out == 1 else 'inputs have'} no room here.")


def print_ends(output: Console, counts: Mapping[Status, int], notes: Mapping[str, tuple[int, str]], hint: str) -> None:
    """Print how many came to which end, and what there is to note.

    Args:
        output: where to.
        counts: how many models ended in each status.
        notes: how many models have each note, and the name of the first, empty where models have none.
        hint: what to say of models that took all their steps.
    """
    states = ", ".join(f"{counts[status]:,} {words}" for status, words in _STATUS_WORDS.items())
    output.print(f"{_models(sum(counts.values()))}: {states}.", highlight=False)
    if counts[Status.RAN_ALL_STEPS]:
        output.print(hint, style="dim", highlight=False)
    if counts[Status.DIVERGED]:
        output.print("Those that diverged need a smaller --learning-rate; auto looks for one.", style="dim")
    _print_notes(output, notes)


def _print_one(output: Console, result: Fit, names: Sequence[str]) -> int:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    if result.intercept is not None:
        table.add_row("intercept", _number(result, 0, result.intercept))
    for number, name in enumerate(names):
        table.add_row(escape(name), _number(result, 0, result.weights[:, number]))
    table.add_row("loss", _number(result, 0, result.loss), end_section=True)
    table.add_row("steps", str(result.steps[0]))
    table.add_row("status", _status(result, 0))
    output.print(table, "")
    return 0


def _print_first(output: Console, result: Fit, labels: Any, names: Sequence[str], group: str) -> int:
    """A row per group, with as many inputs as there is room for; returns how many there was none for."""
    rows = range(min(len(result.loss), SHOWN_GROUPS))
    first = {group: [_short(str(labels[row])) for row in rows]}
    if result.intercept is not None:
        first["intercept"] = [_number(result, row, result.intercept) for row in rows]
    inputs = {
        name: [_number(result, row, result.weights[:, number]) for row in rows] for number, name in enumerate(names)
    }
    last = {
        "loss": [_number(result, row, result.loss) for row in rows],
        "steps": [str(result.steps[row]) for row in rows],
        "status": [_status(result, row) for row in rows],
    }
    room = output.width - sum(_width(*column) for column in (first | last).items())
    shown: dict[str, list[str]] = {}
    for name, texts in inputs.items():
        room -= _width(name, texts)
        if room >= 0 or not shown:
            shown[name] = texts
    columns = first | shown | last
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(escape(name), justify="left" if name in (group, "status") else "right", overflow="fold")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*(escape(cell) for cell in cells))
    output.print(table)
    return len(names) - len(shown)


def _width(name: str, texts: Sequence[str]) -> int:
    return max(len(name), *map(len, texts)) + 3


def _short(text: str, longest: int = 24) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _number(result: Fit, row: int, values: np.ndarray) -> str:
    """A figure of one model; a dash where descent diverged, since its last finite weights answer nothing."""
    return "–" if result.status[row] == Status.DIVERGED else f"{values[row]:.6g}"


def _status(result: Fit, row: int) -> str:
    return _STATUS_WORDS[Status(result.status[row])] + (" *" if result.notes[row] else "")


def _models(count: int) -> str:
    return f"{count:,} {'model' if count == 1 else 'models'}"


def _print_notes(output: Console, notes: Mapping[str, tuple[int, str]]) -> None:
    """The commonest notes, each with how many groups have it and the first of them."""
    commonest = sorted(sorted(notes), key=lambda text: -notes[text][0])[:8]
    for text in commonest:
        count, first = notes[text]
        label = f" ({'such as ' if count > 1 else ''}{first})" if first else ""
        output.print(f"* {text}: {_models(count)}{escape(label)}", highlight=False)


def print_whereabouts(output: Console, out: Path | None, plot: Path | None, count: int) -> None:
    """Say where all models and the picture are to be found, or how to have them written."""
    if out is not None:
        output.print(f"{'The model is' if count == 1 else f'All {_models(count)} are'} in {escape(str(out))}.")
    elif count > SHOWN_GROUPS:
        output.print(f"These are the first {SHOWN_GROUPS} of {count:,}; --out FILE.csv writes all of them.")
    if plot is not None:
        output.print(f"The picture is in {escape(str(plot))}.")
