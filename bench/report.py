"""Results on disk and in words: one JSON file per run, one Markdown table per case, and what was promised."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.cases import SIZE_SWEEPS
from bench.rounds import LIMITS, Result, Row
from gdjax.files import replacing

FORMAT = 1
HEADER = (
    "program",
    "seconds",
    "spread",
    "G steps/s",
    "gdjax is faster by",
    "of the limit",
    "error",
    "converged",
    "useful lanes",
    "compile s",
    "memory MB",
    "notes",
)


def save(path: Path, environment: dict[str, Any], results: list[Result]) -> None:
    """Write a run, whole or not at all."""
    document = {"format": FORMAT, **environment, "results": [result.to_json() for result in results]}
    with replacing(path) as file:
        file.write((json.dumps(document, indent=1) + "\n").encode())


def load(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """Read a run; ValueError for a file that is none."""
    try:
        document = json.loads(path.read_text())
        if document.pop("format") != FORMAT:
            raise ValueError("another format")
        return document, [Result.from_json(result) for result in document.pop("results")]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a result of `python -m bench`: {error}") from error


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, a thousands separator where it is large, nothing for None."""
    if value is None:
        return ""
    if value == 0 or 1e-3 <= abs(value) < 1000:
        return f"{value:.{digits}g}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.1e}"


def ranged(values: tuple[float, float, float] | None, percent: bool = False) -> str:
    """A median with the least and the most beside it."""
    if values is None:
        return ""
    factor, unit = (100, "%") if percent else (1, "")
    median, least, most = (number(value * factor) for value in values)
    return f"{median}{unit} ({least} to {most})"


def cells(result: Result, row: Row) -> list[str]:
    """One line of a case's table."""
    if row.missing:
        return [row.program, *[""] * (len(HEADER) - 2), row.missing]
    times = row.times
    spread = f"{number(min(times))} to {number(max(times))}" if times else ""
    notes = [row.notes]
    if row.bit_equal is not None:
        notes.append("bits as alone" if row.bit_equal else "BITS DIFFER FROM ALONE")
    if len(times) < len(row.seconds):
        notes.append(f"{len(times)} rounds")
    speed = None if row.steps_per_second is None else row.steps_per_second / 1e9
    against = "" if row.program == "gdjax" else ranged(result.ratio(row.program))
    if row.program == "multiply-adds":
        against, spread = "", ""
    return [
        row.program,
        number(row.median),
        spread,
        number(speed),
        against,
        "" if row.program in LIMITS else ranged(result.share(row.program), percent=True),
        "" if row.error is None else f"{row.error:.1e}",
        "" if row.converged is None else f"{row.converged:.1%}",
        "" if row.lane_share is None else f"{row.lane_share:.0%}",
        number(row.compile_seconds),
        "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}",
        "; ".join(filter(None, notes)),
    ]


def markdown(header: Iterable[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table; bars inside a cell are kept from cutting it."""
    rows = [list(header), *[[cell.replace("|", "/") for cell in line] for line in lines]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    draw = lambda row: "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"  # noqa: E731
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([draw(rows[0]), rule, *map(draw, rows[1:])])


def case_table(result: Result) -> str:
    """One case: who ran it, how fast, how right."""
    columns = [cells(result, row) for row in result.rows]
    kept = [i for i in range(len(HEADER)) if i == 0 or any(line[i] for line in columns)]
    table = markdown([HEADER[i] for i in kept], [[line[i] for i in kept] for line in columns])
    held = f"{result.problems:,} problems. Limit: {result.limit_name}. Error: {result.error_means}."
    return f"### {result.case}: {result.title}\n\n{held}\n\n{table}\n"


def promises(results: list[Result]) -> list[list[str]]:
    """What was promised, what was measured, and whether it holds."""
    lines = []
    for result in results:
        for target in result.targets:
            ratio = result.ratio(target["program"])
            if ratio is None:
                row = next((row for row in result.rows if row.program == target["program"]), None)
                found, met = row.missing if row and row.missing else "not run", ""
            else:
                found, met = ranged(ratio), "yes" if ratio[0] >= target["least"] else "NO"
                met = "aim" if target["aim"] is not None and ratio[0] >= target["aim"] else met
            least, aim = number(target["least"]), number(target["aim"])
            lines.append([result.case, target["program"], found, least, aim, met])
    for sweep in SIZE_SWEEPS:
        sizes = [result for result in results if result.sweep == sweep and result.row("gdjax")]
        if len(sizes) < 2:
            continue
        speeds = {result.case: result.row("gdjax").steps_per_second or 0 for result in sizes}
        worst = min(speeds, key=speeds.__getitem__)
        share = speeds[worst] / max(speeds.values())
        met = "yes" if share >= 0.6 else "NO"
        lines.append([worst, "gdjax at its best size", number(share), "0.6", "", met])
    return lines


def readable(environment: dict[str, Any], results: list[Result]) -> str:
    """The whole run as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    head = [
        f"# Benchmarks on {environment['device']}\n",
        f"{environment['date']}, commit {environment['commit'] or 'unknown'}, {environment['system']}, "
        f"{environment['cores']} cores; {environment['driver']}; {versions}.\n",
        "Median seconds of interleaved rounds, least and most beside them; ratios are taken within each "
        "round. Times run from NumPy arrays on the host to NumPy arrays on the host.\n",
    ]
    # What devices with memory of their own promise: `bench.device_claims`.
    lines = promises(results) if environment.get("platform", "cpu") == "cpu" else []
    if lines:
        header = ("case", "against", "times as fast", "at least", "aim", "met")
        head.append(f"## Promises\n\n{markdown(header, lines)}\n")
    return "\n".join([*head, "## Cases\n", *map(case_table, results)])
