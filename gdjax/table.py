"""Tidy tables in (CSV, Parquet, NPZ) and out (also JSON), chosen by the file's ending."""

import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gdjax.files import check_output, replacing
from gdjax.formats import JOINERS, READERS, WRITERS, TableError, check_content

if TYPE_CHECKING:
    import pyarrow as pa

_MISSING_WORDS = ("", "na", "n/a", "#n/a", "nan", "-nan", "null", "none")


def read_table(path: str | os.PathLike[str], columns: Sequence[str]) -> "pa.Table":
    """Read the named columns of a table.

    Args:
        path: a `.csv` (UTF-8, comma separated, names in the first row), `.parquet` or `.npz` file (each named
            1-d array is a column).
        columns: the names of the columns wanted; only these are read.

    Returns:
        A `pyarrow.Table` of these columns, at least one row long. CSV columns come as text, of which
        `number_column` and `label_column` make what is wanted.

    Raises:
        TableError: if the file is missing, empty or not what its ending says, or lacks a column.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "shops.csv"
    >>> _ = path.write_text("shop,day,sales\\nnorth,1,10\\n")
    >>> read_table(path, ["shop", "sales"]).column_names
    ['shop', 'sales']
    >>> read_table(path, ["shop", "sale"])
    Traceback (most recent call last):
    gdjax.formats.TableError: shops.csv has no column 'sale'; did you mean 'sales'? It has: shop, day, sales
    """
    import pyarrow as pa

    path = Path(path)
    if path.suffix.lower() not in READERS:
        known = ", ".join(READERS)
        raise TableError(f"{path} has the ending {path.suffix!r}; a table to read must be one of {known}")
    check_content(path)
    unreadable = (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error)
    try:
        table = READERS[path.suffix.lower()](path, list(dict.fromkeys(columns)))
    except unreadable as error:
        reason = str(error).rstrip(".").replace("Row #", "line ")
        reason += "; save it as UTF-8" if "utf" in reason.lower() else ""
        raise TableError(f"{path.name} cannot be read as {path.suffix[1:].upper()}: {reason}") from None
    if table.num_rows == 0:
        raise TableError(f"{path.name} has no rows below its column names")
    return table


def number_column(table: "pa.Table", name: str, before: int = 0) -> np.ndarray:
    """Take a column as float64 numbers, every one of them finite.

    Whole numbers, decimals, booleans (0 and 1) and text that spells numbers are taken.

    Args:
        table: what `read_table` returned.
        name: the column's name.
        before: how many rows of a larger table come before these, for errors.

    Returns:
        `[rows]` float64.

    Raises:
        TableError: if an entry is missing, not a number or not finite; it names the column and the row,
            the first row below the column names being row 1.

    >>> import pyarrow
    >>> number_column(pyarrow.table({"sales": ["1.5", " 2", "3e1"]}), "sales")
    array([ 1.5,  2. , 30. ])
    >>> number_column(pyarrow.table({"sales": ["1.5", "two"]}), "sales")
    Traceback (most recent call last):
    gdjax.formats.TableError: column 'sales', row 2: 'two' is not a number
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = _plain(table[name])
    if pa.types.is_large_string(column.type):
        spelled = _as_numbers(column)
        column = column if spelled is None else spelled
    if pa.types.is_large_string(column.type):
        column = pc.utf8_trim_whitespace(column)
        missing = pc.is_in(pc.utf8_lower(column), pa.array(_MISSING_WORDS, pa.large_string()))
        column = pc.if_else(missing, None, column)
    if column.null_count:
        row = before + pc.index(pc.is_null(column), True).as_py() + 1
        raise TableError(f"column '{name}', row {row}: the value is missing; fill it in or drop the row")
    if pa.types.is_large_string(column.type):
        column = _spelled_numbers(column, name, before)
    elif pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    elif not (
        pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_decimal(column.type)
    ):
        raise TableError(f"column '{name}' holds {column.type}, not numbers; convert it to numbers first")
    numbers = column.cast(pa.float64(), safe=False).to_numpy()
    finite = np.isfinite(numbers)
    if not finite.all():
        row = int(np.argmin(finite))
        raise TableError(
            f"column '{name}', row {before + row + 1}: {numbers[row]} is not a finite number; mend it or drop the row"
        )
    return numbers


def label_column(table: "pa.Table", name: str) -> tuple["pa.Array", np.ndarray]:
    """Take a column as labels: its distinct values in order of first appearance, and which row has which.

    Args:
        table: what `read_table` returned.
        name: the column's name.

    Returns:
        The distinct values (a `pyarrow.Array` of N; text that spells whole numbers exactly becomes integers,
        so that `7` is a number and `007` stays text) and, `[rows]` from 0 to N - 1, which value a row has.

    Raises:
        TableError: if a label is missing; it names the column and the row.

    >>> import pyarrow
    >>> values, codes = label_column(pyarrow.table({"shop": ["north", "south", "north"]}), "shop")
    >>> values.to_pylist(), codes
    (['north', 'south'], array([0, 1, 0], dtype=int32))
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = _plain(table[name])
    absent = pc.is_null(column, nan_is_null=True)
    if pa.types.is_large_string(column.type):
        absent = pc.or_(absent, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), False))
    row = pc.index(absent, True).as_py()
    if row >= 0:
        raise TableError(f"column '{name}', row {row + 1}: the label is missing; fill it in or drop the row")
    encoded = column.dictionary_encode()
    return integers_if_exact(encoded.dictionary), encoded.indices.to_numpy()


