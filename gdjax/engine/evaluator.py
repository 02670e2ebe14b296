"""Walks the jaxpr of one problem and emits it for many problems at once; what is emitted is up to the form.

Two forms share the walk: `gdjax.engine.lanes`, where a value of one problem becomes an array with the problems along
its last axis, and `gdjax.engine.scalars`, where each scalar of it becomes a tile of its own. Calls are written out,
operations on constants are computed at once, and products are rounded in the declared way:

Rounding. Where a product feeds an addition, compilers contract the two to one multiply-add, rounded once, if the
machine has one; that is fast, wanted, and declared here. Where they have a choice (`a·b + c·d`, a product used twice, a
product that does not change in the loop), the choice would depend on tile and chunk. There the product is written
`a·b + z` with `z` a runtime −0.0: contracted, `fma(a, b, −0.0)` is the rounded product at no cost, and
nothing is left to choose.
  - `x·w`, summed: `fma(x_n, w_n, … fma(x_1, w_1, round(x_0·w_0)))`
  - `a·b ± c·d`: the right product is rounded, the left one contracted
  - a product used twice, or made of what the loop does not change: rounded
  - a product used once in a sum or difference: contracted
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

MAX_TERMS = 256
"""Longest sum written out; a longer one belongs in a loop or a matrix kernel, so the problem runs under vmap."""

MAX_EQUATIONS = 6000
"""Most operations one step may be written out into: beyond it, compiling costs more than it gives."""


class UnsupportedError(NotImplementedError):
    """A program that cannot be evaluated in this form; the message says which operation is the reason."""


class Value:
    """What a value of one problem became.

    `lane`: problems differ in it; else it is an array as one problem has it. `product`: it is a product not yet
    rounded, which an addition may take in. `varies`: it changes from step to step.
    """

    __slots__ = ("array", "lane", "product", "varies")

    def __init__(self, array: Any, lane: bool, varies: bool = True, product: bool = False):
        self.array = array
        self.lane = lane
        self.varies = varies
        self.product = product


class Evaluator:
    """The walk. `zero` is a −0.0 that is known at run time only. A form says how it emits and how it rounds."""

    def __init__(self, zero: Any):
        self.zero = zero
        self.written = 0

    def emit(self, eqn: Any, operands: list[Value]) -> list[Any]:
        """The arrays of an operation with at least one operand in which problems differ."""
        raise NotImplementedError

    def round(self, array: Any) -> Any:
        """An array of products, rounded here and now."""
        raise NotImplementedError

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Value], once: Sequence[bool] = ()) -> list[Value]:
        """The outputs of `jaxpr`; `once` says which of them are used a single time outside."""
        env: dict[Any, Value] = {}

        def read(atom: Any) -> Value:
            if isinstance(atom, core.Literal):
                aval: Any = atom.aval
                return Value(np.asarray(atom.val, aval.dtype), False, False)
            return env[atom]

        # An output counts as used twice where it is not known what becomes of it outside.
        uses = collections.Counter(v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, core.Literal))
        counted = [v for v, alone in zip(jaxpr.outvars, once, strict=True) if not alone] if once else jaxpr.outvars
        uses.update(v for v in [*jaxpr.outvars, *counted] if not isinstance(v, core.Literal))
        env.update(zip(jaxpr.constvars, (Value(c, False, False) for c in consts), strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            alone = [uses[v] == 1 for v in eqn.outvars]
            results = self.equation(eqn, [read(v) for v in eqn.invars], alone)
            for var, value in zip(eqn.outvars, results, strict=True):
                kept = value.varies and value.lane and uses[var] == 1
                env[var] = value if kept else self.rounded(value)
        return [read(v) for v in jaxpr.outvars]

    def rounded(self, value: Value) -> Value:
        """The value with its product, if it is one, rounded here and now."""
        return Value(self.round(value.array), value.lane, value.varies) if value.product else value

    def equation(self, eqn: Any, operands: list[Value], alone: list[bool]) -> list[Value]:
        name = eqn.primitive.name
        self.count(1)
        if name in SUMS and all(v.product for v in operands):
            operands = [operands[0], self.rounded(operands[1])]
        elif name not in SUMS and name not in PASSED_ON and name != "mul" and not one_term(eqn):
            operands = [self.rounded(v) for v in operands]
        if name in INLINED:
            return self.run(*inner(eqn), operands, alone)
        varies = any(v.varies for v in operands)
        if not any(v.lane for v in operands):
            if all(isinstance(v.array, np.ndarray | np.generic) for v in operands):
                return [Value(np.asarray(o), False, False) for o in constant(eqn, operands)]
            out = eqn.primitive.bind(*(v.array for v in operands), **eqn.params)
            product = name in PRODUCTS and jnp.issubdtype(out.dtype, jnp.floating)
            return [Value(o, False, varies, product) for o in (out if eqn.primitive.multiple_results else [out])]
        arrays = self.emit(eqn, operands)
        product = name in PRODUCTS or one_term(eqn) or (name in PASSED_ON and operands[0].product)
        floating = [jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.outvars]
        return [
            Value(array, True, varies or name == "scan", product and real)
            if not is_constant(array)
            else Value(array, False, False)
            for array, real in zip(arrays, floating, strict=True)
        ]

    def count(self, operations: int) -> None:
        self.written += operations
        if self.written > MAX_EQUATIONS:
            raise UnsupportedError(f"one step is more than {MAX_EQUATIONS} operations written out")

    def fold(self, combine: Callable[[Any, Any], Any], terms: list[Any]) -> Any:
        """Left to right, first term first: the declared order of every sum."""
        if len(terms) > MAX_TERMS:
            raise UnsupportedError(f"a sum of {len(terms)} terms, more than {MAX_TERMS}")
        self.count(len(terms))
        return functools.reduce(combine, terms)


def is_constant(array: Any) -> bool:
    """Whether an emitted array turned out to be known now."""
    return isinstance(array, np.ndarray) and array.dtype != object


def constant(eqn: Any, operands: list[Value]) -> list[Any]:
    """The results of an operation on constants, computed now: what is left for the compiler to fold stays foldable."""
    with jax.ensure_compile_time_eval():
        out = eqn.primitive.bind(*(jnp.asarray(v.array) for v in operands), **eqn.params)
    return out if eqn.primitive.multiple_results else [out]


def inner(eqn: Any) -> tuple[Any, Any]:
    """The jaxpr of a call, or of what an operation is made of, and its constants."""
    parts = INLINED[eqn.primitive.name]
    if callable(parts):
        jaxpr = jax.make_jaxpr(functools.partial(parts, eqn.params))(*(v.aval for v in eqn.invars))
    else:
        jaxpr = eqn.params[parts]
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "jaxpr") else (jaxpr, ())


def loop_operands(eqn: Any, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """What a scan holds fixed, what it carries, and what it takes a slice of at every turn."""
    p = eqn.params
    if "num_consts" in p:  # up to jax 0.10
        fixed, carried = p["num_consts"], p["num_carry"]
    else:
        fixed, carried, _ = map(len, p["ft_in"].unpack())
    last = fixed + carried
    return list(operands[:fixed]), list(operands[fixed:last]), list(operands[last:])


def reaches(jaxpr: Any, flags: Sequence[bool]) -> list[bool]:
    """Which outputs of `jaxpr` depend on the inputs that `flags` marks."""
    marked = {v for v, flag in zip(jaxpr.invars, flags, strict=True) if flag}
    for eqn in jaxpr.eqns:
        into = [not isinstance(v, core.Literal) and v in marked for v in eqn.invars]
        if eqn.primitive.name in INLINED:
            out = reaches(inner(eqn)[0], into)
        else:
            out = [any(into)] * len(eqn.outvars)
        marked.update(v for v, flag in zip(eqn.outvars, out, strict=True) if flag)
    return [not isinstance(v, core.Literal) and v in marked for v in jaxpr.outvars]


def operations(jaxpr: Any) -> int:
    """Roughly how many machine operations a jaxpr is, for one number per value."""
    return sum(
        operations(inner(eqn)[0]) if eqn.primitive.name in INLINED else 1 if eqn.primitive.name in SIMPLE else 12
        for eqn in jaxpr.eqns
    )


def one_term(eqn: Any) -> bool:
    """Whether the operation is a dot product of one term: a product."""
    if eqn.primitive.name != "dot_general":
        return False
    (contract, _), _ = eqn.params["dimension_numbers"]
    return math.prod(eqn.invars[0].aval.shape[d] for d in contract) == 1


def polynomial(params: Any, x: Any, *coefficients: Any) -> Any:
    """Horner's rule; coefficients come lowest first."""
    return functools.reduce(lambda sum_, c: lax.add(lax.mul(sum_, x), c), reversed(coefficients))


