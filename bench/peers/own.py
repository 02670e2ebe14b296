"""gdjax itself, called as its users call it."""

from __future__ import annotations

import logging
import logging.handlers
from dataclasses import asdict
from typing import Any

import numpy as np

from bench.cases import Case, Inputs
from bench.peers import Answer, Run, load


def arguments(case: Case, inputs: Inputs, device: str) -> dict[str, Any]:
    """The keywords of `gdjax.minimize` for this case."""
    import gdjax

    keywords: dict[str, Any] = {"in_axes": case.in_axes, "steps": case.steps, "device": device}
    if case.family == "adam":
        keywords |= {"optimizer": load("optax").adam, "hyperparams": {"learning_rate": inputs.rates}}
    else:
        keywords["learning_rate"] = inputs.rates
    if case.tolerance is not None:
        keywords["stop"] = gdjax.stop.gradient_below(case.tolerance)
    return keywords


def solve(case: Case, inputs: Inputs, keywords: dict[str, Any]) -> Answer:
    """One call of minimize, its whole answer waited for and the weights fetched."""
    import jax

    import gdjax

    solution = jax.block_until_ready(gdjax.minimize(case.loss, inputs.weights, inputs.data, **keywords))
    # Not looked at without a stop rule: a mask of millions of problems would be paid for in fresh memory.
    ruled = case.tolerance is not None
    converged = np.asarray(solution.status) == int(gdjax.Status.CONVERGED) if ruled else None
    plan = ", ".join(f"{name} {value}" for name, value in asdict(solution.plan).items() if value not in (None, ""))
    return Answer(np.asarray(solution.weights), np.asarray(solution.steps), converged, plan)


def gdjax(case: Case, inputs: Inputs, device: str) -> Run:
    """gdjax.minimize."""
    keywords = arguments(case, inputs, device)
    return lambda: solve(case, inputs, keywords)


def gdjax_fixed(case: Case, inputs: Inputs, device: str) -> Run:
    """gdjax without the stop rule, told beforehand how many steps all need: as many as the first one."""
    ((_, first),) = alone(case, inputs, device, 1)
    keywords = arguments(case, inputs, device) | {"stop": None, "steps": int(first.steps[0])}
    return lambda: solve(case, inputs, keywords)


def lane_share(case: Case, inputs: Inputs, device: str) -> float | None:
    """Steps that the problems needed as a share of those that lanes went through, by gdjax's own count."""
    log, said = logging.getLogger("gdjax"), logging.handlers.BufferingHandler(1000)
    level = log.level
    log.addHandler(said)
    log.setLevel(logging.INFO)
    try:
        solve(case, inputs, arguments(case, inputs, device))
    finally:
        log.removeHandler(said)
        log.setLevel(level)
    counts = [record.args for record in said.buffer if "lanes went through" in record.msg]
    return sum(taken for _, taken in counts) / sum(spent for spent, _ in counts) if counts else None


def alone(case: Case, inputs: Inputs, device: str, problems: int = 5) -> list[tuple[int, Answer]]:
    """Some problems of the batch, each run alone through gdjax."""
    chosen = np.unique(np.linspace(0, len(inputs) - 1, problems).astype(np.int64))
    answers = []
    for problem in chosen:
        one = inputs.take(np.array([problem]), case.shared)
        answers.append((int(problem), solve(case, one, arguments(case, one, device))))
    return answers


def bit_equal(answer: Answer, singles: list[tuple[int, Answer]]) -> bool:
    """Whether the batch gave each of these problems the bits, and the step count, that it gets alone."""
    return all(
        answer.weights[problem].tobytes() == single.weights[0].tobytes()
        and (answer.steps is None or single.steps is None or answer.steps[problem] == single.steps[0])
        for problem, single in singles
    )
