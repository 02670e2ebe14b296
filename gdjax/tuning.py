"""Plans found by measuring, remembered in the cache (`gdjax.cache`) per kind of problem, device and JAX version.

A remembered plan changes speed alone: every candidate gives every problem the same bits.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gdjax import cache
from gdjax import device as dev
from gdjax.plan import BLOCK_BYTES, VECTOR, Kind, Plan, power_below

log = logging.getLogger("gdjax")

WORTH_SECONDS = 30.0
"""A run expected to take this long is worth measuring for: six candidates take two to four seconds."""

STEP_BYTES_PER_SECOND = 3e11
"""Rough speed for that expectation: bytes of problems taken through one step, per second and machine."""

ROUNDS = 3


def candidates(kind: Kind, default: Plan) -> list[Plan]:
    """The plans worth measuring for a large batch of this kind of problem, the default first."""
    if default.kernel != "lanes":
        return [default]
    if kind.elementwise:
        shapes = [(default.tile, chunk) for chunk in (2, 3, 8)] + [(512, 4), (2048, 3), (4096, 4), (16384, 4)]
    else:
        near = (default.tile // 2, default.tile * 2, default.tile * 4)
        shapes = [(tile, 1) for tile in near if tile >= VECTOR and tile % VECTOR == 0]
    made = [
        Plan("lanes", tile, power_below(BLOCK_BYTES / (tile * kind.bytes), 1, 4096), chunk) for tile, chunk in shapes
    ]
    return [default, *(plan for plan in made if plan != default)]


def worth_measuring(kind: Kind, device: jax.Device, count: int, steps: int) -> bool:
    """Whether a run is long enough that a better plan would save more than finding it costs."""
    return (
        dev.is_host(device) and count >= 1 << 16 and count * steps * kind.bytes > WORTH_SECONDS * STEP_BYTES_PER_SECOND
    )


def fastest(plans: list[Plan], run: Callable[[Plan], Any]) -> Plan:
    """The plan under which `run` takes the least time, in interleaved rounds after a first turn that compiles."""
    for plan in plans:
        run(plan)
    taken = dict.fromkeys(plans, float("inf"))
    for _ in range(ROUNDS):
        for plan in plans:
            begin = time.perf_counter()
            run(plan)
            taken[plan] = min(taken[plan], time.perf_counter() - begin)
    best = min(plans, key=lambda plan: taken[plan])
    log.info(
        "measured %d plans; %s takes %.0f%% of the default's time",
        len(plans),
        best,
        100 * taken[best] / taken[plans[0]],
    )
    return best


def key(function: Callable[..., Any], shapes: tuple[Any, ...], device: jax.Device) -> str:
    """What a plan is remembered for: the traced step of one problem, the device's kind, the versions."""
    # str() of a jaxpr is coloured where it would be printed on a terminal.
    jaxpr = re.sub(r"0x[0-9a-f]+", "", jax.make_jaxpr(function)(*shapes).pretty_print(use_color=False))
    return cache.digest(jaxpr, dev.kind(device), str(dev.workers(device)), jax.__version__, np.__version__, "3")


def recall(name: str) -> Plan | None:
    """The plan remembered under `name`, None if there is none that can be used."""
    held = cache.read(name)
    try:
        plan = Plan(held["kernel"], int(held["tile"]), int(held["tiles"]), int(held["chunk"]))
    except (ValueError, KeyError, TypeError):
        return None
    return plan if plan.kernel == "lanes" else None


def remember(name: str, plan: Plan) -> None:
    """Keep a plan for other processes and other days."""
    cache.write(name, dataclasses.asdict(plan))
