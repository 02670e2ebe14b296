"""Problems on disk, or from an iterator: named columns, one row per problem, read a range of rows at a time.

What can be read at any place is read there: Parquet files and `.npy` arrays. CSV and NPZ cannot; they are turned, once,
into a copy that can, in the sink's own folder. An iterator is read from its beginning to its end.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gdjax.arena import end_to_end
from gdjax.files import replacing
from gdjax.formats import TableError, check_columns
from gdjax.sink import told

if TYPE_CHECKING:
    import pyarrow as pa

Columns = dict[str, Any]
"""Arrays `[rows, ...]` by name; columns that hold no numbers as `pyarrow.Array`s."""

WHOLE_GROUP_BYTES = 256 << 20
"""A row group up to this size is decoded at once and kept for the next range; larger ones are read in batches."""


class Source(Protocol):
    """Rows that can be read at any place."""

    rows: int

    def read(self, first: int, last: int) -> Columns:
        """The columns of rows `first` to `last`, the last not among them."""


def file_identity(path: Path) -> dict[str, Any]:
    """What tells a file from another one, or from itself after a change."""
    stat = path.stat()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(1 << 16))
        file.seek(max(0, stat.st_size - (1 << 16)))
        digest.update(file.read())
    return {"file": path.name, "bytes": stat.st_size, "modified": stat.st_mtime_ns, "ends": digest.hexdigest()}


def files_of(path: Path) -> list[Path]:
    """The Parquet files of a folder in the order of their names, or the file itself."""
    if not path.is_dir():
        if not path.exists():
            raise TableError(f"there is no file or folder {path}")
        return [path]
    found = sorted(p for p in path.rglob("*.parquet") if p.name[0] not in "._")
    if not found:
        raise TableError(f"{path} is a folder without Parquet files; name a file, or a folder of .parquet files")
    return found


class ParquetSource:
    """Rows of Parquet files, one file after the other."""

    def __init__(self, files: Sequence[Path], columns: Sequence[str]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        self.columns = list(dict.fromkeys(columns))
        self.files, self.groups, self.rows = [], [], 0
        for path in files:
            try:
                file = parquet.ParquetFile(path)
            except (pa.ArrowException, OSError) as error:
                reason = str(error).rstrip(".")
                raise TableError(f"{path} cannot be read as Parquet: {reason}; is it whole?") from None
            check_columns(path, self.columns, file.schema_arrow.names)
            self.files.append((path, file))
            for number in range(file.num_row_groups):
                rows = file.metadata.row_group(number).num_rows
                self.groups.append((self.rows, self.rows + rows, len(self.files) - 1, number))
                self.rows += rows
        self.kept: tuple[int, pa.Table] | None = None
        self.under_way: tuple[int, int, Iterator[pa.RecordBatch]] | None = None

    def read(self, first: int, last: int) -> Columns:
        return {name: column_array(column, name, first) for name, column in self.table(first, last).items()}

    def table(self, first: int, last: int) -> dict[str, pa.ChunkedArray]:
        """The columns as pyarrow holds them."""
        import pyarrow as pa

        pieces = [piece for numbers in self.runs(first, last) for piece in self.piece(numbers, first, last)]
        return {
            name: pa.chunked_array([chunk for piece in pieces for chunk in piece.column(name).chunks])
            for name in self.columns
        }

    def runs(self, first: int, last: int) -> list[list[int]]:
        """The row groups that the range touches; those of one file that lie in it whole are read together: what comes
        of them lies in one piece."""

        def shared(number: int) -> tuple[int, int | None]:
            begin, end, which, _ = self.groups[number]
            whole = first <= begin and end <= last and number != kept
            return which, None if whole and not self.is_large(number) else number

        kept = None if self.kept is None else self.kept[0]
        touched = [number for number, (begin, end, *_) in enumerate(self.groups) if begin < last and end > first]
        return [list(run) for _, run in itertools.groupby(touched, shared)]

    def is_large(self, number: int) -> bool:
        """Whether a row group is too large to be decoded at once."""
        _, _, which, group = self.groups[number]
        return bool(self.files[which][1].metadata.row_group(group).total_byte_size > WHOLE_GROUP_BYTES)

    def piece(self, numbers: list[int], first: int, last: int) -> Iterator[pa.Table]:
        """The rows of one row group that lie in the range, or of several that lie in it whole."""
        import pyarrow as pa

        number = numbers[0]
        begin, end, which, group = self.groups[number]
        path, file = self.files[which]
        low, high = max(first, begin) - begin, min(last, end) - begin
        try:
            if len(numbers) > 1:
                groups = [self.groups[each][3] for each in numbers]
                yield file.read_row_groups(groups, self.columns, use_threads=False)
                return
            if self.is_large(number):
                yield from self.batches(number, low, high)
                return
            if self.kept is None or self.kept[0] != number:
                whole = file.read_row_group(group, self.columns, use_threads=False)
                self.kept = (number, whole)
        except (pa.ArrowException, OSError) as error:
            raise TableError(f"{path} cannot be read from row {low + 1:,} of row group {group} on: {error}") from None
        yield self.kept[1].slice(low, high - low)

    def batches(self, number: int, low: int, high: int) -> Iterator[pa.Table]:
        """Rows of a row group too large to be decoded at once; ranges that follow one another are read once."""
        import pyarrow as pa

        place, rest = 0, None
        if self.under_way is not None and self.under_way[0] == number and self.under_way[1] <= low:
            _, place, rest = self.under_way
        if rest is None:
            _, _, which, group = self.groups[number]
            rest = self.files[which][1].iter_batches(1 << 18, [group], self.columns, use_threads=False)
        while place < high:
            batch = next(rest)
            begin, place = place, place + len(batch)
            if place > low:
                cut = batch.slice(max(0, low - begin), min(high, place) - max(low, begin))
                yield pa.Table.from_batches([cut])
            if place > high:  # the rest of this batch is the next range's
                rest, place = prepended(batch.slice(high - begin), rest), high
        self.under_way = (number, place, rest)


def prepended(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def column_array(column: pa.ChunkedArray, name: str, first: int = 0) -> Any:
    """A column as a NumPy array `[rows, ...]`, a view where it lies in one piece; text stays as it is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column.null_count:
        row = first + pc.index(pc.is_null(column), True).as_py() + 1
        raise TableError(f"column '{name}', row {row:,}: the value is missing; fill it in or drop the row")
    if column.num_chunks > 1 and (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        # Into memory that earlier parts have given back: what pyarrow would take is fresh, and is cleared first.
        return end_to_end([chunk.to_numpy(zero_copy_only=False) for chunk in column.chunks])
    whole = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        whole = whole.chunk(0) if whole.num_chunks else pa.array([], column.type)
    shape: list[int] = [len(whole)]
    while pa.types.is_fixed_size_list(whole.type) or pa.types.is_list(whole.type) or pa.types.is_large_list(whole.type):
        if pa.types.is_fixed_size_list(whole.type):
            each = whole.type.list_size
        else:
            lengths = pc.list_value_length(whole)
            each = lengths[0].as_py() if len(lengths) else 0
            if pc.any(pc.not_equal(lengths, each)).as_py():
                row = first + pc.index(pc.not_equal(lengths, each), True).as_py() + 1
                raise TableError(
                    f"column '{name}', row {row:,}: a list of another length than the {each} of row {first + 1:,}; all "
                    "problems of a stream have the same shapes"
                )
        shape.append(each)
        whole = whole.flatten()
        if whole.null_count:
            raise TableError(f"column '{name}' has lists with missing values; fill them in")
    if pa.types.is_boolean(whole.type) or pa.types.is_integer(whole.type) or pa.types.is_floating(whole.type):
        return whole.to_numpy(zero_copy_only=False).reshape(shape)
    return whole


class ArraySource:
    """Arrays `[rows, ...]` by name: NumPy's, memory-mapped, or `.npy` files."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self.arrays = {name: opened(name, array) for name, array in arrays.items()}
        lengths = {name: len(array) for name, array in self.arrays.items()}
        self.rows = next(iter(lengths.values()))
        for name, rows in lengths.items():
            if rows != self.rows:
                one = next(iter(lengths))
                raise TableError(f"array '{one}' has {self.rows:,} rows, '{name}' has {rows:,}; they must be as many")

    def read(self, first: int, last: int) -> Columns:
        return {name: rows_of(array, first, last) for name, array in self.arrays.items()}


def opened(name: str, array: Any) -> np.ndarray:
    if isinstance(array, (str, os.PathLike)):
        try:
            array = np.load(array, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise TableError(f"there is no file {array}") from None
        except (OSError, ValueError, EOFError) as error:
            raise TableError(f"{array} cannot be read as a NumPy array: {error}; is it whole?") from None
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        raise TableError(f"array '{name}' is a {type(array).__name__}; give an array [rows, ...] or the path of a .npy")
    return array


def rows_of(array: np.ndarray, first: int, last: int) -> np.ndarray:
    """A range of rows in memory. A mapped file is read, not mapped: pages once touched would stay with the process."""
    base: Any = array
    if isinstance(base, np.memmap) and base.filename is not None and base.flags.c_contiguous and base.base is not None:
        each = base.dtype.itemsize * int(np.prod(base.shape[1:], dtype=np.int64))
        count = (last - first) * (each // base.dtype.itemsize)
        with open(base.filename, "rb") as file:
            read = np.fromfile(file, base.dtype, count, offset=base.offset + first * each)
        if len(read) != count:
            raise TableError(f"{base.filename} ends before row {last:,}; it was cut short")
        return read.reshape(last - first, *base.shape[1:])
    return np.ascontiguousarray(array[first:last])


def array_identity(array: Any) -> dict[str, Any]:
    """What tells an array from another one: its file, or a digest of what it holds."""
    if isinstance(array, (str, os.PathLike)):
        return file_identity(Path(array))
    if isinstance(array, np.memmap) and array.filename is not None:
        return {**file_identity(Path(array.filename)), "shape": list(array.shape), "offset": array.offset}
    return {"shape": list(array.shape), "dtype": array.dtype.name, "digest": digest_of([array])}


def digest_of(arrays: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def staged_npz(path: Path, columns: Sequence[str], folder: Path) -> ArraySource:
    """The arrays of an NPZ archive, taken out of it once: there they cannot be read at any place."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_columns(path, columns, [name.removesuffix(".npy") for name in archive.namelist()])
            for number, name in enumerate(columns):
                if not (target := folder / f"{number}.npy").exists():
                    with archive.open(f"{name}.npy") as member, replacing(target) as file:
                        while piece := member.read(1 << 22):
                            file.write(piece)
    except (zipfile.BadZipFile, EOFError) as error:
        raise TableError(f"{path} cannot be read as NPZ: {error}; is it whole?") from None
    return ArraySource({name: folder / f"{number}.npy" for number, name in enumerate(columns)})


def staged_csv(path: Path, numbers: Sequence[str], text: Sequence[str], folder: Path) -> ParquetSource:
    """The columns of a CSV file, turned once into Parquet: `numbers` as float64, `text` as it is."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    target = folder / "table.parquet"
    columns = [*numbers, *text]
    if not target.exists():
        kinds = {**dict.fromkeys(numbers, pa.float64()), **dict.fromkeys(text, pa.large_string())}
        read = csv.ReadOptions(use_threads=False, block_size=1 << 23)  # errors name the row then
        parse = csv.ParseOptions(newlines_in_values=True)
        try:
            with csv.open_csv(path, read, parse) as reader:
                check_columns(path, columns, reader.schema.names)
            convert = csv.ConvertOptions(include_columns=columns, column_types=kinds)
            with csv.open_csv(path, read, parse, convert) as reader, replacing(target) as file:
                with parquet.ParquetWriter(file, reader.schema, compression="NONE", use_dictionary=list(text)) as out:
                    for batch in reader:
                        out.write_batch(batch)
        except pa.ArrowException as error:
            reason = str(error).rstrip(".").replace("Row #", "line ")
            raise TableError(f"{path.name} cannot be read as CSV: {reason}") from None
    return ParquetSource([target], columns)


def open_source(source: Any, columns: Sequence[str], text: Sequence[str], staging: Path) -> Source:
    """The source that a user names, its `columns` (numbers) and `text` (what is only handed on)."""
    text = [name for name in text if name not in columns]
    if isinstance(source, Mapping):
        missing = [name for name in [*columns, *text] if name not in source]
        if missing:
            raise TableError(f"source has no array '{missing[0]}'; it has: {', '.join(map(str, source))}")
        return ArraySource({name: source[name] for name in dict.fromkeys([*columns, *text])})
    path, ending = Path(source), Path(source).suffix.lower()
    if path.is_dir() or ending == ".parquet":
        return ParquetSource(files_of(path), [*columns, *text])
    if ending == ".npy":
        return open_source({path.stem: path}, columns, text, staging)
    with told(staging):
        staging.mkdir(parents=True, exist_ok=True)
        if ending == ".csv":
            return staged_csv(path, columns, text, staging)
        return staged_npz(path, [*columns, *text], staging)


def identity_of(source: Any) -> Any:
    """What the manifest says of a source; None for an iterator, whose parts are told apart by what they hold."""
    if isinstance(source, Mapping):
        return {str(name): array_identity(array) for name, array in source.items()}
    if not isinstance(source, (str, os.PathLike)):
        if not isinstance(source, Iterable):
            raise TypeError(
                f"source is a {type(source).__name__}; pass a path, a dict of arrays, or an iterable of dicts of arrays"
            )
        return None
    files = files_of(Path(source))
    ending = files[0].suffix.lower()
    if ending not in (".parquet", ".csv", ".npz", ".npy"):
        raise TableError(
            f"source has the ending {ending!r}; pass a .parquet, .csv, .npz or .npy file, a folder of Parquet files, "
            "a dict of arrays or .npy files by name, or an iterable of such dicts"
        )
    return [file_identity(path) for path in files]
