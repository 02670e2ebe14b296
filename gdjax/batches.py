"""An iterator of batches as a source: read once, in order, cut anew into parts of one size."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gdjax import sources
from gdjax.sink import Sink, SinkError


class Batches:
    """An iterable of batches, cut anew into parts of one size."""

    def __init__(self, source: Iterable[Any], columns: Sequence[str]) -> None:
        self.columns = list(dict.fromkeys(columns))
        self.batches = iter(source)
        self.first = next(self.batches, None)
        if self.first is None:
            raise ValueError("source brings no batch; there is nothing to solve")

    def sample(self) -> dict[str, Any]:
        """The columns of the first problem."""
        return {name: array[:1] for name, array in self.checked(self.first).items()}

    def checked(self, batch: Any) -> dict[str, np.ndarray]:
        if not isinstance(batch, Mapping):
            raise TypeError(f"source brought a {type(batch).__name__}; each batch is a dict of arrays [n, ...] by name")
        missing = [name for name in self.columns if name not in batch]
        if missing:
            raise ValueError(f"a batch of the source has no '{missing[0]}'; it has: {', '.join(map(str, batch))}")
        return {name: np.asarray(batch[name]) for name in self.columns}

    def parts(self, size: int, sink: Sink) -> Iterator[tuple[int, Any]]:
        """The parts that are missing, in order; those that are there are compared with what the iterable brings."""
        for number, (columns, last) in enumerate(self.cut(size)):
            digest = sources.digest_of(columns.values())
            held = sink.held(number)
            if held is None:
                yield number, (columns, {"digest": digest, "last": last})
            elif held["digest"] != digest or held["last"] != last:
                raise SinkError(
                    f"part {number} was computed from other problems than the source brings now; an iterable must "
                    "bring the same every time. Name another folder for other problems"
                )

    def cut(self, size: int) -> Iterator[tuple[dict[str, np.ndarray], bool]]:
        """Columns of `size` rows each, and whether they are the last."""
        held: list[dict[str, np.ndarray]] = []
        count = 0
        for batch in map(self.checked, itertools.chain([self.first], self.batches)):
            rows = {name: len(array) for name, array in batch.items()}
            if len(set(rows.values())) > 1:
                raise ValueError(f"a batch of the source has columns of different lengths: {rows}")
            while count + (here := len(next(iter(batch.values())))) > size:  # more follows: not the last
                room = size - count
                held.append({name: array[:room] for name, array in batch.items()})
                yield joined(held), False
                batch = {name: array[room:] for name, array in batch.items()}
                held, count = [], 0
            if here:
                held.append(batch)
                count += here
        yield joined(held), True


def joined(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
