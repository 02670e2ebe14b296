"""The small cache of what was measured: one JSON file per entry, written whole or not at all.

A file that cannot be read, is torn or is not ours is as good as none. `GDJAX_CACHE_DIR` names another folder,
`GDJAX_CACHE=off` switches the cache off.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from gdjax.files import replacing

log = logging.getLogger("gdjax")


def folder() -> Path | None:
    """Where entries are kept; None where the cache is off."""
    if os.environ.get("GDJAX_CACHE", "").lower() in ("off", "0", "no"):
        return None
    named = os.environ.get("GDJAX_CACHE_DIR")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "gdjax" if base else Path.home() / ".cache" / "gdjax"


def digest(*parts: str) -> str:
    """A file name for what these parts say."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def read(name: str) -> Any:
    """What is kept under `name`, None if there is nothing that can be read."""
    where = folder()
    if where is None:
        return None
    try:
        return json.loads((where / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write(name: str, entry: Any) -> None:
    """Keep an entry; a folder that cannot be written is no reason to fail a run."""
    where = folder()
    if where is None:
        return
    try:
        where.mkdir(parents=True, exist_ok=True)
        with replacing(where / f"{name}.json") as file:
            file.write(json.dumps(entry).encode())
    except OSError as error:
        log.info("the cache %s cannot be written: %s", where, error)
