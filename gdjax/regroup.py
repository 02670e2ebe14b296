"""Tables larger than memory with the rows of each group together, as models per group need them.

A table whose groups lie together already is used as it is. Any other is sorted in passes on disk, in the order in which
the groups first appear: rows are dealt out by a hash of their group to partitions that fit into memory, each partition
is sorted by itself, and the partitions are merged, stretch by stretch of the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gdjax.files import replacing
from gdjax.formats import TableError
from gdjax.sources import ParquetSource

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1 << 18
PARTITION_ROWS = 1 << 22
"""Rows that are sorted in memory at once."""

MOST_PARTITIONS = 512
"""Partitions that are written side by side."""

LABEL_BYTES = 256 << 20
"""Labels of groups that are looked through in memory for one that comes back."""


def batches(source: ParquetSource, columns: list[str]) -> Iterator[pa.Table]:
    """The rows in order, some at a time."""
    reader = ParquetSource([path for path, _ in source.files], columns)
    for first in range(0, reader.rows, BATCH_ROWS):
        yield plain(reader.table(first, min(first + BATCH_ROWS, reader.rows)))


def plain(columns: dict[str, pa.ChunkedArray]) -> pa.Table:
    """Columns as a table."""
    import pyarrow as pa

    return pa.table(columns)


def labels_of(table: pa.Table, group: str, first: int) -> pa.Array:
    """The group column in one piece, dictionaries decoded, no label missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table[group]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    whole = column.combine_chunks()
    whole = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
    absent = pc.is_null(whole, nan_is_null=True)
    if pa.types.is_large_string(whole.type):
        absent = pc.or_(absent, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(whole), ""), False))
    row = pc.index(absent, True).as_py()
    if row >= 0:
        raise TableError(f"column '{group}', row {first + row + 1:,}: the label is missing; fill it in or drop the row")
    return whole


def changes(labels: pa.Array) -> np.ndarray:
    """The rows at which another group begins, the first row aside."""
    import pyarrow.compute as pc

    differs = pc.not_equal(labels[1:], labels[:-1]).to_numpy(zero_copy_only=False)
    return np.flatnonzero(differs) + 1


def starts_of(source: ParquetSource, group: str | None) -> np.ndarray | None:
    """The row at which each group begins, where the rows of every group lie together; None where they do not."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if group is None:
        return np.zeros(1, np.int64)
    starts: list[np.ndarray] = []
    seen: list[pa.Array] = []
    first, before, bytes_seen, ascending, descending = 0, None, 0, True, True
    for table in batches(source, [group]):
        labels = labels_of(table, group, first)
        own = np.concatenate([[0], changes(labels)]).astype(np.int64)
        if before is not None and labels[0].equals(before):
            own = own[1:]
        begun = labels.take(pa.array(own))
        chain = pa.concat_arrays([pa.array([before.as_py()], labels.type), begun]) if before is not None else begun
        ascending = ascending and pc.all(pc.greater(chain[1:], chain[:-1])).as_py() is not False
        descending = descending and pc.all(pc.less(chain[1:], chain[:-1])).as_py() is not False
        bytes_seen += begun.nbytes
        if not ascending and not descending and bytes_seen > LABEL_BYTES:
            return None
        if bytes_seen <= LABEL_BYTES:
            seen.append(begun)
        starts.append(first + own)
        first, before = first + len(labels), labels[-1]
    if not ascending and not descending:
        every = pa.chunked_array(seen)
        if pc.count_distinct(every).as_py() != len(every):
            return None
    return np.concatenate(starts)


def hashed(labels: pa.Array) -> np.ndarray:
    """A number per label, the same for the same label in any batch."""
    import pyarrow as pa

    encoded = labels.dictionary_encode()
    values = encoded.dictionary
    if pa.types.is_large_string(values.type):
        length, offsets, content = (np.frombuffer(b, k) if b else None for b, k in _buffers(values))
        del length
        ends = np.asarray(offsets)[values.offset : values.offset + len(values) + 1]
        code = _text_hash(np.asarray(content) if content is not None else np.zeros(0, np.uint8), ends)
    else:
        code = np.asarray(values.cast(pa.float64() if pa.types.is_floating(values.type) else pa.int64()))
        code = code.view(np.uint64) if code.dtype.itemsize == 8 else code.astype(np.uint64)
    code = code * np.uint64(0x9E3779B97F4A7C15)
    return (code ^ (code >> np.uint64(32)))[encoded.indices.to_numpy()]


def _buffers(values: Any) -> list[tuple[Any, Any]]:
    return list(zip(values.buffers(), (np.uint8, np.int64, np.uint8), strict=True))


def _text_hash(content: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A polynomial of each text's bytes, modulo 2^64."""
    lengths = np.diff(ends)
    used = content[ends[0] : ends[-1]].astype(np.uint64)
    place = np.arange(len(used)) - np.repeat(ends[:-1] - ends[0], lengths)
    powers = np.cumprod(np.full(int(lengths.max(initial=0)) + 1, np.uint64(0x100000001B3)))
    terms = np.append((used + np.uint64(1)) * powers[place], np.uint64(0))
    sums = np.add.reduceat(terms, ends[:-1] - ends[0])
    return np.where(lengths > 0, sums, np.uint64(0))


