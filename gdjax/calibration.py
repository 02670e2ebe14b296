"""What each device costs, measured once in a few seconds and kept in the cache (`gdjax.cache`).

Measured is what a job goes through: compiling, launching, transfers, and steps of two kinds of problem, few and many of
them. The two kinds stand for all others, in proportion to their operations.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdjax import cache
from gdjax import device as dev
from gdjax.batch import prepare
from gdjax.cost import Calibration, Pace
from gdjax.engine import fixed
from gdjax.engine.program import Program
from gdjax.kernel import squared_loss
from gdjax.rules import Descent
from gdjax.session import Session
from gdjax.work import operations

log = logging.getLogger("gdjax")

POINTS, WEIGHTS = 16, 4
"""One problem of the vector kind."""

FEW, MANY_BYTES = 256, 16 << 20
"""Problems in a small batch, bytes of a large one."""

PATIENCE = 0.01
"""Seconds that a measured run takes at least."""

MOST_STEPS = 1 << 16

TRANSFER_BYTES = (1 << 16, 1 << 24)


def linear_loss(w: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    return 0.5 * jnp.mean((t - x @ w) ** 2)


@functools.cache
def calibration(device: jax.Device) -> Calibration:
    """The calibration of a device: as measured before in this process, as in the cache, or measured now."""
    name = cache.digest("calibration 2", dev.kind(device), str(dev.workers(device)), jax.__version__)
    known = parsed(cache.read(name))
    if known is None:
        known = measure(device)
        cache.write(name, dataclasses.asdict(known))
    return known


def parsed(entry: Any) -> Calibration | None:
    """A calibration read from the cache; None if the entry is not one."""
    try:
        scalar, vector = (Pace(**entry.pop(kind)) for kind in ("scalar", "vector"))
        found = Calibration(**entry, scalar=scalar, vector=vector)
        sound = all(value > 0 for value in (*figures(found), *figures(scalar), *figures(vector)))
    except (AttributeError, KeyError, TypeError):
        return None
    return found if sound else None


def figures(record: Any) -> list[float]:
    values = [getattr(record, field.name) for field in dataclasses.fields(record)]
    return [value for value in values if not isinstance(value, Pace)]


def measure(device: jax.Device) -> Calibration:
    """Measure a device: two to five seconds."""
    began = time.perf_counter()
    with jax.enable_x64(False):
        scalar, call, touch, _ = pace(device, squared_loss, ())
        vector, _, _, compiling = pace(device, linear_loss, (POINTS, WEIGHTS))
        to, back = (touch, touch) if dev.is_host(device) else transfer_rates(device)
    found = Calibration(compiling, call, to, back, scalar, vector)
    log.info("measured %s in %.1f s: %s", dev.label([device]), time.perf_counter() - began, found)
    return found


def pace(device: jax.Device, loss: Callable[..., Any], shape: tuple[int, ...]) -> tuple[Pace, float, float, float]:
    """The pace of a kind of problem, seconds of a call with a few of them, bytes per second in and out of a call with
    many, seconds to compile."""
    program = Program(loss, Descent(), None)
    one = tuple(jax.ShapeDtypeStruct(s, np.float32) for s in (shape[1:], shape, shape[:1]))
    rate = jax.ShapeDtypeStruct((), np.float32)
    index, healthy = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((), np.bool_)
    work = operations(program.step, one[0], (), healthy, index, one[1:], {"learning_rate": rate})
    many = MANY_BYTES // (4 * sum(math.prod(s.shape) for s in one))

    few_run, compiling = runner(device, program, one, FEW, np.asarray)
    many_run, _ = runner(device, program, one, many, lambda leaf: jax.device_put(leaf, device))
    call, large = (min(taken(run, 1) for _ in range(5)) for run in (few_run, many_run))
    results = many * 4 * (math.prod(one[0].shape) + 3)
    touch = (MANY_BYTES + results) / max(1e-9, large - call)
    return Pace(seconds_a_step(few_run), many * work / seconds_a_step(many_run)), call, touch, compiling


def runner(
    device: jax.Device, program: Program, one: tuple[Any, ...], count: int, place: Callable[[Any], Any]
) -> tuple[Callable[[int], None], float]:
    """A function that takes so many steps of a batch on the device, and the seconds it took to compile.

    `place` says where the arrays come from and where the results go.
    """
    weights, *data = (np.full((count, *s.shape), 0.5, s.dtype) for s in one)
    batch = prepare(weights, tuple(data), 0, {"learning_rate": np.float32(0.01)}, None)
    session = Session(program, batch, [device])
    inputs = jax.tree.map(place, fixed.Inputs(batch.weights, None, batch.data, batch.hyper))
    flags = fixed.Inputs(True, None, batch.data_flags, batch.hyper_flags)

    def run(steps: int) -> None:
        _, out = session.execute(fixed.tile, inputs, flags, count, None, 0, steps)
        jax.block_until_ready(jax.tree.map(place, out))

    first = taken(run, 1)
    return run, max(1e-3, first - taken(run, 1))


def taken(run: Callable[[int], None], steps: int) -> float:
    began = time.perf_counter()
    run(steps)
    return time.perf_counter() - began


def seconds_a_step(run: Callable[[int], None]) -> float:
    """Seconds of one step, without what a call costs whatever its steps."""
    base = min(taken(run, 1) for _ in range(3))
    steps = 16
    while steps < MOST_STEPS and taken(run, steps) < base + PATIENCE:
        steps *= 4
    return max(1e-12, (min(taken(run, steps) for _ in range(3)) - base) / (steps - 1))


def transfer_rates(device: jax.Device) -> tuple[float, float]:
    """Bytes per second from the host to the device and back, without what a transfer costs whatever its size."""
    to, back = [], []
    for size in TRANSFER_BYTES:
        host = np.ones(size // 4, np.float32)
        rounds = [round_trip(host, device) for _ in range(4)][1:]
        to.append(min(there for there, _ in rounds))
        back.append(min(again for _, again in rounds))
    bytes_more = TRANSFER_BYTES[1] - TRANSFER_BYTES[0]
    return bytes_more / max(1e-9, to[1] - to[0]), bytes_more / max(1e-9, back[1] - back[0])


def round_trip(host: np.ndarray, device: jax.Device) -> tuple[float, float]:
    """Seconds to bring an array to the device, and to bring it back."""
    began = time.perf_counter()
    there = jax.block_until_ready(jax.device_put(host, device))
    arrived = time.perf_counter()
    np.asarray(there)
    return arrived - began, time.perf_counter() - arrived
