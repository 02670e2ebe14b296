"""climit.c, compiled on the spot: the processor's limit."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import Array, Case, Inputs
from bench.losses import adam_corrections
from bench.peers import Answer, Run, Skip

SOURCE = Path(__file__).parent.parent / "climit.c"
# Neither errno nor traps change a result; without them the square root of Adam becomes a vector instruction.
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
)
PEAK_BLOCKS, PEAK_STEPS, PEAK_LANES = 4096, 4096, 192


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def library(points: int, weights: int) -> ctypes.CDLL:
    """Compile for this processor and this size of problem, or skip."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Skip("no C compiler")
    folder = tempfile.mkdtemp(prefix="gdjax-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sizes = [f"-DPOINTS={points}", f"-DWEIGHTS={weights}"]
    for width in (["-mprefer-vector-width=512"], []):
        command = [
            compiler,
            *FLAGS,
            *width,
            *sizes,
            "-pthread",
            "-o",
            f"{folder}/limit.so",
            str(SOURCE),
            "-lm",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return ctypes.CDLL(f"{folder}/limit.so")
    raise Skip(f"the C compiler failed: {done.stderr.strip().splitlines()[-1]}")


def call(function: Any, arrays: tuple[Array, ...], *numbers: int) -> None:
    """Call a function of climit.c: pointers to float32 arrays, then longs, the thread count last."""
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
    function(*pointers, *map(ctypes.c_long, numbers), ctypes.c_int(cores()))


def loop(case: Case, inputs: Inputs, device: str) -> Run:
    """The loop written by hand for this case; with a stop rule, as many steps told beforehand and no rule."""
    if case.family not in ("scalar", "vector", "adam"):
        raise Skip("no loop written by hand for this case")
    compiled = library(case.points, case.weights)
    function = getattr(compiled, case.family)
    if case.family == "vector" and inputs.data[0].shape[1:] != (case.points, case.weights):
        raise ValueError(f"the loop is compiled for {case.points} x {case.weights}, got {inputs.data[0].shape[1:]}")
    steps = case.steps if inputs.useful_steps is None else round(float(inputs.useful_steps.mean()))
    notes = "" if case.tolerance is None else "as many steps, told beforehand, no stop rule"

    def run() -> Answer:
        w = np.empty_like(inputs.weights)
        table = (adam_corrections(steps),) if case.family == "adam" else ()
        call(function, (*inputs.data, inputs.rates, inputs.weights, w, *table), len(w), steps)
        return Answer(w, notes=notes)

    return run


def multiply_adds(case: Case, inputs: Inputs, device: str) -> Run:
    """A fixed number of multiply-adds, nothing else: in C on the host, as a JAX kernel elsewhere."""
    from gdjax import device as rooms
    from gdjax.limits import multiply_adder, side_by_side

    place = rooms.one_device(device)
    try:
        compiled = library(case.points, case.weights) if rooms.is_host(place) else None
    except Skip:
        compiled = None
    nothing = np.empty(0, np.float32)
    if compiled is None:
        kernel, starts, work = multiply_adder(place)

        def in_jax() -> Answer:
            side_by_side(kernel, starts, 0.0)  # once to warm up and three times after
            return Answer(nothing, work=4 * work)

        return in_jax
    halves, out = np.full(32, 0.5, np.float32), np.empty(PEAK_BLOCKS + 16, np.float32)

    def in_c() -> Answer:
        call(compiled.peak, (halves, out), PEAK_BLOCKS, PEAK_STEPS)
        return Answer(nothing, work=PEAK_BLOCKS * PEAK_STEPS * PEAK_LANES)

    return in_c
