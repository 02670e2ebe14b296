"""Losses of one prediction, and the units in which a group's problem is well scaled for descent.

A loss is elementwise, `(prediction, target) -> loss`. Its units say how the problem in standard units maps
back: `target = shift + scale * standard target`, `prediction = link_shift + link_scale * standard prediction`
and `loss = loss_scale * standard loss + loss_shift`. Where a loss has such a map exactly (squared, absolute,
Huber, quantile; Poisson through its log link) the standard problem is the user's problem, only better scaled.
The logistic loss and a user's own are descended as they are.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdjax.grouping import Groups

Elementwise = Callable[..., jax.Array]


@dataclass(frozen=True)
class Units:
    """One group's standard units, every field `[N]`; `divisor` divides each row's standard loss."""

    shift: np.ndarray
    scale: np.ndarray
    link_shift: np.ndarray
    link_scale: np.ndarray
    loss_scale: np.ndarray
    loss_shift: np.ndarray
    divisor: np.ndarray
    parameter: np.ndarray | None = None


@dataclass(frozen=True)
class Loss:
    """An elementwise loss and what descending it well takes.

    Attributes:
        elementwise: `(prediction, target) -> loss` in JAX, with the units' parameter, if any, as a
            third argument.
        units: `(sorted targets, groups, intercept) -> Units`.
        check: raises ValueError for targets that the loss is not defined for.
        curvature: `standard targets -> bound on the second derivative` on the way and at the end; None where
            the curvature at the start is bound enough or nothing is known.
        kinked: whether the gradient jumps, so that no constant rate converges.
        response: `prediction -> expected target`, for pictures.
    """

    elementwise: Elementwise
    units: Callable[[np.ndarray, Groups, bool], Units]
    check: Callable[[np.ndarray], None] = field(default=lambda target: None)
    curvature: Callable[[np.ndarray], np.ndarray] | None = None
    kinked: bool = False
    response: Callable[[np.ndarray], np.ndarray] = field(default=lambda prediction: prediction)


# Elementwise losses. optax is imported inside: only the command line's extra brings it.


def squared(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """½ (prediction − target)²."""
    import optax

    return optax.losses.l2_loss(prediction, target)


def absolute(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """|prediction − target|."""
    return jnp.abs(prediction - target)


def huber(prediction: jax.Array, target: jax.Array, delta: jax.Array) -> jax.Array:
    """½ e² where |e| ≤ δ, else δ (|e| − ½ δ), with e = prediction − target (Huber 1964)."""
    import optax

    return optax.losses.huber_loss(prediction, target, delta=delta)


def logistic(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """−log of the probability given to a target of 0 or 1, the prediction being the log odds of 1."""
    import optax

    return optax.losses.sigmoid_binary_cross_entropy(prediction, target)


def poisson(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """exp(prediction) − target · prediction: −log likelihood of a count, log link, without its constant."""
    return jnp.exp(prediction) - target * prediction


@functools.cache
def quantile_loss(quantile: float) -> Elementwise:
    """The loss max(q e, (q − 1) e) with e = target − prediction (Koenker and Bassett 1978).

    Args:
        quantile: q, between 0 and 1: the share of targets that shall lie below the prediction.

    Returns:
        The elementwise loss; the same function for the same q, so that nothing is compiled twice.

    >>> quantile_loss(0.75)(jnp.array([1.0, 3.0]), jnp.array([2.0, 2.0])).tolist()
    [0.75, 0.25]
    """

    def loss(prediction: jax.Array, target: jax.Array) -> jax.Array:
        error = target - prediction
        return jnp.maximum(quantile * error, (quantile - 1) * error)

    return loss


# Units.


def _as_they_are(target: np.ndarray, groups: Groups, intercept: bool) -> Units:
    zero, one = np.zeros(len(groups.sizes)), np.ones(len(groups.sizes))
    return Units(zero, one, zero, one, one, zero, one)


def _standardised(target: np.ndarray, groups: Groups, intercept: bool, *, degree: int) -> Units:
    """For a loss that grows with the error's `degree`-th power."""
    one = np.ones(len(groups.sizes))
    centre = groups.mean(target) * intercept
    spread = groups.spread(target, centre)
    return Units(centre, spread, centre, spread, spread**degree, 0 * one, one)


def _huber_units(target: np.ndarray, groups: Groups, intercept: bool, *, delta: float) -> Units:
    standard = _standardised(target, groups, intercept, degree=2)
    bend = delta / standard.scale
    # Where the bend is far below the spread, the loss is nearly straight: divided by its slope it stays of
    # order 1.
    slope = np.minimum(bend, 1.0)
    return Units(
        standard.shift,
        standard.scale,
        standard.link_shift,
        standard.link_scale,
        standard.loss_scale * slope,
        standard.loss_shift,
        slope,
        bend,
    )


