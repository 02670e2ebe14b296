"""The tutorial's gradient descent as pure functions of one problem.

A problem is `f(x, w) = x·w` with target `t`. Every function takes one problem, scalar or vector, and traces under
`jit`, `vmap` and `grad`; a batch is `jax.vmap` of them, or `gdjax.minimize`, which is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def predict(x: Any, w: Any) -> Array:
    """Prediction of the linear model, `f(x, w) = x·w`.

    Args:
        x: input, a scalar or a vector `[d]`, floating point, in the user's units.
        w: weights, of the shape of `x`.

    Returns:
        The scalar `x·w`, in the dtype of the inputs.

    Raises:
        TypeError: the shapes do not match.

    >>> float(predict(2.0, 1.0))
    2.0
    >>> float(predict(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])))
    11.0
    """
    return jnp.dot(jnp.asarray(x), jnp.asarray(w))


def residual_loss(w: Any, x: Any, t: Any) -> Array:
    """The tutorial's signed loss, `l(x, w, t) = t − x·w`; its derivative is `∂l/∂w = −x`.

    It has no minimum: descent on it drives the loss down at the constant speed `r·x²` and past zero, so stop it with
    `gdjax.stop.loss_below`.

    Args:
        w: weights, scalar or `[d]`.
        x: input, of the shape of `w`.
        t: target, scalar.

    Returns:
        The scalar loss, in the dtype of the inputs.

    Raises:
        TypeError: the shapes do not match.

    >>> float(residual_loss(1.0, 2.0, 4.0))
    2.0
    """
    return jnp.asarray(t) - predict(x, w)


def squared_loss(w: Any, x: Any, t: Any) -> Array:
    """Half the squared residual, `½(t − x·w)²`; its derivative is `∂l/∂w = −x(t − x·w)`.

    Args:
        w: weights, scalar or `[d]`.
        x: input, of the shape of `w`.
        t: target, scalar.

    Returns:
        The scalar loss, in the dtype of the inputs.

    Raises:
        TypeError: the shapes do not match.

    >>> float(squared_loss(1.0, 2.0, 4.0))
    2.0
    """
    return 0.5 * jnp.square(residual_loss(w, x, t))


def gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of `loss` in its first argument, `∂l/∂w`, by `jax.grad`.

    Args:
        loss: `loss(weights, *data) -> scalar`, a pure JAX function of one problem.

    Returns:
        A function of the same arguments that returns a pytree like `weights`.

    Raises:
        TypeError: on calling it, if the loss is not a real scalar or the weights are not floating point.

    >>> float(gradient(residual_loss)(1.0, 2.0, 4.0))
    -2.0
    """
    return jax.grad(loss)


def update(w: Any, g: Any, r: Any) -> Any:
    """One step of gradient descent, `w ← w − r·∂l/∂w`.

    Args:
        w: weights, any pytree of floating point arrays.
        g: gradient, a pytree like `w`.
        r: learning rate, a scalar; it is brought to the dtype of each leaf of `w`.

    Returns:
        The new weights, a pytree like `w`.

    Raises:
        ValueError: the two pytrees differ.

    >>> round(float(update(1.0, -2.0, 0.1)), 6)
    1.2
    """
    return jax.tree.map(lambda a, b: jnp.asarray(a) - jnp.asarray(r, jnp.result_type(a)) * b, w, g)
