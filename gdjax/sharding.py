"""Batches whose arrays lie in shards on several devices, of this process or of many: each shard runs where it lies.

Problems are independent, so a shard needs nothing from another. A process runs the shards that it holds and gives back
its part of global arrays that are sharded like those that came in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from gdjax import device as dev
from gdjax.batch import Batch, named_leaves
from gdjax.engine.program import RAN_ALL_STEPS, STOPPED
from gdjax.pieces import own, unhashed
from gdjax.progress import FIRST
from gdjax.session import Job, Outcome, Session
from gdjax.solution import State

SETTINGS = ("enable_x64", "numpy_dtype_promotion", "numpy_rank_promotion", "default_matmul_precision", "debug_nans")
"""What JAX keeps per thread and tracing heeds."""

Range = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the problem axis of a batch of `count` problems is sharded, and which ranges of it lie with this process."""

    count: int
    sharding: NamedSharding
    ranges: tuple[Range, ...]
    places: tuple[tuple[jax.Device, Range], ...]

    @property
    def devices(self) -> tuple[jax.Device, ...]:
        """The device on which each range runs: the first that holds it."""
        return tuple(next(device for device, held in self.places if held == wanted) for wanted in self.ranges)

    @property
    def held(self) -> int:
        """How many problems lie with this process."""
        return sum(last - first for first, last in self.ranges)

    def split(self, tree: Any, flags: Any) -> list[Any]:
        """A pytree of each range's problems, on its device where the array is sharded alike."""
        leaves, structure = jax.tree.flatten(tree)
        cuts = [self.cut(leaf, flag) for leaf, flag in zip(leaves, jax.tree.leaves(flags), strict=True)]
        return [jax.tree.unflatten(structure, [cut[n] for cut in cuts]) for n in range(len(self.ranges))]

    def cut(self, leaf: Any, flag: bool) -> list[Any]:
        """One array's piece for each range: its shard there, or else a slice; all of an array that has no range."""
        wanted = list(zip(self.ranges if flag else [None] * len(self.ranges), self.devices, strict=True))
        held = {}
        if flag or getattr(leaf, "is_fully_replicated", False):
            held = {(range_of(s.index, leaf.shape) if flag else None, s.device): s.data for s in shards(leaf)}
        missing = any(place not in held for place in wanted)
        whole = np.asarray(leaf) if missing and (flag or shards(leaf)) else leaf
        return [held[place] if place in held else whole[slice(*place[0])] if place[0] else whole for place in wanted]

    def join(self, parts: list[Any]) -> Any:
        """Global arrays, sharded as this layout says, of pytrees of NumPy or device arrays for each range."""
        of = dict(zip(self.ranges, parts, strict=True))
        placed = [jax.device_put(of[held], device) for device, held in self.places]
        return jax.tree.map(lambda *leaves: self.whole(leaves), *placed)

    def whole(self, placed: tuple[jax.Array, ...]) -> jax.Array:
        shape, dtype = (self.count, *placed[0].shape[1:]), placed[0].dtype
        return jax.make_array_from_single_device_arrays(shape, self.sharding, list(placed), dtype=dtype)


def shards(leaf: Any) -> Sequence[Any]:
    """The shards of a JAX array that lie with this process."""
    return leaf.addressable_shards if isinstance(leaf, jax.Array) else ()


def leads(leaf: Any) -> bool:
    """Whether an array says where its problems are to run: it is cut along some axis, if only into one piece."""
    if not isinstance(leaf, jax.Array):
        return False
    if isinstance(leaf.sharding, NamedSharding) and len(leaf.sharding.device_set) == 1:
        return leaf.sharding.spec[:1] not in ((), (None,))
    return not leaf.is_fully_replicated


def range_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Range | None:
    """The problems that a shard holds; None if it holds only part of each."""
    bounds = [part.indices(size) for part, size in zip(index, shape, strict=True)]
    if any((first, last) != (0, size) for (first, last, _), size in zip(bounds[1:], shape[1:], strict=True)):
        return None
    return bounds[0][0], bounds[0][1]


