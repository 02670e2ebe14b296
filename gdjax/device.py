"""The one module that knows devices: which there are, what they are, which to take, how programs are compiled there.

No other module names a platform: what depends on one is a question answered here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxlib import xla_client

from gdjax.arena import host_room

log = logging.getLogger("gdjax")

INSTALL = {
    "gpu": 'pip install "gdjax[cuda]"',
    "tpu": 'pip install "gdjax[tpu]"',
}

ALIASES = {"cuda": "gpu", "rocm": "gpu"}


@dataclasses.dataclass(frozen=True)
class DeviceInfo:
    """One device as gdjax sees it.

    Attributes:
        name: what `device=` takes, such as `"cpu:0"`.
        platform: `"cpu"`, `"gpu"` or `"tpu"`.
        kind: the maker's name of it.
        memory_bytes: its memory in bytes, None where it does not say.
        count: how many devices of this platform there are.
        device: the `jax.Device`.

    >>> import gdjax
    >>> host = gdjax.devices()[-1]
    >>> host.name.partition(":")[0], host.platform, str(host.device.platform)
    ('cpu', 'cpu', 'cpu')
    """

    name: str
    platform: str
    kind: str
    memory_bytes: int | None
    count: int
    device: jax.Device


def devices() -> list[DeviceInfo]:
    """Every device JAX can use here, accelerators first.

    Returns:
        One `DeviceInfo` per device, in the order in which `"auto"` would take them.

    Raises:
        RuntimeError: JAX itself finds no backend (a wrong `JAX_PLATFORMS`, say).

    >>> devices()[-1].platform
    'cpu'
    """
    found = [d for platform in platforms() for d in jax.local_devices(backend=platform)]
    counts = {p: sum(platform_of(d) == p for d in found) for p in {platform_of(d) for d in found}}
    return [describe(d, counts[platform_of(d)]) for d in found]


def platforms() -> list[str]:
    """Platforms with at least one device of this process, the default one first, the host last."""
    default = platform_of(jax.local_devices()[0])
    return [default, *[platform for platform in ("gpu", "tpu", "cpu") if platform != default and there(platform)]]


def there(platform: str) -> list[jax.Device]:
    """The devices of a platform, none where it is not here."""
    try:
        return jax.local_devices(backend=platform)
    except RuntimeError:
        return []


def platform_of(device: jax.Device) -> str:
    return ALIASES.get(device.platform, device.platform)


def describe(device: jax.Device, count: int) -> DeviceInfo:
    platform = platform_of(device)
    siblings = jax.local_devices(backend=device.platform)
    kind = device.device_kind if platform != "cpu" else host_kind()
    return DeviceInfo(f"{platform}:{siblings.index(device)}", platform, kind, memory(device), count, device)


@functools.cache
def host_kind() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else "cpu"


def memory(device: jax.Device) -> int | None:
    """Bytes of memory the device may use, None where it does not say."""
    if platform_of(device) == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError, AttributeError):
            return None
    stats = device.memory_stats()
    return stats.get("bytes_limit") if stats else None


def one_device(device: Any) -> jax.Device:
    """The one device that a request names, as in `select_devices`; ValueError if it names several."""
    chosen = select_devices(device)
    if len(chosen) != 1:
        raise ValueError(f"device names {len(chosen)} devices where one is wanted; pass one of them")
    return chosen[0]


def candidates() -> tuple[list[list[jax.Device]], str]:
    """`(groups of alike devices that "auto" may take, why no others)`; virtual CPU devices share the same cores.

    `jax_default_device` names the only candidate. `JAX_PLATFORMS` says which platforms there are; with the CPU named
    first it is the only one. Under `jax.distributed` a process takes none of another's devices.
    """
    if jax.config.jax_default_device:  # type: ignore[attr-defined]
        return [[named("auto")]], "jax_default_device says so"
    default = jax.local_devices()[0]
    if is_host(default) and jax.config.jax_platforms:  # type: ignore[attr-defined]
        return [[default]], "JAX_PLATFORMS names it first"
    return alike(default), "the only device there is"


@functools.cache
def alike(default: jax.Device) -> list[list[jax.Device]]:
    """The devices of this process by kind, those of the default device's platform first."""
    kinds: dict[tuple[str, str], list[jax.Device]] = {}
    for platform in platforms():
        for device in jax.local_devices(backend=platform):
            kinds.setdefault((platform_of(device), device.device_kind), []).append(device)
    return [group[:1] if is_host(group[0]) else group for group in kinds.values()]