def _poisson_units(target: np.ndarray, groups: Groups, intercept: bool) -> Units:
    """Counts in units of their mean m, and predictions from log m on, since exp(f + log m) = m exp(f)."""
    zero, one = np.zeros(len(groups.sizes)), np.ones(len(groups.sizes))
    mean = groups.mean(target)
    mean = np.where(mean > 0, mean, 1.0)
    if not intercept:  # nothing to put log m into
        return Units(zero, one, zero, one, mean, zero, mean)
    return Units(zero, mean, np.log(mean), one, mean, -groups.mean(target) * np.log(mean), one)


# Targets.


def _check_logistic(target: np.ndarray) -> None:
    _check_rows(target, (target == 0) | (target == 1), "the logistic loss wants 0 or 1")


def _check_poisson(target: np.ndarray) -> None:
    _check_rows(target, target >= 0, "the Poisson loss wants counts, 0 or more")


def _check_rows(target: np.ndarray, fine: np.ndarray, wanted: str) -> None:
    if not fine.all():
        row = int(np.argmin(fine))
        raise ValueError(f"target, row {row + 1}: {target[row]:g} was given; {wanted}")


# By name.


def named_loss(loss: str | Elementwise, delta: float = 1.0, quantile: float = 0.5) -> Loss:
    """Find a loss by its name.

    Args:
        loss: "squared", "absolute", "huber", "logistic", "poisson", "quantile", or "module:function" or a
            function: an elementwise loss in JAX.
        delta: the Huber loss's bend, in units of the target.
        quantile: the quantile loss's quantile.

    Returns:
        The loss.

    Raises:
        ValueError: if there is no such loss, or the function is not elementwise.

    >>> named_loss("square")
    Traceback (most recent call last):
    ValueError: no loss 'square'; it must be one of squared, absolute, huber, logistic, poisson, quantile, ...
    """
    if not 0 < delta < np.inf:
        raise ValueError(f"delta must be positive, got {delta}")
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must lie between 0 and 1, got {quantile}")
    known = {
        "squared": Loss(squared, functools.partial(_standardised, degree=2)),
        "absolute": Loss(absolute, functools.partial(_standardised, degree=1), kinked=True),
        "huber": Loss(huber, functools.partial(_huber_units, delta=delta), curvature=np.ones_like),
        "logistic": Loss(logistic, _as_they_are, _check_logistic, response=lambda f: 0.5 + 0.5 * np.tanh(f / 2)),
        # At the optimum the mean of exp(f) is the mean target; twice the larger of start and end leaves room
        # between.
        "poisson": Loss(
            poisson,
            _poisson_units,
            _check_poisson,
            lambda target: 2 * np.maximum(target, 1.0),
            response=np.exp,
        ),
        "quantile": Loss(quantile_loss(quantile), functools.partial(_standardised, degree=1), kinked=True),
    }
    if isinstance(loss, str) and loss in known:
        return known[loss]
    if isinstance(loss, str) and ":" not in loss:
        raise ValueError(f"no loss '{loss}'; it must be one of {', '.join(known)}, or module:function for your own")
    own = _imported(loss) if isinstance(loss, str) else loss
    _check_elementwise(own, loss)
    return Loss(own, _as_they_are, curvature=functools.partial(_curvature, own))


def _curvature(loss: Elementwise, target: np.ndarray) -> np.ndarray:
    """Second derivative of a loss nothing is known of: at a prediction of 0, where descent starts, and, if
    the loss is smaller there, at a prediction that hits the target, where a robust loss curves most."""

    def of_one(prediction: jax.Array, target: jax.Array) -> jax.Array:
        return loss(prediction[None], target[None])[0]

    def at(prediction: jax.Array) -> tuple[jax.Array, jax.Array]:
        second = jax.vmap(jax.grad(jax.grad(of_one)))(prediction, t)
        return loss(prediction, t), jnp.where(jnp.isfinite(second), jnp.abs(second), jnp.zeros_like(second))

    t = jnp.asarray(target.ravel(), np.float32)
    (start_loss, start), (hit_loss, hit) = at(jnp.zeros_like(t)), at(t)
    return np.asarray(jnp.where(hit_loss < start_loss, jnp.maximum(start, hit), start)).reshape(target.shape)


def _imported(name: str) -> Any:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"loss '{name}': module '{module_name}' cannot be imported: {error}") from error
    if not callable(found := getattr(module, function_name, None)):
        raise ValueError(f"loss '{name}': module '{module_name}' has no function '{function_name}'")
    return found


def _check_elementwise(loss: Elementwise, name: object) -> None:
    """Call the loss on shapes alone: an error of the user's is told before any work is done."""
    row = jax.ShapeDtypeStruct((3,), np.float32)
    try:
        result = jax.eval_shape(loss, row, row)
    except Exception as error:
        raise ValueError(
            f"loss '{name}' fails on (predictions [rows], targets [rows]): {type(error).__name__}: {error}"
        ) from error
    if getattr(result, "shape", None) != (3,):
        shape = getattr(result, "shape", type(result).__name__)
        raise ValueError(
            f"loss '{name}' must be elementwise, (predictions [rows], targets [rows]) -> losses [rows]; "
            f"for 3 rows it returned {shape}"
        )
