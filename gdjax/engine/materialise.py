"""Arrays put down in memory once, for all that look at them, on the CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def materialised(tree: Any, zero: Any) -> Any:
    """The same arrays, computed and laid out here; `zero` is one that is known at run time only.

    XLA's CPU compiler fuses by repeating, drops barriers before it does, and lays an array out as the one who made it
    likes. What a loop carries it neither repeats nor lays out anew; of this one, which takes a single turn, it does not
    know the length.
    """

    def turn(state: Any) -> Any:
        pending, held = state
        return jnp.zeros((), bool), jax.tree.map(lambda leaf: jnp.where(pending, leaf, jnp.zeros_like(leaf)), held)

    return lax.while_loop(lambda state: state[0], turn, (zero == 0, tree))[1]
