"""Without a compiler: NumPy over the whole batch, SciPy problem by problem, plain Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bench.cases import Case, Inputs
from bench.peers import Answer, Run, Skip, load


def numpy_loop(case: Case, inputs: Inputs, device: str) -> Run:
    """One NumPy step after another over all problems at once."""
    rates = inputs.rates.reshape(-1, *(1,) * (inputs.weights.ndim - 1))

    def descend() -> Answer:
        w = inputs.weights.copy()
        for _ in range(case.steps):
            w -= rates * case.gradient(np, w, *inputs.data)
        return Answer(w)

    def adam() -> Answer:
        w = inputs.weights.copy()
        first, second = np.zeros_like(w), np.zeros_like(w)
        for step in range(1, case.steps + 1):
            g = case.gradient(np, w, *inputs.data)
            first = 0.9 * first + 0.1 * g
            second = 0.999 * second + 0.001 * g**2
            w -= rates * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        return Answer(w)

    if case.tolerance is not None:
        raise Skip("a batched NumPy loop has no stop rule per problem")
    return adam if case.family == "adam" else descend


def scipy_each(case: Case, inputs: Inputs, device: str) -> Run:
    """scipy.optimize.minimize (BFGS), one call per problem, same gradient and tolerance."""
    optimize = load("scipy.optimize")

    def loss(w: Any, x: Any, t: Any) -> float:
        if case.family == "logistic":
            z = x[0] @ w
            return float(np.mean(np.logaddexp(0, z) - t[0] * z))
        return float(0.5 * (t[0] - x[0] * w[0]) ** 2)

    def gradient(w: Any, x: Any, t: Any) -> Any:
        return np.atleast_1d(case.gradient(np, w[None] if case.weights > 1 else w, x, t).ravel())

    def run() -> Answer:
        found = []
        for problem in range(len(inputs)):
            one = inputs.take(np.array([problem]), case.shared)
            data = tuple(array.astype(np.float64) for array in one.data)
            start = one.weights.astype(np.float64).ravel()
            found.append(
                optimize.minimize(loss, start, data, "BFGS", gradient, options={"gtol": case.tolerance, "norm": np.inf})
            )
        weights = np.array([result.x for result in found]).reshape(inputs.weights.shape)
        converged = np.array([result.success for result in found])
        return Answer(weights, np.array([result.nit for result in found]), converged, "BFGS in float64: fewer steps")

    return run


def reference(case: Case, inputs: Inputs, device: str) -> Run:
    """The scalar reference of gdjax where it reaches (one data point), elsewhere the same in plain floats."""
    if case.family == "adam":
        raise Skip("the reference is plain descent")
    weights, rates = inputs.weights.tolist(), inputs.rates.tolist()
    columns = [array.tolist() for array in inputs.data]

    def descend_scalar() -> Answer:
        from gdjax import reference as plain

        found = [
            plain.descend(w, x, t, r, case.steps).weights[-1]
            for w, r, x, t in zip(weights, rates, *columns, strict=True)
        ]
        return Answer(np.array(found), notes="float64")

    def descend() -> Answer:
        found, counts = [], []
        for problem, (w, r) in enumerate(zip(weights, rates, strict=True)):
            x, t = columns if case.shared else (column[problem] for column in columns)
            w, steps = until(case, w if case.weights > 1 else [w], r, x, t)
            found.append(w if case.weights > 1 else w[0])
            counts.append(steps)
        steps = None if case.tolerance is None else np.array(counts)
        return Answer(np.array(found), steps, None if steps is None else steps < case.steps, "float64")

    return descend_scalar if case.family == "scalar" and case.tolerance is None else descend


def until(case: Case, w: list[float], r: float, x: Any, t: Any) -> tuple[list[float], int]:
    """One problem, float by float, until the gradient is within the tolerance or the steps are used up."""
    rows, targets = (x, t) if case.weights > 1 else ([[x]], [t])
    tolerance = -1.0 if case.tolerance is None else case.tolerance
    for step in range(case.steps):
        g = [0.0] * len(w)
        for row, target in zip(rows, targets, strict=True):
            f = sum(a * b for a, b in zip(row, w, strict=True))
            if case.family == "logistic":
                f = 1 / (1 + math.exp(-f))
            for k, a in enumerate(row):
                g[k] += a * (f - target)
        g = [value / len(rows) for value in g]
        if max(map(abs, g)) <= tolerance:
            return w, step
        w = [a - r * b for a, b in zip(w, g, strict=True)]
    return w, case.steps
