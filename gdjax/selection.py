"""`gdjax.select_device`: which device a job would take, and why, without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gdjax import device as dev
from gdjax import stop as stops
from gdjax.batch import prepare
from gdjax.calibration import linear_loss
from gdjax.dispatch import ASKED, Choice, choose
from gdjax.engine.program import Program
from gdjax.minimize import check_steps, checked_loss, choose_rule


def select_device(
    device: Any = "auto",
    loss: Callable[..., Any] | None = None,
    weights: Any = None,
    data: tuple[Any, ...] = (),
    *,
    in_axes: Any = 0,
    learning_rate: Any = None,
    optimizer: Any = None,
    hyperparams: dict[str, Any] | None = None,
    steps: int | None = None,
    stop: Any = None,
    dtype: Any = None,
) -> Choice:
    """The devices that `minimize` would take for this job, with the reasons; nothing is run.

    `"auto"` takes the devices on which the job is expected to end first, where there is a choice: seconds to compile
    + bytes moved / rates + calls + steps × max(least step, operations / rate), by a calibration of each kind of device
    that is measured once, in a few seconds, and kept in the cache folder. A single device is taken as it is.
    `JAX_PLATFORMS`, `jax_default_device` and `with jax.default_device(...)` are respected.

    Args:
        device: `"auto"`, a platform (`"cpu"`, `"gpu"`, `"tpu"`), one device of it (`"gpu:1"`), a `jax.Device`, a list
            of them or a `jax.sharding.Mesh`.
        loss, weights, data, in_axes, learning_rate, optimizer, hyperparams, steps, stop, dtype: the job, as in
            `minimize`. Without one, `"auto"` is the first accelerator, else the CPU.

    Returns:
        A `Choice`: `devices`, the first of them as `device`, its `platform`, the `reason`, the `estimates`; `explain()`
        puts them in words and a table.

    Raises:
        ValueError: there is no such device; the message says which there are and how to install support. Or the job
            is one that `minimize` would not take.
        TypeError: an argument of the wrong kind.

    >>> select_device("cpu").platform
    'cpu'
    >>> import gdjax, numpy as np
    >>> w = np.ones(1000, np.float32)
    >>> job = gdjax.kernel.squared_loss, w, (2 * w, 4 * w)
    >>> print(select_device("cpu:0", *job, learning_rate=0.1, steps=100).explain())
    cpu:0: asked for
    """
    if callable(device):
        raise TypeError("device is a function; the device comes first: select_device('auto', loss, weights, data, ...)")
    if loss is None:
        if weights is not None or steps is not None:
            raise ValueError("weights and steps make no job without a loss; pass it, or leave them out")
        asked = not (isinstance(device, str) and device == "auto")
        return Choice(tuple(dev.select_devices(device)), ASKED if asked else "the default device: no job to weigh")
    rule, hyper = choose_rule(learning_rate, optimizer, hyperparams)
    batch = prepare(weights, data, in_axes, hyper, dtype)
    program = Program(checked_loss(loss), rule, None if stop is None else stops.as_rule(stop))
    with jax.enable_x64(batch.x64 or jax.config.jax_enable_x64):  # type: ignore[attr-defined]
        return choose(device, program, batch, check_steps(steps), running=False)


def weighed(problems: int, points: int, weights: int, steps: int) -> Choice:
    """The choice for so many linear regressions in float32; their data are not made."""
    nothing = np.float32(0)
    w, x, t = (np.broadcast_to(nothing, (problems, *shape)) for shape in ((weights,), (points, weights), (points,)))
    return select_device("auto", linear_loss, w, (x, t), learning_rate=0.1, steps=steps)
