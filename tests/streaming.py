"""What tests of streams share: problems, and a program to be killed, `python tests/streaming.py KIND SOURCE SINK`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

N, SIZE, STEPS = 1000, 96, 30
FIELDS = ("weights", "loss", "gradient_norm", "steps", "status")


def arrays(seed: int = 0, count: int = N) -> dict[str, np.ndarray]:
    """`count` tutorial problems in float32, one of which diverges."""
    rng = np.random.default_rng(seed)
    w, x, t = rng.normal(size=(3, count)).astype(np.float32)
    x[7] = 1e6
    return {"w": w, "x": x, "t": t}


def stored(folder: Path) -> Path:
    """These problems as a Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    path = folder / "problems.parquet"
    parquet.write_table(pa.table(arrays()), path, row_group_size=70)
    return path


def alone(held: dict[str, np.ndarray], **options: object) -> Any:
    """The solution of such problems without a stream."""
    import gdjax

    plain = {"learning_rate": 0.1, "steps": STEPS, **options}
    return gdjax.minimize(gdjax.kernel.squared_loss, held["w"], (held["x"], held["t"]), **plain)


def same(table: Any, solution: Any) -> None:
    """A stream's results are those of this solution, in every bit."""
    for name in FIELDS:
        np.testing.assert_array_equal(table[name].to_numpy(), np.asarray(getattr(solution, name)), name)


def parts(folder: Path) -> dict[str, bytes]:
    """The parts that lie in a folder of results."""
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


def truncate(path: Path) -> None:
    """Cut off the end of a file."""
    path.write_bytes(path.read_bytes()[:-100])


def tidy(seed: int = 0, groups: int = 60) -> dict[str, np.ndarray]:
    """Rows of groups of 1 to 30 rows, in random order."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.repeat(np.arange(groups), rng.integers(1, 31, groups)))
    x = rng.normal(size=(len(ids), 2)) * [1, 50]
    labels = np.array([f"group {i}" for i in ids])
    return {"label": labels, "a": x[:, 0], "b": x[:, 1], "y": x @ [2, 0.1] + rng.normal(size=len(ids))}


def solve(source: object, sink: object, **options: object) -> object:
    """The stream that most tests run."""
    import gdjax

    plain = {"learning_rate": 0.1, "steps": STEPS, "part_size": SIZE, **options}
    return gdjax.solve_stream(source, sink, gdjax.kernel.squared_loss, "w", ("x", "t"), **plain)


def fit_groups(source: str, sink: str) -> None:
    """The same for groups, in small parts and after passes on disk."""
    from gdjax import regroup
    from gdjax.streamed_fit import open_fit_job

    regroup.PARTITION_ROWS, regroup.BATCH_ROWS = 300, 100
    job = open_fit_job(Path(source), Path(sink), group="label", names=["a", "b"], target="y", part_rows=100, steps=50)
    job.run()
    job.finish()


if __name__ == "__main__":
    kind, source, sink = sys.argv[1:]
    import jax

    import gdjax  # noqa: F401

    jax.devices()
    print("begun", flush=True)
    if kind == "arrays":
        solve(source, sink)
    else:
        fit_groups(source, sink)
    print("done", flush=True)
