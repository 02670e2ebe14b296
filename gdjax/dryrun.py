"""A dry run: one problem's program traced on shapes alone, before anything is compiled.

The loss, the update rule and the stop rule may be functions of the user's: what is wrong with one of them is told with
the name of its argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdjax.batch import Batch, brief, problem_shapes
from gdjax.engine.program import Program
from gdjax.rules import Descent, Projected, Transformation, is_pair
from gdjax.stop import Step, StopRule, largest

INDEX = jax.ShapeDtypeStruct((), np.int32)


def check_program(program: Program, batch: Batch) -> None:
    """Trace a program on the shapes of one problem; raises ValueError or TypeError naming the argument that fails."""
    weights = problem_shapes(batch.weights, jax.tree.map(lambda _: True, batch.weights))
    data = problem_shapes(batch.data, batch.data_flags)
    hyper = problem_shapes(batch.hyper, batch.hyper_flags)
    loss = check_loss(program.loss, weights, data)
    rule = program.rule
    if isinstance(rule, Projected):
        check_project(rule.project, weights)
        rule = rule.rule
    if isinstance(rule, Descent):
        check_rate(program, rule, weights, data, hyper)
    else:
        check_optimizer(program, rule, weights, data, hyper)
    if program.stop is not None:
        check_stop(program.stop, weights, loss)
    if program.record is not None:
        norm = jax.eval_shape(largest, weights)
        step = Step(INDEX, weights, loss, weights, norm, loss, norm)
        noted = returned("record", f"on the step of one problem (weights {brief(weights)})", "", program.record, step)
        if not jax.tree.leaves(noted):
            raise ValueError("record returned nothing; return an array, or a pytree of arrays, of one problem")


@contextmanager
def named(argument: str, where: str, mend: str = "") -> Iterator[None]:
    """Whatever is raised inside is told as an error of this argument."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{argument} raised {type(error).__name__} {where}: {str(error).rstrip('.')}{mend}") from error


def returned(argument: str, where: str, mend: str, function: Callable[..., Any], *shapes: Any) -> Any:
    """What a function of the user's returns on these shapes: a pytree of shapes and dtypes."""
    with named(argument, where, mend):
        return jax.eval_shape(function, *shapes)


def described(tree: Any) -> str:
    """`dtype and shape` of one array, the pytree of them otherwise."""
    return f"{tree.dtype} of shape {tree.shape}" if isinstance(tree, jax.ShapeDtypeStruct) else brief(tree)


def is_scalar(tree: Any, *kinds: Any) -> bool:
    """Whether this is one array without axes, of one of these kinds of dtype."""
    return (
        isinstance(tree, jax.ShapeDtypeStruct)
        and tree.shape == ()
        and any(jnp.issubdtype(tree.dtype, kind) for kind in kinds)
    )


def shapes_of(tree: Any) -> Any:
    return jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)]


def kinds_of(tree: Any) -> Any:
    """Structure, shapes and dtypes. The text of `brief` would not do: a class without one shows where it lies."""
    return shapes_of(tree), [leaf.dtype for leaf in jax.tree.leaves(tree)]


def check_loss(loss: Callable[..., Any], weights: Any, data: Any) -> Any:
    """The loss must be one real floating point number and have a gradient; returns its shape and dtype."""
    shapes = f"weights {brief(weights)}, data {brief(data)}"
    out = returned("loss", f"on the shapes of one problem ({shapes})", "", loss, weights, *data)
    if not isinstance(out, jax.ShapeDtypeStruct):
        count = len(jax.tree.leaves(out))
        raise ValueError(f"loss returned {count} arrays; return one scalar, the loss of one problem")
    if out.shape != ():
        raise ValueError(
            f"loss returned shape {out.shape} on one problem ({shapes}); return a scalar, with jnp.mean or jnp.sum"
        )
    if not jnp.issubdtype(out.dtype, np.floating):
        raise TypeError(f"loss returned dtype {out.dtype}; return a real floating point number")
    returned("loss", "when its gradient was taken", "", jax.grad(loss), weights, *data)
    return out


