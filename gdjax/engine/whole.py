"""A block as one function of machine code, loops and all, on the CPU.

XLA's CPU runtime calls every fusion of a loop's body by itself, some tens of nanoseconds each, and does so once a pass.
That is dear where a tile is small enough for the fastest cache. What is called with the mark that XLA gives its own
small loops is compiled whole instead: a tile may be as small as the cache wants it, and a loop over tiles costs
nothing. A compiler that does not know the mark makes of it what it makes of any call. The bits are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core

from gdjax.engine.lanes import ELEMENTWISE

MARKS = {"xla_cpu_small_call": "true", "inlineable": "false"}

FLOW = frozenset({"while", "scan", "jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"})

MOVES = frozenset(
    """broadcast_in_dim concatenate dynamic_slice dynamic_update_slice iota optimization_barrier pad reduce reduce_and
    reduce_max reduce_min reduce_or reduce_prod reduce_sum reshape rev select_n slice split squeeze transpose""".split()
)

WRITTEN = ELEMENTWISE | FLOW | MOVES
"""What XLA writes into one function. What calls a library (`dot_general`, `sort`, `fft`) it cannot."""


def can_be_whole(jaxpr: core.Jaxpr) -> bool:
    """Whether a function with this jaxpr may be compiled whole."""
    avals: list[Any] = [v.aval for v in jaxpr.invars]
    if any(0 in aval.shape for aval in avals):
        return False  # XLA drops such arguments, and then misses them: see `whole`
    return all(name in WRITTEN for name in primitives(jaxpr))


def primitives(jaxpr: core.Jaxpr) -> Iterator[str]:
    """The names of all operations, those of inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in core.jaxprs_in_params(eqn.params):
            yield from primitives(inner)


def whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, compiled whole where `can_be_whole`.

    Its last argument is memory that the results are written into, and is used for nothing else.
    """

    def called(*args: Any) -> Any:
        # XLA aborts the process where such a call has an argument that nothing in it uses, and it may find that out
        # itself, simplifying; so each is used: a single entry of it is a result. (Of what is written into, XLA would
        # make a copy for that.)
        touched = [lax.slice(leaf, (0,) * leaf.ndim, (1,) * leaf.ndim) for leaf in jax.tree.leaves(args[:-1])]
        return function(*args), touched

    @functools.wraps(function)
    def caller(*args: Any) -> Any:
        out = set_xla_metadata(jax.jit(called)(*args), **MARKS)
        return lax.optimization_barrier(out)[0]  # without it JAX would drop the results that nobody wants

    return caller
