"""Learning rates must be finite and not below zero: looked at where they lie."""

from __future__ import annotations

import weakref
from typing import Any

import jax
import numpy as np

from gdjax import device as dev
from gdjax.batch import check_held, is_traced, together


def check_rate(rate: Any) -> None:
    """Numbers, finite and not below zero. Those on an accelerator are looked at beside the run (`Doubt`)."""
    check_held("learning_rate", rate)
    rate = together(rate)
    array = rate if is_traced(rate) or dev.on_accelerator(rate) else dev.here(rate)
    if array.dtype.kind not in "fiu" and not jax.numpy.issubdtype(array.dtype, np.floating):
        raise TypeError(
            f"learning_rate is a {type(rate).__name__}; pass a number, an [N] array, a function step -> rate, or 'auto'"
        )
    if isinstance(array, np.ndarray) and array.size and not plain(array):
        bad = ~np.isfinite(array.astype(np.float64)) | (array < 0)
        where = "" if array.ndim == 0 else f"[{int(np.argmax(bad))}]"
        value = array.reshape(-1)[int(np.argmax(bad.reshape(-1)))]
        raise ValueError(f"learning_rate{where} is {value}; pass a finite number, zero or more")


class Doubt:
    """Rates on an accelerator, whose values nobody has looked at. The question is put there, and the answer comes while
    other things are done: to fetch millions of rates, or to wait, would take longer than many descents."""

    def __init__(self, rates: jax.Array):
        self.rates = rates
        self.sound = sound(rates)
        self.sound.copy_to_host_async()

    @classmethod
    def of(cls, rates: Any) -> Doubt | None:
        return cls(rates) if dev.on_accelerator(rates) and SETTLED.get(id(rates)) is not rates else None

    def settle(self) -> None:
        """ValueError if a rate is not finite or below zero."""
        if not self.sound:
            check_rate(np.asarray(self.rates))
        SETTLED[id(self.rates)] = self.rates


SETTLED: weakref.WeakValueDictionary[int, jax.Array] = weakref.WeakValueDictionary()
"""Rates that were found to be sound, by their ids: a `jax.Array` stays as it is."""


@jax.jit
def sound(rates: jax.Array) -> jax.Array:
    return jax.numpy.all((rates >= 0) & jax.numpy.isfinite(rates))


def plain(array: np.ndarray) -> bool:
    """Whether all numbers are finite and not below zero.

    In one pass where the bits tell: as whole numbers without a sign they rise with the number, up to infinity, NaN and
    then those with a minus.
    """
    if array.dtype == np.float32 and array.flags.c_contiguous and array.ndim:
        if array.view(np.uint32).max() < np.float32(np.inf).view(np.uint32):
            return True
    return bool(array.min() >= 0 and array.max() < np.inf)  # NaN fails both
