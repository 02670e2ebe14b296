"""What `minimize` returns."""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import Any

import jax
import numpy as np

from gdjax import device as dev
from gdjax.engine import program
from gdjax.friends import check_concrete, handed
from gdjax.plan import Plan


class Status(enum.IntEnum):
    """How a problem ended.

    >>> import gdjax, numpy as np
    >>> w, x, t = np.ones(2), np.array([1.0, 100.0]), np.ones(2)
    >>> run = gdjax.minimize(gdjax.kernel.squared_loss, 2 * w, (x, t), learning_rate=0.5, steps=200)
    >>> [Status(ended).name for ended in run.status]
    ['RAN_ALL_STEPS', 'DIVERGED']
    >>> print(run.status == Status.DIVERGED)
    [False  True]
    """

    RAN_ALL_STEPS = program.RAN_ALL_STEPS
    CONVERGED = program.CONVERGED
    DIVERGED = program.DIVERGED
    STOPPED = program.STOPPED


COMMON_FIRST = Status.RAN_ALL_STEPS, Status.DIVERGED, Status.CONVERGED, Status.STOPPED


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["carried", "status", "steps"],
    meta_fields=["engine", "flags", "total", "kind"],
)
@dataclasses.dataclass(frozen=True)
class State:
    """Where a run stands, to be passed back as `resume=`: each problem's lane or rule state, and the updates taken.

    And the kind of device that took them: on another, going on would not give the bits of one longer run.
    """

    carried: Any
    status: Any
    steps: Any
    engine: str
    flags: Any
    total: int
    kind: str = ""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "loss", "gradient_norm", "steps", "status", "record", "record_steps", "state"],
    meta_fields=["plan", "device"],
)
@dataclasses.dataclass(frozen=True)
class Solution:
    """The answers to a batch of N problems; a pytree of arrays with the problem axis in front.

    The arrays are `jax.Array`s on the device that ran, save 64-bit ones while `jax_enable_x64` is off: those are NumPy
    arrays, since JAX would narrow them to 32 bits at the first operation on them.

    Attributes:
        weights: a pytree like the start weights, leaves `[N, ...]`, in their dtype. For a diverged problem, the last
            weights that were finite.
        loss: `[N]`, the loss at the weights.
        gradient_norm: `[N]`, the largest absolute entry of the gradient at the weights.
        steps: `[N]` int32, updates taken.
        status: `[N]` int8, a `Status` for each problem.
        record: what `record=` asked for, `[N, R, ...]`: the figure after `record_steps` updates, NaN (in whole numbers
            0) after a problem's end; None where nothing was asked for.
        record_steps: `[R]` int64, updates taken at each row of the record, or None.
        state: pass it back as `resume=` to go on from here.
        plan: the `Plan` that ran.
        device: the name of the device that ran it.

    >>> import gdjax, numpy as np
    >>> w, x, t = (np.array(values, np.float32) for values in ([1, 1], [2, 2], [4, 6]))
    >>> solution = gdjax.minimize(gdjax.kernel.squared_loss, w, (x, t), learning_rate=0.25, steps=9)
    >>> print(solution.weights, solution.steps, solution.plan.kernel)
    [2. 3.] [9 9] lanes
    """

    weights: Any
    loss: Any
    gradient_norm: Any
    steps: Any
    status: Any
    record: Any
    record_steps: Any
    state: Any
    plan: Plan
    device: str

    def to(self, kind: str) -> Solution:
        """The same solution in another library's arrays, without a copy on the CPU (torch's step counts are one).

        Args:
            kind: `"numpy"`, `"torch"` or `"jax"`. NumPy arrays and torch tensors may share their memory with this
                solution: do not write into them.

        Returns:
            A `Solution` with every array of that kind; whatever is no array in a model's weights stays.

        Raises:
            ValueError: another kind, or `"jax"` for 64-bit arrays while `jax_enable_x64` is off.
            TypeError: the solution is being traced.
            ImportError: torch is not installed.

        >>> import gdjax, numpy as np
        >>> one = np.ones(3, np.float32)
        >>> solution = gdjax.minimize(gdjax.kernel.squared_loss, one, (one, 4 * one), learning_rate=1.0, steps=1)
        >>> solution.to("numpy").weights
        array([4., 4., 4.], dtype=float32)
        """
        given = handed(self, kind)
        if kind == "torch":  # tensors can be written to, and this array may be that of other solutions too
            given = dataclasses.replace(given, steps=given.steps.clone())
        return given

    def summary(self) -> dict[str, int]:
        """How many problems ended in each status, by its name; over several processes, of those that this one holds.

        Returns:
            A dict with the keys `RAN_ALL_STEPS`, `CONVERGED` and `DIVERGED`, and `STOPPED` where a callback ended the
            run before some problems had ended.

        >>> import gdjax, numpy as np
        >>> one = np.ones(3, np.float32)
        >>> gdjax.minimize(gdjax.kernel.squared_loss, one, (2 * one, 4 * one), learning_rate=0.1, steps=5).summary()
        {'RAN_ALL_STEPS': 3, 'CONVERGED': 0, 'DIVERGED': 0}
        """
        check_concrete(self.status)
        return counted(dev.here(self.status))


def counted(ended: np.ndarray) -> dict[str, int]:
    """How many problems ended in each status, by its name."""
    counts, left = dict.fromkeys(Status, 0), ended.size
    if left:  # looked at no more often than needed: there may be millions
        low, high = ended.min(), ended.max()
        *some, last = [status for status in COMMON_FIRST if low <= status <= high]
        for status in some:
            counts[status] = int(np.count_nonzero(ended == np.int8(status))) if left else 0
            left -= counts[status]
        counts[last] = left
    return {status.name: count for status, count in counts.items() if count or status != Status.STOPPED}