def sort_on_disk(source: ParquetSource, group: str, target: Path) -> ParquetSource:
    """A copy of the table with each group's rows together, groups in the order of their first rows."""
    folder = target.with_suffix(".passes")
    count = min(MOST_PARTITIONS, -(-source.rows // PARTITION_ROWS))
    columns = list(dict.fromkeys([group, *source.columns]))
    folder.mkdir(parents=True, exist_ok=True)
    deal(source, group, columns, folder, count)
    runs = [Run.of(folder, number, group) for number in range(count)]
    merge([run for run in runs if run is not None], source.rows, target)
    for left in folder.iterdir():
        left.unlink()
    folder.rmdir()
    return ParquetSource([target], columns)


def deal(source: ParquetSource, group: str, columns: list[str], folder: Path, count: int) -> None:
    """First pass: every row, with its number, to the partition of its group."""
    import pyarrow as pa

    writers: dict[int, Any] = {}
    first = 0
    try:
        for table in batches(source, columns):
            labels = labels_of(table, group, first)
            table = table.set_column(table.column_names.index(group), group, labels)
            table = table.append_column("_row", pa.array(np.arange(first, first + len(table))))
            turn = (hashed(labels) % np.uint64(count)).astype(np.int64)
            order = np.argsort(turn, kind="stable")
            table, ends = table.take(pa.array(order)), np.cumsum(np.bincount(turn, minlength=count))
            for number in np.unique(turn):
                begin = int(ends[number - 1]) if number else 0
                if number not in writers:
                    writers[number] = pa.ipc.new_file(str(folder / f"{number}.dealt"), table.schema)
                writers[number].write_table(table.slice(begin, int(ends[number]) - begin))
            first += len(table)
    finally:
        for writer in writers.values():
            writer.close()


class Run:
    """A sorted partition: its groups in the order of their first rows, each group's rows together in their order."""

    def __init__(self, table: pa.Table, begins: np.ndarray, first_rows: np.ndarray) -> None:
        self.table = table
        self.begins = begins
        self.first_rows = first_rows

    @classmethod
    def of(cls, folder: Path, number: int, group: str) -> Run | None:
        """Second pass: a partition sorted in memory, and mapped from the disk from then on."""
        import pyarrow as pa

        dealt, path = folder / f"{number}.dealt", folder / f"{number}.sorted"
        if not dealt.exists():
            return None
        with pa.memory_map(str(dealt)) as mapped:
            table = pa.ipc.open_file(mapped).read_all()
            codes = table[group].combine_chunks().dictionary_encode().indices.to_numpy()  # numbered as they appear
            order = np.argsort(codes, kind="stable")
            sizes = np.bincount(codes)
            begins = np.concatenate([[0], np.cumsum(sizes)])
            table = table.take(pa.array(order)).combine_chunks()
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
            first_rows = table["_row"].to_numpy()[begins[:-1]]
            del table
        dealt.unlink()
        return cls(pa.ipc.open_file(pa.memory_map(str(path))).read_all(), begins, first_rows)

    def between(self, low: int, high: int) -> tuple[pa.Table, np.ndarray]:
        """The rows of the groups that begin in this range of rows, and for each row where its group begins."""
        one, other = np.searchsorted(self.first_rows, [low, high])
        begin, end = int(self.begins[one]), int(self.begins[other])
        sizes = np.diff(self.begins[one : other + 1])
        return self.table.slice(begin, end - begin), np.repeat(self.first_rows[one:other], sizes)


def merge(runs: list[Run], rows: int, target: Path) -> None:
    """Third pass: the partitions as one table, whole or not at all."""
    import pyarrow as pa
    from pyarrow import parquet

    with replacing(target) as file:
        writer = None
        for low, high in stretches(runs, rows):
            found = [run.between(low, high) for run in runs]
            keys = np.concatenate([key for _, key in found])
            table = pa.concat_tables([table for table, _ in found]).drop_columns(["_row"])
            table = table.take(pa.array(np.argsort(keys, kind="stable")))
            if writer is None:
                text = [f.name for f in table.schema if pa.types.is_large_string(f.type)]
                writer = parquet.ParquetWriter(file, table.schema, compression="NONE", use_dictionary=text or False)
            writer.write_table(table, row_group_size=1 << 20)
        assert writer is not None
        writer.close()


def stretches(runs: list[Run], rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of the order whose groups have about as many rows as fit into memory."""
    cells = 1 << 16
    width = -(-rows // cells)
    counts = np.zeros(cells + 1, np.int64)
    for run in runs:
        np.add.at(counts, run.first_rows // width, np.diff(run.begins))
    low = held = 0
    for cell in range(cells):
        if held and held + counts[cell] > PARTITION_ROWS:
            yield low * width, cell * width
            low, held = cell, 0
        held += int(counts[cell])
    yield low * width, rows
