"""What a sweep goes over: axes of values, lists of points, random draws, and data sets given as row weights.

An axis has K positions and gives a value at each of them to one name, or to several names at once: `points` and
`draws` make axes of several names, everything else is one name's values. `folds` and `bootstrap` are data sets of K
row weights, which a loss takes as an argument, so that the rows themselves are never copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gdjax.batch import check_held

Draw = Callable[[np.random.Generator, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a sweep.

    Attributes:
        values: an array `[K, ...]`, or a pytree of such arrays, one entry per position; with `joint` a dict of them,
            one for each name that the axis sets.
        labels: `[K]`, what the positions are called in `sel` and in tables; None for the values themselves where they
            are single numbers or words, else 0 to K - 1.
        joint: whether the axis sets several names at once.

    Raises:
        ValueError: no positions, or values and labels of different lengths.
        TypeError: values that are not arrays.

    >>> Axis([0.1, 0.2], labels=["slow", "fast"]).labels.tolist()
    ['slow', 'fast']
    """

    values: Any
    labels: Any = None
    joint: bool = False

    def __post_init__(self) -> None:
        values: Any = {n: as_arrays(v) for n, v in self.values.items()} if self.joint else as_arrays(self.values)
        lengths = {np.shape(leaf)[0] for leaf in jax.tree.leaves(values)}
        if len(lengths) != 1:
            raise ValueError(f"values of one axis have lengths {sorted(lengths)}; give one value per position to all")
        (count,) = lengths
        if count == 0:
            raise ValueError("it has no values; give at least one")
        plain = not self.joint and isinstance(values, np.ndarray) and values.ndim == 1
        labels: Any = (values if plain else np.arange(count)) if self.labels is None else np.asarray(self.labels)
        if labels.shape != (count,):
            raise ValueError(f"labels has shape {labels.shape}, values has {count} positions; give one label to each")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.labels)

    def named(self, name: str) -> dict[str, Any]:
        """The values by the names that they are for; `name` is the axis's own."""
        return self.values if self.joint else {name: self.values}

    def columns(self, name: str) -> dict[str, np.ndarray]:
        """What a table shows of the axis, `[K]` each: its labels, and the single numbers that it sets."""
        single = {n: v for n, v in self.named(name).items() if isinstance(v, np.ndarray) and v.ndim == 1}
        return {name: self.labels, **(single if self.joint else {})}

    def take(self, positions: Any) -> Axis:
        """The axis at some of its positions."""
        return Axis(jax.tree.map(lambda leaf: leaf[positions], self.values), self.labels[positions], self.joint)


def as_arrays(values: Any) -> Any:
    """Arrays `[K, ...]` of what was given: numbers, words, arrays, a list of arrays of one shape, pytrees of them."""
    if isinstance(values, (str, bytes, int, float, complex, np.generic)) or values is None:
        raise TypeError(f"it is {values!r}, one value; give a list of values, such as [{values!r}]")
    if isinstance(values, (list, tuple, range)):
        values = array_of(list(values))
    elif isinstance(values, Iterable) and not isinstance(values, Mapping) and not hasattr(values, "__array__"):
        values = array_of(list(values)) if jax.tree_util.all_leaves([values]) else values
    arrays = jax.tree.map(one_array, values)
    for leaf in jax.tree.leaves(arrays):
        if leaf.ndim == 0 or not (leaf.dtype.kind in "fiubUc" or jax.numpy.issubdtype(leaf.dtype, np.floating)):
            what = "a single value" if leaf.ndim == 0 else f"values of dtype {leaf.dtype}"
            raise TypeError(f"it holds {what}; give numbers, words, or arrays with one entry per position in front")
    if not jax.tree.leaves(arrays):
        raise ValueError("it has no values; give at least one")
    return arrays


def one_array(value: Any) -> np.ndarray:
    check_held("it", value)
    return np.asarray(value)


def array_of(values: list[Any]) -> np.ndarray:
    arrays = [one_array(value) for value in values]
    try:
        return np.array(arrays) if arrays else np.zeros(0)
    except ValueError:
        shapes = sorted({np.shape(value) for value in values})
        raise ValueError(f"its values have the shapes {shapes}; give values of one shape") from None


def points(rows: Sequence[Mapping[str, Any]]) -> Axis:
    """An axis of listed points: at each of them several names have a value of their own.

    Args:
        rows: K dicts with the same names, `{"learning_rate": 0.1, "momentum": 0.9}`.

    Returns:
        The axis, for `over={"point": points(rows)}`; `over=rows` alone is the same.

    Raises:
        ValueError: no rows, or rows with different names.

    >>> points([{"learning_rate": 0.1, "seed": 0}, {"learning_rate": 0.2, "seed": 5}]).values["seed"].tolist()
    [0, 5]
    """
    if not rows:
        raise ValueError("the list of points is empty; give at least one")
    names = list(rows[0])
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or set(row) != set(names) or not names:
            given = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(f"point {number} is {given}, point 0 has {sorted(names)}; give each the same names")
    return Axis({name: array_of([row[name] for row in rows]) for name in names}, joint=True)


