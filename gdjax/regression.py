"""One linear model per group of rows, all groups descended at once.

The model of a group is `prediction = x · w + b`; its loss is the mean of an elementwise loss over the group's
own rows. What is descended is the same model in standard units: every input minus its mean and divided by its
spread in that group, and for the losses that allow it the target likewise (`losses.py`). There the curvature
is about 1 in every direction, one tolerance serves every unit of measurement, and float32 is enough. Weights
and losses are mapped back to the user's units in float64.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdjax import stop
from gdjax.grouping import Groups
from gdjax.losses import Elementwise, Loss, Units, named_loss
from gdjax.minimize import minimize

DEFAULT_STEPS = 10_000
# Some 100 units of rounding of the standard problem's gradient, whose entries start out at about 1.
DEFAULT_TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
_DRAWN = 4096  # random starts are drawn for so many groups at a time


@dataclass(frozen=True)
class Fit:
    """Fitted models of N groups, in the user's units.

    Attributes:
        weights: `[N, P]` float64, one weight per input.
        intercept: `[N]` float64, or None for models without one.
        loss: `[N]` float64, the mean loss over the group's rows.
        gradient_norm: `[N]`, the largest absolute entry of the gradient in standard units: what `tol` is
            compared with.
        steps: `[N]` int32, updates taken.
        status: `[N]` int8, see `gdjax.Status`.
        rows: `[N]` int64, rows in the group.
        notes: `[N]` text, what a reader of this group's numbers should know; mostly empty.
        device: where it ran.
    """

    weights: np.ndarray
    intercept: np.ndarray | None
    loss: np.ndarray
    gradient_norm: np.ndarray
    steps: np.ndarray
    status: np.ndarray
    rows: np.ndarray
    notes: np.ndarray
    device: str


@dataclass(frozen=True)
class _Standard:
    """A table in standard units: rows sorted by group, the intercept's column of ones last."""

    groups: Groups
    centre: np.ndarray  # [N, P]
    spread: np.ndarray  # [N, P]
    varies: np.ndarray  # [N, P]
    inputs: np.ndarray  # [rows, P + intercept]
    target: np.ndarray  # [rows]
    units: Units


