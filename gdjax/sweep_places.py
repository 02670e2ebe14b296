"""Where each axis of a sweep goes: rates, hyperparameters, starts and arguments of the loss, found by their names."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from gdjax import batch
from gdjax.engine.evaluator import MAX_TERMS
from gdjax.over import Axis
from gdjax.plan import VECTOR
from gdjax.rules import is_pair

OWN_BYTES = 1 << 26
"""Memory for what is laid out run by run, besides weights and figures: beyond it the runs go slab by slab."""

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of the loss: one for all runs, or an entry per position of an axis.

    `way`: `"shared"`; `"own"`, small enough to be given to each run; `"lookup"`, a table that all runs share with the
    number of each one's entry; `"loop"`, entry by entry, each shared by all runs that have it, so that its products
    with their weights are products of matrices.
    """

    values: Any
    axis: str | None = None
    way: str = "shared"


@dataclasses.dataclass(frozen=True)
class Bound:
    """A function of one run called by its arguments' names; equal where function and names are, so compiled once."""

    function: Callable[..., Any]
    names: tuple[str | int, ...]
    lookups: frozenset[str | int]

    def __call__(self, weights: Any, *data: Any) -> Any:
        given = dict(zip(self.names, data, strict=True))
        for name in self.lookups:
            table, index = given[name]
            given[name] = jax.tree.map(lambda leaf, index=index: leaf[index], table)
        plain = [value for name, value in given.items() if isinstance(name, int)]
        return self.function(weights, *plain, **{n: value for n, value in given.items() if isinstance(n, str)})


