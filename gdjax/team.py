"""Processes that write into one folder: each leaves word there that it lives, and sees who has died.

Word is a small file per process, written anew every second. A process is dead when its word has not changed for a while
by the reader's own clock, so that no clocks need agree, or when it is of this machine and not among its processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdjax.files import replacing

FOLDER = "_processes"
"""Where word is left; readers of Parquet folders skip it."""

PARTS = "parts.json"

BEAT = 1.0
"""Seconds between two words."""

SILENCE = 60.0
"""Seconds without a word after which a process on another machine counts as dead."""

SIGHT = 60.0
"""Seconds within which every process must see the word of all others."""

STARTED, READY, DONE, FAILED, LEFT = "started", "ready", "done", "failed", "left"


class TeamError(ValueError):
    """Processes that cannot work together, or one that the others waited for in vain."""


@dataclass
class Member:
    """What is known of one process: its last word, and since when it has been silent."""

    index: int
    word: dict[str, Any] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)

    def hear(self, word: dict[str, Any] | None) -> None:
        if word is not None and word != self.word:
            self.word, self.heard = word, time.monotonic()

    @property
    def stage(self) -> str:
        return self.word.get("stage", STARTED)

    @property
    def ended(self) -> bool:
        return self.stage in (DONE, FAILED, LEFT)

    @property
    def dead(self) -> bool:
        """Whether it has gone without saying that it is done."""
        if self.ended:
            return False
        if machine() and self.word.get("machine") == machine():
            return not runs(self.word["pid"], self.word["born"])
        return time.monotonic() - self.heard > SILENCE

    @property
    def fate(self) -> str:
        """What became of one that is lost, in words."""
        return f"failed ({self.word['reason']})" if self.stage == FAILED else "died"

    def __str__(self) -> str:
        if not self.word:
            return f"process {self.index}"
        return f"process {self.index} ({self.word['host']}, pid {self.word['pid']})"


class Team:
    """This process among the others of a run.

    Args:
        index: which process this is, from 0.
        count: how many there are.
        folder: where all of them write; on a file system that they share.
    """

    def __init__(self, index: int, count: int, folder: Path):
        self.index, self.count = index, count
        self.folder = folder / FOLDER
        self.members = [Member(number) for number in range(count)]
        self.stage = STARTED
        self.more: dict[str, Any] = {}
        self.number = 0
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.beating = threading.Thread(target=self.beat, name="gdjax-team", daemon=True)

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.json"

    def come(self) -> None:
        """Leave the first word, in place of one from an earlier run, and go on leaving it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.say(STARTED)
        self.beating.start()

    def say(self, stage: str, **more: Any) -> None:
        """Leave word of where this process stands, with what else the others should know."""
        with self.lock:
            self.stage, self.more = stage, more
            self.write()

    def write(self) -> None:
        self.number += 1
        word = {"number": self.number, "stage": self.stage, **me(), **self.more}
        with replacing(self.path(self.index)) as file:
            file.write(json.dumps(word).encode())

    def beat(self) -> None:
        while not self.over.wait(BEAT):
            with self.lock, contextlib.suppress(OSError):  # a full disk must not end the watch
                self.write()

    def leave(self) -> None:
        """No word any more; the last one stays."""
        self.over.set()
        if self.beating.is_alive():
            self.beating.join()

    def look(self) -> list[Member]:
        """All members, with their last words."""
        for member in self.members:
            member.hear(read(self.path(member.index)))
        return self.members

    def meet(self) -> None:
        """See all others; TeamError where their word does not come through, because they write elsewhere."""
        limit = time.monotonic() + SIGHT
        while unseen := [member for member in self.look() if not member.word]:
            if time.monotonic() > limit:
                names = ", ".join(str(member.index) for member in unseen)
                raise TeamError(
                    f"process {self.index} sees nothing of process {names} in {self.folder.parent}; name a folder on a "
                    "file system that all processes share"
                )
            time.sleep(BEAT / 10)

    def deal(self, parts: list[int]) -> None:
        """As process 0: say which parts are to be done, by all together."""
        with replacing(self.folder / PARTS) as file:
            file.write(json.dumps(parts).encode())
        self.say(READY)

    def dealt(self) -> list[int]:
        """What process 0 dealt; TeamError where it fails or dies before that."""
        while (first := self.look()[0]).stage == STARTED:
            if first.dead:
                raise TeamError(f"{first} died before the work began; run the same again")
            time.sleep(BEAT / 10)
        if first.stage == FAILED:
            raise TeamError(f"{first} failed: {first.word['reason']}")
        return json.loads((self.folder / PARTS).read_text(encoding="utf-8"))

    def lost(self) -> list[Member]:
        """Wait for the others to end; returns those that died or failed."""
        gone: dict[int, Member] = {}
        while True:
            for member in self.look():
                if member.stage == FAILED or member.dead:
                    gone[member.index] = member
            if all(member.ended or member.index in (*gone, self.index) for member in self.members):
                return list(gone.values())
            time.sleep(BEAT / 10)

    def disband(self, lost: list[Member]) -> None:
        """As the last to need them: remove all words, once the others that live have read them."""
        limit = time.monotonic() + SIGHT
        away = {self.index, *(member.index for member in lost)}
        while time.monotonic() < limit and any(m.stage != LEFT and m.index not in away for m in self.look()):
            time.sleep(BEAT / 10)
        self.leave()
        shutil.rmtree(self.folder, ignore_errors=True)


def me() -> dict[str, Any]:
    """This process as the others shall know it."""
    return {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid(), "born": born(os.getpid())}


def machine() -> str:
    """What two processes have in common that see each other's process ids; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def born(pid: int) -> str:
    """When a process of this machine began, by the kernel's count; empty where there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def runs(pid: int, birth: str) -> bool:
    return born(pid) == birth


def read(path: Path) -> dict[str, Any] | None:
    """A word; None where there is none, or none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def taking_part(team: Team) -> Iterator[Team]:
    """Whatever ends this process's part is told to the others."""
    try:
        yield team
    except BaseException as error:
        with contextlib.suppress(OSError):
            team.say(FAILED, reason=f"{error}" or type(error).__name__)
        raise
    finally:
        team.leave()