def stack(params: Any, *xs: Any) -> Any:
    return lax.concatenate([lax.expand_dims(x, (params["axis"],)) for x in xs], params["axis"])


def unstack(params: Any, x: Any) -> list[Any]:
    axis = params["axis"]
    return [lax.index_in_dim(x, index, axis, keepdims=False) for index in range(x.shape[axis])]


INLINED: dict[str, str | Callable[..., Any]] = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "log2": lambda params, x: lax.div(lax.log(x, **params), lax.log(lax.full_like(x, 2), **params)),
    "one_minus_square": lambda params, x: lax.mul(lax.add(lax.full_like(x, 1), x), lax.sub(lax.full_like(x, 1), x)),
    "polynomial": polynomial,
    "stack": stack,
    "unstack": unstack,
}
"""Where a call has its jaxpr; of operations that came with later versions of jax, what they are made of."""

SIMPLE = frozenset(
    """abs add add_any and convert_element_type copy copy_p eq ge gt integer_pow is_finite le lt max min mul ne neg
    not or optimization_barrier
    select_n sign sqrt square sub broadcast_in_dim reshape squeeze dot_general reduce_max stop_gradient""".split()
)
"""Operations that are one instruction or none on a vector unit."""

PRODUCTS = frozenset({"mul", "log1p", "square", "integer_pow", "reduce_prod"})
"""Operations that end in a multiplication."""

SUMS = frozenset({"add", "sub", "add_any"})
"""Operations that may take a product in."""

PASSED_ON = frozenset({"neg", "broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "rev", "copy", "copy_p"})
"""Operations behind which a compiler still sees the product."""
