"""What a batch needs of a device's memory, and plans that stay within it.

Only the number of problems per call is made smaller: that changes no bit of any result.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

import jax

from gdjax import device as dev
from gdjax.plan import VECTOR, Plan

log = logging.getLogger("gdjax")

SHARE = 0.9
"""Of the memory that is free, what a run may take: the allocator needs some for itself."""

MODEST = 256 << 20
"""Bytes for which no device is asked whether it has them."""

LAYOUTS = 3
"""A rough need before anything is compiled: a lane's inputs as they come, in the kernel's layout, and its outputs."""


def size(plan: Plan) -> int:
    """Problems per call."""
    return plan.tile * plan.tiles


def halved(plan: Plan) -> Plan | None:
    """The plan with half as many problems per call, None where there can be no fewer.

    Tiles go first. Then the tile itself, but not under vmap, where another tile might get other bits.
    """
    if plan.tiles > 1:
        return dataclasses.replace(plan, tiles=plan.tiles // 2)
    if plan.kernel != "vmap" and plan.tile > VECTOR:
        return dataclasses.replace(plan, tile=plan.tile // VECTOR // 2 * VECTOR or VECTOR)
    return None


def capped(plan: Plan, most: float) -> Plan:
    """The plan halved until a call takes at most this many problems, or the fewest that there can be."""
    while size(plan) > most and (less := halved(plan)) is not None:
        plan = less
    return plan


def within(plan: Plan, need: int, room: int | None) -> Plan:
    """The plan, which needs `need` bytes, made to fit into `room` bytes; None: nobody knows how many there are."""
    if room is None or need <= SHARE * room:
        return plan
    return capped(plan, size(plan) * SHARE * room / need)


class Ceiling:
    """How many problems a call may take on some devices, of which `at_once` calls share a memory.

    It is lowered by what the devices say before a run, and by running full; it is never raised again.
    """

    def __init__(self, devices: Sequence[jax.Device], at_once: int):
        self.devices, self.at_once = devices, at_once
        self.most = math.inf

    def under(self, plan: Plan, lane_bytes: int) -> Plan:
        """The plan, smaller where it is known or plain to be too large; `lane_bytes` is what a problem brings."""
        plan = capped(plan, self.most)
        return self.fitting(plan, LAYOUTS * lane_bytes * size(plan))

    def fitting(self, plan: Plan, need: int) -> Plan:
        """The plan, of which a call needs `need` bytes, smaller where the device has not as many."""
        if need * self.at_once <= MODEST:
            return plan
        fits = within(plan, need * self.at_once, dev.room(self.devices[0]))
        if fits != plan:
            self.most = min(self.most, size(fits))
        return fits

    def lowered(self, plan: Plan, need: int) -> Plan:
        """The plan to go on with where the device ran out of memory under `plan`; MemoryError if there is none."""
        less = halved(plan)
        if less is None:
            raise self.full(plan, need)
        log.info("out of memory with %d problems at a time; %d from now on", size(plan), size(less))
        self.most = min(self.most, size(less))
        return less

    def full(self, plan: Plan, need: int) -> MemoryError:
        """What to say where not even this plan fits."""
        room, where = dev.room(self.devices[0]), dev.label(self.devices)
        figures = f", {need:,} bytes" if need else ""
        free = f" where {room:,} bytes are free" if room is not None else ""
        return MemoryError(
            f"{where} is out of memory with {size(plan)} problems at a time{figures}{free}; there can be no fewer: "
            "pass problems with less data, or another device"
        )
