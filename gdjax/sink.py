"""Results on disk in parts, each whole or not at all, under a manifest that says whose they are.

A sink is a folder. `_manifest.json` is written first and describes the run: source, program, options, versions. Part k
is `part-0000000k.parquet`; which parts are done is known from the files that are there and from nothing else, so any
process may do any of them, in any order, and a run that is cut short at any instant goes on where it was. Names that
begin with an underscore or a dot are skipped by readers of Parquet folders: the folder is a data set as it stands.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdjax import team
from gdjax.files import replacing, sync_folder
from gdjax.formats import TableError
from gdjax.table import write_joined

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "_manifest.json"
STAGED = "_staged"
KEY = b"gdjax"
FORMAT = 1
DIGEST = re.compile("[0-9a-f]{64}")


class SinkError(ValueError):
    """A folder of results that cannot be used or written; the message says why and how to go on."""


class Sink:
    """The parts of one run, in a folder."""

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder
        self.run = run

    @classmethod
    def open(cls, folder: Path, about: Mapping[str, Any]) -> Sink:
        """The sink of the run that `about` describes: begun, or gone on with where the folder holds that very run.

        Raises:
            SinkError: the folder holds results of another run, or files that are none; nothing in it is touched.
        """
        about = dict(json.loads(json.dumps({"format": FORMAT, **about})))  # as it will be read back
        run = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        manifest = folder / MANIFEST
        if manifest.exists():
            check_same(read_manifest(manifest), about, folder)
            return cls(folder, run)
        if folder.is_dir() and (others := [p.name for p in folder.iterdir() if p.name[0] not in "._"]):
            raise SinkError(
                f"{folder} holds files ({', '.join(sorted(others)[:3])}) but no {MANIFEST}; name a new or empty folder"
            )
        with told(manifest):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(manifest) as file:
                file.write(json.dumps(about, indent=1).encode() + b"\n")
            sync_folder(folder.parent)
        return cls(folder, run)

    def path(self, number: int) -> Path:
        """Where part `number` is, or will be."""
        return self.folder / f"part-{number:08d}.parquet"

    def held(self, number: int) -> dict[str, Any] | None:
        """What the metadata of a part says, None where it is not there yet.

        Raises:
            SinkError: the part cannot be read, or belongs to another run.
        """
        path = self.path(number)
        if not path.exists():
            return None
        about, rows = read_about(path)
        if about.get("run") != self.run or about.get("part") != number:
            raise SinkError(f"{path} comes from another run than the {MANIFEST} beside it; delete it and run again")
        if about["rows"] != rows:
            raise SinkError(f"{path} has {rows:,} rows where {about['rows']:,} were written; {AGAIN}")
        return about

    def write(self, number: int, table: pa.Table, about: Mapping[str, Any]) -> None:
        """Write a part, whole or not at all.

        Raises:
            SinkError: the disk is full, or the folder cannot be written; parts that are done stay as they are.
        """
        from pyarrow import parquet

        path = self.path(number)
        sweep(self.folder, f".{path.stem}.")
        about = {"run": self.run, "part": number, "rows": table.num_rows, **about}
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), KEY: json.dumps(about).encode()})
        try:
            with told(path), replacing(path, f".{path.stem}.") as file:
                parquet.write_table(table, file.name, row_group_size=max(1, table.num_rows), **encoding(table.schema))
        except SinkError:
            if self.held(number) is None:  # else another process has just written the same part
                raise

    def tables(self, count: int) -> Iterator[pa.Table]:
        """The tables of all parts in order."""
        for number in range(count):
            if self.held(number) is None:
                raise SinkError(f"{self.path(number)} is not there; run the same again, which computes what is missing")
            yield read_part(self.path(number))

    def join(self, target: Path, count: int, arrange: Callable[[Iterator[pa.Table]], Iterator[pa.Table]]) -> None:
        """All parts in one file, in the format of its ending, whole or not at all."""
        sweep(target.parent, f".{target.name}.")
        with told(target):
            write_joined(target, arrange(self.tables(count)), f".{target.name}.")

    def clear(self) -> None:
        """Remove what was kept for the run's own use."""
        for name in (STAGED, team.FOLDER):  # the latter where all processes of a run were killed
            shutil.rmtree(self.folder / name, ignore_errors=True)
        sweep(self.folder, ".")

    def remove(self) -> None:
        """Remove the sink itself, the manifest last: what is left by a crash on the way is still this run's."""
        self.clear()
        for path in self.folder.glob("part-*.parquet"):
            path.unlink()
        (self.folder / MANIFEST).unlink()
        try:
            self.folder.rmdir()
        except OSError:  # someone put a file of his own there
            pass


def sweep(folder: Path, prefix: str) -> None:
    """Remove temporary files that a killed process has left."""
    for left in folder.glob("*.tmp"):
        if left.name.startswith(prefix):
            left.unlink(missing_ok=True)


AGAIN = "delete that file and run the same again, which computes it anew"


def encoding(schema: pa.Schema) -> dict[str, Any]:
    """How parts are encoded, for speed: floating point as it lies in memory, counts compressed, text by dictionary."""
    import pyarrow as pa

    text = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    return {
        "compression": {f.name: "snappy" if pa.types.is_integer(f.type) else "NONE" for f in schema},
        "use_dictionary": text or False,
        "write_statistics": False,
        "write_batch_size": 1 << 16,
    }


def read_part(path: Path) -> pa.Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            return file.read().replace_schema_metadata(None)
    except (pa.ArrowException, OSError) as error:
        raise SinkError(f"{path} cannot be read: {error}; {AGAIN}") from None


def read_about(path: Path) -> tuple[dict[str, Any], int]:
    """What the metadata of a part says, and its rows."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(path)
        return json.loads(metadata.metadata[KEY]), metadata.num_rows
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise SinkError(f"{path} cannot be read as a part of results: {error}; {AGAIN}") from None


def read_manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SinkError(f"{path} cannot be read: {error}; name another folder") from None
    if not isinstance(found, dict):
        raise SinkError(f"{path} is no manifest of gdjax; name another folder")
    return found


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to mix the parts of two runs, and say in what they differ."""
    changes = list(differences(before, now))
    if changes:
        raise SinkError(
            f"{folder} holds results of another run: {'; '.join(changes[:4])}. Go on with what that run was given, or "
            "name another folder (or delete this one)"
        )


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs between two manifests, in words."""
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif DIGEST.fullmatch(str(before)) and DIGEST.fullmatch(str(now)):
        yield f"{name} {'(loss, optimizer or stop rule) ' if name == 'program' else ''}is another"
    else:
        yield f"{name} was {brief(before)}, now it is {brief(now)}"


def brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}..."


class told:
    """Turns what the system says of a file that cannot be written into a `SinkError` that says how to go on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if not isinstance(error, OSError) or isinstance(error, TableError):
            return
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise SinkError(
            f"{self.path} cannot be written: {reason}. Parts that are done are kept; make room or mend the folder and "
            "run the same again, which goes on from there"
        ) from None
