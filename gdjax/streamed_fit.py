"""One model per group of a table larger than memory: `gdjax solve`, part by part.

The bits are those of `gdjax.regression.fit` on the whole table: a part holds whole groups, and what is computed for a
group follows from its own rows alone.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gdjax import device as dev
from gdjax import regroup, sources
from gdjax.files import replacing
from gdjax.formats import TableError, check_columns, check_content
from gdjax.jobs import Answer, Job
from gdjax.losses import named_loss
from gdjax.mapping import plain_text, versions
from gdjax.regression import Fit, fit
from gdjax.sink import STAGED, Sink, told
from gdjax.solution import Status
from gdjax.solve import columns_of
from gdjax.sources import ParquetSource
from gdjax.stream import check_source, places, staging_folder
from gdjax.table import integers_if_exact, number_column

if TYPE_CHECKING:
    import pyarrow as pa

PART_ROWS = 1 << 19
"""Rows of the table in one part, give or take a group."""


@dataclass
class FitJob(Job):
    """A job that fits models; `shown` are the first of them, `groups` and `rows_read` how much there is."""

    groups: int = 0
    rows_read: int = 0
    device: str = ""
    sorted_on_disk: bool = False
    names: Sequence[str] = field(default_factory=list)


def open_fit_job(
    table: Path,
    sink: Path,
    *,
    group: str | None,
    names: Sequence[str],
    target: str,
    part_rows: int = PART_ROWS,
    say: Any = lambda text: None,
    **options: Any,
) -> FitJob:
    """The job of `gdjax solve` on a big table: checked, sorted where it must be, its manifest written or compared.

    Args:
        table: a `.csv`, `.npz` or `.parquet` file, or a folder of Parquet files.
        sink: as in `solve_stream`.
        group: the column that says which group a row belongs to, None for one group.
        names: the input columns.
        target: the column to predict.
        part_rows: rows per part, give or take a group.
        say: told, in words, of work that is done beforehand.
        options: as in `gdjax.regression.fit`.

    Returns:
        The job, nothing fitted yet.

    Raises:
        ValueError: what does not fit, in table, sink or options.
    """
    folder, file = places(sink, table)
    identity = sources.identity_of(table)
    check_source(folder, identity)
    chosen = named_loss(options.get("loss", "squared"), options.get("delta", 1.0), options.get("quantile", 0.5))
    device = dev.select_devices(options.get("device", "auto"))
    columns = [*([group] if group else []), *names, target]
    staging = staging_folder(folder, [identity, columns])
    with told(staging):
        source = readable(table, columns, group, staging, say)
    if source.rows == 0:
        raise TableError(f"{table.name} has no rows")
    with told(staging):
        grouped, starts, moved = together(source, group, staging, say)
    place = starts // part_rows
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(place)) + 1, [len(starts)]])
    ends = np.append(starts, grouped.rows)
    rows = jax.ShapeDtypeStruct((3,), np.float32)
    parameter = () if options.get("loss") != "huber" else (rows,)
    jaxpr = plain_text(jax.make_jaxpr(chosen.elementwise)(rows, rows, *parameter)).encode()
    plain = {key: str(value) for key, value in sorted(options.items()) if key not in ("device", "names", "optimizer")}
    optimizer = options.get("optimizer")
    about = versions(device[0]) | {
        "source": identity,
        "program": hashlib.sha256(jaxpr).hexdigest(),
        "options": plain | {"optimizer": getattr(optimizer, "__name__", None)},
        "columns": {"group": group, "inputs": list(names), "target": target},
        "part_rows": part_rows,
        "problems": len(starts),
    }
    holder = Sink.open(folder, about)

    def load(number: int) -> dict[str, Any]:
        one, other = cuts[number], cuts[number + 1]
        first, last = int(ends[one]), int(ends[other])
        held = regroup.plain(grouped.table(first, last))
        t = number_column(held, target, first)
        sizes = np.diff(ends[one : other + 1])
        labels = [""] if group is None else regroup.labels_of(held, group, first).take(ends[one:other] - first)
        return {
            "x": np.column_stack([number_column(held, name, first) for name in names]),
            "t": t,
            "codes": np.repeat(np.arange(len(sizes)), sizes),
            "labels": labels,
            "first": int(one),
        }

    def solve(number: int, loaded: dict[str, Any]) -> Answer:
        try:
            result = fit(
                loaded["x"],
                loaded["t"],
                loaded["codes"],
                first_group=loaded["first"],
                names=names,
                **{**options, "device": device},
            )
        except ValueError as error:
            raise ValueError(f"groups {loaded['first'] + 1:,} to {int(cuts[number + 1]):,}: {error}") from None
        return answer(result, group, loaded["labels"], names)

    job = FitJob(
        holder,
        len(cuts) - 1,
        lambda number: int(ends[cuts[number + 1]] - ends[cuts[number]]),
        load,
        solve,
        unchanged=lambda: check_source(folder, sources.identity_of(table)),
        target=file,
        unit="rows",
        groups=len(starts),
        rows_read=grouped.rows,
        device=dev.label(device),
        sorted_on_disk=moved,
        names=names,
    )
    job.arrange = lambda tables: arranged(tables, job, group)
    return job


def answer(result: Fit, group: str | None, labels: Any, names: Sequence[str]) -> Answer:
    """One part's models as a table, and what is told of them."""
    import pyarrow as pa

    columns = {"note": np.full(len(result.loss), ""), **columns_of(result, group, labels, names)}
    columns["note"] = columns.pop("note")
    arrays = {name: pa.array(column) for name, column in columns.items()}
    schema = pa.schema([pa.field(name, array.type, nullable=False) for name, array in arrays.items()])
    texts, first, counts = np.unique(result.notes, return_index=True, return_counts=True)
    notes = {
        str(text): [int(count), str(labels[int(row)])]
        for text, row, count in zip(texts, first, counts, strict=True)
        if text
    }
    ended = {status.name: int((result.status == status).sum()) for status in Status}
    whole = group is not None and spells_integers(arrays[group])
    about = {"status": {k: v for k, v in ended.items() if v}, "notes": notes, "integers": whole}
    return pa.table(list(arrays.values()), schema=schema), about


