"""Batches larger than memory: read, solved and written in parts, and gone on with after any interruption."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdjax import device as dev
from gdjax import sources
from gdjax.batch import check_held, named_leaves
from gdjax.batches import Batches
from gdjax.files import check_output
from gdjax.formats import WRITERS
from gdjax.jobs import Job, Totals
from gdjax.mapping import RESULTS, Mapped
from gdjax.plan import power_below
from gdjax.progress import check_watch
from gdjax.sink import MANIFEST, STAGED, Sink, check_same, read_manifest
from gdjax.solution import Status

PART_BYTES = 64 << 20
"""Inputs and results of one part: enough that a part costs little beside its problems, and several fit anywhere."""

FILES = (".npy", ".txt", ".tsv", ".xls", ".xlsx", ".feather", ".arrow", ".h5", ".gz", ".pkl")
"""Endings of files that are not written: no folder is meant by such a name."""


@dataclass(frozen=True)
class StreamSolution:
    """Where the answers to a stream of problems are, and how many ended how.

    Attributes:
        path: the folder of parts, or the file into which they were joined.
        problems: how many problems there are.
        parts: in how many parts they were solved.
        counts: how many ended in each status, by its name.
        device: the name of the device that ran them.

    >>> import gdjax, numpy as np, pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "answers"
    >>> problems = {"x": np.full(3, 2.0), "t": np.array([4.0, 5.0, 6.0])}
    >>> s = gdjax.solve_stream(problems, folder, gdjax.kernel.squared_loss, 1.0, ("x", "t"), learning_rate=0.1, steps=9)
    >>> s.path == folder, s.parts, s.summary()
    (True, 1, {'RAN_ALL_STEPS': 3, 'CONVERGED': 0, 'DIVERGED': 0})
    """

    path: Path
    problems: int
    parts: int
    counts: dict[str, int]
    device: str

    def summary(self) -> dict[str, int]:
        """How many problems ended in each status, by its name, as `Solution.summary` does."""
        return {s.name: self.counts.get(s.name, 0) for s in Status if s is not Status.STOPPED}


def solve_stream(
    source: Any,
    sink: Any,
    loss: Callable[..., Any],
    weights: Any,
    data: tuple[Any, ...] = (),
    *,
    keep: Sequence[str] = (),
    results: Sequence[str] = RESULTS,
    learning_rate: Any = None,
    optimizer: Any = None,
    hyperparams: dict[str, Any] | None = None,
    steps: int,
    stop: Any = None,
    device: Any = "auto",
    dtype: Any = None,
    plan: Any = "auto",
    part_size: int | None = None,
    share: tuple[int, int] | None = None,
    progress: bool = False,
) -> StreamSolution | None:
    """Descend a stream of problems, one per row of a source that need not fit into memory: `minimize`, part by part.

    It is called like `minimize`, but where `minimize` takes an array with one entry per problem, this takes the name of
    a column: in `weights`, `data` and `hyperparams` a string names a column of the source, `[rows]` or, where the
    column holds lists or arrays, `[rows, ...]`. Everything else there is shared: an array in `data` by all problems,
    a number or array in `weights` as the start of every problem. The answers are the bits that `minimize` gives.

    Whatever ends a run before its end (Ctrl-C, a full disk, `kill -9`, a power cut): the same call goes on with the
    parts that are missing, and what comes out is the same in every bit. With another source, program or options it is
    refused.

    Args:
        source: a `.parquet` file or a folder of them, `.csv`, `.npz` or `.npy` (a column of the file's name); a dict of
            arrays, memory-mapped or not, or paths of `.npy` files, by name; or an iterable of such dicts of arrays,
            batches of any size, which must bring the same every time. Numbers in CSV are read as float64.
        sink: a folder, which gets `part-00000000.parquet` and so on and a manifest; or a `.parquet`, `.csv`, `.npz` or
            `.json` file, which is written at the end, whole or not at all.
        loss: `loss(weights, *data) -> scalar`, the loss of ONE problem, a pure JAX function.
        weights: the start weights, a pytree whose leaves are names of columns, or numbers or arrays to start all at.
        data: one pytree per further argument of `loss`; leaves are names of columns, or arrays shared by all.
        keep: columns of the source that are handed on to the results, such as an id.
        results: which of weights, loss, gradient_norm, steps and status are written. Weights that are a pytree get a
            column per leaf, such as `weights.b`.
        learning_rate, optimizer, hyperparams, steps, stop, device, dtype, plan: as in `minimize`, a rate per problem
            being the name of a column.
        part_size: problems per part; None for some 64 MB of inputs and results.
        share: `(p, P)`: do only every P-th part, from part p on, beside other processes that do the others.
        progress: show a progress bar on a terminal.

    Returns:
        A `StreamSolution`; None where, with a `share`, parts of other processes are still missing.

    Raises:
        ValueError: what does not fit, as in `minimize`; a source that cannot be read or lacks a column; a sink that
            holds another run's results, or cannot be written. Parts that are done are never touched.
        TypeError: `keep` or `results` is not made of names; what `minimize` refuses by its type.
        StreamStopped: Ctrl-C (a KeyboardInterrupt); the parts at hand are finished first.

    >>> import gdjax, numpy as np, pathlib, tempfile
    >>> problems = {"x": np.full(3, 2.0), "t": np.array([4.0, 5.0, 6.0])}
    >>> out = pathlib.Path(tempfile.mkdtemp()) / "answers.csv"
    >>> s = gdjax.solve_stream(problems, out, gdjax.kernel.squared_loss, 1.0, ("x", "t"), learning_rate=0.1, steps=50)
    >>> s.problems, s.counts
    (3, {'RAN_ALL_STEPS': 3})
    >>> print(out.read_text().splitlines()[0])
    weights,loss,gradient_norm,steps,status
    """
    options = {k: v for k, v in locals().items() if k not in ("source", "sink", "loss", "weights", "data")}
    share, progress = options.pop("share"), options.pop("progress")
    check_watch(None, progress)
    job = open_job(source, sink, loss, weights, data, **options)
    job.run(share, progress)
    try:
        totals = job.finish()
    except FileNotFoundError:
        if share is None:
            raise
        return None
    return told(job, totals, device)


def told(job: Job, totals: Totals, device: Any) -> StreamSolution:
    place = job.sink.folder if job.target is None else job.target
    where = dev.label(dev.select_devices(device))
    return StreamSolution(place, totals.problems, totals.parts, totals.counts, where)


def open_job(
    source: Any,
    sink: Any,
    loss: Callable[..., Any],
    weights: Any,
    data: tuple[Any, ...] = (),
    *,
    keep: Sequence[str] = (),
    results: Sequence[str] = RESULTS,
    part_size: int | None = None,
    **options: Any,
) -> Job:
    """The job that `solve_stream` runs: checked, its manifest written or compared, nothing computed yet."""
    check_installed()
    for root, tree in (("source", source if isinstance(source, dict) else {}), ("weights", weights), ("data", data)):
        for name, leaf in named_leaves(tree, root):
            check_held(name, leaf)
    mapping = Mapped(loss, weights, data, names_of("keep", keep), checked_results(results), options)
    folder, target = places(sink, source)
    identity = sources.identity_of(source)
    check_source(folder, identity)
    staging = staging_folder(folder, identity)
    names = mapping.columns()
    walk = None
    if identity is None:
        batches = Batches(source, [*names, *mapping.keep])
        sample, rows = batches.sample(), None
    else:
        reader = sources.open_source(source, names, mapping.keep, staging)
        rows = reader.rows
        if rows == 0:
            raise ValueError("source has no rows; there is nothing to solve")
        sample = reader.read(0, 1)
    about = mapping.described(sample)
    if target is not None:
        mapping.check_fits(target, sample)
    size = checked_size(part_size, mapping.bytes_each(sample))
    holder = Sink.open(folder, {**about, "source": identity, "part_size": size, "problems": rows})
    if identity is None or rows is None:
        walk = lambda: batches.parts(size, holder)  # noqa: E731
        return Job(holder, None, lambda _: 0, lambda _: None, mapping.solve, walk, target=target, answer=mapping.answer)

    def span(number: int) -> tuple[int, int]:
        return number * size, min((number + 1) * size, rows)

    return Job(
        holder,
        -(-rows // size),
        lambda number: span(number)[1] - span(number)[0],
        lambda number: (reader.read(*span(number)), {}),
        mapping.solve,
        unchanged=lambda: check_source(folder, sources.identity_of(source)),
        target=target,
        answer=mapping.answer,
    )


def check_installed() -> None:
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError('solve_stream needs pyarrow: pip install "gdjax[cli]"', name="pyarrow") from None


def places(sink: Any, source: Any = None) -> tuple[Path, Path | None]:
    """The folder of parts, and the file they are joined into, if one is asked for; neither may meet the source."""
    path = Path(sink)
    if path.suffix.lower() in WRITERS and not path.is_dir():
        check_output(path, tuple(WRITERS))
        folder, target = path.with_name(path.name + ".parts"), path
    elif path.suffix.lower() in FILES and not path.is_dir():
        raise ValueError(f"sink {path} cannot be written; name a folder, or a file that ends in {', '.join(WRITERS)}")
    elif path.exists() and not path.is_dir():
        raise ValueError(f"sink {path} is a file; name a folder, or a file that ends in {', '.join(WRITERS)}")
    else:
        folder, target = path, None
    if isinstance(source, (str, os.PathLike)):
        read = Path(source).resolve()
        if read in (path.resolve(), *folder.resolve().parents):
            raise ValueError(f"sink {path} is, or lies in, the source {source}; name another place")
    return folder, target


def check_source(folder: Path, identity: Any) -> None:
    """Refuse a source that is not the one which the folder's results come from, before anything is read of it."""
    if (folder / MANIFEST).exists():
        before = read_manifest(folder / MANIFEST)
        check_same({"source": before.get("source")}, {"source": identity}, folder)


def staging_folder(folder: Path, identity: Any) -> Path:
    """Where a copy of this very source may lie that can be read at any place."""
    return folder / STAGED / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def names_of(argument: str, names: Any) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    given = tuple(names) if isinstance(names, Iterable) and not isinstance(names, str) else (names,)
    if not all(isinstance(name, str) for name in given):
        raise TypeError(f"{argument}={names!r}; pass a name or a list of names")
    return given


def checked_results(results: Any) -> tuple[str, ...]:
    chosen = names_of("results", results)
    wrong = [name for name in chosen if name not in RESULTS]
    if wrong or not chosen:
        raise ValueError(f"results={results!r}; name some of {', '.join(RESULTS)}")
    return chosen


def checked_size(part_size: Any, each: int) -> int:
    if part_size is None:
        return power_below(PART_BYTES / each, 1, 1 << 24)
    if isinstance(part_size, bool) or not isinstance(part_size, int) or part_size < 1:
        raise ValueError(f"part_size={part_size!r}; pass a whole number of problems per part, at least 1")
    return part_size
