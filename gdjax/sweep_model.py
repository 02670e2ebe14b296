"""The model that a sweep's file describes: linear in the columns of a table, descended in standard units.

Inputs minus their means and divided by their spreads, and for the losses that allow it the target likewise, as in
`gdjax.regression`; the weights come back in the user's units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from gdjax import over, stop
from gdjax.grouping import Groups
from gdjax.losses import Loss, named_loss
from gdjax.over import Axis
from gdjax.regression import DEFAULT_TOLERANCE
from gdjax.sweep import sweep
from gdjax.sweep_config import DATA_SETS, Config, ConfigError
from gdjax.sweep_result import SweepResult
from gdjax.table import number_column, read_table


@dataclasses.dataclass(frozen=True)
class Model:
    """One table in standard units, the intercept's column of ones last.

    Attributes:
        loss: the elementwise loss and its units.
        inputs: `[rows, P + intercept]`.
        target: `[rows]`.
        centre: `[P]`, the means taken off.
        spread: `[P]`, what the inputs were divided by.
        varies: `[P]`, False for a constant input.
        units: of the target and the loss.
    """

    loss: Loss
    inputs: np.ndarray
    target: np.ndarray
    centre: np.ndarray
    spread: np.ndarray
    varies: np.ndarray
    units: Any
    intercept: bool

    @classmethod
    def of(cls, x: np.ndarray, t: np.ndarray, loss: Loss, intercept: bool) -> Model:
        """The model of a table."""
        rows = Groups.of(np.zeros(len(t), np.int32))
        centre = rows.mean(x) * intercept
        spread = rows.spread(x, centre)
        z = (x - centre) / spread
        units = loss.units(t, rows, intercept)
        inputs = np.column_stack([z, np.ones(len(z))]) if intercept else z
        return cls(
            loss, inputs, (t - units.shift) / units.scale, centre[0], spread[0], rows.varies(x)[0], units, intercept
        )

    def functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What is descended, and the mean loss over the rows without weight."""
        elementwise, parameter = self.loss.elementwise, self.units.parameter
        count = len(self.spread)

        def losses(w: Any, x: Any, t: Any) -> Any:
            extra = () if parameter is None else (jnp.asarray(parameter[0], x.dtype),)
            return elementwise(x @ w, t, *extra)

        def objective(w: Any, x: Any, t: Any, rows: Any, l2: Any) -> Any:
            return jnp.sum(rows * losses(w, x, t)) + jnp.asarray(0.5, x.dtype) * l2 * jnp.sum(jnp.square(w[:count]))

        def held_out(w: Any, x: Any, t: Any, rows: Any) -> Any:
            out = (rows == 0).astype(x.dtype)
            return jnp.sum(out * losses(w, x, t)) / jnp.sum(out)

        return objective, held_out

    def start(self, seed: int | None) -> np.ndarray:
        """Zero, or a random start; the weight of a constant input, which nothing moves, stays at zero."""
        if seed is None:
            return np.zeros(self.inputs.shape[1])
        start: np.ndarray = np.random.default_rng(seed).standard_normal((self.inputs.shape[1],))
        if self.intercept:
            start[:-1] *= self.varies
        return start

    def user_weights(self, weights: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
        """Weights `[..., P + intercept]` in the user's units, by name."""
        v, units = weights.astype(np.float64), self.units
        # Weights that diverged may be beyond what float64 can tell.
        with np.errstate(over="ignore", invalid="ignore"):
            slopes = v[..., : len(self.spread)] * (units.link_scale[0] / self.spread)
            found = {name: slopes[..., number] for number, name in enumerate(names)}
            if self.intercept:
                bias = units.link_shift[0] + units.link_scale[0] * v[..., -1]
                found["intercept"] = bias - slopes @ self.centre
        return found


def prepared(config: Config) -> Model:
    """The table that a file names, as a model; raises ConfigError or TableError for what does not fit."""
    data, model = config.data, config.model
    names, target = data["inputs"], data["target"]
    if len({*names, target}) <= len(names):
        raise ConfigError(f"{config.path.name}: [data] names a column twice; leave it out of inputs")
    loss = named_loss(model["loss"], model["delta"], model["quantile"])
    if config.run["optimizer"] is None and "learning_rate" not in config.swept:
        if config.run["learning_rate"] in (None, "auto") and (loss.kinked or loss.curvature is not None):
            raise ConfigError(
                f"{config.path.name}: the {model['loss']} loss curves differently along the way; give learning_rate "
                "in [over] or [run]"
            )
    table = read_table(config.path.parent / data["table"], [*names, target])
    x, t = np.column_stack([number_column(table, name) for name in names]), number_column(table, target)
    loss.check(t)
    if not 2 <= config.axes.get("fold", 2) <= len(t):
        raise ConfigError(
            f"{config.path.name}: [over] fold = {config.axes['fold']}; the table's {len(t)} rows can be dealt out to "
            f"2 to {len(t)} folds"
        )
    return Model.of(x, t, loss, model["intercept"])


def run(config: Config, model: Model, progress: bool = False) -> SweepResult:
    """Run the sweep that a file asks for.

    Args:
        config: the file, read and checked.
        model: its table.
        progress: whether to show a bar.

    Returns:
        The runs. `loss` and `gradient_norm` are those of what is descended, in standard units; `weights` has an array
        for each input and the intercept, in the user's units; `held_out`, where rows are held out, is the mean loss
        over these, in the user's units and without the penalty.
    """
    options, dtype = config.run, config.run["dtype"]
    objective, held_out = model.functions()
    axes, swept = axes_of(config, model), config.swept
    apart = any(name in swept for name in DATA_SETS)
    shared = [model.inputs.astype(dtype), model.target.astype(dtype)]
    shared += [] if apart else [row_shares(np.ones((1, len(model.target))), model)[0].astype(dtype)]
    shared += [] if "l2" in swept else [np.asarray(config.model["l2"] or 0.0, dtype)]
    rate, optimizer, hyper = options["learning_rate"], None, dict(options["hyperparams"])
    if options["optimizer"] is not None:
        from gdjax.optimizers import optax_rules

        optimizer = optax_rules()[options["optimizer"]]
        hyper |= {} if rate is None else {"learning_rate": rate}
        rate = None
    elif "learning_rate" not in swept:
        rate = rate or "auto"
    result = sweep(
        objective,
        (lambda seed: model.start(seed).astype(dtype)) if "seed" in swept else model.start(None).astype(dtype),
        tuple(shared),
        over=axes,
        learning_rate=rate,
        optimizer=optimizer,
        hyperparams=hyper or None,
        steps=options["steps"],
        stop=stop.gradient_below(options["tol"] or DEFAULT_TOLERANCE[dtype]),
        measures={"held_out": held_out} if apart else None,
        device=options["device"],
        progress=progress,
    )
    figures = {**result.figures, "weights": model.user_weights(result.weights, config.data["inputs"])}
    if apart:
        units = model.units
        scale = units.loss_scale[0] / units.divisor[0]
        figures["held_out"] = scale * figures["held_out"].astype(np.float64) + units.loss_shift[0]
    return dataclasses.replace(result, figures=figures)


def row_shares(counts: np.ndarray, model: Model) -> np.ndarray:
    """Row weights `[K, rows]` that make a mean of each data set, in standard units."""
    return counts / (counts.sum(axis=1, keepdims=True) * model.units.divisor[0])


def axes_of(config: Config, model: Model) -> dict[str, Any]:
    """The axes of the sweep, those over data sets with their row weights."""
    axes = dict(config.axes)
    rows = len(model.target)
    for name, count in config.axes.items():
        if name == "seed":
            axes[name] = range(count)
        elif name in DATA_SETS:
            counts = over.folds(rows, count) if name == "fold" else over.bootstrap(rows, count)
            shares = row_shares(counts, model).astype(config.run["dtype"])
            axes[name] = Axis({"rows": shares}, joint=True)
    return axes
