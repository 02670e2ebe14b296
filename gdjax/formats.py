"""The file formats of tables: CSV, Parquet, NPZ and JSON, each read and written by one function.

CSV columns are read as text: guessing a column's type from the first megabyte, as CSV readers do, fails on
the first decimal point after it and turns the label `007` into 7.
"""

import csv
import difflib
import io
import itertools
import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

# What files that are something else begin with: the commonest wrong downloads and wrong endings.
_SIGNATURES = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip archive (such as NPZ or XLSX)",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"%PDF": "a PDF document",
    b"\x1f\x8b": "a gzip archive",
    b"\x93NUMPY": "a single NumPy array (NPY)",
    b"\x89HDF": "an HDF5 file",
    b"<!DOCTYPE": "a web page",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"<?xml": "an XML document",
    b"{": "a JSON document",
}
_MAGIC = {".parquet": b"PAR1", ".npz": b"PK\x03\x04"}


class TableError(ValueError):
    """A table that cannot be read or written; the message says why and how to mend it."""


def check_content(path: Path) -> None:
    """See that the file is there and, from its first bytes, that it is not something else by another name."""
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 16)
    except FileNotFoundError:
        raise TableError(f"there is no file {path}") from None
    except OSError as error:
        raise TableError(f"{path} cannot be read: {error.strerror}") from None
    if not head.strip(b"\xef\xbb\xbf \t\r\n"):
        raise TableError(f"{path.name} is empty")
    expected = _MAGIC.get(path.suffix.lower())
    if head.startswith(expected) if expected else b"\0" not in head and _signature(head) is None:
        return
    found = _signature(head) or ("a binary file" if b"\0" in head else "a text file")
    raise TableError(f"{path.name} is not {path.suffix[1:].upper()}: by its content it is {found}")


def _signature(head: bytes) -> str | None:
    return next((kind for magic, kind in _SIGNATURES.items() if head.startswith(magic)), None)


def check_columns(path: Path, wanted: Sequence[str], present: Sequence[str]) -> None:
    for name in wanted:
        if present.count(name) > 1:
            raise TableError(f"{path.name} has several columns named '{name}'; rename all but one of them")
        if name in present:
            continue
        near = difflib.get_close_matches(name.lower(), [other.lower() for other in present], n=1)
        match = [other for other in present if near and other.lower() == near[0]]
        hint = f"; did you mean '{match[0]}'?" if match else "."
        if len(present) == 1 and any(mark in present[0] for mark in ";\t|"):
            hint = ". Columns must be separated by commas."
        more = f" and {len(present) - 20} more" if len(present) > 20 else ""
        raise TableError(f"{path.name} has no column '{name}'{hint} It has: {', '.join(present[:20])}{more}")


def _read_csv(path: Path, wanted: list[str]) -> "pa.Table":
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    parse = arrow_csv.ParseOptions(newlines_in_values=True)
    one_thread = arrow_csv.ReadOptions(use_threads=False)  # errors name the row then
    with arrow_csv.open_csv(path, one_thread, parse) as reader:
        check_columns(path, wanted, reader.schema.names)
    convert = arrow_csv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.large_string()))
    try:
        return arrow_csv.read_csv(path, parse_options=parse, convert_options=convert)
    except pa.ArrowInvalid:
        return arrow_csv.read_csv(path, one_thread, parse, convert)


def _read_parquet(path: Path, wanted: list[str]) -> "pa.Table":
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        check_columns(path, wanted, file.schema_arrow.names)
        return file.read(columns=wanted)


def _read_npz(path: Path, wanted: list[str]) -> "pa.Table":
    import pyarrow as pa

    # Opened here because numpy.load does not close a file that turns out to be no archive.
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
        check_columns(path, wanted, archive.files)
        arrays = {}
        for name in archive.files:
            try:
                arrays[name] = archive[name]
            except ValueError as error:
                if "pickle" not in str(error):
                    raise TableError(f"{path.name}, array '{name}' cannot be read: {error}") from None
                raise TableError(
                    f"{path.name}, array '{name}' holds pickled Python objects, which can run code when read "
                    "and are refused; save it as numbers or text, for example array.astype(str)"
                ) from None
    for name in wanted:
        array = arrays[name]
        if not isinstance(array, np.ndarray) or array.ndim != 1:
            shape = getattr(array, "shape", "none")
            raise TableError(f"{path.name}, array '{name}' has shape {shape}; a column must be a 1-d array")
        if array.dtype.kind not in "biufUSM":
            raise TableError(f"{path.name}, array '{name}' holds {array.dtype}; it must be numbers or text")
        if len(array) != len(arrays[wanted[0]]):
            raise TableError(
                f"{path.name}: array '{name}' has {len(array)} entries, "
                f"'{wanted[0]}' has {len(arrays[wanted[0]])}; columns have one length"
            )
    return pa.table({name: pa.array(_native(arrays[name])) for name in wanted})


def _native(array: np.ndarray) -> np.ndarray:
    """The array in a form that pyarrow takes: this machine's byte order, text as Unicode."""
    if array.dtype.kind == "S":
        return np.char.decode(array, "utf-8")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _write_csv(table: "pa.Table", file: BinaryIO) -> None:
    _join_csv(iter([table]), file)


def _join_csv(tables: Iterator["pa.Table"], file: BinaryIO) -> None:
    from pyarrow import csv as arrow_csv

    for number, table in enumerate(tables):
        if number == 0:
            header = io.StringIO()
            csv.writer(header, lineterminator="\n").writerow(table.column_names)
            file.write(header.getvalue().encode())
        arrow_csv.write_csv(table, file, arrow_csv.WriteOptions(include_header=False))


def _write_parquet(table: "pa.Table", file: BinaryIO) -> None:
    from pyarrow import parquet

    parquet.write_table(table, file)


def _join_parquet(tables: Iterator["pa.Table"], file: BinaryIO) -> None:
    from pyarrow import parquet

    first = next(tables)
    with parquet.ParquetWriter(file, first.schema) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)


def _write_npz(table: "pa.Table", file: BinaryIO) -> None:
    write_arrays({name: table[name].to_numpy() for name in table.column_names}, file)


def write_arrays(columns: Mapping[str, np.ndarray], file: BinaryIO) -> None:
    """Columns as NPZ. By hand, because numpy.savez takes no column that is called `file`."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in columns.items():
            array = array.astype(str) if array.dtype == object else array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _write_json(table: "pa.Table", file: BinaryIO) -> None:
    separator = "[\n"
    for batch in table.to_batches(max_chunksize=1 << 14):
        for row in batch.to_pylist():
            row = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in row.items()
            }
            file.write((separator + json.dumps(row, ensure_ascii=False, default=str)).encode())
            separator = ",\n"
    file.write(b"\n]\n" if separator == ",\n" else b"[]\n")


READERS = {".csv": _read_csv, ".parquet": _read_parquet, ".npz": _read_npz}
WRITERS = {".csv": _write_csv, ".parquet": _write_parquet, ".npz": _write_npz, ".json": _write_json}
JOINERS = {".csv": _join_csv, ".parquet": _join_parquet}