def select_devices(device: Any) -> list[jax.Device]:
    """The devices a request names: a platform, one device of it, a `jax.Device`, a list of these, or a mesh.

    `"auto"` is the default device, the first accelerator or else the CPU: where there is a job to weigh,
    `gdjax.dispatch` chooses.

    Raises:
        ValueError: there is no such device; the message says which there are and how to install support.
        TypeError: `device` is something else.
    """
    if isinstance(device, str):
        return [named(device)]
    if isinstance(device, jax.Device):
        return [device]
    if isinstance(device, jax.sharding.Mesh):
        return list(device.devices.flat)
    if isinstance(device, (list, tuple)):
        if not device:
            raise ValueError("device is an empty list; pass at least one device, or 'auto'")
        return [d for item in device for d in select_devices(item)]
    raise TypeError(
        f"device is a {type(device).__name__}; pass 'auto', 'cpu', 'gpu', 'tpu', 'gpu:1', a jax.Device, a list of "
        "them, or a jax.sharding.Mesh"
    )


def named(name: str) -> jax.Device:
    if name == "auto":
        default = jax.config.jax_default_device  # type: ignore[attr-defined]
        if isinstance(default, jax.Device):
            return default
        return jax.local_devices(backend=default or None)[0]
    platform, _, index = name.partition(":")
    platform = ALIASES.get(platform, platform)
    if platform not in ("cpu", "gpu", "tpu"):
        near = difflib.get_close_matches(platform, ["auto", "cpu", "gpu", "tpu"], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"device={name!r} is not 'auto', 'cpu', 'gpu', 'tpu' or one of them with a number{hint}")
    matching = there(platform)
    if index and not index.isdigit():
        raise ValueError(f"device={name!r}: {index!r} is not a device number; write {platform}:0")
    if int(index or 0) >= len(matching):
        have = ", ".join(d.name for d in devices())
        mend = f"; for {platform} support: {INSTALL[platform]}" if platform in INSTALL and not matching else ""
        raise ValueError(f"device={name!r} is not here; there is {have}{mend}")
    return matching[int(index or 0)]


def own_devices(chosen: list[jax.Device]) -> list[jax.Device]:
    """The same devices; raises ValueError where one belongs to another process, which alone can run programs there."""
    foreign = [d for d in chosen if d.process_index != d.client.process_index()]
    if foreign:
        raise ValueError(
            f"device holds {foreign[0]}, which belongs to process {foreign[0].process_index}; to run over several "
            "processes pass weights and data as arrays that are sharded over their devices "
            "(jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec('axis')), mine)), and leave "
            "device='auto': each process runs the problems it holds"
        )
    return chosen


def without_mesh() -> contextlib.AbstractContextManager[Any]:
    """Sets aside the mesh that `jax.set_mesh` has set: under it, nothing can be compiled for one device."""
    if jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ()))


def full_precision(device: jax.Device) -> contextlib.AbstractContextManager[Any]:
    """Matrix products of float32 in float32, unless the user has set `jax_default_matmul_precision`: accelerators would
    multiply in tf32 or bfloat16."""
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return contextlib.nullcontext() if asked or is_host(device) else jax.default_matmul_precision("highest")


def in_shards(array: Any) -> bool:
    """Whether an array lies on several devices."""
    return isinstance(array, jax.Array) and len(array.sharding.device_set) > 1


