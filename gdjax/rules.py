"""Update rules: how one problem's weights move, given its gradient.

A rule has `start(weights) -> weights`, `init(weights, loss, hyper) -> state` and `update(gradient, state, weights,
step, loss, hyper) -> (weights, state)`, all for ONE problem, where `loss(weights)` closes over the problem's data and
`hyper` are the problem's hyperparameters.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gdjax.stop import widest

POWER_ITERATIONS = 24


@dataclasses.dataclass(frozen=True)
class Descent:
    """Plain gradient descent, `w ← w − r·∂l/∂w`; the rate is a hyperparameter, a schedule, or found from curvature.

    `sticky`: once a weight is not finite it never is again, so finite weights at the end prove every step finite.
    """

    schedule: Callable[[Any], Any] | None = None
    auto: bool = False
    sticky = lasting = True

    def start(self, weights: Any) -> Any:
        return weights

    def init(self, weights: Any, loss: Callable[[Any], Any], hyper: dict[str, Any]) -> Any:
        return curvature_rate(weights, loss) if self.auto else ()

    def update(
        self,
        gradient: Any,
        state: Any,
        weights: Any,
        step: Any,
        loss: Callable[[Any], Any],
        hyper: dict[str, Any],
    ) -> tuple[Any, Any]:
        rate = self.schedule(step) if self.schedule else state if self.auto else hyper["learning_rate"]

        def move(w: Any, g: Any) -> Any:
            return w - jnp.asarray(rate).astype(w.dtype) * g

        return jax.tree.map(move, weights, gradient), state


@dataclasses.dataclass(frozen=True)
class Transformation:
    """An optax-style `init`/`update` pair, or a function that makes one from the problem's hyperparameters.

    `lasting`: weights that are not finite stay so, since updates are added to them; but a rule may forgive a gradient
    that is not finite.
    """

    optimizer: Any
    constants: tuple[tuple[str, Any], ...] = ()
    sticky = False
    lasting = True

    def start(self, weights: Any) -> Any:
        return weights

    def build(self, hyper: dict[str, Any]) -> Any:
        if is_pair(self.optimizer):
            return self.optimizer
        return self.optimizer(**dict(self.constants), **hyper)

    def init(self, weights: Any, loss: Callable[[Any], Any], hyper: dict[str, Any]) -> Any:
        return jax.tree.map(jnp.asarray, self.build(hyper).init(weights))

    def update(
        self,
        gradient: Any,
        state: Any,
        weights: Any,
        step: Any,
        loss: Callable[[Any], Any],
        hyper: dict[str, Any],
    ) -> tuple[Any, Any]:
        pair = self.build(hyper)
        wanted = extra_arguments(pair.update)
        extra = {"grad": gradient, "value_fn": loss}
        if "value" in wanted:
            extra["value"] = loss(weights)
        moves, new = pair.update(gradient, state, weights, **{name: extra[name] for name in wanted})
        # A rule may compute its state in a wider type than it started with; the loop's state keeps its types.
        new = jax.tree.map(lambda a, b: jnp.asarray(b).astype(jnp.asarray(a).dtype), state, new)
        return jax.tree.map(lambda w, m: (w + m).astype(w.dtype), weights, moves), new


FreeRule = Descent | Transformation


@dataclasses.dataclass(frozen=True)
class Projected:
    """Another rule whose start and whose every update are brought into a set: `w ← P(rule(w))`.

    With plain descent this is projected gradient descent, `w ← P(w − r·∂l/∂w)` (Bertsekas, Nonlinear Programming, 3rd
    ed., section 3.3). Not `sticky`: a projection may make an infinite weight finite again.
    """

    rule: FreeRule
    project: Callable[[Any], Any]
    sticky = lasting = False

    def start(self, weights: Any) -> Any:
        return self.project(weights)

    def init(self, weights: Any, loss: Callable[[Any], Any], hyper: dict[str, Any]) -> Any:
        return self.rule.init(weights, loss, hyper)

    def update(
        self,
        gradient: Any,
        state: Any,
        weights: Any,
        step: Any,
        loss: Callable[[Any], Any],
        hyper: dict[str, Any],
    ) -> tuple[Any, Any]:
        moved, state = self.rule.update(gradient, state, weights, step, loss, hyper)
        return self.project(moved), state


Rule = FreeRule | Projected


def is_pair(optimizer: Any) -> bool:
    return callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))


def extra_arguments(update: Callable[..., Any]) -> list[str]:
    """Which of optax's extra arguments an update takes."""
    parameters = inspect.signature(update).parameters.values()
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return [name for name in ("value", "grad", "value_fn") if takes_all or name in names]


def curvature_rate(weights: Any, loss: Callable[[Any], Any]) -> Any:
    """The rate `1/L`, L the largest curvature at `weights`, by power iteration on Hessian-vector products.

    `v ← Hv/‖Hv‖`, `L = ‖Hv‖` (Golub and Van Loan, Matrix Computations, 4th ed., section 7.3.1). A loss without
    curvature (the tutorial's residual) gives no scale: its rate is 1.
    """
    slope = jax.grad(loss)
    leaves, treedef = jax.tree.flatten(weights)

    def product(direction: list[Any]) -> list[Any]:
        tangent = jax.tree.unflatten(treedef, direction)
        return jax.tree.leaves(jax.jvp(slope, (weights,), (tangent,))[1])

    def norm(direction: list[Any]) -> Any:
        total = sum(jnp.sum(jnp.square(d.astype(dtype))) for d in direction)
        return jnp.sqrt(jnp.asarray(total, dtype))

    dtype = widest(leaves)
    tiny = jnp.finfo(dtype).tiny

    def iterate(carry: tuple[list[Any], Any], _: None) -> tuple[tuple[list[Any], Any], None]:
        direction, _ = carry
        image = product(direction)
        length = norm(image)
        scale = 1 / jnp.maximum(length, tiny)
        return ([i * scale.astype(i.dtype) for i in image], length), None

    start = [uneven(leaf.shape, leaf.dtype) for leaf in leaves]
    scale = 1 / norm(start)
    start = [s * scale.astype(s.dtype) for s in start]
    (_, length), _ = jax.lax.scan(iterate, (start, jnp.zeros((), dtype)), None, length=POWER_ITERATIONS)
    return jnp.where(length > tiny, 1 / length, jnp.ones((), dtype))


def uneven(shape: tuple[int, ...], dtype: Any) -> Any:
    """A fixed direction with no symmetry of its own, so that it has a part along every eigenvector in practice."""
    size = 1
    for d in shape:
        size *= d
    entries = 1 + jnp.modf(jnp.arange(1, size + 1, dtype=jnp.float32) * jnp.float32(0.618034))[0]
    return entries.astype(dtype).reshape(shape)
