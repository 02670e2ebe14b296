"""One compilation for all devices of a kind: what was compiled for the first is loaded on the others.

JAX ties an executable to its devices, and compiling takes tens of times as long as loading what is compiled. Where
loading does not work (a backend that cannot write its executables down), each device gets a compilation of its own.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable
from jaxlib import xla_client

log = logging.getLogger("gdjax")


def on_each(compiled: Callable[[jax.Device], Any], devices: Sequence[jax.Device]) -> tuple[Any, ...]:
    """An executable per device, in their order; `compiled` compiles for one of them."""
    first, *others = devices
    original = compiled(first)
    if all(device == first for device in others):
        return (original,) * len(devices)
    try:
        written, inputs, outputs = serialize_executable.serialize(original)
        return original, *(loaded(written, inputs, outputs, device) for device in others)
    except Exception as error:  # whatever a backend or another JAX raises here, compiling anew still serves
        log.info("an executable for %s cannot be loaded on its siblings (%s): compiled for each", first, error)
        return original, *(compiled(device) for device in others)


def loaded(written: bytes, inputs: Any, outputs: Any, device: jax.Device) -> Any:
    """A compiled function of one device, written down, on another of the same kind: the same code, byte for byte.

    It is called once, on zeros, since only running shows whether a backend has heeded the other device.
    """
    unloaded, described, no_kwargs = reader(io.BytesIO(written), device).load()
    copy = jax.stages.Compiled(unloaded.load(), [], inputs.unflatten(described), outputs, no_kwargs=no_kwargs)
    arguments, _ = jax.tree.map(lambda info: jax.device_put(np.zeros(info.shape, info.dtype), device), copy.args_info)
    there = {where for leaf in jax.tree.leaves(copy(*arguments)) for where in leaf.devices()}
    if there != {device}:
        raise ValueError(f"it ran on {there} instead of {device}")
    return copy


def reader(file: Any, device: jax.Device) -> Any:
    """JAX's reader of executables, which puts one back on the device that it was compiled for, naming another."""
    client, options = device.client, xla_client.CompileOptions()
    options.device_assignment = xla_client.DeviceAssignment.create(np.array([[device.id]]))

    class Elsewhere(serialize_executable._JaxPjrtUnpickler):
        def persistent_load(self, pid: Any) -> Any:
            if pid[0] == "exec":
                return client.deserialize_executable(pid[1], self.execution_devices, options)
            return device if pid[0] == "device" else client

    return Elsewhere(file, client, [device])