def on_accelerator(array: Any) -> bool:
    """Whether an array lies on one accelerator, from where fetching it takes longer than looking at it there."""
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer) or in_shards(array):
        return False
    return not is_host(next(iter(array.devices())))


def here(array: Any) -> np.ndarray:
    """What this process holds of an array: all of it, save of one that lies with several processes."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.concatenate([np.asarray(s.data) for s in array.addressable_shards if s.replica_id == 0])


def cast(array: Any, dtype: Any) -> Any:
    """The array in another dtype, rounded as NumPy does; one in shards, or on an accelerator in this dtype, stays."""
    if array.dtype == dtype and (in_shards(array) or on_accelerator(array)):
        return array
    if not in_shards(array):
        return np.asarray(array).astype(dtype, copy=False)
    with jax.enable_x64(True):
        pieces = [jax.device_put(np.asarray(s.data).astype(dtype), s.device) for s in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, pieces)


def is_host(device: jax.Device) -> bool:
    """Whether the device computes in the host's own memory, where slices of NumPy arrays cost nothing to pass."""
    return platform_of(device) == "cpu"


def runs_on(device: jax.Device) -> jax.Device:
    """The device that programs for `device` are compiled for: the host has one that runs them where they are called.

    JAX's own CPU client hands every program to threads of its pool, which costs some 30 microseconds a call and has the
    results copied out by a core that did not compute them.
    """
    return (host_in_place() or device) if is_host(device) else device


@functools.cache
def host_in_place() -> jax.Device | None:
    """The host as the one device of a client of our own, whose programs run in the thread that calls them; None where
    jaxlib makes no such client. Its arrays are never given to users."""
    try:
        client: Any = xla_client.make_cpu_client(asynchronous=False, num_devices=1)
        return client.local_devices()[0]
    except (AttributeError, TypeError, RuntimeError) as error:
        log.info("programs on the CPU run in JAX's own threads: %s", error)
        return None


def workers(device: jax.Device) -> int:
    """How many blocks to run on the device side by side: XLA's CPU client runs one program on one core."""
    if not is_host(device):
        return 1
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def register_target(device: jax.Device) -> tuple[str | None, str]:
    """What kernels in registers are compiled for on a device, and where that is nothing, why.

    Mosaic, which compiles them, knows TPUs, and NVIDIA GPUs from Hopper (compute capability 9.0) on; for the CPU they
    are interpreted.
    """
    platform = platform_of(device)
    if platform != "gpu":
        return platform, ""
    capability = str(getattr(device, "compute_capability", "unknown"))
    major = capability.partition(".")[0]
    if major.isdigit() and int(major) >= 9:
        return platform, ""
    return None, f"{device.device_kind} (compute capability {capability}) is older than Hopper (9.0) or not NVIDIA's"


def side_by_side(chosen: Sequence[jax.Device]) -> int:
    """How many blocks run at a time on these devices, which are of one kind."""
    return max(1, workers(chosen[0]) // len(chosen)) * len(chosen)


def room(device: jax.Device) -> int | None:
    """Bytes of memory that are free for arrays, None where the device does not say."""
    if is_host(device):
        return host_room()
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return max(0, stats["bytes_limit"] - stats.get("bytes_in_use", 0))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the host, has no memory left."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def compiler_options(device: jax.Device) -> dict[str, Any]:
    """What tiles are compiled with.

    On the CPU: full-width vectors, and one program on one core, since blocks of the batch already fill the cores.
    """
    if not is_host(device):
        return {}
    return {"xla_cpu_prefer_vector_width": 512, "xla_disable_hlo_passes": "cpu-parallel-task-assigner"}


def kind(device: jax.Device) -> str:
    """What a measured plan is good for: the platform and the maker's name of the device."""
    return f"{platform_of(device)} {host_kind() if is_host(device) else device.device_kind}"


def label(chosen: Sequence[jax.Device]) -> str:
    """The devices in one word, for messages and tables."""
    names = [f"{platform_of(d)}:{jax.local_devices(backend=d.platform).index(d)}" for d in chosen]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
