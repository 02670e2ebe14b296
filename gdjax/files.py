"""Output files: checked before the work begins, and written whole or not at all."""

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str], prefix: str = ".gdjax-") -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its place when the block ends well.

    If the block raises, the temporary file is removed and whatever was at `path` stays as it was. After a power cut the
    file is there whole or not at all.

    Args:
        path: where the file shall be; a link is followed, so that it is the file behind it which is replaced.
        prefix: what the temporary file's name begins with.

    Yields:
        A binary file to write to.

    Raises:
        OSError: if the folder cannot be written to.

    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with replacing(folder / "answer.txt") as file:
    ...     _ = file.write(b"42")
    >>> [(found.name, found.read_text()) for found in folder.iterdir()]
    [('answer.txt', '42')]
    """
    target = Path(path).resolve()
    # Opened by hand rather than with tempfile, whose files nobody but their owner may read afterwards.
    temporary = target.with_name(f"{prefix}{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can: a file replaced there outlasts a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder cannot be opened here
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(path: str | os.PathLike[str], endings: Sequence[str], error: type[ValueError] = ValueError) -> Path:
    """Say at once whether a file can be written at `path`, rather than after minutes of work.

    Args:
        path: where a file shall be written.
        endings: the endings that can be written, lower case and with their dot.
        error: the kind of ValueError to raise.

    Returns:
        `path` as a Path.

    Raises:
        ValueError: (or `error`) if the ending is unknown, the folder is missing or closed, or `path` is a
            folder.

    >>> check_output("no/such/folder/out.csv", [".csv"])
    Traceback (most recent call last):
    ValueError: out.csv cannot be written: there is no folder 'no/such/folder'; make it first
    """
    path = Path(path)
    if path.suffix.lower() not in endings:
        raise error(f"{path} has the ending {path.suffix!r}; it must be one of {', '.join(endings)}")
    if path.is_dir():
        raise error(f"{path} is a folder; name a file")
    if not path.parent.is_dir():
        raise error(f"{path.name} cannot be written: there is no folder '{path.parent}'; make it first")
    if not os.access(path.parent, os.W_OK):
        raise error(f"{path.name} cannot be written: the folder '{path.parent}' may not be written to")
    return path
