"""What a verification found: named checks with their figures, as a table and as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gdjax.files import replacing


@dataclass(frozen=True)
class Check:
    """One line of a report.

    Attributes:
        name: what was checked.
        subject: the dtype, plan or device that it was checked on.
        passed: True, False, or None for a check that was left out (the detail says why).
        detail: what was seen, in a sentence; for a failed check what is wrong.
        figures: every number behind the detail.
    """

    name: str
    subject: str
    passed: bool | None
    detail: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """ "ok", "FAIL" or "left out"."""
        return {True: "ok", False: "FAIL", None: "left out"}[self.passed]


@dataclass(frozen=True)
class Report:
    """The result of `gdjax.verify`: print it, test `report.passed`, or keep `report.to_json()`.

    Attributes:
        kernel: the name of the verified kernel.
        loss: the loss it claims to descend, "squared" or "residual".
        claim: "bits" or "bound", see `gdjax.verify`.
        device: the name of the device, as in `gdjax.devices()`.
        seed: what the random problems were drawn from.
        seconds: how long the verification took.
        environment: versions, machine and driver.
        checks: the lines.

    >>> check = Check("zero rate", "float32", True, "w stays")
    >>> report = Report("mine", "squared", "bits", "cpu:0", 0, 1.5, {}, (check,))
    >>> report.passed
    True
    >>> print(report)
    mine: squared loss on cpu:0, claim bits, seed 0
    ok        zero rate             float32   w stays
    1 check in 1.5 s: 1 ok, 0 failed, 0 left out
    """

    kernel: str
    loss: str
    claim: str
    device: str
    seed: int
    seconds: float
    environment: Mapping[str, Any]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True if no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    def to_json(self) -> str:
        """Everything, as one JSON object (numbers that JSON lacks as strings: "inf", "nan")."""
        content = {"passed": self.passed} | asdict(self)
        content["checks"] = [asdict(check) | {"verdict": check.verdict} for check in self.checks]
        return json.dumps(_plain(content), indent=1, allow_nan=False, ensure_ascii=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to a file, whole or not at all."""
        with replacing(path) as file:
            file.write(self.to_json().encode() + b"\n")

    @property
    def heading(self) -> str:
        """One line: what was verified, where, and with which claim."""
        return f"{self.kernel}: {self.loss} loss on {self.device}, claim {self.claim}, seed {self.seed}"

    @property
    def summary(self) -> str:
        """One line: how many checks passed, failed and were left out."""
        verdicts = [check.verdict for check in self.checks]
        noun = "check" if len(verdicts) == 1 else "checks"
        return (
            f"{len(verdicts)} {noun} in {self.seconds:.1f} s: {verdicts.count('ok')} ok, "
            f"{verdicts.count('FAIL')} failed, {verdicts.count('left out')} left out"
        )

    def __str__(self) -> str:
        width = min(max(shutil.get_terminal_size((100, 24)).columns, 80), 110)
        lines = [self.heading]
        subject_width = max([9, *(len(check.subject) for check in self.checks)]) + 1
        subject_width = min(subject_width, 24)
        for check in self.checks:
            head = f"{check.verdict:<10}{check.name:<22}{check.subject:<{subject_width}}"
            lines += textwrap.wrap(head + check.detail, width, subsequent_indent=" " * 12) or [head]
        return "\n".join([*lines, self.summary])

    def __rich__(self) -> Any:
        """The same as a coloured table, for `rich.print(report)`."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.heading, caption=self.summary, title_justify="left", box=None)
        for column in ("", "check", "on", "what was seen"):
            table.add_column(column, no_wrap=column == "")
        colours = {True: "green", False: "bold red", None: "yellow"}
        for check in self.checks:
            verdict = Text(check.verdict, style=colours[check.passed])
            table.add_row(verdict, Text(check.name), Text(check.subject), Text(check.detail))
        return table


def environment(device: Any) -> dict[str, Any]:
    """Versions of what computed, the machine, and the device with its driver."""
    versions = {}
    for name in ("gdjax", "jax", "jaxlib", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
            versions[name] = "not installed"
    return {
        "versions": versions | {"python": platform.python_version()},
        "machine": f"{platform.system()} {platform.machine()}",
        "device_kind": device.device_kind,
        "platform": device.platform,
        "driver": getattr(device.client, "platform_version", "unknown"),
    }


def _plain(value: Any) -> Any:
    """Only what JSON knows."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    return value