@dataclasses.dataclass(frozen=True)
class Piece:
    """Runs from number `first` on, in the order of `Places.order`: for each axis one position, or one per run."""

    first: int
    count: int
    positions: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Places:
    """What goes where.

    Attributes:
        axes: the axes of the sweep.
        arguments: what functions of a run may ask for: the data by the loss's names for it, and every column.
        loss: the names of the loss's arguments among them; a number for data without a name.
        hyper: the columns that are hyperparameters.
        starts: the axes that the start weights depend on, and the start weights `[K1 * K2 ..., ...]`.
    """

    axes: dict[str, Axis]
    arguments: dict[str | int, Argument]
    loss: tuple[str | int, ...]
    hyper: tuple[str, ...]
    starts: tuple[tuple[str, ...], Any]

    @property
    def looped(self) -> list[str]:
        """The axes whose positions are gone through one by one."""
        ways = {argument.axis for name, argument in self.arguments.items() if argument.way == "loop"}
        return [name for name in self.axes if name in ways]

    @property
    def order(self) -> list[str]:
        """The axes in the order in which runs are numbered, the last changing fastest."""
        return self.looped + [name for name in self.axes if name not in self.looped]

    def pieces(self) -> Iterator[Piece]:
        """All runs: those of one data set that is looped over together, and no more than memory is set aside for."""
        looped, lengths = self.looped, [len(self.axes[name]) for name in self.order]
        rest = lengths[len(looped) :]
        together = math.prod(rest)
        own = sum(entry_bytes(argument.values) for argument in self.arguments.values() if argument.way == "own")
        slab = max(MAX_TERMS, OWN_BYTES // max(1, own))
        for number, fixed in enumerate(itertools.product(*(range(length) for length in lengths[: len(looped)]))):
            for first in range(0, together, slab):
                last = min(first + slab, together)
                spots = np.unravel_index(np.arange(first, last), rest) if rest else ()
                positions = dict(zip(self.order, [*fixed, *spots], strict=True))
                yield Piece(number * together + first, last - first, positions)

    def data(self, names: tuple[str | int, ...], piece: Piece) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """These arguments for the runs of a piece, and their `in_axes`."""
        pairs: list[tuple[Any, Any]] = []
        for argument in (self.arguments[name] for name in names):
            at = None if argument.axis is None else piece.positions[argument.axis]
            if argument.way == "shared":
                pairs.append((argument.values, None))
            elif argument.way == "lookup":
                pairs.append(((argument.values, np.asarray(at, np.int32)), (None, 0)))
            else:
                entries = jax.tree.map(lambda leaf, at=at: leaf[at], argument.values)
                pairs.append((entries, None if argument.way == "loop" else 0))
        return tuple(value for value, _ in pairs), tuple(axes for _, axes in pairs)

    def hyperparams(self, piece: Piece) -> dict[str, Any]:
        """The swept hyperparameters of the runs of a piece, `[count]` each."""
        swept = {name: self.arguments[name] for name in self.hyper}
        return {
            name: np.broadcast_to(argument.values[piece.positions[str(argument.axis)]], (piece.count,))
            for name, argument in swept.items()
        }

    def weights(self, piece: Piece) -> Any:
        """The start weights of the runs of a piece."""
        names, starts = self.starts
        spots = [np.broadcast_to(piece.positions[name], (piece.count,)) for name in names]
        if not names:
            return jax.tree.map(lambda leaf: np.broadcast_to(leaf[0], (piece.count, *leaf.shape[1:])), starts)
        which = np.ravel_multi_index(spots, [len(self.axes[name]) for name in names])
        return jax.tree.map(lambda leaf: leaf[which], starts)

    def bind(self, function: Callable[..., Any], names: tuple[str | int, ...]) -> Bound:
        """A function of one run whose data is these arguments."""
        return Bound(function, names, frozenset(n for n in names if self.arguments[n].way == "lookup"))

    def asked(self, function: Any, what: str) -> tuple[str | int, ...]:
        """The names of the arguments that a measure asks for."""
        if not callable(function):
            raise TypeError(f"{what} is a {type(function).__name__}; pass a function like the loss")
        wanted = parameters_of(function)[1:]
        known = [name for name in self.arguments if isinstance(name, str)]
        for parameter in wanted:
            if parameter.name not in known and parameter.default is parameter.empty:
                raise ValueError(
                    f"{what} asks for {parameter.name!r}, which is no argument of the loss and no axis"
                    f"{nearest(parameter.name, known)}"
                )
        return tuple(parameter.name for parameter in wanted if parameter.name in known)


def place(
    loss: Any, weights: Any, data: Any, axes: dict[str, Axis], optimizer: Any, given: Mapping[str, Any], dtype: Any
) -> Places:
    """Find a place for every axis; `given` are the rate and the hyperparameters that are the same for all runs."""
    if not callable(loss):
        raise TypeError(f"loss is a {type(loss).__name__}; pass a function loss(weights, *data) of one run")
    if not isinstance(data, tuple):
        raise TypeError(f"data is a {type(data).__name__}; pass a tuple with the arguments that all runs share")
    columns = columns_of(axes)
    hyper = tuple(name for name in hyper_names(optimizer) if name in columns)
    for name in hyper:
        if given.get(name) is not None:
            raise ValueError(f"{name} is given for all runs and is an axis in over; leave one of them out")
    starter = weights if is_function(weights) else None
    begins = () if starter is None else tuple(name for name in names_of(starter) if name in columns)
    shared, swept = loss_arguments(loss, data, columns)
    homeless = [n for n in columns if n not in (*hyper, *begins, *swept, *(a for a in axes if axes[a].joint))]
    if homeless:
        raise ValueError(no_place(homeless[0], loss, shared, optimizer, starter))
    for name in (*hyper, *swept):
        check_numbers(name, columns[name][1], name in hyper)
    starts = start_weights(weights if starter is None else starter, begins, columns, axes, data, dtype)
    common = np.result_type(*(leaf.dtype for leaf in jax.tree.leaves(starts[1])))
    runs = math.prod(len(axis) for axis in axes.values())
    arguments: dict[str | int, Argument] = {name: Argument(entry) for name, entry in shared.items()}
    for name, (axis, values) in columns.items():
        fitted = jax.tree.map(lambda leaf: brought(leaf, common), values)
        arguments[name] = Argument(fitted, axis, way_of(fitted, runs // len(axes[axis]), name in swept))
    return Places(axes, arguments, (*shared, *swept), hyper, starts)


def check_numbers(name: str, values: Any, hyper: bool) -> None:
    """What is computed with must be numbers, and a hyperparameter one of them."""
    if any(leaf.dtype.kind == "U" for leaf in jax.tree.leaves(values)):
        raise TypeError(f"over[{name!r}] holds words; a hyperparameter or an argument of the loss is made of numbers")
    if hyper and (len(jax.tree.leaves(values)) != 1 or np.ndim(values) != 1):
        raise ValueError(f"over[{name!r}] holds arrays; a hyperparameter is one number per position")


def columns_of(axes: dict[str, Axis]) -> dict[str, tuple[str, Any]]:
    """The axis and the values of every name that is swept."""
    columns: dict[str, tuple[str, Any]] = {}
    for axis, entry in axes.items():
        own = {axis: entry.labels} if entry.joint else {}
        for name, values in {**own, **entry.named(axis)}.items():
            if name in columns:
                raise ValueError(f"over sets {name!r} twice, by {columns[name][0]!r} and by {axis!r}; leave one out")
            columns[name] = (axis, values)
    return columns


def hyper_names(optimizer: Any) -> list[str]:
    if optimizer is None:
        return ["learning_rate"]
    return names_of(optimizer) if callable(optimizer) and not is_pair(optimizer) else []


def is_function(weights: Any) -> bool:
    """Whether the starts are made by a function; a pytree may be callable too, as Equinox's modules are."""
    return callable(weights) and jax.tree_util.all_leaves([weights])


def parameters_of(function: Any) -> list[inspect.Parameter]:
    """A function's parameters; none where it does not tell."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


def names_of(function: Any) -> list[str]:
    """The arguments that a function takes by name."""
    return [parameter.name for parameter in parameters_of(function) if parameter.kind in NAMED]


def loss_arguments(
    loss: Any, data: tuple[Any, ...], columns: Mapping[str, Any]
) -> tuple[dict[str | int, Any], tuple[str, ...]]:
    """The shared data by the loss's names for it (by number where it has none), and the axes that the loss takes."""
    parameters = parameters_of(loss)[1:]
    swept = tuple(p.name for p in parameters if p.kind in NAMED and p.name in columns)
    if not parameters or any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters):
        return dict(enumerate(data)), swept
    free = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in columns]
    if len(data) > len(free):
        takes = ", ".join(p.name for p in free) or "nothing"
        raise ValueError(f"data has {len(data)} entries; besides the weights and the axes, loss takes {takes}")
    given = {p.name for p in free[: len(data)]}
    missing = [
        p.name for p in parameters if p.name not in {*given, *columns} and p.default is p.empty and p.kind in NAMED
    ]
    if missing:
        raise ValueError(
            f"loss needs {missing[0]!r}; give it in data, which has {len(data)} entries, or as an axis in over"
            + nearest(missing[0], columns)
        )
    return {p.name: entry for p, entry in zip(free, data, strict=False)}, swept


def no_place(name: str, loss: Any, shared: Mapping[str | int, Any], optimizer: Any, starter: Any) -> str:
    """What to say of an axis that nothing takes."""
    takes = [p for p in names_of(loss)[1:] if p not in shared]
    hyper = hyper_names(optimizer)
    begins = names_of(starter) if starter is not None else []
    said = f"over has {name!r}, which nothing takes{nearest(name, [*hyper, *takes, *begins])}."
    if name == "learning_rate" and is_pair(optimizer):
        return said + " An optimizer made beforehand has its rate: pass the function (optax.adam), not what it returns"
    made = getattr(optimizer, "__name__", "") if optimizer is not None else "plain descent"
    said += f" An axis is a hyperparameter of {made} ({', '.join(hyper) or 'none'})" if made else " An axis is"
    said += f", an argument of loss that is not in data ({', '.join(takes) or 'none'})"
    if starter is None:
        return said + f", or one of weights, where that is a function: lambda {name}: ..."
    return said + f", or an argument of weights ({', '.join(begins) or 'none'})"


def nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, [other for other in known if isinstance(other, str)], 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def start_weights(
    weights: Any, names: tuple[str, ...], columns: Mapping[str, Any], axes: dict[str, Axis], data: Any, dtype: Any
) -> tuple[tuple[str, ...], Any]:
    """The axes that starts depend on, and the start for every combination of their positions, leaves `[K, ...]`."""
    target = batch.checked_dtype(dtype)
    involved = tuple(axis for axis in axes if axis in {columns[name][0] for name in names})
    if is_function(weights):
        for parameter in parameters_of(weights):
            if parameter.name not in names and parameter.default is parameter.empty and parameter.kind in NAMED:
                raise ValueError(
                    f"weights needs {parameter.name!r}, which is no axis in over{nearest(parameter.name, columns)}"
                )
    starts = []
    for spot in itertools.product(*(range(len(axes[axis])) for axis in involved)):
        at = dict(zip(involved, spot, strict=True))
        values = {name: entry_of(columns[name][1], at[columns[name][0]]) for name in names}
        made = weights(**values) if is_function(weights) else weights
        starts.append(batch.convert(with_dtypes(made, data), "weights", target))
        shapes = [batch.brief(jax.tree.map(np.asarray, start)) for start in (starts[0], starts[-1])]
        if shapes[0] != shapes[1]:
            raise ValueError(f"weights gave {shapes[0]}, but {shapes[1]} for {values}; give one shape to all runs")
    leaves = jax.tree.leaves(starts[0])
    if not leaves:
        raise ValueError("weights has no arrays; pass the start weights of one run, or a function that returns them")
    for name, leaf in batch.named_leaves(starts[0], "weights"):
        batch.check_weight(name, np.asarray(leaf)[None], starts[0])
    return involved, jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *starts)


