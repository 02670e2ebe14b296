"""Devices that are not there: a virtual CPU device taken for an accelerator, a memory that runs full."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import pytest

from gdjax import blocks, dispatch, session, trust
from gdjax import device as dev
from gdjax.cost import Calibration, Pace
from gdjax.engine import block as engine_block

CPU = Calibration(0.35, 100e-6, math.inf, math.inf, scalar=Pace(1.6e-8, 3e11), vector=Pace(3e-7, 2.5e11))
"""As measured on two cores of a server."""

GPU = Calibration(1.5, 250e-6, 12e9, 10e9, scalar=Pace(2e-7, 1e13), vector=Pace(1e-5, 2e12))
"""Made up: a GPU that is 33 and 8 times as fast, behind a bus of 12 GB/s."""

FULL = "RESOURCE_EXHAUSTED: Out of memory allocating 123456789 bytes."


def accelerator(monkeypatch: pytest.MonkeyPatch, room: int | None = None, count: int = 1) -> list[jax.Device]:
    """The last `count` virtual CPU devices as accelerators of a kind, each with `room` bytes of free memory."""
    chosen = jax.devices("cpu")[-count:]
    true_platform, true_room = dev.platform_of, dev.room
    monkeypatch.setattr(dev, "platform_of", lambda d: "gpu" if d in chosen else true_platform(d))
    monkeypatch.setattr(session.SESSIONS, "kept", collections.OrderedDict())  # compiled for a CPU
    for module, name in ((dev, "alike"), (dispatch, "option"), (dispatch, "name_of")):
        monkeypatch.setattr(module, name, functools.cache(getattr(module, name).__wrapped__))
    monkeypatch.setattr(dispatch, "calibration", lambda d: GPU if d in chosen else CPU)
    monkeypatch.setattr(dispatch, "KINDS", dispatch.Kinds())
    monkeypatch.setattr(dev, "room", lambda d: room if d in chosen else true_room(d))
    return chosen


@dataclasses.dataclass
class Full:
    """A device that has no memory for more than `most` problems per call; `refused` is the sizes it turned down."""

    most: float
    refused: list[int]
    ran: list[int]


@contextlib.contextmanager
def full_device(monkeypatch: pytest.MonkeyPatch, most: float) -> Iterator[Full]:
    """Every compiled block as on a device that is out of memory from more than `most` problems per call on."""
    device = Full(most, [], [])

    def compile_block(*args: object) -> engine_block.Block:
        block = engine_block.compile_block(*args)  # type: ignore[arg-type]

        def limited(executable):
            def call(*inputs):
                if block.size > device.most:
                    device.refused.append(block.size)
                    raise jax.errors.JaxRuntimeError(FULL)
                device.ran.append(block.size)
                return executable(*inputs)

            return call

        return dataclasses.replace(block, executables=tuple(map(limited, block.executables)))

    with monkeypatch.context() as patched:
        patched.setattr(blocks, "compile_block", compile_block)
        patched.setattr(trust, "compile_block", compile_block)
        patched.setattr(session.SESSIONS, "kept", collections.OrderedDict())
        yield device
