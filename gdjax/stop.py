"""Stop rules: when one problem is done.

A rule is tested at the current weights before each update, and once more after the last. Rules join with `|` (either)
and `&` (both); any function `rule(step) -> bool` of the step's state is a rule as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Step(NamedTuple):
    """What a rule may look at, for ONE problem at its current weights.

    Attributes:
        index: updates taken so far, int32 scalar.
        weights: the current weights.
        loss: the loss at them, scalar.
        gradient: the gradient at them, a pytree like `weights`.
        gradient_norm: its largest absolute entry, scalar.
        previous_loss: the loss one step ago; infinite before the first update.
        update_norm: largest absolute entry of the last update; infinite before the first.

    A rule of one's own, and what it makes of one step:

    >>> def flat(step):
    ...     return (step.gradient_norm <= 1e-3) & (step.index >= 2)
    >>> flat(Step(index=2, weights=1.0, loss=0.5, gradient=0.0, gradient_norm=0.0, previous_loss=0.6, update_norm=0.1))
    True
    """

    index: Any
    weights: Any
    loss: Any
    gradient: Any
    gradient_norm: Any
    previous_loss: Any
    update_norm: Any


class StopRule:
    """A rule with a memory: `init()` gives the memory of a fresh problem, `test` says whether it is done.

    Subclass it for rules that need more of the past than `Step` holds (patience, say): memory is any pytree of arrays
    of fixed shape and dtype, kept per problem.

    >>> class Patience(StopRule):
    ...     "Done when the loss has not fallen for three steps."
    ...
    ...     def init(self):
    ...         return jnp.int32(0)
    ...
    ...     def test(self, step, memory):
    ...         memory = jnp.where(step.loss < step.previous_loss, 0, memory + 1)
    ...         return memory == 3, memory
    >>> import gdjax, numpy as np
    >>> w, x, t = (np.array(values, np.float32) for values in ([1, 3], [2, 2], [4, 4]))
    >>> s = gdjax.minimize(gdjax.kernel.squared_loss, w, (x, t), learning_rate=0.125, steps=500, stop=Patience())
    >>> print(s.status, (s.steps < 500).all())
    [1 1] True
    """

    def init(self) -> Any:
        """The memory before the first test; by default none."""
        return ()

    def test(self, step: Step, memory: Any) -> tuple[Any, Any]:
        """`(done, memory)`: a boolean scalar and the memory for the next test."""
        raise NotImplementedError

    def _watch(self, step: Step, memory: Any, noted: Any) -> tuple[Any, Any]:
        """As `test`, where several steps are taken before anybody asks: instead of whether it is done, what has been
        `noted` of this step and those before it (None: there are none). `_met` says what that means."""
        done, memory = self.test(step, memory)
        return jnp.asarray(done, bool) if noted is None else noted | done, memory

    def _met(self, noted: Any, alone: bool = False) -> Any:
        """Whether the rule has held at any of the steps of which this was noted, or at the one that is `alone`. Of
        several it may be true as well where that cannot be told: they are then taken again, one by one."""
        return noted

    def __or__(self, other: Any) -> StopRule:
        return Joined(jnp.logical_or, "|", self, as_rule(other))

    def __ror__(self, other: Any) -> StopRule:
        return as_rule(other) | self

    def __and__(self, other: Any) -> StopRule:
        return Joined(jnp.logical_and, "&", self, as_rule(other))

    def __rand__(self, other: Any) -> StopRule:
        return as_rule(other) & self

    def _key(self) -> Any:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StopRule) and type(self) is type(other) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((type(self), self._key()))


class Test(StopRule):
    """A rule without memory: a function of the step's state.

    Args:
        function: `function(step) -> bool`, pure, of a `Step`.
        name: how it shows; by default the function's name.

    >>> Test(lambda step: step.index >= 10, "ten") | loss_below(0.5)
    (ten | loss_below(0.5))
    """

    __test__ = False  # not a pytest class

    def __init__(self, function: Callable[[Step], Any], name: str | None = None):
        self.function = function
        self.name = name or str(getattr(function, "__name__", function))

    def test(self, step: Step, memory: Any) -> tuple[Any, Any]:
        return self.function(step), memory

    def _key(self) -> Any:
        return self.function

    def __repr__(self) -> str:
        return self.name


class Below(StopRule):
    """One figure of the step at or below a tolerance, in the figure's dtype.

    Args:
        name: how the rule shows.
        figure: `figure(step) -> scalar`, pure, of a `Step`.
        tol: tolerance in units of the figure, zero or more.

    Raises:
        ValueError: `tol` is negative, NaN or not a number.

    >>> Below("weight_below", lambda step: jnp.abs(step.weights), 0.01) & gradient_below(1e-3)
    (weight_below(0.01) & gradient_below(0.001))
    """

    def __init__(self, name: str, figure: Callable[[Step], Any], tol: float):
        if isinstance(tol, bool) or not isinstance(tol, (int, float)) or math.isnan(tol) or tol < 0:
            function = "; for a traced one, a function such as lambda step: step.loss <= tol"
            mend = function if isinstance(tol, jax.core.Tracer) else ""
            raise ValueError(f"tol={tol!r} in {name}; pass a number, zero or more{mend}")
        self.name, self.figure, self.tol = name, figure, float(tol)

    def test(self, step: Step, memory: Any) -> tuple[Any, Any]:
        figure = jnp.asarray(self.figure(step))
        return figure <= jnp.asarray(self.tol, figure.dtype), memory

    def _watch(self, step: Step, memory: Any, noted: Any) -> tuple[Any, Any]:
        """The lowest figure so far, which is compared once for all steps; a NaN hides none before it."""
        figure = jnp.asarray(self.figure(step))
        if type(self).test is not Below.test or not jnp.issubdtype(figure.dtype, jnp.floating):
            return super()._watch(step, memory, noted)
        return figure if noted is None else jnp.where(figure < noted, figure, noted), memory

    def _met(self, noted: Any, alone: bool = False) -> Any:
        """Of several steps, what comes behind a NaN cannot be told."""
        if noted.dtype == bool:
            return noted
        tol = jnp.asarray(self.tol, noted.dtype)
        return noted <= tol if alone else ~(noted > tol)

    def _key(self) -> Any:
        return (self.name, self.figure, self.tol)

    def __repr__(self) -> str:
        return f"{self.name}({self.tol!r})"


class Joined(StopRule):
    """Two rules, either or both; what `|` and `&` make.

    Args:
        join: `join(left, right) -> bool` of two boolean scalars.
        sign: how it shows.
        left, right: the rules; both are tested at every step, and each keeps its own memory.

    >>> Joined(jnp.logical_or, "|", loss_below(0.5), update_below(0)) == (loss_below(0.5) | update_below(0))
    True
    """

    def __init__(self, join: Callable[[Any, Any], Any], sign: str, left: StopRule, right: StopRule):
        self.join, self.sign, self.left, self.right = join, sign, left, right

    def init(self) -> Any:
        return (self.left.init(), self.right.init())

    def test(self, step: Step, memory: Any) -> tuple[Any, Any]:
        left, memory_left = self.left.test(step, memory[0])
        right, memory_right = self.right.test(step, memory[1])
        return self.join(left, right), (memory_left, memory_right)

    def _watch(self, step: Step, memory: Any, noted: Any) -> tuple[Any, Any]:
        """Of either rule what it notes itself; whether both held at the same step is known there and then alone."""
        if not self._apart:
            return super()._watch(step, memory, noted)
        left, memory_left = self.left._watch(step, memory[0], noted and noted[0])
        right, memory_right = self.right._watch(step, memory[1], noted and noted[1])
        return (left, right), (memory_left, memory_right)

    def _met(self, noted: Any, alone: bool = False) -> Any:
        return self.left._met(noted[0], alone) | self.right._met(noted[1], alone) if self._apart else noted

    @property
    def _apart(self) -> bool:
        """Whether it is enough to know of each rule that it held at some step."""
        return self.join is jnp.logical_or and type(self).test is Joined.test

    def _key(self) -> Any:
        return (self.join, self.sign, self.left, self.right)

    def __repr__(self) -> str:
        return f"({self.left!r} {self.sign} {self.right!r})"


def as_rule(rule: Any) -> StopRule:
    """A rule, from a rule or a function of the step's state.

    Args:
        rule: a `StopRule`, returned as it is, or `rule(step) -> bool`.

    Returns:
        A `StopRule`.

    Raises:
        TypeError: it is neither.

    >>> def late(step):
    ...     return step.index >= 10
    >>> as_rule(late), as_rule(loss_below(0.5))
    (late, loss_below(0.5))
    """
    if isinstance(rule, StopRule):
        return rule
    if callable(rule):
        return Test(rule)
    raise TypeError(
        f"stop is a {type(rule).__name__}; pass None, a rule from gdjax.stop such as gradient_below(1e-6), rules "
        "joined with | and &, or a function of the step's state"
    )


def largest(tree: Any) -> Any:
    """Largest absolute entry over a whole pytree, `max |aᵢ|`; NaN if any entry is.

    Args:
        tree: a pytree of arrays of any shape, at least one of them with entries.

    Returns:
        A scalar of the widest dtype among the leaves.

    Raises:
        ValueError: no leaf has an entry.

    >>> print(largest({"a": jnp.array([1.0, -3.0]), "b": jnp.array(2.0)}))
    3.0
    """
    leaves = [jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree) if leaf.size]
    dtype = widest(leaves)
    result = leaves[0].astype(dtype)
    for leaf in leaves[1:]:
        result = jnp.maximum(result, leaf.astype(dtype))
    return result


def widest(tree: Any) -> Any:
    """The dtype that holds those of all leaves, also where the user forbids implicit promotion.

    Args:
        tree: a pytree of arrays, at least one.

    Returns:
        A NumPy dtype.

    Raises:
        ValueError: there is no leaf.

    >>> print(widest([jnp.ones(3, jnp.float16), jnp.ones((), jnp.float32)]))
    float32
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(tree)))


