"""One problem's program: init, step, finished and report, composed of a loss, a rule and a stop rule.

Everything here is a pure function of ONE problem; the engines only decide how many lanes run it and when.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gdjax.rules import Rule
from gdjax.stop import Step, StopRule, largest

RUNNING = -1
RAN_ALL_STEPS = 0
CONVERGED = 1
DIVERGED = 2


@dataclasses.dataclass(frozen=True)
class Program:
    """A loss, how it descends, and when it is done."""

    loss: Callable[..., Any]
    rule: Rule
    stop: StopRule | None

    def bound(self, data: Any) -> Callable[[Any], Any]:
        return lambda weights: self.loss(weights, *data)

    def init(self, weights: Any, data: Any, hyper: Any) -> Any:
        """The rule's state before the first update."""
        return self.rule.init(weights, self.bound(data), hyper)

    def step(self, weights: Any, state: Any, healthy: Any, index: Any, data: Any, hyper: Any) -> tuple[Any, Any, Any]:
        """One update, not looking whether it is a good one; `healthy` goes false with the first gradient not finite."""
        gradient = jax.grad(self.loss)(weights, *data)
        new, state = self.rule.update(gradient, state, weights, index, self.bound(data), hyper)
        if not self.rule.sticky:
            healthy = healthy & finite(gradient) & finite(new)
        return new, state, healthy

    def report(self, weights: Any, data: Any) -> tuple[Any, Any]:
        """Loss and largest absolute gradient entry."""
        loss, gradient = jax.value_and_grad(self.loss)(weights, *data)
        return loss, largest(gradient)

    def start(self, weights: Any, state: Any, index: Any, data: Any) -> dict[str, Any]:
        """The lane of a problem that is stopped by a rule: everything it must remember."""
        scalar = jnp.result_type(jax.eval_shape(self.loss, weights, *data).dtype)
        kind = jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(weights)))
        return {
            "weights": weights,
            "state": state,
            "memory": jax.tree.map(jnp.asarray, self.stop.init()) if self.stop else (),
            "previous_loss": jnp.full((), jnp.inf, scalar),
            "update_norm": jnp.full((), jnp.inf, kind),
            "index": index,
            "status": jnp.full((), RUNNING, jnp.int8),
        }

    def advance(self, lane: dict[str, Any], last: Any, data: Any, hyper: Any) -> dict[str, Any]:
        """Test the rule at the current weights, then take one update; a problem that is done stays as it is.

        `last` is the update count at which a problem has run all its steps; it is tested once more there.
        An update whose gradient or weights are not finite is not taken: the problem has diverged.
        """
        weights, index = lane["weights"], lane["index"]
        loss, gradient = jax.value_and_grad(self.loss)(weights, *data)
        done, memory = self.finished(lane, loss, gradient)
        new, state = self.rule.update(gradient, lane["state"], weights, index, self.bound(data), hyper)
        broken = ~(finite(gradient) & finite(new))
        exhausted = index >= last
        status = jnp.where(
            done,
            jnp.int8(CONVERGED),
            jnp.where(
                exhausted, jnp.int8(RAN_ALL_STEPS), jnp.where(broken, jnp.int8(DIVERGED), jnp.int8(RUNNING))
            ),
        )
        running = lane["status"] == RUNNING
        moves = running & (status == RUNNING)

        def taken(after: Any, before: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(moves, a, b), after, before)

        size = largest(jax.tree.map(jnp.subtract, new, weights)).astype(lane["update_norm"].dtype)
        return {
            "weights": taken(new, weights),
            "state": taken(state, lane["state"]),
            "memory": taken(memory, lane["memory"]),
            "previous_loss": taken(loss, lane["previous_loss"]),
            "update_norm": taken(size, lane["update_norm"]),
            "index": index + moves.astype(index.dtype),
            "status": jnp.where(running, status, lane["status"]),
        }

    def finished(self, lane: dict[str, Any], loss: Any, gradient: Any) -> tuple[Any, Any]:
        if self.stop is None:
            return jnp.zeros((), bool), ()
        seen = Step(
            lane["index"], lane["weights"], loss, gradient, largest(gradient), lane["previous_loss"], lane["update_norm"]
        )
        done, memory = self.stop.test(seen, lane["memory"])
        return jnp.asarray(done, bool), memory


def finite(tree: Any) -> Any:
    """Whether every entry of a pytree is finite."""
    result = jnp.ones((), bool)
    for leaf in jax.tree.leaves(tree):
        result = result & jnp.all(jnp.isfinite(leaf))
    return result