def spells_integers(values: pa.Array) -> bool:
    return integers_if_exact(values) is not values


def arranged(tables: Iterator[pa.Table], job: Job, group: str | None) -> Iterator[pa.Table]:
    """The parts as one table: as `gdjax solve` writes it of a table in memory."""
    import pyarrow as pa

    abouts = list(job.abouts())
    noted = any(about["notes"] for about in abouts)
    whole = group is not None and all(about["integers"] for about in abouts)
    for table in tables:
        if not noted:
            table = table.drop_columns(["note"])
        if whole:
            number = table.column_names.index(group)
            table = table.set_column(number, pa.field(group, pa.int64(), nullable=False), table[group].cast(pa.int64()))
        yield table


def together(
    source: ParquetSource, group: str | None, staging: Path, say: Any
) -> tuple[ParquetSource, np.ndarray, bool]:
    """The table with each group's rows together, where each group begins, and whether it had to be sorted."""
    target = staging / "sorted.parquet"
    if not target.exists():
        starts = regroup.starts_of(source, group)
        if starts is not None:
            return source, starts, False
        assert group is not None
        say(f"the rows of a '{group}' do not lie together: sorting {source.rows:,} rows on disk")
        staging.mkdir(parents=True, exist_ok=True)
        regroup.sort_on_disk(source, group, target)
    grouped = ParquetSource([target], source.columns)
    starts = regroup.starts_of(grouped, group)
    assert starts is not None
    return grouped, starts, True


def readable(table: Path, columns: list[str], group: str | None, staging: Path, say: Any) -> ParquetSource:
    """The table in a form that can be read at any place: as it is if it is Parquet, else copied once."""
    if table.is_dir() or table.suffix.lower() == ".parquet":
        return ParquetSource(sources.files_of(table), columns)
    if table.suffix.lower() not in (".csv", ".npz"):
        raise TableError(
            f"{table} has the ending {table.suffix!r}; a table to read must be one of .csv, .parquet, .npz"
        )
    check_content(table)
    target = staging / "table.parquet"
    if not target.exists():
        staging.mkdir(parents=True, exist_ok=True)
        say(f"{table.name} is turned into Parquet in {staging.parent.parent / STAGED}, once")
        copy_table(table, columns, group, target)
    return ParquetSource([target], columns)


def copy_table(table: Path, columns: list[str], group: str | None, target: Path) -> None:
    """CSV or NPZ as Parquet: numbers as float64, the group as it is."""
    import pyarrow as pa
    from pyarrow import parquet

    read = csv_tables if table.suffix.lower() == ".csv" else npz_tables
    first = 0
    try:
        with replacing(target) as file:
            writer = None
            for held in read(table, columns, target.parent):
                arrays = {name: held[name] if name == group else number_column(held, name, first) for name in columns}
                made = pa.table(arrays)
                first += len(made)
                if writer is None:
                    text = [group] if group else False
                    writer = parquet.ParquetWriter(file, made.schema, compression="NONE", use_dictionary=text)
                writer.write_table(made)
            if writer is None:
                raise TableError(f"{table.name} has no rows below its column names")
            writer.close()
    except (pa.ArrowException, zipfile.BadZipFile, EOFError) as error:
        reason = str(error).rstrip(".").replace("Row #", "line ")
        raise TableError(f"{table.name} cannot be read as {table.suffix[1:].upper()}: {reason}") from None


def csv_tables(path: Path, columns: list[str], folder: Path) -> Iterator[pa.Table]:
    import pyarrow as pa
    from pyarrow import csv

    read = csv.ReadOptions(use_threads=False, block_size=1 << 24)
    parse = csv.ParseOptions(newlines_in_values=True)
    with csv.open_csv(path, csv.ReadOptions(use_threads=False), parse) as reader:
        check_columns(path, columns, reader.schema.names)
    kinds = dict.fromkeys(columns, pa.large_string())
    with csv.open_csv(path, read, parse, csv.ConvertOptions(include_columns=columns, column_types=kinds)) as reader:
        for batch in reader:
            if len(batch):
                yield pa.Table.from_batches([batch])


def npz_tables(path: Path, columns: list[str], folder: Path) -> Iterator[pa.Table]:
    import pyarrow as pa

    source = sources.staged_npz(path, columns, folder)
    for first in range(0, source.rows, regroup.BATCH_ROWS):
        held = source.read(first, min(first + regroup.BATCH_ROWS, source.rows))
        yield pa.table({name: pa.array(array) for name, array in held.items()})