def fit(
    inputs: np.ndarray,
    target: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    intercept: bool = True,
    loss: str | Elementwise = "squared",
    delta: float = 1.0,
    quantile: float = 0.5,
    learning_rate: str | float | None = "auto",
    optimizer: Any = None,
    hyperparams: dict[str, Any] | None = None,
    steps: int = DEFAULT_STEPS,
    tol: float | None = None,
    seed: int | None = None,
    dtype: str = "float64",
    device: Any = "auto",
    names: Sequence[str] | None = None,
    first_group: int = 0,
) -> Fit:
    """Fit `prediction = x · w + b` to every group of rows, all groups at once.

    The loss of group g is `(1 / n_g) Σ_i loss(x_i · w + b, t_i)` over its own n_g rows.

    Args:
        inputs: `[rows, P]` numbers.
        target: `[rows]` numbers; 0 or 1 for the logistic loss, not negative for the Poisson loss.
        groups: `[rows]` integers from 0 to N - 1 that say which group a row belongs to, in any order; None
            for one group of all rows.
        intercept: whether the model has a b.
        loss: "squared" (half the square), "absolute", "huber", "logistic", "poisson" (log link, the constant
            log t! left out), "quantile", or an elementwise `(predictions, targets) -> losses` in JAX.
        delta: where the Huber loss turns from square to straight, in units of the target.
        quantile: which quantile the quantile loss looks for, between 0 and 1.
        learning_rate: a number, in standard units, or "auto": 1/L per group, L a bound on its curvature (for
            a function of your own: at predictions of 0 and, where its loss is smaller, of the target). The
            absolute and quantile losses have kinks, where no constant rate converges: for them "auto" falls
            from 1 to `tol` by the same factor each step (Goffin 1977), and all steps are taken.
        optimizer: a rule to use instead of plain descent, as in `gdjax.minimize`; `learning_rate` is then not
            used.
        hyperparams: the rule's hyperparameters, as in `gdjax.minimize`.
        steps: at most this many updates per group.
        tol: a group has converged when no entry of its gradient in standard units exceeds this; None for 1e-5
            in float32 and 1e-10 in float64.
        seed: None starts at zero in standard units (each prediction is the target's mean, the mean count, or
            the probability 1/2); an integer draws normally distributed starts from it.
        dtype: "float32" or "float64", the arithmetic of the descent.
        device: as in `gdjax.minimize`.
        names: the names of the inputs, for the notes.
        first_group: how many groups of a larger table come before these: random starts go by a group's number.

    Returns:
        A `Fit`. A group with fewer rows than weights is fitted, and noted.

    Raises:
        ValueError: if an argument is not as described.

    >>> x, t = np.array([[1.0], [2.0], [3.0], [5.0]]), np.array([3.0, 5.0, 7.0, 10.0])
    >>> result = fit(x, t, np.array([0, 0, 1, 1]))
    >>> result.weights.round(6).tolist(), result.intercept.round(6).tolist()
    ([[2.0], [1.5]], [1.0, 2.5])
    """
    inputs, target = np.asarray(inputs, np.float64), np.asarray(target, np.float64)
    _check(inputs, target, dtype, tol)
    tol = DEFAULT_TOLERANCE[dtype] if tol is None else tol
    chosen = named_loss(loss, delta, quantile)
    chosen.check(target)
    codes = np.zeros(len(target), np.int32) if groups is None else np.asarray(groups)
    if len(codes) != len(target):
        raise ValueError(f"groups has {len(codes)} rows, target has {len(target)}")
    standard = _standardise(inputs, target, Groups.of(codes), chosen, intercept)
    start = _start(standard, seed, intercept, first_group)

    found: dict[str, np.ndarray] = {}
    where = ""
    for members in standard.groups.batches():
        data = _padded(standard, members)
        rate, rule = _pace(chosen, learning_rate, optimizer, data, steps, tol)
        solution = minimize(
            _model_loss(chosen.elementwise),
            start[members].astype(dtype),
            tuple(part.astype(dtype) for part in data),
            learning_rate=rate.astype(dtype) if isinstance(rate, np.ndarray) else rate,
            optimizer=optimizer,
            hyperparams=hyperparams,
            steps=steps,
            stop=rule,
            device=device,
        )
        where = str(solution.device)
        for name in ("weights", "loss", "gradient_norm", "steps", "status"):
            part = np.asarray(getattr(solution, name))
            found.setdefault(name, np.empty((len(start), *part.shape[1:]), part.dtype))[members] = part

    inputs_named = names or [f"input {number + 1}" for number in range(inputs.shape[1])]
    v = found["weights"].astype(np.float64)
    # Weights that diverged may be beyond what float64 can tell.
    with np.errstate(over="ignore", invalid="ignore"):
        weights, bias = _user_weights(standard, v, intercept)
        mean_loss = standard.units.loss_scale * found["loss"].astype(np.float64) + standard.units.loss_shift
        notes = _notes(standard, loss, v, inputs_named, intercept)
    return Fit(
        weights=weights,
        intercept=bias,
        loss=mean_loss,
        gradient_norm=found["gradient_norm"],
        steps=found["steps"],
        status=found["status"],
        rows=standard.groups.sizes,
        notes=notes,
        device=where,
    )


def _check(inputs: np.ndarray, target: np.ndarray, dtype: str, tol: float | None) -> None:
    if inputs.ndim != 2 or target.ndim != 1 or len(inputs) != len(target):
        raise ValueError(f"inputs must be [rows, P] and target [rows], got {inputs.shape} and {target.shape}")
    if len(target) == 0:
        raise ValueError("target has no rows; there is nothing to fit")
    if not (np.isfinite(inputs).all() and np.isfinite(target).all()):
        raise ValueError("inputs and target must be finite; fill in or drop rows with missing values")
    if dtype not in DEFAULT_TOLERANCE:
        raise ValueError(f"dtype must be one of {', '.join(DEFAULT_TOLERANCE)}, got {dtype!r}")
    if tol is not None and not 0 <= tol < np.inf:
        raise ValueError(f"tol must be 0 or more, got {tol}")


def _standardise(inputs: np.ndarray, target: np.ndarray, groups: Groups, loss: Loss, intercept: bool) -> _Standard:
    x, t = inputs[groups.order], target[groups.order]
    # Without an intercept a shift would change the model: inputs are divided by their size alone.
    centre = groups.mean(x) * intercept
    spread = groups.spread(x, centre)
    z = (x - groups.repeat(centre)) / groups.repeat(spread)
    if intercept:
        z = np.column_stack([z, np.ones(len(z))])
    units = loss.units(t, groups, intercept)
    u = (t - groups.repeat(units.shift)) / groups.repeat(units.scale)
    return _Standard(groups, centre, spread, groups.varies(x), z, u, units)


