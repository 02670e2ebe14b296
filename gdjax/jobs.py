"""A run cut into parts: which are missing, the missing ones done with reading, computing and writing side by side."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdjax.sink import Sink

if TYPE_CHECKING:
    import pyarrow as pa

AHEAD = 2
"""Parts read ahead, and parts whose writing may lag behind."""

Answer = tuple["pa.Table", dict[str, Any]]
"""The results of one part, and what its metadata shall say."""


class StreamStopped(KeyboardInterrupt):
    """Ctrl-C: the parts at hand were finished; the message says how to go on."""


@dataclass
class Job:
    """One run into one sink.

    Attributes:
        sink: where the parts go.
        count: how many parts there are; None where only the end of an iterator will tell.
        rows: how many problems (or rows of a table) each part has, for the progress bar; None as above.
        load: reads the part of this number.
        solve: computes it.
        answer: what is written of it, put together beside the computing of the next part.
        walk: for a source without places: all parts in order, as `(number, what load would return)`.
        unchanged: raises where the source is no longer what it was.
        target: the one file into which the parts are joined at the end; None leaves them as they are.
        arrange: what is done to the parts on the way into that file.
        unit: what is counted, for the progress bar.
    """

    sink: Sink
    count: int | None
    rows: Callable[[int], int]
    load: Callable[[int], Any]
    solve: Callable[[int, Any], Any]
    walk: Callable[[], Iterator[tuple[int, Any]]] | None = None
    unchanged: Callable[[], None] = lambda: None
    target: Path | None = None
    answer: Callable[[Any], Answer] = lambda solved: solved
    arrange: Callable[[Iterator[pa.Table]], Iterator[pa.Table]] = lambda tables: tables
    unit: str = "problems"

    def missing(self) -> list[int]:
        """The parts that are not there yet, of a job whose parts are counted."""
        if self.count is None:
            raise ValueError("the parts of an iterator are not known before its end")
        return [number for number in range(self.count) if self.sink.held(number) is None]

    def run(
        self, share: tuple[int, int] | None = None, progress: bool = False, parts: Sequence[int] | None = None
    ) -> None:
        """Do the missing parts, or those of a share `(p, P)`: the parts whose number leaves p when divided by P.

        Or, where the caller deals them out, just these `parts`.

        Raises:
            SinkError: a part cannot be written, or one that is there cannot be read. Parts that are done are kept.
            StreamStopped: Ctrl-C was pressed; the parts at hand are finished first.
        """
        turn, turns = checked_share(share)
        if self.count is None:
            assert self.walk is not None
            todo: Iterable[Any] = ()
            pairs = (pair for pair in self.walk() if pair[0] % turns == turn)
            total = None
        else:
            todo = [number for number in self.missing() if number % turns == turn] if parts is None else parts
            pairs = ((number, self.load(number)) for number in todo)
            total = sum(map(self.rows, todo))
        with bar(progress, total, self.unit) as advance, interruptible() as stopped:
            self.overlap(iter(pairs), advance, stopped)
        self.unchanged()
        if stopped.is_set():
            raise StreamStopped(
                f"stopped between two parts; run the same again to go on. What is done is in {self.sink.folder}"
            )

    def overlap(self, parts: Iterator[tuple[int, Any]], advance: Callable[[int], None], stop: threading.Event) -> None:
        """Read ahead, compute and write behind, each in threads of its own, a few parts at a time."""
        end: Any = object()
        with ThreadPoolExecutor(1, "gdjax-read") as reader, ThreadPoolExecutor(2, "gdjax-write") as writer:
            ahead: deque[Future[Any]] = deque(reader.submit(next, parts, end) for _ in range(AHEAD))
            behind: deque[Future[None]] = deque()

            def written(number: int, solved: Any) -> None:
                table, about = self.answer(solved)
                self.sink.write(number, table, about)
                advance(table.num_rows)

            try:
                while (read := ahead.popleft().result()) is not end and not stop.is_set():
                    ahead.append(reader.submit(next, parts, end))
                    number, loaded = read
                    solved = self.solve(number, loaded)
                    while len(behind) >= AHEAD:
                        behind.popleft().result()
                    behind.append(writer.submit(written, number, solved))
                for part in behind:
                    part.result()
            finally:  # what is computed is written, whatever happened to the rest
                for waiting in ahead:
                    waiting.cancel()

    def abouts(self) -> Iterator[dict[str, Any]]:
        """What the metadata of every part says.

        Raises:
            FileNotFoundError: parts are missing.
        """
        number, last = 0, self.count == 0
        while not last:
            about = self.sink.held(number)
            if about is None:
                raise FileNotFoundError(f"{self.sink.path(number)} is missing; run the same again, which computes it")
            yield about
            number += 1
            last = about.get("last", False) if self.count is None else number == self.count

    def finish(self) -> Totals:
        """Join the parts where one file is wanted, and tidy up.

        Raises:
            FileNotFoundError: parts are missing.
            SinkError: the file cannot be written, or a part cannot be read.
        """
        totals = Totals.of(self.abouts())
        if self.target is not None:
            self.sink.join(self.target, totals.parts, self.arrange)
            self.sink.remove()
        self.sink.clear()
        return totals


@dataclass(frozen=True)
class Totals:
    """What all parts together hold."""

    parts: int
    problems: int
    counts: dict[str, int]
    notes: dict[str, tuple[int, str]]

    @classmethod
    def of(cls, abouts: Iterable[dict[str, Any]]) -> Totals:
        parts = problems = 0
        counts: dict[str, int] = {}
        notes: dict[str, tuple[int, str]] = {}
        for about in abouts:
            parts, problems = parts + 1, problems + about["rows"]
            for name, count in about["status"].items():
                counts[name] = counts.get(name, 0) + count
            for text, (count, label) in about.get("notes", {}).items():
                notes[text] = (notes.get(text, (0, ""))[0] + count, notes.get(text, (0, label))[1])
        return cls(parts, problems, counts, notes)


def checked_share(share: Any) -> tuple[int, int]:
    if share is None:
        return 0, 1
    if not isinstance(share, tuple) or len(share) != 2 or not all(isinstance(number, int) for number in share):
        raise TypeError(f"share={share!r}; pass (p, P): this process's number, from 0, and how many there are")
    if not 0 <= share[0] < share[1]:
        raise ValueError(f"share={share}; the first number counts from 0 and is below the second")
    return share


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, so that the work at hand can be finished; the second interrupts at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there are signals handled
        yield stopped
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: Any) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, before)

    if callable(before):
        signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        if callable(before):
            signal.signal(signal.SIGINT, before)


@contextmanager
def bar(wanted: bool, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """A progress bar with rate and time left, on a terminal only."""
    if not wanted:
        yield lambda done: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
        from rich.text import Text
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError('progress=True needs rich: pip install "gdjax[cli]"', name=missing.name) from None

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.finished_speed or task.speed or 0:,.0f} {unit}/s")

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done: None
        return
    with Progress(BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn(), console=console) as shown:
        task = shown.add_task(unit, total=total)
        yield lambda done: shown.advance(task, done)
