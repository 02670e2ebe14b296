"""How much arithmetic a step is: operations counted in its jaxpr, to compare jobs by, not to predict them."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from gdjax.batch import Batch, problem_shapes
from gdjax.engine.program import Program
from gdjax.pieces import own

FREE = frozenset(
    "broadcast_in_dim reshape squeeze expand_dims transpose slice dynamic_slice concatenate pad rev iota copy "
    "convert_element_type stop_gradient split optimization_barrier copy_p".split()
)
"""Primitives that move numbers and compute none."""

DEAR = frozenset(
    "exp exp2 expm1 log log1p log2 tanh logistic sin cos tan asin acos atan atan2 sinh cosh asinh acosh atanh erf erfc "
    "erf_inv pow cbrt lgamma digamma sort cumsum cumlogsumexp cumprod".split()
)
"""Primitives that cost about `DEAR_COST` operations for each number."""

DEAR_COST = 16.0

COSTS = {"div": 4.0, "sqrt": 4.0, "rsqrt": 4.0, "integer_pow": 2.0, "square": 1.0, "one_minus_square": 3.0, "rem": 4.0}


def operations(function: Any, *shapes: Any) -> float:
    """Arithmetic operations of a function on arguments of these shapes, roughly.

    >>> one = jax.ShapeDtypeStruct((), "float32")
    >>> operations(lambda w, x, t: w - 0.1 * (x * (t - x * w)), one, one, one)
    5.0
    """
    return max(1.0, of_jaxpr(jax.make_jaxpr(function)(*shapes).jaxpr))


def step_operations(program: Program, batch: Batch) -> float:
    """Operations of one step of one problem of a batch."""
    trees, flags = (batch.weights, batch.data, batch.hyper), (own(batch.weights), batch.data_flags, batch.hyper_flags)
    weights, data, hyper = problem_shapes(trees, flags)
    state = jax.eval_shape(program.init, weights, data, hyper)
    index, healthy = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((), np.bool_)
    if program.stop is None:
        return operations(program.step, weights, state, healthy, index, data, hyper)
    lane = jax.eval_shape(program.begin, weights, state, index, data)
    return operations(program.look, lane, data, hyper)


def of_jaxpr(jaxpr: Any) -> float:
    return sum(of_equation(equation) for equation in jaxpr.eqns)


def of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    inner = [of_jaxpr(getattr(p, "jaxpr", p)) for p in jaxprs(params)]
    if inner:  # of the branches of a cond the dearest; a while loop is taken to turn once
        return max(inner) * params.get("length", 1) if name in ("cond", "scan") else sum(inner)
    numbers = max((math.prod(v.aval.shape) for v in equation.outvars), default=0)
    if name in FREE:
        return 0.0
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * numbers * math.prod(left[axis] for axis in contracted)
    if name == "polynomial":
        return 2.0 * numbers * (len(equation.invars) - 2)
    if name.startswith(("reduce", "arg")):
        numbers = math.prod(equation.invars[0].aval.shape)
    return numbers * (DEAR_COST if name in DEAR else COSTS.get(name, 1.0))


def jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation, be they alone or in a tuple."""
    found = []
    for value in params.values():
        for entry in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(entry, "jaxpr", entry), "eqns"):
                found.append(entry)
    return found
