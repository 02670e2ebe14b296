"""What moved between two runs, beyond the noise."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import load, markdown, number
from bench.rounds import Result, Row

FLOOR = 0.03  # changes smaller than this are never news


@dataclass(frozen=True)
class Change:
    """One program on one case in both runs; `factor` is new / old median seconds."""

    case: str
    program: str
    old: float
    new: float
    noise: float  # the relative change that the rounds' own spread explains

    @property
    def factor(self) -> float:
        """New over old."""
        return self.new / self.old

    @property
    def moved(self) -> bool:
        """Whether it is more than noise."""
        return abs(self.factor - 1) > max(self.noise, FLOOR)


def spread(row: Row) -> float:
    """Half the range between the quartiles (of few rounds: half the whole range), over the median."""
    times = row.times
    if len(times) < 2:
        return 0.5
    low, high = (min(times), max(times)) if len(times) < 4 else statistics.quantiles(times, n=4)[::2]
    return (high - low) / 2 / statistics.median(times)


def changes(old: list[Result], new: list[Result]) -> list[Change]:
    """All programs timed in both runs on the same case and size; noise is twice the joint spread."""
    before = {(result.case, result.problems, row.program): row for result in old for row in result.rows}
    found = []
    for result in new:
        for row in result.rows:
            earlier = before.get((result.case, result.problems, row.program))
            if earlier is None or earlier.median is None or row.median is None:
                continue
            noise = 2 * (spread(earlier) ** 2 + spread(row) ** 2) ** 0.5
            found.append(Change(result.case, row.program, earlier.median, row.median, noise))
    return found


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What else was not the same: device, driver, versions, flags."""
    lines = [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in ("device", "cores", "driver", "commit", "flags")
        if old.get(key) != new.get(key)
    ]
    a, b = old.get("versions", {}), new.get("versions", {})
    return lines + [f"{key}: {a.get(key)} -> {b.get(key)}" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def compare(old_path: Path, new_path: Path) -> str:
    """Tell what moved, as text.

    Args:
        old_path: a JSON file of an earlier run.
        new_path: one of a later run.

    Returns:
        Differences of the set-up, a table of what moved, and how much did not.
    """
    old_environment, old = load(old_path)
    new_environment, new = load(new_path)
    found = changes(old, new)
    moved = sorted((change for change in found if change.moved), key=lambda change: change.factor)
    lines = [f"not the same: {text}" for text in differences(old_environment, new_environment)]
    if not found:
        return "\n".join([*lines, "The two runs have no case and program in common."])
    if moved:
        rows = [
            [
                change.case,
                change.program,
                number(change.old),
                number(change.new),
                f"{1 / change.factor:.2f}x faster" if change.factor < 1 else f"{change.factor:.2f}x slower",
                f"±{change.noise:.0%}",
            ]
            for change in moved
        ]
        lines.append(markdown(("case", "program", "old s", "new s", "moved", "noise"), rows))
    still = len(found) - len(moved)
    lines.append(f"{len(moved)} of {len(found)} moved beyond the noise, {still} did not.")
    return "\n".join(lines)