def layout_of(batch: Batch, device: Any) -> Layout | None:
    """How the batch lies in shards, by the first array that does; None where it is to run as one.

    Raises:
        ValueError: an array over several processes whose problems cannot be run where they lie.
    """
    if not any(map(spread_out, jax.tree.leaves((batch.weights, batch.data, batch.hyper)))):
        return None
    found = None
    for name, leaf in own_leaves(batch):
        if found is None and leads(leaf):
            found = followed(leaf, device)
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            check_global(name, leaf, found, device)
    for name, leaf in shared_leaves(batch):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise ValueError(
                f"{name} is shared by all problems and its shards lie with several processes; "
                "replicate it: NamedSharding(mesh, PartitionSpec())"
            )
    return found


def spread_out(leaf: Any) -> bool:
    """Whether an array may lie anywhere but on one device of this process."""
    if not isinstance(leaf, jax.Array):
        return False
    return type(leaf.sharding) is not SingleDeviceSharding or not leaf.is_fully_addressable


def own_leaves(batch: Batch) -> list[tuple[str, Any]]:
    """The arrays with a problem axis, by name."""
    return [*named_leaves(batch.weights, "weights"), *(pair for pair, flag in rest(batch) if flag)]


def shared_leaves(batch: Batch) -> list[tuple[str, Any]]:
    return [pair for pair, flag in rest(batch) if not flag]


def rest(batch: Batch) -> list[tuple[tuple[str, Any], bool]]:
    """Data and hyperparameters by name, each with whether it has a problem axis."""
    named = [pair for i, entry in enumerate(batch.data) for pair in named_leaves(entry, f"data[{i}]")]
    named += list(batch.hyper.items())
    return list(zip(named, jax.tree.leaves((batch.data_flags, list(batch.hyper_flags.values()))), strict=True))


def followed(leaf: Any, device: Any) -> Layout | None:
    """The layout of one array, if each problem is whole in its shard and no other devices are asked for."""
    everywhere = {
        where: range_of(index, leaf.shape) for where, index in leaf.sharding.devices_indices_map(leaf.shape).items()
    }
    ranges = {where: held for where, held in everywhere.items() if held is not None}
    if len(ranges) < len(everywhere):
        return None
    if not (isinstance(device, str) and device == "auto") and set(dev.select_devices(device)) != set(ranges):
        return None
    order = sorted(ranges, key=lambda where: (ranges[where], where.id))
    if isinstance(leaf.sharding, NamedSharding):
        alike = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[:1]))
    elif len(set(ranges.values())) == len(order):
        alike = NamedSharding(Mesh(np.array(order), ("problems",)), PartitionSpec("problems"))
    else:
        return None
    here = {shard.device for shard in leaf.addressable_shards}
    places = tuple((where, ranges[where]) for where in order if where in here)
    return Layout(leaf.shape[0], alike, tuple(dict.fromkeys(held for _, held in places)), places)


