"""`python -m bench.streaming`: a stream of scalar problems from Parquet beside the same batch in memory and the disk.

Each measurement runs in a process of its own, in interleaved rounds, after a small run that compiles. The source is put
out of the system's page cache before every read. Peak memory is what the process held at most beyond what it held
after a small batch, which is JAX's own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
ROWS = 1 << 20
WRITTEN = {"all results": ("weights", "loss", "gradient_norm", "steps", "status"), "weights": ("weights",)}


def make_source(path: Path, problems: int) -> None:
    """A Parquet file of x and t, plain float32 without missing values."""
    import pyarrow as pa
    from pyarrow import parquet

    from gdjax.files import replacing

    if path.exists() and parquet.read_metadata(path).num_rows == problems:
        return
    schema = pa.schema([pa.field(name, pa.float32(), nullable=False) for name in ("x", "t")])
    plain = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}
    with replacing(path) as file, parquet.ParquetWriter(file, schema, **plain) as writer:
        for first in range(0, problems, ROWS):
            rows = min(ROWS, problems - first)
            held = np.random.default_rng([0, first]).normal(size=(2, rows)).astype(np.float32)
            writer.write_table(pa.table([held[0], held[1]], schema=schema), row_group_size=ROWS)


def forget(path: Path) -> None:
    """Out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading(path: Path, steps: int, folder: Path) -> dict[str, Any]:
    """The whole source read from the disk, in blocks of 16 MiB."""
    block = bytearray(1 << 24)
    forget(path)
    begin = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass
    return {"seconds": time.perf_counter() - begin, "bytes": path.stat().st_size}


def writing(path: Path, steps: int, folder: Path) -> dict[str, Any]:
    """A gigabyte written to the disk in files of 64 MiB, each of them synced, as parts are."""
    block = np.random.default_rng(0).bytes(1 << 26)
    begin = time.perf_counter()
    for number in range(16):
        with open(folder / f"written-{number}", "wb", buffering=0) as file:
            file.write(block)
            os.fsync(file.fileno())
    taken = time.perf_counter() - begin
    for number in range(16):
        (folder / f"written-{number}").unlink()
    return {"seconds": taken, "bytes": 16 << 26}