def _gradient_norm(step: Step) -> Any:
    return step.gradient_norm


def _loss_size(step: Step) -> Any:
    return jnp.abs(step.loss)


def _loss_change(step: Step) -> Any:
    return jnp.abs(step.loss - step.previous_loss)


def _update_norm(step: Step) -> Any:
    return step.update_norm


def gradient_below(tol: float) -> StopRule:
    """Done when the largest absolute entry of the gradient, over the whole pytree, is at most `tol`.

    Args:
        tol: tolerance in units of the loss per unit of the weights, zero or more.

    Returns:
        A rule for `minimize(stop=...)`.

    Raises:
        ValueError: `tol` is negative, NaN or not a number.

    >>> gradient_below(1e-6) | loss_below(1e-3)
    (gradient_below(1e-06) | loss_below(0.001))
    """
    return Below("gradient_below", _gradient_norm, tol)


def loss_below(tol: float) -> StopRule:
    """Done when `|loss| ≤ tol`.

    Args:
        tol: tolerance in units of the loss, zero or more.

    Returns:
        A rule for `minimize(stop=...)`.

    Raises:
        ValueError: `tol` is negative, NaN or not a number.

    >>> loss_below(0.5)
    loss_below(0.5)
    """
    return Below("loss_below", _loss_size, tol)


def loss_change_below(tol: float) -> StopRule:
    """Done when the last update changed the loss by at most `tol`; never before the first update.

    Args:
        tol: tolerance in units of the loss, zero or more.

    Returns:
        A rule for `minimize(stop=...)`.

    Raises:
        ValueError: `tol` is negative, NaN or not a number.

    >>> loss_change_below(1e-9) & gradient_below(1e-3)
    (loss_change_below(1e-09) & gradient_below(0.001))
    """
    return Below("loss_change_below", _loss_change, tol)


def update_below(tol: float) -> StopRule:
    """Done when the largest absolute entry of the last update is at most `tol`; never before the first update.

    Args:
        tol: tolerance in units of the weights, zero or more.

    Returns:
        A rule for `minimize(stop=...)`.

    Raises:
        ValueError: `tol` is negative, NaN or not a number.

    >>> update_below(0)
    update_below(0.0)
    """
    return Below("update_below", _update_norm, tol)
