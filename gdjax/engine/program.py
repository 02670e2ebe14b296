"""One problem's program: init, step, finished and report, composed of a loss, a rule and a stop rule.

Everything here is a pure function of ONE problem; the engines only decide how many lanes run it and when.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gdjax.rules import Rule
from gdjax.stop import Step, StopRule, largest, widest

RUNNING = -1
RAN_ALL_STEPS = 0
CONVERGED = 1
DIVERGED = 2
STOPPED = 3
WAITING = -2
"""Something ends this problem within the next strides: it waits to take them one by one."""

AWAY = -3
"""Runs, but has been taken out of its lane: it is to be seated again."""

MOVING = ("weights", "state", "memory", "past")
"""What of a lane an update changes, apart from the count of updates."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A loss, how it descends, when it is done, and which figure of it is recorded on the way."""

    loss: Callable[..., Any]
    rule: Rule
    stop: StopRule | None
    record: Callable[[Step], Any] | None = None

    def __post_init__(self) -> None:
        rule = "learning_rate, optimizer or project"
        for name, part in {"loss": self.loss, rule: self.rule, "stop": self.stop, "record": self.record}.items():
            try:
                hash(part)  # what is compiled is looked up by it
            except TypeError as error:
                raise TypeError(f"{name}: {error}; pass a plain function, or an object that can be hashed") from None

    def bound(self, data: Any) -> Callable[[Any], Any]:
        return lambda weights: self.loss(weights, *data)

    def start(self, weights: Any) -> Any:
        """The weights of a fresh start: those given, inside the set that they are held in."""
        return self.rule.start(weights)

    def init(self, weights: Any, data: Any, hyper: Any) -> Any:
        """The rule's state before the first update."""
        return self.rule.init(weights, self.bound(data), hyper)

    def step(self, weights: Any, state: Any, healthy: Any, index: Any, data: Any, hyper: Any) -> tuple[Any, Any, Any]:
        """One update, not looking whether it is a good one.

        A gradient that is not finite leaves its trace: in the weights where they keep it, as NaN, since an array of its
        own would have every step computed once more; elsewhere `healthy` goes false.
        """
        gradient = jax.grad(self.loss)(weights, *data)
        if not self.rule.sticky:  # for plain descent each entry is looked at once
            gradient = computed_once(gradient, weights, data)
        new, state = self.rule.update(gradient, state, weights, index, self.bound(data), hyper)
        if not self.rule.lasting:
            healthy = healthy & finite(gradient) & finite(new)
        elif not self.rule.sticky:
            new = jax.tree.map(lambda w, g: jnp.where(jnp.isfinite(g), w, jnp.full_like(w, jnp.nan)), new, gradient)
        return new, state, healthy

    def slope(self, weights: Any, data: Any) -> tuple[Any, Any]:
        """Loss and gradient."""
        loss, gradient = jax.value_and_grad(self.loss)(weights, *data)
        return loss, computed_once(gradient, weights, data)

    def report(self, weights: Any, data: Any) -> tuple[Any, Any]:
        """Loss and largest absolute gradient entry.

        Apart from each other: what both need, an exponential say, a compiler would put down for both, in many little
        loops where one would do (for logistic regressions these took LLVM as long as all else).
        """
        _, gradient = self.slope(weights, data)
        return self.loss(computed_once(weights, weights, data), *data), largest(gradient)

    def begin(self, weights: Any, state: Any, index: Any, data: Any) -> dict[str, Any]:
        """The lane of a problem with a stop rule: everything it must remember between steps."""
        return {
            "weights": weights,
            "state": state,
            "memory": jax.tree.map(jnp.asarray, self.stop.init()) if self.stop else (),
            "past": self.fresh_past(weights, data),
            "index": index,
            "status": jnp.full((), RUNNING, jnp.int32),
        }

    def remembered(self, weights: Any, data: Any, past: dict[str, Any]) -> list[str]:
        """Which figures of the previous step are looked at: the others are not kept."""

        def seen(past: dict[str, Any], weights: Any) -> Any:
            loss = jnp.zeros((), past["previous_loss"].dtype)
            norm = jnp.zeros((), past["update_norm"].dtype)
            step = Step(jnp.int32(0), weights, loss, weights, norm, past["previous_loss"], past["update_norm"])
            noted = self.record(step) if self.record else ()
            done = self.stop.test(step, jax.tree.map(jnp.asarray, self.stop.init())) if self.stop else ()
            return noted, done

        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (past, weights))
        jaxpr = jax.make_jaxpr(seen)(*shapes).jaxpr
        used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
        return [name for name, v in zip(sorted(past), jaxpr.invars, strict=False) if id(v) in used]

    def look(self, lane: dict[str, Any], data: Any, hyper: Any, test: Any = None) -> tuple[dict[str, Any], Any, Any]:
        """`(lane after one update, what `test` says before it, whether the update is finite)`; by default whether the
        rule holds."""
        weights = lane["weights"]
        loss, gradient = self.slope(weights, data)
        done, memory = (test or self.finished)(seen(lane, loss, gradient), lane["memory"])
        new, state = self.rule.update(gradient, lane["state"], weights, lane["index"], self.bound(data), hyper)
        after = {
            **lane,
            "weights": new,
            "state": state,
            "memory": memory,
            "past": self.behind(weights, new, loss, lane["past"]),
            "index": lane["index"] + jnp.int32(1),
        }
        # For a sticky rule finite weights prove a finite gradient.
        sound = finite(new) if self.rule.sticky else finite(new) & finite(gradient)
        return after, done, sound

    def leap(
        self, moving: dict[str, Any], index: Any, noted: Any, data: Any, hyper: Any
    ) -> tuple[dict[str, Any], Any]:
        """One update taken blindly, and what has been `noted` (None before the first) of what ends a problem."""
        sofar, healthy = (None, jnp.ones((), bool)) if noted is None else noted
        watch = None if self.stop is None else functools.partial(self.stop._watch, noted=sofar)
        after, sofar, sound = self.look({**moving, "index": index}, data, hyper, watch)
        if not self.rule.sticky:
            healthy = healthy & sound
        if not self.rule.lasting:  # a projection may have made weights finite again that were marked
            healthy = healthy & finite(moving["weights"])
        return {name: after[name] for name in MOVING}, (sofar, healthy)

    def stay(self, moving: dict[str, Any], noted: Any, alone: bool = False) -> dict[str, Any]:
        """The same, marked where something that ends the problem has been noted, or may have been."""
        sofar, healthy = noted
        return self.mark(moving, healthy if self.stop is None else healthy & ~self.stop._met(sofar, alone))

    def stay_after_one(self, moving: dict[str, Any], noted: Any) -> dict[str, Any]:
        """Marked where one update alone has been noted that ends the problem: then nothing is left open."""
        return self.stay(moving, noted, alone=True)

    def mark(self, moving: dict[str, Any], quiet: Any) -> dict[str, Any]:
        """What ends the problem written into the weights as NaN, where it stays: one array tells both how the weights
        are and whether something happened."""
        first, *others = jax.tree.leaves(moving["weights"])
        marked = [jnp.where(quiet, first, jnp.full_like(first, jnp.nan)), *others]
        return {**moving, "weights": jax.tree.unflatten(jax.tree.structure(moving["weights"]), marked)}

    def hold(self, kept: dict[str, Any], index: Any, after: dict[str, Any], now: Any) -> tuple[dict[str, Any], Any]:
        """After some strides: a problem to which nothing happened is kept where it stands now, another where it was."""
        runs = finite(after["weights"])
        return jax.tree.map(lambda a, b: either(runs, b, a), kept, after), jnp.where(runs, now, index)

    def advance(self, lane: dict[str, Any], last: Any, data: Any, hyper: Any) -> dict[str, Any]:
        """Test the rule at the current weights, then take one update; a problem that is done stays as it is.

        `last` is the update count at which a problem has run all its steps; it is tested once more there.
        An update whose gradient or weights are not finite is not taken: the problem has diverged.
        """
        after, done, sound = self.look(lane, data, hyper)
        ended = jnp.where(
            done,
            jnp.int32(CONVERGED),
            jnp.where(
                lane["index"] >= last,
                jnp.int32(RAN_ALL_STEPS),
                jnp.where(sound, jnp.int32(RUNNING), jnp.int32(DIVERGED)),
            ),
        )
        status = jnp.where(lane["status"] == RUNNING, ended, lane["status"])
        moves = status == RUNNING
        kept = jax.tree.map(lambda a, b: either(moves, a, b), after, lane)
        return {**kept, "status": status}

    def finished(self, step: Step, memory: Any) -> tuple[Any, Any]:
        """Whether the rule holds, and its memory."""
        if self.stop is None:
            return jnp.zeros((), bool), ()
        done, memory = self.stop.test(step, memory)
        return jnp.asarray(done, bool), memory

    def figure(self, lane: dict[str, Any], data: Any) -> Any:
        """What is recorded of a problem at its current weights."""
        assert self.record is not None
        step = seen(lane, *self.slope(lane["weights"], data))
        return jax.tree.map(jnp.asarray, self.record(step))

    def noted(self, lane: dict[str, Any], data: Any) -> Any:
        """What is recorded of a problem that strides, unless something has happened to it: then nothing."""
        runs = finite(lane["weights"])
        return jax.tree.map(lambda leaf: jnp.where(runs, leaf, absent(leaf)), self.figure(lane, data))

    def behind(self, before: Any, after: Any, loss: Any, past: dict[str, Any]) -> dict[str, Any]:
        """What is remembered of the update that led from `before`, with this loss, to `after`."""
        kept = dict(past)
        if "previous_loss" in kept:
            kept["previous_loss"] = loss
        if "update_norm" in kept:
            size = largest(jax.tree.map(jnp.subtract, after, before))
            kept["update_norm"] = size.astype(kept["update_norm"].dtype)
        return kept

    def fresh_past(self, weights: Any, data: Any) -> dict[str, Any]:
        """What is remembered of the update before the first one."""
        scalar = jax.eval_shape(self.loss, weights, *data).dtype
        past = {"previous_loss": jnp.full((), jnp.inf, scalar), "update_norm": jnp.full((), jnp.inf, widest(weights))}
        return {name: past[name] for name in self.remembered(weights, data, past)}