def check_global(name: str, leaf: jax.Array, layout: Layout | None, device: Any) -> None:
    """An array over several processes must lie as the batch does: no process can reach the shards of another."""
    if layout is None and any(range_of(s.index, leaf.shape) is None for s in leaf.addressable_shards):
        raise ValueError(
            f"{name} is sharded over several processes along an axis other than the problems', axis 0; shard it as "
            "NamedSharding(mesh, PartitionSpec('axis of the mesh')), so that each problem lies in one piece"
        )
    if layout is None:
        raise ValueError(
            f"{name} is sharded over several processes, device={device!r} names other devices than those it lies on; "
            "leave device='auto', and each process runs the problems it holds"
        )
    held = {(range_of(shard.index, leaf.shape), shard.device) for shard in leaf.addressable_shards}
    if not {(held, device) for device, held in layout.places} <= held:
        raise ValueError(
            f"{name} is sharded over several processes, but not as the first sharded array of the batch is "
            f"({leaf.sharding} against {layout.sharding}); shard all arrays alike along axis 0"
        )


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A session whose batch lies in shards: runs as `Session` does, each shard on its device, side by side."""

    session: Session
    layout: Layout

    def run(self, batch: Batch, job: Job, state: State | None) -> Outcome:
        """All problems that this process holds to their end; arrays come back sharded as they came."""
        drive = self.parts if job.watch is None else self.slices
        return self.outcome(drive(self.batches(batch), job, self.states(state)))

    def parts(self, batches: list[Batch], job: Job, states: list[State | None]) -> list[Outcome]:
        """Each range run by itself, side by side."""
        settings = {name: getattr(jax.config, f"jax_{name}") for name in SETTINGS}
        alone = dataclasses.replace(job, watch=None)

        def one(number: int) -> Outcome:
            with kept(settings):
                return self.session.at(number).run(batches[number], alone, states[number])

        return list(crew(len(batches)).map(one, range(len(batches))))

    def slices(self, batches: list[Batch], job: Job, states: list[State | None]) -> list[Outcome]:
        """The same, so many steps at a time that the watch can be told in between; a record is made in one go."""
        watch, left = job.watch, job.steps
        assert watch is not None
        while True:
            ahead = left if job.every else min(left, max(FIRST, watch.affordable(self.layout.held)))
            parts = self.parts(batches, dataclasses.replace(job, steps=ahead), states)
            status = np.concatenate([np.asarray(part.status) for part in parts])
            left -= ahead
            watch.took(ahead * len(status))
            ended = status[status != RAN_ALL_STEPS]
            share = None if len(ended) else 1 - left / job.steps
            if not left or len(ended) == len(status):
                watch.end(status)
                return parts
            if watch.tell(ended, len(ended), share):
                return [stopped(part) for part in parts]
            batches = [
                dataclasses.replace(batch, weights=part.weights) for batch, part in zip(batches, parts, strict=True)
            ]
            states = [part.state for part in parts]

    def batches(self, batch: Batch) -> list[Batch]:
        trees = (batch.weights, batch.data, batch.hyper)
        flags = (own(batch.weights), batch.data_flags, batch.hyper_flags)
        return [
            dataclasses.replace(batch, weights=weights, data=data, hyper=hyper, count=last - first)
            for (weights, data, hyper), (first, last) in zip(
                self.layout.split(trees, flags), self.layout.ranges, strict=True
            )
        ]

    def states(self, state: State | None) -> list[State | None]:
        if state is None:
            return [None] * len(self.layout.ranges)
        flags = carried_flags(state), True, True
        return [
            dataclasses.replace(state, carried=carried, status=status, steps=steps)
            for carried, status, steps in self.layout.split((state.carried, state.status, state.steps), flags)
        ]

    def outcome(self, parts: list[Outcome]) -> Outcome:
        """One outcome of those of all ranges."""
        fields = ("weights", "loss", "gradient_norm", "steps", "status", "record")
        states = [part.state for part in parts]
        flags = jax.tree.leaves(carried_flags(states[0]))
        carried = [jax.tree.leaves(state.carried) for state in states]
        joined, own_carried = self.layout.join(
            [
                (
                    {name: getattr(part, name) for name in fields},
                    [c for c, flag in zip(held, flags, strict=True) if flag],
                )
                for part, held in zip(parts, carried, strict=True)
            ]
        )
        ready = iter(own_carried)
        whole = [next(ready) if flag else leaf for leaf, flag in zip(carried[0], flags, strict=True)]
        state = dataclasses.replace(
            states[0],
            carried=jax.tree.unflatten(jax.tree.structure(states[0].carried), whole),
            status=joined["status"],
            steps=joined["steps"],
        )
        return dataclasses.replace(parts[0], **joined, state=state)


@functools.cache
def crew(shards: int) -> ThreadPoolExecutor:
    """The threads that run shards side by side, kept between calls."""
    return ThreadPoolExecutor(shards, thread_name_prefix="gdjax-shard")


def stopped(part: Outcome) -> Outcome:
    """What a run says that its callback ended: problems still on their way are STOPPED."""
    status = np.where(np.asarray(part.status) == RAN_ALL_STEPS, np.int8(STOPPED), part.status)
    return dataclasses.replace(part, status=status, state=dataclasses.replace(part.state, status=status))


def carried_flags(state: State) -> Any:
    """Which leaves of what a state carries have the problem axis."""
    return own(state.carried) if state.flags is None else unhashed(state.flags, state.carried)


@contextlib.contextmanager
def kept(settings: dict[str, Any]) -> Iterator[None]:
    """JAX's settings of another thread in this one."""
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(getattr(jax, name)(value))
        yield