def check_rate(program: Program, rule: Descent, weights: Any, data: Any, hyper: Any) -> None:
    """A schedule must return one real number; the rate found from the curvature needs a second derivative."""
    if rule.schedule is not None:
        mend = "; a schedule takes the number of updates so far, an int32 scalar, and returns the rate"
        rate = returned("learning_rate, a schedule,", "on the step number", mend, rule.schedule, INDEX)
        if not is_scalar(rate, np.floating, np.integer):
            raise ValueError(f"learning_rate, a schedule, returned {described(rate)}; return one real number, the rate")
    if rule.auto:
        mend = "; 'auto' takes the second derivative of the loss: pass a number instead"
        returned("learning_rate='auto'", "when the curvature was taken", mend, program.init, weights, data, hyper)


def check_optimizer(program: Program, rule: Transformation, weights: Any, data: Any, hyper: Any) -> None:
    """An optimizer must make updates of the weights' shapes and keep the shapes of its state."""
    text = [name for name, value in rule.constants if isinstance(value, str)]
    mend = f"; hyperparams passes text for {' and '.join(text)}: is a number wanted there?" if text else ""
    made: list[Any] = []

    def build(hyper: Any) -> None:
        made.append(rule.build(hyper))

    def update(weights: Any, state: Any, index: Any, data: Any, hyper: Any) -> Any:
        gradient = jax.grad(program.loss)(weights, *data)
        return rule.update(gradient, state, weights, index, program.bound(data), hyper)

    returned("optimizer", "when it was made from hyperparams", mend, build, hyper)
    if not is_pair(made[0]):
        raise TypeError(
            f"optimizer returned a {type(made[0]).__name__}; return an optax-style init/update pair, as optax.adam does"
        )
    shapes = f"(weights {brief(weights)})"
    state = returned("optimizer", f"in init on one problem {shapes}", mend, program.init, weights, data, hyper)
    where = f"in update on one problem {shapes}"
    new, new_state = returned("optimizer", where, mend, update, weights, state, INDEX, data, hyper)
    if shapes_of(new) != shapes_of(weights):
        raise ValueError(
            f"optimizer brought weights {brief(weights)} to {brief(new)}; its updates must have their shapes"
        )
    if shapes_of(new_state) != shapes_of(state):
        raise ValueError(
            f"optimizer brought its state {brief(state)} to {brief(new_state)}; update must keep the shapes"
        )


def check_project(project: Callable[..., Any], weights: Any) -> None:
    """A projection must keep structure, shapes and dtypes of the weights."""
    out = returned("project", f"on the weights of one problem ({brief(weights)})", "", project, weights)
    if kinds_of(out) != kinds_of(weights):
        raise ValueError(f"project brought weights {brief(weights)} to {brief(out)}; keep structure, shapes and dtypes")


def check_stop(rule: StopRule, weights: Any, loss: Any) -> None:
    """A stop rule must return one boolean, and its memory must keep its shapes and dtypes."""
    norm = jax.eval_shape(largest, weights)
    step = Step(INDEX, weights, loss, weights, norm, loss, norm)
    shapes = f"on the step of one problem (weights {brief(weights)})"
    memory = returned("stop", "in init", "", lambda: jax.tree.map(jnp.asarray, rule.init()))
    result = returned("stop", shapes, "", rule.test, step, memory)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError("stop: test of a StopRule returned no pair; return (done, memory)")
    done, new = result
    if not is_scalar(done, np.bool_):
        raise ValueError(
            f"stop returned {described(done)} {shapes}; return one boolean scalar, "
            "such as step.gradient_norm < 1e-6, or jnp.all(...) of several"
        )
    if kinds_of(new) != kinds_of(memory):
        raise ValueError(f"stop brought its memory {brief(memory)} to {brief(new)}; test must keep shapes and dtypes")
