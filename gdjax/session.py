"""The way of a batch through the compiled programs of its kind of problem, which are kept between calls."""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np

from gdjax import device as dev
from gdjax import plan as plans
from gdjax import tuning
from gdjax.batch import Batch, problem_shapes
from gdjax.blocks import Blocks
from gdjax.dryrun import check_program
from gdjax.engine import fixed, flow, history, refill, rounds
from gdjax.engine.block import Block
from gdjax.engine.feed import run_block
from gdjax.engine.program import DIVERGED, RAN_ALL_STEPS, RUNNING, STOPPED, Program
from gdjax.key import Key, key_of
from gdjax.pieces import cut, hashable, joined, own, pick, scatter, shared_once, unhashed
from gdjax.placed import filled
from gdjax.plan import Plan
from gdjax.progress import FIRST, Watch
from gdjax.solution import State

log = logging.getLogger("gdjax")

KEPT = 64
"""Kinds of problem whose compiled programs are kept."""

TILES = {
    "begin": refill.begin,
    "sprint": refill.sprint,
    "finish": refill.finish,
    "entire": refill.entire,
    "rows": history.rows,
    "fresh": flow.flow,
    "through": flow.flow,
}
"""What batches with a stop rule or a record are run through."""

BARE = fixed.Outputs(weights=True, state=False, loss=False, gradient_norm=False, status=True, lowest=True)
"""What is wanted of a block where not everything is."""

SAMPLE, SAMPLE_STEPS = 1 << 19, 24
"""Problems and steps on which plans are measured."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Arrays of all problems as NumPy or device arrays, before they become a `Solution`."""

    weights: Any
    loss: Any
    gradient_norm: Any
    steps: Any
    status: Any
    state: State
    plan: Plan
    record: Any = None


@dataclasses.dataclass(frozen=True)
class Job:
    """What is wanted of a batch: at most so many `steps`, a row of record `every` so many of them (0: none).

    `plan` None: as remembered, or a sound default; `measure`: measured first. `watch` is told how far the batch is.
    Without `everything`, only weights and how they ended are sure to come back.
    """

    steps: int
    plan: Plan | None = None
    measure: bool = False
    every: int = 0
    watch: Watch | None = None
    everything: bool = True


