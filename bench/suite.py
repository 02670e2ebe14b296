"""What both pytest-benchmark suites do with a case and a program."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench import exact
from bench.cases import CASES, Case
from bench.peers import Skip, programs
from bench.rounds import part_for, quick

PRECISION = 1e-4  # float32 after a few hundred steps, Adam's float32 powers included


def pairs(stop_rule: bool) -> list[Any]:
    """Every program of every case with, or without, a stop rule."""
    return [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in CASES.values()
        if (case.tolerance is not None) == stop_rule and case.problems <= 4_000_000
        for name in case.programs
        if name != "multiply-adds"
    ]


def run(benchmark: Any, case: Case, name: str, full: bool) -> None:
    """Time one program on one case, after one run that compiles, and judge its answer."""
    case = case if full else quick(case)
    program = programs()[name]
    inputs = case.inputs()
    part = part_for(program, case, inputs)
    benchmark.group = case.name
    try:
        solve = program.build(case, part, "cpu")
        answer = benchmark.pedantic(solve, rounds=3, warmup_rounds=1)
    except Skip as reason:
        pytest.skip(str(reason))
    benchmark.extra_info |= {"problems": len(part), "of": len(inputs), "notes": answer.notes}
    if case.tolerance is None:
        error = exact.error(case, part, answer)
        benchmark.extra_info["error"] = error
        assert error < PRECISION
    elif answer.converged is not None:
        benchmark.extra_info["converged"] = float(np.mean(answer.converged))
        assert np.mean(answer.converged) == 1