def computed_once(tree: Any, weights: Any, data: Any) -> Any:
    """A gradient, say, for several that look at it: new weights, the moments of a rule, a stop rule.

    The barrier says to the lanes kernel that compilers shall not sum over the problem's data anew for each of them.
    Where a problem is scalars throughout, to repeat is cheaper.
    """
    flat = all(jnp.ndim(leaf) == 0 for leaf in jax.tree.leaves((weights, data)))
    return tree if flat else jax.lax.optimization_barrier(tree)


def seen(lane: dict[str, Any], loss: Any, gradient: Any) -> Step:
    """What rules and records may look at."""
    unknown = jnp.full((), jnp.nan, loss.dtype)
    past = {"previous_loss": unknown, "update_norm": unknown, **lane["past"]}
    return Step(lane["index"], lane["weights"], loss, gradient, largest(gradient), **past)


def absent(leaf: Any) -> Any:
    """What stands for a value that is not there."""
    return jnp.full_like(leaf, jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.zeros_like(leaf)


def either(which: Any, left: Any, right: Any) -> Any:
    """`jnp.where` on the bits: LLVM turns a choice between two arrays of floats into a gather from one or the other."""
    if not jnp.issubdtype(left.dtype, jnp.floating):
        return jnp.where(which, left, right)
    bits = jnp.dtype(f"int{8 * left.dtype.itemsize}")
    chosen = jnp.where(which, jax.lax.bitcast_convert_type(left, bits), jax.lax.bitcast_convert_type(right, bits))
    return jax.lax.bitcast_convert_type(chosen, left.dtype)


def finite(tree: Any) -> Any:
    """Whether every entry of a pytree is finite."""
    result = jnp.ones((), bool)
    for leaf in jax.tree.leaves(tree):
        result = result & jnp.all(jnp.isfinite(leaf))
    return result