def write_table(path: str | os.PathLike[str], columns: Mapping[str, Any]) -> None:
    """Write a table, whole or not at all, in the format that the ending of `path` names.

    Args:
        path: a `.csv`, `.parquet`, `.npz` (no pickled objects) or `.json` file (a list, one object per
            row; what is not finite becomes null); a file that is there is replaced.
        columns: the columns by name, NumPy or pyarrow arrays or lists of one length.

    Raises:
        TableError: if the ending is unknown or the folder is missing.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "fits.json"
    >>> write_table(path, {"shop": ["north", "south"], "slope": np.array([1.5, np.nan])})
    >>> print(path.read_text())
    [
    {"shop": "north", "slope": 1.5},
    {"shop": "south", "slope": null}
    ]
    """
    import pyarrow as pa

    path = check_output(path, tuple(WRITERS), TableError)
    table = pa.table({name: pa.array(column) for name, column in columns.items()})
    try:
        with replacing(path) as file:
            WRITERS[path.suffix.lower()](table, file)
    except OSError as error:
        raise TableError(f"{path} cannot be written: {error.strerror or error}") from None


def write_joined(path: str | os.PathLike[str], tables: Iterator["pa.Table"], prefix: str = ".gdjax-") -> None:
    """Write tables below one another into one file, whole or not at all; CSV and Parquet one table at a time.

    Args:
        path: as in `write_table`.
        tables: at least one table, all of one schema.
        prefix: as in `replacing`.
    """
    import pyarrow as pa

    ending = Path(path).suffix.lower()
    with replacing(path, prefix) as file:
        if ending in JOINERS:
            JOINERS[ending](tables, file)
        else:
            WRITERS[ending](pa.concat_tables(tables), file)


def _plain(column: "pa.ChunkedArray") -> "pa.Array":
    """One contiguous array; dictionaries decoded, all text as large_string (which has no 2 GB limit)."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    whole = column.combine_chunks()
    return whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole


def _as_numbers(text: "pa.Array") -> "pa.Array | None":
    import pyarrow as pa

    try:
        return text.cast(pa.float64())
    except pa.ArrowInvalid:
        return None


def _spelled_numbers(text: "pa.Array", name: str, before: int) -> "pa.Array":
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers = _as_numbers(text)
    if numbers is not None:
        return numbers
    lower = pc.utf8_lower(text)
    if pc.all(pc.is_in(lower, pa.array(["true", "false"], pa.large_string()))).as_py():
        return pc.equal(lower, "true").cast(pa.uint8())
    good, bad = 0, len(text)
    while bad - good > 1:  # text[:good] is fine, text[good:bad] is not
        middle = (good + bad) // 2
        fine = _as_numbers(text[good:middle]) is not None
        good, bad = (middle, bad) if fine else (good, middle)
    raise TableError(f"column '{name}', row {before + good + 1}: {text[good].as_py()!r} is not a number")


def integers_if_exact(values: "pa.Array") -> "pa.Array":
    """Text that spells whole numbers exactly as integers; anything else as it is."""
    import pyarrow as pa

    if not pa.types.is_large_string(values.type):
        return values
    try:
        integers = values.cast(pa.int64())
    except pa.ArrowInvalid:
        return values
    return integers if integers.cast(pa.large_string()).equals(values) else values