def peak() -> int:
    """Bytes this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def begun() -> int:
    """Bytes held by a process in which JAX has solved a small batch."""
    import pyarrow.parquet  # noqa: F401

    import gdjax

    one = np.ones(1000, np.float32)
    gdjax.minimize(gdjax.kernel.squared_loss, one, (one, one), learning_rate=0.1, steps=2)
    return peak()


def in_memory(path: Path, steps: int, folder: Path) -> dict[str, Any]:
    """The same batch from NumPy arrays to NumPy arrays."""
    from pyarrow import parquet

    import gdjax

    before = begun()
    held = parquet.read_table(path)
    x, t = (np.ascontiguousarray(held[name].combine_chunks().to_numpy()) for name in ("x", "t"))
    del held
    w = np.ones(len(x), np.float32)

    def run(count: int) -> None:
        solution = gdjax.minimize(
            gdjax.kernel.squared_loss, w[:count], (x[:count], t[:count]), learning_rate=0.1, steps=steps
        )
        for name in WRITTEN["all results"]:
            np.asarray(getattr(solution, name))

    run(4 * ROWS)
    taken = []
    for _ in range(2):  # the second time, memory is there already: that is what a stream is held against
        begin = time.perf_counter()
        run(len(x))
        taken.append(time.perf_counter() - begin)
    return {"seconds": taken[1], "first": taken[0], "peak": peak() - before}


def streamed(path: Path, steps: int, folder: Path, results: str) -> dict[str, Any]:
    """The stream, from a cold file to synced parts."""
    from pyarrow import parquet

    import gdjax
    from gdjax.sources import ParquetSource

    before = begun()
    warm = folder / "warm.parquet"
    make_source(warm, min(4 * ROWS, parquet.read_metadata(path).num_rows))

    def run(source: Path, sink: Path) -> None:
        shutil.rmtree(sink, ignore_errors=True)
        gdjax.solve_stream(
            source,
            sink,
            gdjax.kernel.squared_loss,
            1.0,
            ("x", "t"),
            learning_rate=0.1,
            steps=steps,
            results=WRITTEN[results],
        )

    run(warm, folder / "warm")
    sink = folder / "streamed"
    shutil.rmtree(sink, ignore_errors=True)
    forget(path)
    begin = time.perf_counter()
    run(path, sink)
    taken, most = time.perf_counter() - begin, peak() - before
    parts = sorted(sink.glob("part-*"))
    size = sum(part.stat().st_size for part in parts)
    rows = 0
    for number, part in enumerate(parts):  # a sample of parts against the same problems alone
        held = parquet.read_table(part)
        if number % max(1, len(parts) // 4) == 0:
            columns = ParquetSource([path], ["x", "t"]).read(rows, rows + len(held))
            one = np.ones(len(held), np.float32)
            data = (columns["x"], columns["t"])
            alone = gdjax.minimize(gdjax.kernel.squared_loss, one, data, learning_rate=0.1, steps=steps)
            np.testing.assert_array_equal(held["weights"].to_numpy(), np.asarray(alone.weights))
        rows += len(held)
    shutil.rmtree(sink)
    return {"seconds": taken, "peak": most, "written": size, "parts": len(parts)}


MEASURED: dict[str, Callable[..., dict[str, Any]]] = {
    "disk read": reading,
    "disk write": writing,
    "in memory": in_memory,
    **{
        f"stream, {name}": lambda path, steps, folder, name=name: streamed(path, steps, folder, name)
        for name in WRITTEN
    },
}

BOUNDS = {"of memory or disk": "seconds", "of memory the first time": "first"}
"""What streams are held against: the batch in memory run again, in memory that has been in use, and run once."""


def report(found: dict[str, list[dict[str, Any]]], problems: int, steps: int) -> str:
    """The figures as a table, and how they stand to what was promised."""
    seconds = {name: statistics.median(one["seconds"] for one in rounds) for name, rounds in found.items()}
    speeds = {name: problems / taken for name, taken in seconds.items() if "disk" not in name}
    speeds["disk read"] = problems / seconds["disk read"]
    first = statistics.median(one["first"] for one in found["in memory"])
    head = "measured", "seconds", "million problems/s", "G steps/s", *BOUNDS, "peak MiB above JAX's own"
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, taken in seconds.items():
        if name == "disk write":
            rate = found[name][0]["bytes"] / taken / 1e9
            lines.append(f"| {name}, {rate:.2f} GB/s synced | {taken:.2f} | | | | | |")
            continue
        most = max((one.get("peak", 0) for one in found[name]), default=0)
        cells = [name, f"{taken:.2f}", f"{speeds[name] / 1e6:.1f}"]
        cells.append("" if "disk" in name else f"{speeds[name] * steps / 1e9:.2f}")
        cells += [f"{share(found, name, key):.0%}" if "stream" in name else "" for key in BOUNDS.values()]
        lines.append(f"| {' | '.join([*cells, f'{most / 2**20:.0f}' if most else ''])} |")
    lines.append(f"| in memory, the first time | {first:.2f} | {problems / first / 1e6:.1f} | | | | |")
    return "\n".join(lines)


def share(found: dict[str, list[dict[str, Any]]], name: str, key: str) -> float:
    """The speed of a stream by that of memory or of reading the disk, whichever is lower: median of the rounds."""
    rounds = zip(found["in memory"], found["disk read"], found[name], strict=True)
    return statistics.median(max(held[key], read["seconds"]) / one["seconds"] for held, read, one in rounds)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = argparse.ArgumentParser("python -m bench.streaming", description=__doc__)
    options.add_argument("--problems", type=int, default=10_000_000, help="how many (default 10,000,000)")
    options.add_argument("--steps", type=int, default=100, help="steps per problem (default 100)")
    options.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    options.add_argument("--folder", type=Path, required=True, help="where source and sink go, on the disk measured")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default bench/results)")
    options.add_argument("--one", choices=list(MEASURED), help=argparse.SUPPRESS)
    chosen = options.parse_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    source = chosen.folder / f"problems-{chosen.problems}.parquet"
    if chosen.one:
        print(json.dumps(MEASURED[chosen.one](source, chosen.steps, chosen.folder)))
        return 0
    make_source(source, chosen.problems)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in MEASURED}
    for _ in range(chosen.rounds):
        for name, rounds in found.items():
            words = ["--problems", str(chosen.problems), "--steps", str(chosen.steps), "--folder", str(chosen.folder)]
            command = [sys.executable, "-m", "bench.streaming", *words, "--one", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            rounds.append(json.loads(done.stdout))
            print(f"  {name}: {rounds[-1]}", file=sys.stderr, flush=True)
    print(report(found, chosen.problems, chosen.steps))
    save(chosen, found)
    return 0


def save(chosen: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    import jax

    from bench import environment
    from gdjax.files import replacing

    now = datetime.datetime.now(datetime.UTC)
    about = environment.describe(jax.devices()[0]) | {"date": now.isoformat(timespec="seconds")}
    about |= {"problems": chosen.problems, "steps": chosen.steps, "measured": found}
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / f"streaming-{environment.slug(about['device'])}-{now:%Y-%m-%d-%H%M}.json"
    with replacing(path) as file:
        file.write((json.dumps(about, indent=1) + "\n").encode())
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
