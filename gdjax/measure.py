"""What a device reaches here: speed on scalar and vector problems over batch sizes, against its limits.

The limits are measured, not read from a data sheet (limits.py), and so is the scalar reference in plain
Python, so that every figure comes from the same machine on the same day."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdjax import reference
from gdjax.device import DeviceInfo, devices, one_device
from gdjax.files import check_output, replacing
from gdjax.limits import Limits, clock, measure_limits
from gdjax.minimize import minimize
from gdjax.plot import save as save_figure
from gdjax.plot import style

ENDINGS = (".json",)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito


@dataclass(frozen=True)
class Kind:
    """A kind of problem: `points` data points (0: the tutorial's scalar problem) and `weights` weights."""

    name: str
    points: int
    weights: int
    steps: int
    sizes: tuple[int, ...]
    quick: tuple[int, ...]

    @property
    def multiply_adds(self) -> int:
        """Fewest multiply-adds of one step: two per number of the data, one per weight of a vector."""
        return 2 if not self.points else (2 * self.points + 1) * self.weights

    @property
    def bytes_in(self) -> int:
        """Weights, rate and data of one problem."""
        return 4 * (self.weights + 1 + (self.points * (self.weights + 1) if self.points else 2))

    @property
    def bytes(self) -> int:
        """What comes in, and the results: weights, loss, gradient norm, steps, status (one byte)."""
        return self.bytes_in + 4 * (self.weights + 3) + 1

    @property
    def bus_bytes(self) -> int:
        """What goes to a device with memory of its own and is fetched from there: of the results the weights."""
        return self.bytes_in + 4 * self.weights


KINDS = (
    Kind("scalar", 0, 1, 240, (10**2, 10**3, 10**4, 10**5, 10**6, 10**7), (10**3, 10**4, 10**5, 10**6)),
    Kind("vector 16x4", 16, 4, 100, (10**2, 10**3, 10**4, 10**5, 10**6), (10**2, 10**3, 10**4, 10**5)),
)


@dataclass(frozen=True)
class Point:
    """One batch on one device: median, least and most seconds of a call of `minimize`, from host to host."""

    device: str
    kind: str
    problems: int
    steps: int
    seconds: float
    least: float
    most: float
    compile_seconds: float
    limit_share: float
    limit: str

    @property
    def steps_per_second(self) -> float:
        """Steps of all problems together."""
        return self.problems * self.steps / self.seconds


@dataclass(frozen=True)
class Measurement:
    """Everything that was measured.

    Attributes:
        limits: one entry per device.
        points: one entry per device, kind of problem and batch size.
        reference: steps per second of the scalar reference in plain Python, per kind of problem.
        versions: of jax and of what is below it.
        quick: whether only a few sizes were measured.
    """

    limits: tuple[Limits, ...]
    points: tuple[Point, ...]
    reference: dict[str, float]
    versions: dict[str, str]
    quick: bool

    def of(self, device: str, kind: str) -> list[Point]:
        """The points of one device and kind, smallest batch first."""
        found = [point for point in self.points if point.device == device and point.kind == kind]
        return sorted(found, key=lambda point: point.problems)


def mean_squared(w: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    """0.5 mean((t - x @ w)^2), x `[points, weights]`, t `[points]`."""
    return 0.5 * jnp.mean((t - x @ w) ** 2)


def squared(w: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    """The tutorial's problem with the squared loss, 0.5 (t - x w)^2."""
    return 0.5 * (t - x * w) ** 2


def batch(kind: Kind, problems: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Float32 weights, data and rates (a rate per problem), the same at every call."""
    rng = np.random.default_rng(0)
    shape = (problems, kind.points, kind.weights) if kind.points else (problems,)
    x = rng.standard_normal(shape, dtype=np.float32)
    w = rng.standard_normal((problems, kind.weights) if kind.points else problems, dtype=np.float32)
    t = rng.standard_normal(shape[:2] if kind.points else problems, dtype=np.float32)
    return w, (x, t), rng.uniform(0.01, 0.05, problems).astype(np.float32)


def point(kind: Kind, problems: int, limit: Limits, device: jax.Device, patience: float) -> Point:
    """Solve one batch from host arrays to host arrays, again and again."""
    weights, data, rates = batch(kind, problems)
    loss = mean_squared if kind.points else squared

    def run() -> None:
        found = minimize(loss, weights, data, learning_rate=rates, steps=kind.steps, device=device)
        jax.block_until_ready(found)
        np.asarray(found.weights)

    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    seconds = clock(run, patience)
    median = statistics.median(seconds)
    work = problems * kind.steps * kind.multiply_adds
    best, name = limit.seconds(work, problems * kind.bytes, problems * kind.bus_bytes)
    return Point(
        limit.device,
        kind.name,
        problems,
        kind.steps,
        median,
        min(seconds),
        max(seconds),
        max(first - median, 0.0),
        best / median,
        name,
    )


def reference_rate(kind: Kind, patience: float = 0.3) -> float:
    """Steps per second of `gdjax.reference`, one problem after another in plain Python."""
    weights, (x, t), rates = batch(kind, 1)
    start, inputs, target, rate = weights.tolist()[0], x.tolist()[0], t.tolist()[0], rates.tolist()[0]

    def run() -> None:
        if not kind.points:
            reference.descend(start, inputs, target, rate, kind.steps)
            return
        weights = start
        for _ in range(kind.steps):
            pairs = zip(inputs, target, strict=True)
            residuals = [reference.residual_loss(weights, row, goal) for row, goal in pairs]
            gradient = [
                -sum(row[i] * error for row, error in zip(inputs, residuals, strict=True)) / kind.points
                for i in range(kind.weights)
            ]
            weights = reference.update(weights, gradient, rate)

    return kind.steps / statistics.median(clock(run, patience))


def chosen(device: Any) -> list[DeviceInfo]:
    """The devices to measure: the one that is named, or for "all" one of each kind."""
    there = devices()
    if device != "all":
        wanted = one_device(device)
        return [info for info in there if info.device == wanted]
    return list({(info.platform, info.kind): info for info in reversed(there)}.values())[::-1]


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """A function that moves the bar on and says what comes next; silent without rich or if unwanted."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        shown = False
    if not shown:
        yield lambda text: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=total + 1)

        def advance(text: str) -> None:
            bar.update(task, advance=1, description=text)

        yield advance


def measure(
    device: Any = "auto", *, quick: bool = False, progress: bool = False, kinds: Sequence[Kind] = KINDS
) -> Measurement:
    """Measure what devices reach on scalar and vector problems over batch sizes.

    Args:
        device: what `gdjax.minimize` takes for one device, or `"all"` for one of each kind that is here.
        quick: fewer sizes and repetitions.
        progress: show a bar on the terminal, where rich is installed.
        kinds: the kinds of problems.

    Returns:
        A `Measurement`; `verdicts` puts it in words, `save` and `plot` write it.

    Raises:
        ValueError: there is no such device.

    >>> tiny = Kind("scalar", 0, 1, 8, (4, 64), (4, 64))
    >>> found = measure("cpu", quick=True, kinds=[tiny])
    >>> [point.problems for point in found.points], found.points[0].steps_per_second > 0
    ([4, 64], True)
    """
    from gdjax import __version__

    infos = chosen(device)
    patience = 0.2 if quick else 1.0
    sizes = {kind.name: kind.quick if quick else kind.sizes for kind in kinds}
    ceilings, points, rates = [], [], {}
    with progress_bar(len(infos) * (1 + sum(map(len, sizes.values()))) + len(kinds), progress) as advance:
        for kind in kinds:
            advance(f"reference: {kind.name}")
            rates[kind.name] = reference_rate(kind, patience)
        for info in infos:
            advance(f"{info.name}: limits")
            ceiling = measure_limits(info, patience)
            ceilings.append(ceiling)
            for kind in kinds:
                for problems in sizes[kind.name]:
                    advance(f"{info.name}: {kind.name}, {problems:,} problems")
                    points.append(point(kind, problems, ceiling, info.device, patience))
    platform = {info.name: str(info.device.client.platform_version).split("\n")[0] for info in infos}
    versions = {"gdjax": __version__, "jax": jax.__version__, "numpy": np.__version__, **platform}
    return Measurement(tuple(ceilings), tuple(points), rates, versions, quick)


def wins_from(points: Sequence[Point], rivals: Callable[[int], float]) -> int | None:
    """The smallest batch from which on every measured one beats its rivals' best; None if there is none."""
    start = None
    for one in points:
        if one.steps_per_second <= rivals(one.problems):
            start = None
        elif start is None:
            start = one.problems
    return start


def verdicts(found: Measurement) -> list[str]:
    """From which batch size on each device is the one to take, in sentences.

    Args:
        found: what `measure` returned.

    Returns: One sentence per device and kind of problem against the scalar reference, one more where devices
    compete."""
    lines = []
    for kind, rate in found.reference.items():
        for limit in found.limits:
            mine = found.of(limit.device, kind)
            start = wins_from(mine, lambda _, rate=rate: rate)  # type: ignore[misc]
            lines.append(f"{kind}, {limit.device}: {_from(start)} faster than the scalar reference")
            others = [other.device for other in found.limits if other.device != limit.device]
            if others:
                best = {
                    n: max(p.steps_per_second for o in others for p in found.of(o, kind) if p.problems == n)
                    for n in {p.problems for p in mine}
                }
                lines.append(f"{kind}, {limit.device}: {_from(wins_from(mine, best.__getitem__))} the fastest device")
    return lines


def _from(start: int | None) -> str:
    return "at no measured size" if start is None else f"from {start:,} problems on"


def short(value: float, unit: str = "") -> str:
    """Three digits and a prefix, as in `"9.72 G"` or `"500 us"`."""
    prefixes = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6}
    prefix = next((name for name, size in prefixes.items() if value >= size), "u")
    return f"{value / prefixes[prefix]:.3g} {prefix}{unit}".rstrip()


def rows(found: Measurement) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The measurement as a table narrow enough for a terminal: its header and its lines, all text."""
    header: tuple[str, ...] = ("device", "kind", "problems", "steps/s", "share", "of", "time", "compile")
    lines: list[tuple[str, ...]] = [
        (
            p.device,
            p.kind,
            short(p.problems),
            short(p.steps_per_second),
            f"{p.limit_share:.1%}",
            p.limit,
            short(p.seconds, "s"),
            short(p.compile_seconds, "s"),
        )
        for p in found.points
    ]
    return header, lines


def limit_lines(found: Measurement) -> list[str]:
    """The devices' limits in sentences."""
    lines = []
    for one in found.limits:
        text = f"{one.device} ({one.kind}): {one.multiply_adds / 1e9:,.0f} G multiply-adds/s, "
        text += f"copies {one.copy_bytes / 1e9:,.0f} GB/s"
        transfer = one.transfer_bytes
        lines.append(text if transfer is None else f"{text}, from the host {transfer / 1e9:,.1f} GB/s")
    return lines


def save(found: Measurement, path: str | os.PathLike[str]) -> None:
    """Write a measurement as JSON, whole or not at all.

    Args:
        found: what `measure` returned.
        path: a `.json` file.

    Raises:
        ValueError: another ending, or a folder that is not there.
    """
    path = check_output(path, ENDINGS)
    document = asdict(found) | {"verdicts": verdicts(found)}
    for entry, one in zip(document["points"], found.points, strict=True):
        entry["steps_per_second"] = one.steps_per_second
    with replacing(path) as file:
        file.write((json.dumps(document, indent=1) + "\n").encode())


def plot(found: Measurement, path: str | os.PathLike[str]) -> None:
    """Draw speed and share of the limit over the batch size.

    Args:
        found: what `measure` returned.
        path: a `.png` or `.svg` file.

    Raises:
        ValueError: another ending, or a folder that is not there.
    """
    figure = style.figure(10, 4.5)
    speed, share = figure.subplots(1, 2)
    for i, one in enumerate(found.limits):
        for kind, (dash, marker) in zip(found.reference, (("-", "o"), ("--", "s"), (":", "^")), strict=False):
            points = found.of(one.device, kind)
            sizes = [p.problems for p in points]
            look = {"color": _COLOURS[i % len(_COLOURS)], "linestyle": dash, "marker": marker}
            speed.plot(sizes, [p.steps_per_second for p in points], label=f"{one.device}, {kind}", **look)
            share.plot(sizes, [100 * p.limit_share for p in points], **look)
    for (kind, rate), dash in zip(found.reference.items(), ("-", "--", ":"), strict=False):
        speed.axhline(rate, color="#888888", linestyle=dash, label=f"scalar reference, {kind}")
    speed.set(xscale="log", yscale="log", xlabel="problems", ylabel="steps per second", title="Speed")
    share.set(xscale="log", xlabel="problems", ylabel="% of the limit", title="Share of the device's limit", ylim=0)
    for axes in (speed, share):
        style.tidy(axes)
    style.legend_below(figure, speed.get_legend_handles_labels()[0])
    save_figure(figure, path)