def draws(count: int, seed: int = 0, **distributions: Draw | Sequence[Any]) -> Axis:
    """An axis of random points: each name's value drawn on its own.

    Args:
        count: how many points, K.
        seed: what they are drawn from; the first points are the same for every `count`.
        distributions: for each name `uniform(low, high)`, `log_uniform(low, high)`, a function `(generator, count) ->
            values`, or a list, from which each point takes one.

    Returns:
        The axis, for `over={"draw": draws(...)}`.

    Raises:
        ValueError: `count` is not positive, or no name is given.

    >>> draw = draws(100, learning_rate=log_uniform(1e-4, 1.0), momentum=uniform(0.0, 0.99))
    >>> len(draw), sorted(draw.values)
    (100, ['learning_rate', 'momentum'])
    """
    if count < 1 or not distributions:
        what = f"count is {count}; draw at least one point" if count < 1 else "no name is given to draw for"
        raise ValueError(what)

    def drawn(name: str, number: int) -> np.ndarray:
        distribution = distributions[name]
        draw = distribution if callable(distribution) else choice(distribution)
        values = np.asarray(draw(np.random.default_rng([seed, number]), count))
        if values.shape[:1] != (count,):
            raise ValueError(f"{name} drew values of shape {values.shape} where {count} were wanted")
        return values

    return Axis({name: drawn(name, number) for number, name in enumerate(distributions)}, joint=True)


def uniform(low: float, high: float) -> Draw:
    """Draws spread evenly from `low` to `high`.

    Args:
        low: the smallest value.
        high: the largest value.

    Returns:
        A function for `draws`.

    Raises:
        ValueError: the bounds are not finite, or the wrong way round.

    >>> 0 <= uniform(0, 1)(np.random.default_rng(0), 5).min()
    np.True_
    """
    if not -np.inf < low <= high < np.inf:
        raise ValueError(f"uniform({low}, {high}); give two finite bounds, the lower one first")
    return lambda generator, count: generator.uniform(low, high, count)


def log_uniform(low: float, high: float) -> Draw:
    """Draws whose logarithm is spread evenly: each decade between `low` and `high` gets as many.

    Args:
        low: the smallest value, above 0.
        high: the largest value.

    Returns:
        A function for `draws`.

    Raises:
        ValueError: the bounds are not positive and finite, or the wrong way round.

    >>> sample = log_uniform(1e-4, 1.0)(np.random.default_rng(0), 1000)
    >>> bool(0.4 < (sample < 1e-2).mean() < 0.6)
    True
    """
    if not 0 < low <= high < np.inf:
        raise ValueError(f"log_uniform({low}, {high}); give two positive bounds, the lower one first")
    return lambda generator, count: np.exp(generator.uniform(np.log(low), np.log(high), count))


def choice(values: Sequence[Any]) -> Draw:
    """Draws from a list, each entry equally likely.

    Args:
        values: the entries.

    Returns:
        A function for `draws`, for which a plain list does as well.

    Raises:
        ValueError: the list is empty.

    >>> set(choice([8, 16])(np.random.default_rng(0), 50).tolist()) == {8, 16}
    True
    """
    entries = as_arrays(values)
    return lambda generator, count: entries[generator.integers(len(entries), size=count)]


def folds(rows: int, count: int, seed: int = 0) -> np.ndarray:
    """Row weights for cross-validation: fold k trains on all rows but its own share, which gets the weight 0.

    Args:
        rows: how many rows the data has, n.
        count: how many folds, K; shares differ by one row at most.
        seed: what rows are dealt out by.

    Returns:
        `[K, n]` float64, 1 for a row that is trained on and 0 for one held out: `1 - folds(...)` is what is held out.

    Raises:
        ValueError: fewer than two folds, or more folds than rows.

    >>> weights = folds(10, 5)
    >>> weights.sum(axis=1).tolist(), (1 - weights).sum(axis=0).tolist()
    ([8.0, 8.0, 8.0, 8.0, 8.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    """
    if not 2 <= count <= rows:
        raise ValueError(f"{count} folds of {rows} rows; give at least 2 folds and no more than there are rows")
    order = np.random.default_rng(seed).permutation(rows)
    own = np.empty(rows, np.int64)
    own[order] = np.arange(rows) % count
    return (own != np.arange(count)[:, None]).astype(np.float64)


def bootstrap(rows: int, count: int, seed: int = 0) -> np.ndarray:
    """Row weights of bootstrap resamples: how often each row was drawn, of as many draws as there are rows.

    Args:
        rows: how many rows the data has, n.
        count: how many resamples, B.
        seed: what they are drawn from; resample b depends on the seed and b alone.

    Returns:
        `[B, n]` float64 whole numbers; each resample sums to n (Efron 1979).

    Raises:
        ValueError: no rows or no resamples.

    >>> weights = bootstrap(100, 3)
    >>> weights.shape, weights.sum(axis=1).tolist()
    ((3, 100), [100.0, 100.0, 100.0])
    """
    if rows < 1 or count < 1:
        raise ValueError(f"{count} resamples of {rows} rows; give at least one of each")
    weights = np.empty((count, rows))
    for number in range(count):
        drawn = np.random.default_rng([seed, number]).integers(rows, size=rows)
        weights[number] = np.bincount(drawn, minlength=rows)
    return weights
