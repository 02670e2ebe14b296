"""The compiled programs of one kind of problem on some devices: smaller where memory is short, in another form where
one fails."""

from __future__ import annotations

import copy
import dataclasses
import logging
import threading
from collections.abc import Sequence
from typing import Any, Self

import jax

from gdjax import device as dev
from gdjax import plan as plans
from gdjax import trust
from gdjax.batch import Batch
from gdjax.engine import fixed, history
from gdjax.engine.block import Block, compile_block
from gdjax.engine.feed import in_flight, run_block
from gdjax.engine.program import Program
from gdjax.forms import lane_form
from gdjax.memory import Ceiling
from gdjax.plan import Plan
from gdjax.work import step_operations

log = logging.getLogger("gdjax")


MOST_SMALL = 256
"""Answers that are kept to the question which block a short batch runs through: it takes a tenth of the call."""


class Blocks:
    """The compiled blocks of one loss, rule and stop rule on one kind of problem and some devices."""

    def __init__(self, program: Program, batch: Batch, devices: Sequence[jax.Device]):
        self.program = program
        self.devices = tuple(devices)
        self.blocks: dict[Any, Block] = {}
        self.small: dict[Any, Block] = {}
        self.kinds: dict[Any, plans.Kind] = {}
        form = lane_form(program, batch, dev.is_host(self.devices[0]))
        self.refused, self.fusable = form.refused, form.fusable
        self.whole_tiles = form.whole and dev.is_host(self.devices[0])
        if self.refused is not None:
            log.info("the problem runs under vmap, not in lanes: %s", self.refused)
        # On the CPU a tile depends on the size of a problem alone.
        counted = self.refused is not None and not dev.is_host(self.devices[0])
        self.operations = step_operations(program, batch) if counted else 1.0
        self.registers = trust.Registers(program, batch, self.devices)
        self.lock = threading.RLock()
        self.ceiling = Ceiling(self.devices, in_flight(self.devices))
        self.whole: Any = self
        self.seat: int | None = None

    def at(self, number: int) -> Self:
        """The same on one of its devices alone; what it compiles and measures serves all of them."""
        one = copy.copy(self)
        one.seat, one.devices = number, self.devices[number : number + 1]
        return one

    @property
    def begun(self) -> bool:
        """Whether anything has been compiled."""
        return bool(self.blocks or self.registers.blocks)

    def masked(self, plan: Plan | None) -> bool:
        """Whether problems with a stop rule run in one loop that masks those that are done, without rounds."""
        return not dev.is_host(self.devices[0]) or (plan is not None and plan.kernel == "registers")

    def in_lanes(self, plan: Plan | None) -> bool:
        """Whether problems get the same bits in whatever program they run: elsewhere compilers choose the rounding."""
        return self.refused is None and (plan is None or plan.kernel == "lanes")

    def execute(
        self,
        tile: Any,
        inputs: Any,
        flags: Any,
        count: int,
        plan: Plan | None,
        start: int,
        steps: int,
        updates: int | None = None,
        wanted: Any = None,
    ) -> tuple[Block, Any]:
        """The block that ran last and the outputs; `updates` and `wanted` as for `run_block`.

        A device that is full gets fewer problems at a time; a kernel in registers that fails is given up for the next
        best form.
        """
        used = [self.block(tile, inputs, flags, count, plan)]

        def smaller(block: Block) -> Block:
            used.append(self.smaller(block, tile, inputs, flags, count))
            return used[-1]

        try:
            out = run_block(used[0], inputs, flags, count, start, steps, smaller, updates, wanted)
            return used[-1], out
        except jax.errors.JaxRuntimeError as error:
            if used[0].plan.kernel != "registers":
                raise
            self.registers.refuse(f"it failed: {trust.first_line(error)}")
            return self.execute(tile, inputs, flags, count, plan, start, steps, updates, wanted)

    def smaller(self, block: Block, tile: Any, inputs: Any, flags: Any, count: int) -> Block:
        """The block to go on with, of the same kernel, where a device was out of memory."""
        plan = self.ceiling.lowered(block.plan, block.need)
        with self.lock:
            if plan.kernel != "registers":
                return self.compiled(tile, inputs, flags, plan)
            made = self.block(tile, inputs, flags, count, plan)
            if made.size >= block.size:
                raise self.ceiling.full(block.plan, block.need)
            return made

    def block(self, tile: Any, inputs: Any, flags: Any, count: int, plan: Plan | None) -> Block:
        """The compiled block for these inputs, as it was found before where a batch may be short: a small one on the
        host, any on an accelerator."""
        own, known = tuple(jax.tree.leaves(flags)), (self.ceiling.most, self.registers.refused)
        key = tile, jax.tree.structure(inputs), own, count, plan, self.seat, known
        found = self.small.get(key)
        if found is None:
            found = self.fitting(tile, inputs, flags, count, plan)
            if found.stage or not dev.is_host(found.devices[0]):
                if len(self.small) == MOST_SMALL:
                    self.small.clear()
                self.small[key] = found
        return found

    def fitting(self, tile: Any, inputs: Any, flags: Any, count: int, plan: Plan | None) -> Block:
        """The compiled block for these inputs: in registers on an accelerator, or else in lanes, where the problem has
        such a form."""
        if self.registers.wanted(tile, plan):
            plain = lambda: self.other(tile, inputs, flags, trust.SAMPLE, None)  # noqa: E731
            with self.lock:
                kind = self.kind(inputs, flags)
                fusable = self.fusable if self.refused is None else 1
                problems, ceiling = self.share(count), self.ceiling
                made = self.registers.block(tile, inputs, flags, problems, plan, kind, fusable, plain, ceiling)
            if made is not None:
                return made if self.seat is None else made.on(self.seat)
        in_registers = plan is not None and plan.kernel == "registers"
        return self.other(tile, inputs, flags, count, None if in_registers else plan)

    def other(self, tile: Any, inputs: Any, flags: Any, count: int, plan: Plan | None) -> Block:
        """The compiled block in lanes, or under vmap where there is no such form."""
        kind = self.kind(inputs, flags)
        with self.lock:
            wanted = plan
            if wanted is None and self.refused is None:
                sound = plans.default if tile in (fixed.tile, history.steady) else plans.refill
                wanted = sound(kind, self.devices[0], self.share(count))
            if wanted is not None:
                wanted = plans.fitted(wanted, self.fusable if kind.elementwise else 1)
            if self.refused is not None and (wanted is None or wanted.kernel == "lanes"):
                wanted = plans.fallback(kind, self.devices[0], self.share(count), self.refused, self.operations)
            assert wanted is not None
            if wanted.kernel == "lanes":
                wanted = dataclasses.replace(wanted, reason=self.registers.why_not(tile))
            return self.compiled(tile, inputs, flags, self.ceiling.under(wanted, kind.bytes))

    def kind(self, inputs: Any, flags: Any) -> plans.Kind:
        """The kind of problem that these inputs hold. It follows from what they are made of: the session's problems are
        all alike."""
        key = jax.tree.structure(inputs), tuple(jax.tree.leaves(flags))
        if key not in self.kinds:
            self.kinds[key] = plans.kind_of(inputs, flags)
        return self.kinds[key]

    def share(self, count: int) -> int:
        """How many of so many problems each device gets."""
        return -(-count // len(self.devices))

    def compiled(self, tile: Any, inputs: Any, flags: Any, plan: Plan) -> Block:
        """The block of a plan, or of a smaller one where the compiler finds that the device cannot hold it."""
        key = (tile, plan, jax.tree.structure(inputs), tuple(jax.tree.leaves(flags)))
        if key not in self.blocks:
            try:
                block = compile_block(tile, self.program, plan, inputs, flags, self.whole.devices)
            except RuntimeError as error:  # some compilers lay out the memory
                if not dev.out_of_memory(error):
                    raise
                fits = self.ceiling.lowered(plan, 0)
            else:
                fits = self.ceiling.fitting(plan, block.need)
            if fits != plan:
                return self.compiled(tile, inputs, flags, fits)
            self.blocks[key] = block
        block = self.blocks[key]
        return block if self.seat is None else block.on(self.seat)
