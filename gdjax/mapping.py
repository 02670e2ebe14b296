"""Columns of a source as the arguments of `minimize`, and its solutions as columns of results."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gdjax import device as dev
from gdjax import sources
from gdjax import stop as stops
from gdjax.arena import aligned_full
from gdjax.batch import Batch, prepare, problem_shapes
from gdjax.dryrun import check_program
from gdjax.engine.program import Program
from gdjax.jobs import Answer
from gdjax.minimize import check_steps, checked_loss, choose_rule, descend, planned
from gdjax.session import Job, Outcome
from gdjax.solution import counted

if TYPE_CHECKING:
    import pyarrow as pa

RESULTS = ("weights", "loss", "gradient_norm", "steps", "status")


@dataclass
class Mapped:
    """How columns become the arguments of `minimize`, and its solution columns again."""

    loss: Callable[..., Any]
    weights: Any
    data: Any
    keep: tuple[str, ...]
    results: tuple[str, ...]
    options: dict[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.data, tuple):
            raise TypeError(
                f"data is a {type(self.data).__name__}; pass a tuple with one entry per argument of the loss after the "
                "weights, such as ('x', 't')"
            )
        self.options = {**self.options, "device": dev.select_devices(self.options.get("device", "auto"))}
        self.starts: dict[int, Any] = {}

    def named(self) -> dict[str, str]:
        """The hyperparameters that are columns, by name."""
        rate, hyper = self.options.get("learning_rate"), self.options.get("hyperparams")
        named = {"learning_rate": rate} if isinstance(rate, str) and rate != "auto" else {}
        return named | {k: v for k, v in (hyper if isinstance(hyper, Mapping) else {}).items() if isinstance(v, str)}

    def columns(self) -> list[str]:
        """The columns that are numbers, in the order in which they are first named."""
        leaves = [*jax.tree.leaves((self.weights, self.data)), *self.named().values()]
        found = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, str)))
        if not found:
            raise ValueError(
                "neither weights nor data names a column of the source; name at least one, as in data=('x', 't')"
            )
        return found

    def arguments(self, columns: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        """Weights, data and options of `minimize` for these rows."""
        for name in self.columns():
            if not isinstance(columns[name], np.ndarray):
                raise ValueError(
                    f"column '{name}' holds {columns[name].type}, not numbers; convert it to numbers first"
                )
        rows = len(columns[self.columns()[0]])
        floating = [columns[name].dtype for name in self.columns() if columns[name].dtype.kind == "f"]
        plain = np.result_type(*floating) if floating else np.dtype(np.float32)

        def start(leaf: Any) -> Any:
            if isinstance(leaf, str):
                return columns[leaf]
            one = np.asarray(leaf, None if hasattr(leaf, "dtype") else plain)
            return aligned_full((rows, *one.shape), one, one.dtype)

        own = any(isinstance(leaf, str) for leaf in jax.tree.leaves(self.weights))
        if own or rows not in self.starts:
            started = jax.tree.map(start, self.weights)
            self.starts = {} if own else {rows: started}
        weights = started if own else self.starts[rows]
        fill = lambda leaf: columns[leaf] if isinstance(leaf, str) else leaf  # noqa: E731
        options = dict(self.options)
        if isinstance(options.get("learning_rate"), str) and options["learning_rate"] != "auto":
            options["learning_rate"] = columns[options["learning_rate"]]
        if isinstance(options.get("hyperparams"), Mapping):
            options["hyperparams"] = {k: fill(v) for k, v in options["hyperparams"].items()}
        axes = jax.tree.map(lambda leaf: 0 if isinstance(leaf, str) else None, self.data)
        return weights, jax.tree.map(fill, self.data), {**options, "in_axes": axes}

    def solve(
        self, number: int, loaded: tuple[Mapping[str, Any], dict[str, Any]]
    ) -> tuple[Outcome, Mapping[str, Any], dict[str, Any]]:
        """One part solved, and what was known of it before."""
        columns, about = loaded
        program, batch = self.problems(*self.arguments(columns))
        plan, measure = planned(self.options.get("plan", "auto"))
        everything = not {*self.results} <= {"weights", "steps", "status"}
        job = Job(check_steps(self.options["steps"]), plan, measure, everything=everything)
        out, _ = descend(program, batch, job, self.options["device"])
        return out, columns, about

    def answer(self, solved: tuple[Outcome, Mapping[str, Any], dict[str, Any]]) -> Answer:
        """The results of one part as they are written."""
        out, columns, about = solved
        counts = {name: count for name, count in counted(np.asarray(out.status)).items() if count}
        return self.table(out, columns), {**about, "status": counts}

    def problems(self, weights: Any, data: Any, options: Mapping[str, Any]) -> tuple[Program, Batch]:
        """The program, and the batch of these arguments of `minimize`."""
        rule, hyper = choose_rule(options.get("learning_rate"), options.get("optimizer"), options.get("hyperparams"))
        stop = options.get("stop")
        program = Program(checked_loss(self.loss), rule, None if stop is None else stops.as_rule(stop))
        return program, prepare(weights, data, options["in_axes"], hyper, options.get("dtype"))

    def table(self, solution: Outcome, columns: Mapping[str, Any]) -> pa.Table:
        import pyarrow as pa

        kept = {name: columns[name] for name in self.keep}
        found = {
            name: array
            for key in self.results
            for name, array in (
                weight_columns(solution.weights) if key == "weights" else [(key, getattr(solution, key))]
            )
        }
        arrays = {name: arrow(array) for name, array in (kept | found).items()}
        # Without missing values nothing need be written about them: half the time, and fewer bytes.
        schema = pa.schema([pa.field(name, array.type, nullable=False) for name, array in arrays.items()])
        return pa.table(list(arrays.values()), schema=schema)

    def described(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """What the manifest says of the program and its options; checks them on one problem."""
        weights, data, options = self.arguments(sample)
        program, batch = self.problems(weights, data, options)
        plan, _ = planned(options.get("plan", "auto"))
        names = {*self.keep} & {n for n, _ in weight_columns(self.weights)} | {*self.keep} & {*RESULTS}
        if names:
            raise ValueError(f"keep names '{min(names)}', which is a column of the results; rename it in the source")
        with jax.enable_x64(batch.x64 or jax.config.jax_enable_x64):  # type: ignore[attr-defined]
            check_program(program, batch)
            digest = program_digest(program, batch)
        rate = options.get("learning_rate")
        shared = [leaf for leaf in jax.tree.leaves((self.weights, self.data)) if not isinstance(leaf, str)]
        own = self.named()
        shared += [value for name, value in sorted(batch.hyper.items()) if name not in own]
        columns = {name: describe(array) for name, array in sample.items()}
        return versions(options["device"][0]) | {
            "program": digest,
            "columns": columns,
            "options": {
                "weights": str(jax.tree.map(lambda leaf: leaf if isinstance(leaf, str) else "shared", self.weights)),
                "data": str(jax.tree.map(lambda leaf: leaf if isinstance(leaf, str) else "shared", self.data)),
                "shared": sources.digest_of(np.asarray(leaf) for leaf in shared),
                "hyperparams": own,
                "learning_rate": float(rate) if isinstance(rate, (int, float)) else None,
                "steps": check_steps(options["steps"]),
                "dtype": None if options.get("dtype") is None else np.dtype(options["dtype"]).name,
                "plan": f"vmap {plan.tile}" if plan is not None and plan.kernel == "vmap" else "auto",
                "keep": list(self.keep),
                "results": list(self.results),
            },
        }

    def check_fits(self, target: Path, sample: Mapping[str, Any]) -> None:
        """Refuse vectors of weights where the file's format has no place for them."""
        weights, _, _ = self.arguments(sample)
        for name, leaf in weight_columns(weights):
            if target.suffix.lower() != ".parquet" and "weights" in self.results and leaf.ndim > 1:
                raise ValueError(
                    f"{target.name} cannot hold {name}, which has shape {list(leaf.shape[1:])} per problem; name a "
                    ".parquet file or a folder"
                )

    def bytes_each(self, sample: Mapping[str, Any]) -> int:
        """Bytes of inputs and results of one problem."""
        weights, _, _ = self.arguments(sample)
        inputs = sum(column.nbytes for column in sample.values())
        return inputs + 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) + 16