class Session(Blocks):
    """One loss, rule and stop rule on one kind of problem and device."""

    def __init__(self, program: Program, batch: Batch, devices: Sequence[jax.Device]):
        super().__init__(program, batch, devices)
        self.best: Plan | None = None
        self.recalled = False
        self.tuning = threading.Lock()

    def run(self, batch: Batch, job: Job, state: State | None) -> Outcome:
        """All problems to their end, or to where the watch's callback ends the run."""
        if state is not None:
            check_carried(self.program, batch, state)
        begun, batch = state.total if state else 0, shared_once(batch, self.devices[0])
        if self.program.stop is not None:
            out = self.run_until(batch, job, state)
        elif job.watch is None or job.every:
            out = self.run_fixed(batch, job, state)
        else:
            out = self.run_slices(batch, job, state, job.watch)
        if job.watch is None:
            return out
        if not job.watch.stopped:
            job.watch.end(out.status)
            return out
        early = (np.asarray(out.status) == RAN_ALL_STEPS) & (np.asarray(out.steps) < begun + job.steps)
        status = np.where(early, np.int8(STOPPED), out.status)
        return dataclasses.replace(out, status=status, state=dataclasses.replace(out.state, status=status))

    def run_slices(self, batch: Batch, job: Job, state: State | None, watch: Watch) -> Outcome:
        """All steps, a slice of them at a time: between slices the watch is told."""
        left = job.steps
        while True:
            ahead = min(left, max(FIRST, watch.affordable(batch.count)))
            out = self.run_fixed(batch, dataclasses.replace(job, steps=ahead), state)
            left -= ahead
            watch.took(ahead * batch.count)
            if not left or watch.tell(out.status, share=1 - left / job.steps):
                return out
            batch, state = dataclasses.replace(batch, weights=out.weights), out.state

    def run_fixed(self, batch: Batch, job: Job, state: State | None) -> Outcome:
        """All steps of all problems."""
        start = state.total if state else 0
        inputs = fixed.Inputs(batch.weights, state.carried if state else None, batch.data, batch.hyper)
        kept_flags = unhashed(state.flags, state.carried) if state else None
        flags = fixed.Inputs(own(batch.weights), kept_flags, batch.data_flags, batch.hyper_flags)
        plan = job.plan or self.tuned(inputs, flags, batch.count, job.steps, job.measure)
        out, own_state, plan, steps, record = self.descend(inputs, flags, batch.count, plan, start, job)
        taken, status = filled(batch.count, start + steps, self.devices[0]), out.status
        kept = State(out.state, status, taken, "fixed", hashable(own_state), start + steps, dev.kind(self.devices[0]))
        result = Outcome(out.weights, out.loss, out.gradient_norm, taken, status, kept, plan, record)
        again = state is not None and np.asarray(state.status).max() == DIVERGED
        if least(status, out.lowest) != RUNNING and not again:
            return result
        broken = np.asarray(status) == RUNNING
        if again:
            broken |= np.asarray(state.status) == DIVERGED  # type: ignore[union-attr]
        again_job = Job(steps, every=job.every, everything=job.everything)
        return self.replay(batch, again_job, state, result, np.flatnonzero(broken))

    def descend(
        self, inputs: fixed.Inputs, flags: fixed.Inputs, count: int, plan: Plan | None, start: int, job: Job
    ) -> tuple[fixed.Outputs, Any, Plan, int, Any]:
        """`(outputs, flags of their state, plan, steps, record)`; a problem that broke on the way says RUNNING."""
        if not job.every:
            wanted = None if job.everything else BARE
            block, out = self.execute(fixed.tile, inputs, flags, count, plan, start, job.steps, job.steps, wanted)
            return out, jax.tree.unflatten(block.out_tree, block.out_own).state, block.plan, job.steps, None

        def run(inputs: Any, flags: Any, first: int, ahead: int) -> Any:
            block, out = self.execute(history.steady, inputs, flags, count, plan, first, ahead, ahead)
            ran.append(block)
            return out, jax.tree.unflatten(block.out_tree, block.out_own)

        ran: list[Block] = []
        out, out_flags, steps, record = history.steadily(run, inputs, flags, start, job.steps, job.every, job.watch)
        return out, out_flags.state, ran[-1].plan, steps, record

    def tuned(self, inputs: Any, flags: Any, count: int, steps: int, always: bool = False) -> Plan | None:
        """The plan remembered for large batches of this kind, measured first where the run is long. The block of a
        smaller batch is as small as without: small enough that the batch is copied to where the block works."""
        kind, device = self.kind(inputs, flags), self.devices[0]
        default = plans.default(kind, device, self.share(count))
        if self.refused is not None or not dev.is_host(device) or (default.tiles == 1 and not always):
            return None
        measure, whole = always or tuning.worth_measuring(kind, device, count, steps), self.whole
        with whole.tuning:
            if whole.best is None and (measure or not whole.recalled):
                name = self.tuning_name(inputs, flags)
                whole.best, whole.recalled = tuning.recall(name), True
                if whole.best is None and measure:
                    whole.best = self.measured(inputs, flags, plans.default(kind, device, plans.MANY), count)
                    tuning.remember(name, whole.best)
            best, most = whole.best, default.tile * default.tiles
            return best and dataclasses.replace(best, tiles=min(best.tiles, max(1, most // best.tile)))

    def measured(self, inputs: Any, flags: Any, default: Plan, count: int) -> Plan:
        sample, size = pick(inputs, flags, slice(SAMPLE)), min(count, SAMPLE)

        def run(plan: Plan) -> None:
            run_block(self.block(fixed.tile, sample, flags, size, plan), sample, flags, size, 0, SAMPLE_STEPS)

        return tuning.fastest(tuning.candidates(self.kind(inputs, flags), default), run)

    def tuning_name(self, inputs: Any, flags: Any) -> str:
        one = problem_shapes((inputs.weights, inputs.data, inputs.hyper), (flags.weights, flags.data, flags.hyper))
        weights, data, hyper = one
        state = jax.eval_shape(self.program.init, weights, data, hyper)
        scalar = jax.ShapeDtypeStruct((), np.int32)
        healthy = jax.ShapeDtypeStruct((), bool)
        return tuning.key(self.program.step, (weights, state, healthy, scalar, data, hyper), self.devices[0])

    def replay(self, batch: Batch, job: Job, state: State | None, result: Outcome, which: np.ndarray) -> Outcome:
        """Run the problems that broke again, step by step, to end each at its last finite weights."""
        some = cut(batch, which)
        carried: tuple[Any, Any] = (None, None)
        if state is not None:
            flags = unhashed(state.flags, state.carried)
            carried = (pick(state.carried, flags, which), flags)
        again = self.run_until(some, job, None, carried, state.total if state else 0)
        put = lambda whole, part: scatter(whole, part, which)  # noqa: E731
        taken, status = put(result.steps, again.steps), put(result.status, again.status)
        if state is not None:  # a problem that had diverged before stays at the step where it did
            before = np.asarray(state.status) == DIVERGED
            taken, status = (
                np.where(before, np.asarray(state.steps), taken),
                np.where(before, np.int8(DIVERGED), status),
            )
        return dataclasses.replace(
            result,
            weights=jax.tree.map(put, result.weights, again.weights),
            loss=put(result.loss, again.loss) if job.everything else None,
            gradient_norm=put(result.gradient_norm, again.gradient_norm) if job.everything else None,
            steps=taken,
            status=status,
            state=dataclasses.replace(result.state, status=status, steps=taken),
            record=jax.tree.map(lambda a, b: put(a, history.widened(b, a.shape[1])), result.record, again.record),
        )

    def run_until(
        self,
        batch: Batch,
        job: Job,
        state: State | None,
        rule_state: tuple[Any, Any] = (None, None),
        start: int = 0,
    ) -> Outcome:
        """Until each problem's rule holds, slab by slab."""
        start = state.total if state else start
        ended: Any = None
        parts: list[Any] = []
        most = batch.count if self.masked(job.plan) else rounds.SLAB
        for first in range(0, batch.count, most):
            which = slice(first, first + most)
            slab = batch if batch.count <= most else cut(batch, which)
            lane = None
            if state is not None:
                lane = pick(state.carried, own(state.carried), which)
                status = np.where(lane["status"] == DIVERGED, np.int32(DIVERGED), np.int32(RUNNING))
                lane = {**lane, "weights": slab.weights, "status": status}
            carried = pick(*rule_state, which), rule_state[1]
            if job.watch is not None and job.watch.stopped:  # problems not begun stay at their start
                job = dataclasses.replace(job, steps=0, every=0)
            part, *others = self.run_slab(slab, job, lane, carried, start)
            ended = joined(ended, part, first, batch.count)
            parts.append(others)
        record = history.joined([part for _, _, part in parts], batch.count)
        lane = ended.lane
        status = narrowed(lane["status"]) if dev.on_accelerator(lane["status"]) else lane["status"].astype(np.int8)
        total = start + max(steps for _, steps, _ in parts)
        kept = State(lane, status, lane["index"], "until", None, total, dev.kind(self.devices[0]))
        ran = parts[-1][0]
        return Outcome(lane["weights"], ended.loss, ended.gradient_norm, lane["index"], status, kept, ran, record)

    def run_slab(
        self, batch: Batch, job: Job, lane: Any, rule_state: tuple[Any, Any], start: int
    ) -> tuple[refill.Ended, Plan, int, Any]:
        """`(ended problems, plan, steps, record)`; `steps` are fewer than asked for where the watch ended the run."""
        ran: dict[str, Plan] = {}

        def run(name: str, inputs: Any, flags: Any, count: int, first: int, second: int) -> Any:
            # How long a sprint is differs; the others take much the same time for each problem, call by call.
            updates = None if name == "sprint" else 1
            plan = ran.get("fresh", job.plan) if name == "through" else job.plan  # those left are as wide as before
            block, out = self.execute(TILES[name], inputs, flags, count, plan, first, second, updates)
            ran[name] = block.plan
            return out

        steps, record = job.steps, None
        if lane is None:
            inputs = refill.Start(batch.weights, rule_state[0], batch.data, batch.hyper)
            flags = refill.Start(own(batch.weights), rule_state[1], batch.data_flags, batch.hyper_flags)
            if self.masks(job, inputs, flags, batch.count) and not job.every and job.watch is None:
                return run("entire", inputs, flags, batch.count, start, steps), ran["entire"], steps, None
            if self.flows(job):
                return rounds.flowing(run, "fresh", inputs, flags, batch.count, start, steps), ran["fresh"], steps, None
            lane = run("begin", inputs, flags, batch.count, start, 0)
        lane_flags = refill.Running(own(lane), batch.data_flags, batch.hyper_flags)
        seated = refill.Running(lane, batch.data, batch.hyper)
        masks = self.masks(job, seated, lane_flags, batch.count)
        if job.every:
            ended, steps, record = history.recorded(run, seated, lane_flags, start, steps, job.every, job.watch)
        elif masks and job.watch is not None:
            ended, steps = rounds.slices(run, seated, lane_flags, start, steps, job.watch)
        elif self.program.stop is None or masks:
            ended = run("finish", seated, lane_flags, batch.count, start, steps)
        elif self.flows(job):
            ended = rounds.flowing(run, "through", seated, lane_flags, batch.count, start, steps)
        else:
            stride = refill.stride_of(self.block(refill.sprint, seated, lane_flags, batch.count, job.plan).plan.chunk)
            kind = self.kind(seated, lane_flags)
            if batch.count * kind.bytes <= rounds.FEW_BYTES and job.watch is None:
                ended = rounds.straight(run, seated, lane_flags, start, steps, stride)
            else:
                lull = plans.lull(kind)
                ended, steps = rounds.rounds(run, seated, lane_flags, start, steps, stride, lull, job.watch)
        if job.watch is not None:
            job.watch.settle(ended.lane["status"])
        return ended, next(ran[name] for name in ("through", "sprint", "rows", "finish") if name in ran), steps, record

    def masks(self, job: Job, inputs: Any, flags: Any, count: int) -> bool:
        """Whether all problems run in one loop to their ends: on the CPU where one tile of vectors holds them (there
        nobody waits for a lane, and an update taken blindly costs them as much as one that is looked at), or where they
        may take so few updates that all would be looked at."""
        if not self.flows(job):
            return self.masked(job.plan)
        if job.steps <= flow.LAST:
            return True
        plan = job.plan or plans.refill(self.kind(inputs, flags), self.devices[0], self.share(count))
        return plan.chunk == 1 and count <= plan.tile

    def flows(self, job: Job) -> bool:
        """Whether problems with a stop rule change places in one program: see `gdjax.engine.flow`."""
        whole = self.whole_tiles and self.in_lanes(job.plan) and not self.masked(job.plan)
        return whole and self.program.stop is not None and not job.every and job.watch is None


def least(status: Any, known: Any) -> int:
    """The lowest status of all, where it is not known; looked for on the accelerator where they lie there."""
    if known is not None:
        return int(known)
    return int(least_there(status) if dev.on_accelerator(status) else status.min())


least_there = jax.jit(jax.numpy.min)
narrowed = jax.jit(lambda status: status.astype(np.int8))


class Sessions:
    """The sessions of this process, the longest unused dropped first."""

    def __init__(self) -> None:
        self.kept: collections.OrderedDict[Hashable, Session] = collections.OrderedDict()
        self.lock = threading.Lock()

    def get(self, program: Program, batch: Batch, devices: Sequence[jax.Device]) -> Session:
        key = (key_of(program, batch), tuple(devices))
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
        check_program(program, batch)
        session = Session(program, batch, devices)
        with self.lock:
            self.kept[key] = session
            while len(self.kept) > KEPT:
                self.kept.popitem(last=False)
        return session

    def compiled(self, key: Key, devices: Sequence[jax.Device]) -> bool:
        """Whether programs of this kind of problem have been compiled for these devices."""
        session = self.kept.get((key, tuple(devices)))
        return session is not None and session.begun


SESSIONS = Sessions()


def check_carried(program: Program, batch: Batch, state: State) -> None:
    """What `state` carries must be what this rule and stop rule would have carried."""
    inputs = batch.weights, batch.data, batch.hyper
    flags = own(batch.weights), batch.data_flags, batch.hyper_flags
    weights, data, hyper = problem_shapes(inputs, flags)
    fresh, kept = jax.eval_shape(program.init, weights, data, hyper), state.flags
    if program.stop is not None:
        index = jax.ShapeDtypeStruct((), np.int32)
        fresh, kept = jax.eval_shape(program.begin, weights, fresh, index, data), hashable(own(state.carried))
    held = problem_shapes(state.carried, unhashed(kept, state.carried))
    looks: list[Any] = [
        (jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)])
        for tree in (held, fresh)
    ]
    if looks[0] != looks[1]:
        raise ValueError(
            "resume comes from a run with another update rule, stop rule or kind of problem; go on with the "
            "learning_rate or optimizer, the stop and the shapes you began with"
        )