def _start(standard: _Standard, seed: int | None, intercept: bool, first: int) -> np.ndarray:
    shape = (len(standard.groups.sizes), standard.inputs.shape[1])
    if seed is None:
        return np.zeros(shape)
    start = _drawn(seed, first, *shape)
    if intercept:
        # A constant input never moves its weight: left at a random start it would look like a finding.
        start[:, :-1] *= standard.varies
    return start


def _drawn(seed: int, first: int, count: int, width: int) -> np.ndarray:
    """Normal numbers `[count, width]` for the groups from number `first` on, whatever else is drawn."""
    blocks = range(first // _DRAWN, (first + count - 1) // _DRAWN + 1)
    drawn = [np.random.default_rng([seed, block]).standard_normal((_DRAWN, width)) for block in blocks]
    return np.concatenate(drawn)[first % _DRAWN :][:count]


def _padded(standard: _Standard, members: np.ndarray) -> list[np.ndarray]:
    index, own = standard.groups.padded(members)
    share = own / (standard.groups.sizes * standard.units.divisor)[members, None]
    data = [standard.inputs[index], standard.target[index], share]
    if standard.units.parameter is not None:
        data.append(standard.units.parameter[members])
    return data


@functools.cache
def _model_loss(elementwise: Elementwise) -> Callable[..., jax.Array]:
    """The loss of one group's weights; one function per loss, so that nothing is compiled twice."""

    def model_loss(w: jax.Array, x: jax.Array, t: jax.Array, share: jax.Array, *parameter: jax.Array) -> jax.Array:
        return jnp.sum(share * elementwise(x @ w, t, *parameter))

    return model_loss


def _pace(
    loss: Loss,
    learning_rate: str | float | None,
    optimizer: Any,
    data: list[np.ndarray],
    steps: int,
    tol: float,
) -> tuple[Any, Any]:
    """The learning rate and the stop rule for one batch."""
    converged = stop.gradient_below(tol)
    if optimizer is not None:
        return None, converged
    if learning_rate != "auto":
        return learning_rate, converged
    if loss.kinked:
        smallest = max(tol, 1e-12)
        return lambda step: smallest ** (step / steps), None
    if loss.curvature is None:
        return "auto", converged
    # These losses may curve more on the way than at the start, where "auto" would look.
    x, t, share = data[:3]
    hessian = np.swapaxes(x * (share * loss.curvature(t))[..., None], 1, 2) @ x
    largest = np.linalg.eigvalsh(hessian)[:, -1]
    return 1 / np.where(largest > 0, largest, 1.0), converged


def _user_weights(standard: _Standard, weights: np.ndarray, intercept: bool) -> tuple[np.ndarray, np.ndarray | None]:
    units = standard.units
    slopes = weights[:, : standard.spread.shape[1]] * units.link_scale[:, None] / standard.spread
    if not intercept:
        return slopes, None
    bias = units.link_shift + units.link_scale * weights[:, -1] - (slopes * standard.centre).sum(axis=1)
    return slopes, bias


def _notes(standard: _Standard, loss: object, weights: np.ndarray, names: Sequence[str], intercept: bool) -> np.ndarray:
    groups = standard.groups
    findings = [(groups.sizes < weights.shape[1], "fewer rows than weights")]
    if intercept:
        findings += [(~standard.varies[:, number], f"{name} is constant") for number, name in enumerate(names)]
    if loss == "logistic":
        prediction = (standard.inputs * groups.repeat(weights)).sum(axis=1)
        margin = np.where(standard.target > 0.5, prediction, -prediction)
        findings.append((groups.lowest(margin) > 0, "0 and 1 are separable: no finite optimum"))
    if loss == "poisson":
        findings.append((groups.highest(standard.target) == 0, "all counts are 0: no finite optimum"))
    notes = np.full(len(groups.sizes), "", dtype=object)
    for noted, text in findings:
        notes[noted] = np.where(notes[noted] == "", "", notes[noted] + "; ") + text
    return notes.astype(str)
