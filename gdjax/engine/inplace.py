"""Arrays that are changed where they lie, in the loops of one program: single problems put from one into another.

XLA copies what a choice returns, and what is both read and written in one loop; what a loop only carries it leaves in
its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

WORD = 32
"""Lanes that are looked at together when problems change places."""


def put(into: Any, axis: int, at: Any, source: Any, source_axis: int, taken: Any) -> Any:
    """One problem of `source` put into another array, whose problems lie along another axis."""
    one = lax.dynamic_slice_in_dim(source, taken, 1, source_axis, allow_negative_indices=False)
    return placed(into, jnp.moveaxis(one, source_axis, axis), at, axis)


def placed(into: Any, part: Any, at: Any, axis: int = 0) -> Any:
    """`part` written over `into` from `at` on."""
    return lax.dynamic_update_slice_in_dim(into, part, at, axis, allow_negative_indices=False)


def for_each(
    marked: Any, function: Callable[[Any, Any], Any], state: Any, more: Callable[[Any], Any] = lambda _: True
) -> Any:
    """`function(number, state)` for every lane that is marked, as long as there is `more(state)`.

    The marks become words of `WORD` bits, column by column, and of a word that is not zero the lowest bit is taken: a
    lane that is not marked costs nothing.
    """
    columns = marked.shape[0] // WORD
    rows = lax.broadcasted_iota(jnp.int32, (WORD, columns), 0)
    words = jnp.sum(lax.shift_left(marked.reshape(WORD, columns).astype(jnp.int32), rows), axis=0, dtype=jnp.int32)

    def goes(carry: Any) -> Any:
        return (carry[0] != 0) & more(carry[1])

    def column(number: Any, state: Any) -> Any:
        def lowest(carry: Any) -> Any:
            word, state = carry
            bit = WORD - 1 - lax.clz(word & -word)
            return word & (word - 1), function(bit * columns + number, state)

        return lax.while_loop(goes, lowest, (entry(words, number), state))[1]

    return lax.fori_loop(0, columns, column, state)


def entry(array: Any, number: Any) -> Any:
    return lax.dynamic_index_in_dim(array, number, keepdims=False, allow_negative_indices=False)


def when(wanted: Any, function: Callable[[Any], Any], state: Any) -> Any:
    """`function(state)` where it is wanted.

    As a loop of at most one turn: XLA keeps that in place, as it does not with what a choice returns.
    """

    def once(carry: Any) -> Any:
        return jnp.zeros((), bool), function(carry[1])

    return lax.while_loop(lambda carry: carry[0], once, (wanted, state))[1]
