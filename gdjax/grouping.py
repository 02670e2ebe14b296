"""Rows of a table sorted by group, in vectorised NumPy: statistics, padding, batches of like size."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# The shortest lengths to pad to; beyond them powers of two. Each length is a program to compile, and short ones are
# soon computed whatever their padding.
_SHORT = (16, 64)


@dataclass(frozen=True)
class Groups:
    """N groups of rows: group g holds `order[starts[g] : starts[g] + sizes[g]]`.

    Every method but `padded` and `batches` takes rows that are sorted already, `values[order]`.
    """

    order: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, codes: np.ndarray) -> "Groups":
        """Sort rows by their group, keeping the order of the rows within one.

        Args:
            codes: `[rows]` integers from 0 to N - 1, every one of which occurs.

        Returns:
            The groups.

        Raises:
            ValueError: if a code is negative or one is left out.

        >>> Groups.of(np.array([1, 0, 1])).order
        array([1, 0, 2])
        """
        if codes.ndim != 1 or codes.dtype.kind not in "iu":
            raise ValueError(f"groups must be integers [rows], got {codes.dtype} with shape {codes.shape}")
        if codes.min() < 0 or (sizes := np.bincount(codes)).min() == 0:
            raise ValueError(
                "groups must number the groups from 0 on and leave none out; "
                "numpy.unique(..., return_inverse=True) does that"
            )
        return cls(np.argsort(codes, kind="stable"), np.cumsum(sizes) - sizes, sizes)

    def repeat(self, per_group: np.ndarray) -> np.ndarray:
        """Give each row its group's value."""
        return np.repeat(per_group, self.sizes, axis=0)

    def lowest(self, values: np.ndarray) -> np.ndarray:
        """The smallest of each group's values."""
        return np.minimum.reduceat(values, self.starts, axis=0)

    def highest(self, values: np.ndarray) -> np.ndarray:
        """The largest of each group's values."""
        return np.maximum.reduceat(values, self.starts, axis=0)

    def varies(self, values: np.ndarray) -> np.ndarray:
        """Whether a group's values differ at all."""
        return self.highest(values) > self.lowest(values)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """The mean of each group's values; of equal values exactly that value, which a rounded sum misses."""
        mean = (np.add.reduceat(values, self.starts, axis=0).T / self.sizes).T
        return np.where(self.varies(values), mean, values[self.starts])

    def spread(self, values: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Root mean square distance from the group's centre; 1 where every distance is 0."""
        distance = np.abs(values - self.repeat(centre))
        largest = self.highest(distance)
        largest = np.where(largest > 0, largest, 1.0)
        # Divided by the largest first, so that squares neither overflow nor vanish.
        root = np.sqrt(self.mean((distance / self.repeat(largest)) ** 2))
        return np.where(root > 0, largest * root, 1.0)

    def padded(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices `[members, M]` into sorted rows, and which of them are a group's own.

        Padding repeats the group's first row: a loss is finite there wherever it is finite on the group
        itself, so that a share of 0 takes it out of the loss and of the gradient without leaving a NaN
        behind.
        """
        slots = np.arange(self.lengths[members].max())
        own = slots < self.sizes[members, None]
        return self.starts[members, None] + np.where(own, slots, 0), own

    @property
    def lengths(self) -> np.ndarray:
        """The length that each group is padded to, which follows from the group's own size.

        Not from the longest group's: a sum over more zeros may be taken in another order, and a group's bits must not
        depend on what else is in the table.
        """
        power = 1 << np.frexp(self.sizes - 0.5)[1].astype(np.int64)
        return np.select([power <= length for length in _SHORT], _SHORT, power)

    def batches(self) -> Iterator[np.ndarray]:
        """Groups that are padded to one length."""
        lengths = self.lengths
        for length in np.unique(lengths):
            yield np.flatnonzero(lengths == length)
