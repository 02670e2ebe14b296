"""The tutorial in plain Python: the scalar reference that everything else is checked against.

One problem: predict f(x, w) = x·w, measure a loss against a target t, take the loss's derivative from the
difference quotient, and step against it: w ← w − r·∂l/∂w. Numbers may be float, Fraction or Decimal (one kind
per call); weights and inputs may be scalars or equally long sequences. Sums run from left to right, starting
with the first product. Nothing here imports JAX or NumPy; with Fractions every result is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Number = Any  # float, Fraction or Decimal
Weights = Any  # a Number, or a sequence of them
Loss = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Trajectory:
    """Weights and losses of one descent.

    Attributes:
        weights: steps + 1 entries; entry k are the weights after k updates, a number or a tuple of them.
        losses: steps + 1 numbers; entry k is the loss at `weights[k]`.

    >>> descend(1.0, 2.0, 4.0, 0.25, 1)
    Trajectory(weights=(1.0, 2.0), losses=(2.0, 0.0))
    """

    weights: tuple[Any, ...]
    losses: tuple[Any, ...]


def is_vector(w: Weights) -> bool:
    """Whether weights are a sequence (a list, a tuple, a one-dimensional array) and not a number.

    Args:
        w: weights, a number or a sequence.

    Returns:
        A bool.

    Raises:
        Nothing: whatever has a length is a sequence.

    >>> is_vector([1.0, 2.0]), is_vector(1.0)
    (True, False)
    """
    return hasattr(w, "__len__")


def predict(x: Weights, w: Weights) -> Any:
    """The model f(x, w) = x·w; for sequences x₀w₀ + x₁w₁ + …, added from left to right.

    Args:
        x: inputs, a number or a sequence of n numbers.
        w: weights, shaped as x.

    Returns:
        A number of the kind that came in.

    Raises:
        ValueError: x and w differ in length, or are empty.

    >>> predict(2.0, 1.0), predict([1, 2, 3], [4, 5, 6])
    (2.0, 32)
    """
    if not is_vector(w) and not is_vector(x):
        return x * w
    if not (is_vector(w) and is_vector(x)) or len(x) != len(w) or len(w) == 0:
        raise ValueError(f"x and w must be scalars or equally long sequences, not empty; got x={x!r}, w={w!r}")
    total = x[0] * w[0]
    for x_i, w_i in zip(x[1:], w[1:], strict=True):
        total = total + x_i * w_i
    return total


def residual_loss(w: Weights, x: Weights, t: Number) -> Any:
    """The tutorial's signed loss l = t − f(x, w).

    Args:
        w: weights, a number or a sequence of n numbers.
        x: inputs, shaped as w.
        t: target, a number.

    Returns:
        A number of the kind that came in.

    Raises:
        ValueError: as `predict`.

    >>> residual_loss(1.0, 2.0, 4.0)
    2.0
    """
    return t - predict(x, w)


def squared_loss(w: Weights, x: Weights, t: Number) -> Any:
    """Half the squared residual, l = ½(t − f(x, w))².

    Args:
        w, x, t: as in `residual_loss`.

    Returns:
        A number of the kind that came in, in units of t squared.

    Raises:
        ValueError: as `predict`.

    >>> squared_loss(1.0, 2.0, 4.0)
    2.0
    """
    residual = residual_loss(w, x, t)
    return residual * residual / 2


def difference_quotient(loss: Loss, w: Weights, x: Weights, t: Number, h: Number, index: int = 0) -> Any:
    """Slope of the secant, (l(w + h·eᵢ) − l(w)) / h, with eᵢ the unit vector along weight `index`.

    Args:
        loss: `loss(w, x, t)`, any function of numbers.
        w: weights, a number or a sequence of n numbers.
        x: inputs, shaped as w.
        t: target, a number.
        h: how far to move the weight, in its units, not 0.
        index: which weight, from 0; of no effect for a number.

    Returns:
        A number: units of the loss per unit of the weight.

    Raises:
        ZeroDivisionError: h is 0.
        IndexError: there is no such weight.

    >>> from fractions import Fraction
    >>> difference_quotient(squared_loss, Fraction(1), Fraction(2), Fraction(4), Fraction(1, 100))
    Fraction(-199, 50)
    """
    moved = [*w[:index], w[index] + h, *w[index + 1 :]] if is_vector(w) else w + h
    return (loss(moved, x, t) - loss(w, x, t)) / h


def difference_quotients(
    loss: Loss, w: Weights, x: Weights, t: Number, h: Number, halvings: int, index: int = 0
) -> list[Any]:
    """The difference quotients at h, h/2, h/4, …: their limit is the partial derivative.

    Args:
        loss, w, x, t, h, index: as in `difference_quotient`.
        halvings: how often h is halved, 0 or more.

    Returns:
        A list of halvings + 1 numbers.

    Raises:
        ZeroDivisionError, IndexError: as `difference_quotient`.

    >>> from fractions import Fraction
    >>> difference_quotients(squared_loss, Fraction(1), Fraction(2), Fraction(4), Fraction(1), 2)
    [Fraction(-2, 1), Fraction(-3, 1), Fraction(-7, 2)]
    """
    return [difference_quotient(loss, w, x, t, h / 2**k, index) for k in range(halvings + 1)]


def partial_derivative(loss: Loss, w: Weights, x: Weights, t: Number, index: int = 0) -> Any:
    """The limit of the difference quotient: ∂l/∂wᵢ = −xᵢ (residual loss) or −xᵢ·(t − f) (squared loss).

    Args:
        loss: `residual_loss` or `squared_loss` of this module.
        w: weights, a number or a sequence of n numbers.
        x: inputs, shaped as w.
        t: target, a number.
        index: which weight, from 0; of no effect for a number.

    Returns:
        A number: units of the loss per unit of the weight.

    Raises:
        ValueError: another loss.

    >>> partial_derivative(residual_loss, 1.0, 2.0, 4.0), partial_derivative(squared_loss, 1.0, 2.0, 4.0)
    (-2.0, -4.0)
    """
    x_i = x[index] if is_vector(x) else x
    if loss is residual_loss:
        return -x_i
    if loss is squared_loss:
        return -(x_i * residual_loss(w, x, t))
    raise ValueError(f"loss must be residual_loss or squared_loss of gdjax.reference, got {loss!r}")


def update(w: Weights, g: Weights, learning_rate: Number) -> Any:
    """One step of gradient descent, w − r·g (entry by entry for sequences).

    Args:
        w: weights, a number or a sequence of n numbers.
        g: the gradient at them, shaped as w.
        learning_rate: r, a number, in units of the weights squared per unit of the loss.

    Returns:
        The new weights, a number or a tuple.

    Raises:
        ValueError: w and g differ in length.

    >>> update(1.0, -2.0, 0.1)
    1.2
    """
    if is_vector(w):
        return tuple(update(w_i, g_i, learning_rate) for w_i, g_i in zip(w, g, strict=True))
    return w - learning_rate * g


def descend(
    w: Weights, x: Weights, t: Number, learning_rate: Number, steps: int, loss: Loss = squared_loss
) -> Trajectory:
    """Take `steps` steps of gradient descent from w and return the whole trajectory.

    Args:
        w: start weights, a scalar or a sequence.
        x: inputs, shaped as w.
        t: target, a scalar.
        learning_rate: r in w ← w − r·∂l/∂w.
        steps: how many updates, 0 or more.
        loss: `residual_loss` or `squared_loss`.

    Returns:
        A `Trajectory` with the start and the state after every update.

    Raises:
        ValueError: steps is negative; another loss; w and x differ in length.

    >>> from fractions import Fraction
    >>> run = descend(Fraction(1), Fraction(2), Fraction(4), Fraction(1, 10), 1, loss=residual_loss)
    >>> [str(w) for w in run.weights], [str(l) for l in run.losses]
    (['1', '6/5'], ['2', '8/5'])
    """
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps}")
    w = tuple(w) if is_vector(w) else w
    weights, losses = [w], [loss(w, x, t)]
    for _ in range(steps):
        if is_vector(w):
            w = update(w, [partial_derivative(loss, w, x, t, i) for i in range(len(w))], learning_rate)
        else:
            w = update(w, partial_derivative(loss, w, x, t), learning_rate)
        weights.append(w)
        losses.append(loss(w, x, t))
    return Trajectory(tuple(weights), tuple(losses))