def weight_columns(weights: Any) -> list[tuple[str, Any]]:
    """The leaves of weights by the names of their columns: `weights`, or `weights.b` and so on."""
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    return [
        (".".join(["weights", *filter(None, [jax.tree_util.keystr(path, simple=True, separator=".")])]), leaf)
        for path, leaf in leaves
    ]


def arrow(array: Any) -> pa.Array:
    """An array `[rows, ...]` as a column, of lists of one length where it has more axes."""
    import pyarrow as pa

    if isinstance(array, pa.Array):
        return array
    array = np.asarray(array)
    column = pa.array(np.ascontiguousarray(array).reshape(-1))
    for length in reversed(array.shape[1:]):
        kind = pa.list_(pa.field("item", column.type, nullable=False), length)
        column = pa.FixedSizeListArray.from_arrays(column, type=kind)
    return column


def describe(array: Any) -> str:
    return f"{array.dtype.name}{list(array.shape[1:])}" if isinstance(array, np.ndarray) else str(array.type)


def versions(device: Any) -> dict[str, Any]:
    """What bits depend on besides the problem and the options."""
    import jaxlib

    import gdjax

    return {
        "gdjax": gdjax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "device": dev.kind(device),
    }


def plain_text(jaxpr: Any) -> str:
    """A jaxpr in words that are the same in every process: no addresses, no colours for a terminal."""
    return re.sub(r"0x[0-9a-f]+", "", jaxpr.pretty_print(use_color=False))


def program_digest(program: Program, batch: Batch) -> str:
    """What tells one problem's program (loss, update rule, stop rule) from another: its jaxprs and their constants."""
    digest = hashlib.sha256()

    def noted(function: Callable[..., Any], *shapes: Any) -> Any:
        closed, out = jax.make_jaxpr(function, return_shape=True)(*shapes)
        digest.update(plain_text(closed).encode())
        digest.update(sources.digest_of(np.asarray(constant) for constant in closed.consts).encode())
        return out

    inputs = batch.weights, batch.data, batch.hyper
    flags = jax.tree.map(lambda _: True, batch.weights), batch.data_flags, batch.hyper_flags
    weights, data, hyper = problem_shapes(inputs, flags)
    state = noted(program.init, weights, data, hyper)
    index = jax.ShapeDtypeStruct((), np.int32)
    if program.stop is None:
        noted(program.step, weights, state, jax.ShapeDtypeStruct((), bool), index, data, hyper)
    lane = noted(program.begin, weights, state, index, data)
    noted(program.advance, lane, index, data, hyper)
    noted(program.report, weights, data)
    return digest.hexdigest()