def with_dtypes(weights: Any, data: Any) -> Any:
    """Python's floats, which have no dtype of their own, in that of the arrays beside them, or else of the data."""
    for tree in (weights, data):
        kinds = {leaf.dtype for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")}
        floating = [kind for kind in kinds if jax.numpy.issubdtype(kind, np.floating)]
        if floating:
            common = functools.partial(np.asarray, dtype=np.result_type(*floating))
            return jax.tree.map(lambda leaf, of=common: of(leaf) if type(leaf) is float else leaf, weights)
    return weights


def entry_of(values: Any, at: int) -> Any:
    """One position's value as a user would write it: a plain number or word, or an array."""
    return jax.tree.map(lambda leaf: leaf[at].item() if leaf.ndim == 1 else leaf[at], values)


def brought(leaf: np.ndarray, common: np.dtype) -> np.ndarray:
    """Floats in the dtype of the weights: single numbers always, arrays where that changes none of their values."""
    if not jax.numpy.issubdtype(leaf.dtype, np.floating) or leaf.dtype == common:
        return leaf
    fitted = leaf.astype(common)
    return fitted if leaf.ndim == 1 or np.array_equal(fitted.astype(leaf.dtype), leaf, equal_nan=True) else leaf


def way_of(values: Any, runs: int, wanted: bool) -> str:
    """How entries are given to the runs, of which `runs` share each.

    Looking up costs the CPU next to nothing (measured: 569 row weights, within 5% of runs that have their own). Only
    matrices that many runs share are worth a loop, for they are multiplied with all their weights at once; and only
    what a sum in lanes has room for is worth being given to each run.
    """
    leaves = jax.tree.leaves(values)
    if not wanted or sum(leaf[0].size for leaf in leaves) <= MAX_TERMS:
        return "own"
    return "loop" if runs >= VECTOR and any(leaf.ndim > 2 for leaf in leaves) else "lookup"


def entry_bytes(values: Any) -> int:
    return sum(leaf[0].nbytes for leaf in jax.tree.leaves(values))
