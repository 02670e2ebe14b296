"""Kernels in registers earn trust before they are used, and lose it without failing a call.

A problem is refused a kernel where the device has none, where it does not fit, or where an operation is missing; that
is known before anything is compiled. A kernel that does not compile, or that cannot be run, is given up. Before its
first use it takes a few steps of a few problems of the batch beside the form in lanes; if it fails there, or they
disagree by more than rounding explains, it is given up, in the second case with a warning. Every reason is logged once
and stands in `solution.plan.reason`.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gdjax import device as dev
from gdjax import plan as plans
from gdjax.batch import Batch
from gdjax.engine import fixed, history
from gdjax.engine.block import Block, compile_block
from gdjax.engine.feed import run_block
from gdjax.engine.program import Program
from gdjax.memory import Ceiling
from gdjax.plan import Kind, Plan

log = logging.getLogger("gdjax")

SAMPLE, SAMPLE_STEPS = 256, 3
"""Problems and steps on which a kernel is compared."""

ODD_ONES = 1
"""Problems of the sample that may disagree: where a loss has a kink, rounding may fall on either side of it."""

ROUNDINGS = 1000
"""Roundings of a weight by which two right answers may differ after so few steps."""


class Registers:
    """Whether the problems of a session run in registers, and the kernels in which they do."""

    def __init__(self, program: Program, batch: Batch, devices: Sequence[jax.Device]):
        self.program = program
        self.devices = tuple(devices)
        self.blocks: dict[Any, Block] = {}
        self.refused = ""
        self.target, why = dev.register_target(self.devices[0])
        if not dev.is_host(self.devices[0]):
            self.refused = why or self.unfit(batch)
            if self.refused:
                log.info("the problem runs without a kernel in registers: %s", self.refused)

    def unfit(self, batch: Batch) -> str:
        from gdjax.engine import registers

        return registers.unfit(self.program, batch)

    def wanted(self, tile: Any, plan: Plan | None) -> bool:
        """Whether to try a kernel for this tile function: on accelerators, or where a plan asks for it."""
        if self.refused or (plan is None and dev.is_host(self.devices[0])):
            return False
        if plan is not None and plan.kernel != "registers":
            return False
        from gdjax.engine import registers

        return tile in registers.TILES

    def why_not(self, tile: Any) -> str:
        """Why what `tile` does is not done in registers; empty where nobody would expect it."""
        if self.refused or dev.is_host(self.devices[0]):
            return self.refused
        return "a record is kept on the way" if tile in (history.steady, history.rows) else ""

    def refuse(self, reason: str) -> None:
        """Not again in this session."""
        self.refused = reason
        self.blocks.clear()
        log.info("the kernel in registers is given up: %s", reason)

    def block(
        self,
        tile: Any,
        inputs: Any,
        flags: Any,
        count: int,
        plan: Plan | None,
        kind: Kind,
        fusable: int,
        plain: Callable[[], Block],
        ceiling: Ceiling,
    ) -> Block | None:
        """The compiled kernel that takes the place of `tile`; None where there is none to be trusted.

        `plain` is the block that it is compared with; `ceiling` makes a plan smaller where memory is short.
        """
        from gdjax.engine import registers
        from gdjax.engine.evaluator import UnsupportedError
        from gdjax.engine.targets import TARGETS

        target = TARGETS[str(self.target)]
        fused = fusable if tile is fixed.tile else 1  # with a stop rule more do not gain
        plan = ceiling.under(plan or plans.registers(kind, target.lanes, count, fused), kind.bytes)
        plan = dataclasses.replace(plan, tile=-(-plan.tile // target.lanes) * target.lanes, tiles=1)
        plan = dataclasses.replace(plan, chunk=min(plan.chunk, fusable if kind.elementwise else 1))
        key = (tile, plan, jax.tree.structure(inputs), tuple(jax.tree.leaves(flags)))
        if key in self.blocks:
            return self.blocks[key]
        try:
            made = compile_block(registers.TILES[tile](target), self.program, plan, inputs, flags, self.devices)
            apart = disagreement(made, plain(), inputs, flags, count)
        except UnsupportedError as error:
            self.refuse(str(error))
        except Exception as error:  # whatever a compiler may raise: the call must go on without the kernel
            if dev.out_of_memory(error) and plan.tile >= 2 * target.lanes:
                less = ceiling.lowered(plan, 0)
                return self.block(tile, inputs, flags, count, less, kind, fusable, plain, ceiling)
            self.refuse(f"it does not compile or run: {first_line(error)}")
        else:
            if not apart:
                self.blocks[key] = made
                return made
            name = getattr(self.program.loss, "__name__", repr(self.program.loss))
            warnings.warn(
                f"the kernel in registers for the loss {name!r} disagrees with XLA on {dev.label(self.devices)}: "
                f"{apart}; it is not used",
                RuntimeWarning,
                stacklevel=2,
            )
            self.refuse(f"it disagrees with XLA: {apart}")
        return None


def disagreement(made: Block, plain: Block, inputs: Any, flags: Any, count: int) -> str:
    """Where a kernel and the plain form come apart on the first few problems; empty where they do not."""
    some = min(count, SAMPLE)
    sample = jax.tree.map(lambda leaf, own: np.asarray(leaf[:some]) if own else leaf, inputs, flags)
    start = 0
    if hasattr(sample, "lane"):  # seated problems know where they stand
        start = int(sample.lane["index"].min())
    got, wanted = (run_block(block, sample, flags, some, start, SAMPLE_STEPS) for block in (made, plain))
    before = sample.lane["weights"] if hasattr(sample, "lane") else sample.weights
    after = [out.lane["weights"] if hasattr(out, "lane") else out.weights for out in (got, wanted)]
    tables = [np.concatenate([rows(leaf, some) for leaf in jax.tree.leaves(w)], 1) for w in (before, *after)]
    scale = np.max(np.abs(tables[0]) + np.abs(tables[2]), axis=1, keepdims=True)
    for name, ours, theirs, size in (
        ("weights", tables[1], tables[2], scale),
        ("loss", rows(got.loss, some), rows(wanted.loss, some), None),
        ("gradient_norm", rows(got.gradient_norm, some), rows(wanted.gradient_norm, some), None),
    ):
        finite = np.isfinite(theirs)
        if size is None:  # a loss may be a small difference of large terms, whose size is seen in its neighbours
            size = np.max(np.abs(theirs), where=finite, initial=0.0)
        allowed = ROUNDINGS * np.finfo(np.float32).eps * (size + np.finfo(np.float32).tiny)
        with np.errstate(invalid="ignore", over="ignore"):
            off = np.where(finite, ~(np.abs(ours - theirs) <= allowed), np.isfinite(ours))
        if off.any(1).sum() > ODD_ONES:
            worst = np.nanmax(np.where(off, np.abs(ours - theirs), 0.0))
            return f"{name} of {off.any(1).sum()} of {some} problems, by up to {worst:.3g}"
    return ""


def rows(leaf: Any, count: int) -> np.ndarray:
    """One row of float64 per problem."""
    return np.asarray(leaf, np.float64).reshape(count, -1)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
