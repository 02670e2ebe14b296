"""What a device can do at best, measured: multiply-adds, copies in its memory, transfers from the host.

No program that takes given steps on given arrays can be faster than the slowest of the three.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdjax.device import DeviceInfo, compiler_options, is_host, register_target, workers
from gdjax.engine.targets import TARGETS, Arguments, Target

CHAINS, DEPTH = 12, 16  # enough independent multiply-adds to hide their latency, few enough for the registers
MEGABYTE = 1 << 20
PASSES = 16


@dataclass(frozen=True)
class Limits:
    """What one device can do at best, per second; no `transfer_bytes` where it shares the host's memory."""

    device: str
    kind: str
    multiply_adds: float
    copy_bytes: float
    transfer_bytes: float | None

    def seconds(self, multiply_adds: float, moved_bytes: float, bus_bytes: float) -> tuple[float, str]:
        """The least time for so many multiply-adds, bytes moved in the device's memory (read and written), and bytes
        moved between the host's and the device's; and what takes it."""
        needs = {"compute": multiply_adds / self.multiply_adds, "memory": moved_bytes / self.copy_bytes}
        if self.transfer_bytes is not None:
            needs["transfer"] = bus_bytes / self.transfer_bytes
        return max((seconds, name) for name, seconds in needs.items())


def clock(run: Callable[[], Any], patience: float, least_runs: int = 3, most_runs: int = 50) -> list[float]:
    """Seconds of repeated runs, until `patience` seconds are used up."""
    seconds: list[float] = []
    while len(seconds) < least_runs or (sum(seconds) < patience and len(seconds) < most_runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def side_by_side(function: Callable[[jax.Array], jax.Array], inputs: Sequence[jax.Array], patience: float) -> float:
    """Least seconds for one call per input, all at once from as many threads."""
    with ThreadPoolExecutor(len(inputs)) as pool:
        call = lambda x: function(x).block_until_ready()  # noqa: E731
        list(pool.map(call, inputs))
        return min(clock(lambda: list(pool.map(call, inputs)), patience))


def multiply_adder(device: jax.Device) -> tuple[Callable[[jax.Array], jax.Array], list[jax.Array], int]:
    """A kernel that stays in registers, an input per worker, and how many multiply-adds that is."""
    if not is_host(device) and register_target(device)[0] == "gpu":  # where XLA itself writes products and sums apart
        lanes, loops = 1 << 20, 500
        x = jax.device_put(np.full((1, lanes), 0.5, np.float32), device)
        return jax.jit(lambda x: chains(TARGETS["gpu"], x, loops)), [x], lanes * loops * CHAINS * DEPTH
    lanes, loops = (4096, 500) if is_host(device) else (1 << 22, 50)

    def once(_: Any, x: jax.Array) -> jax.Array:
        chains = [x * np.float32(0.5 + 0.01 * i) for i in range(CHAINS)]
        for _ in range(DEPTH):
            chains = [chain * x + np.float32(0.25) for chain in chains]
        return sum(chains[1:], chains[0]) * np.float32(0.01)

    run = jax.jit(lambda x: jax.lax.fori_loop(0, loops, once, x), compiler_options=compiler_options(device))
    inputs = [jax.device_put(np.full(lanes, 0.5, np.float32), device) for _ in range(workers(device))]
    # Each of the other multiplications and additions takes a multiply-add's place in the pipeline.
    return run, inputs, len(inputs) * lanes * loops * (CHAINS * (DEPTH + 2) + 1)


def chains(target: Target, x: jax.Array, loops: int) -> jax.Array:
    """`CHAINS` chains of `loops · DEPTH` multiply-adds `c ← c·x + 1/4` on every number of `x [1, lanes]`, summed up."""

    def compute(given: Arguments) -> list[list[Any]]:
        (x,) = given.own[0].all()
        quarter = target.full(np.float32(0.25))

        def once(_: Any, all_chains: list[Any]) -> list[Any]:
            for _ in range(DEPTH):
                all_chains = [chain * x + quarter for chain in all_chains]
            return list(map(target.settle, all_chains))

        start = [target.settle(x * target.full(np.float32(0.5 + 0.01 * i))) for i in range(CHAINS)]
        ends = jax.lax.fori_loop(0, given.steps, once, start)
        return [[target.settle(sum(ends[1:], ends[0]))]]

    numbers, zero = jnp.array([0, loops, x.size], jnp.int32), jnp.array([-0.0], jnp.float32)
    (out,) = target.launch(compute, numbers, zero, [x], [], [(1, jnp.float32)], x.size)
    return out


def multiply_add_rate(device: jax.Device, patience: float = 0.3) -> float:
    """Multiply-adds per second, on all cores of a host."""
    run, inputs, work = multiply_adder(device)
    return work / side_by_side(run, inputs, patience)


def copy_rate(device: jax.Device, patience: float = 0.3, size: int = 128 * MEGABYTE) -> float:
    """Bytes per second, read and written together, of a copy too large for any cache."""
    once = lambda _, x: x + np.float32(1)  # noqa: E731
    # Many passes over the same memory: the first touch of fresh pages costs more than any copy.
    run = jax.jit(lambda x: jax.lax.fori_loop(0, PASSES, once, x), compiler_options=compiler_options(device))
    count = workers(device)
    inputs = [jax.device_put(np.ones(size // 4 // count, np.float32), device) for _ in range(count)]
    return PASSES * 2 * 4 * sum(x.size for x in inputs) / side_by_side(run, inputs, patience)


def transfer_rate(device: jax.Device, patience: float = 0.3, size: int = 64 * MEGABYTE) -> float | None:
    """Bytes per second from the host's memory to the device's; None where they are the same."""
    if is_host(device):
        return None
    host = np.ones(size // 4, np.float32)
    return size / min(clock(lambda: jax.device_put(host, device).block_until_ready(), patience))


def measure_limits(info: DeviceInfo, patience: float = 0.3) -> Limits:
    """Measure what a device can do at best.

    Args:
        info: an entry of `gdjax.devices()`.
        patience: seconds spent on each of the three rates, at least.

    Returns:
        Its rates per second.
    """
    device = info.device
    return Limits(
        info.name,
        info.kind,
        multiply_add_rate(device, patience),
        copy_rate(device, patience),
        transfer_rate(device, patience),
    )
