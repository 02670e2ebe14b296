"""The right answer, and how far a program's is from it.

With all steps taken the answer of squared losses has a closed form, evaluated in float64: the error of
gradient descent shrinks by I - r H a step, H the second derivative, so w_k = w* + (I - r H)^k (w_0 - w*).
Where there is none (logistic regression, Adam) the same recurrence runs in float64, nine digits finer than
what it judges. With a stop rule the right answer is any point whose gradient is within the tolerance, so the
float64 gradient is what is measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bench.cases import Array, Case, Inputs
from bench.peers import Answer


def double(inputs: Inputs) -> Inputs:
    """The same batch in float64."""
    return replace(
        inputs,
        weights=inputs.weights.astype(np.float64),
        data=tuple(array.astype(np.float64) for array in inputs.data),
        rates=inputs.rates.astype(np.float64),
    )


def fixed_point(case: Case, inputs: Inputs) -> Array:
    """w_k after all steps of a squared loss, in closed form."""
    exact = double(inputs)
    w, r, (x, t) = exact.weights, exact.rates, exact.data
    if case.family == "scalar":
        return t / x + (1 - r * x**2) ** case.steps * (w - t / x)
    if case.shared:
        x, t = np.broadcast_to(x, (len(w), *x.shape)), np.broadcast_to(t, (len(w), *t.shape))
    values, vectors = np.linalg.eigh(x.transpose(0, 2, 1) @ x / case.points)
    moment = (t[:, None, :] @ x)[:, 0, :] / case.points
    rotate = lambda matrix, vector: (matrix @ vector[..., None])[..., 0]  # noqa: E731
    best = rotate(vectors.transpose(0, 2, 1), moment) / values
    start = rotate(vectors.transpose(0, 2, 1), w)
    return rotate(vectors, best + (1 - r[:, None] * values) ** case.steps * (start - best))


def recurrence(case: Case, inputs: Inputs) -> Array:
    """w_k after all steps, one step after another in float64."""
    exact = double(inputs)
    w, r = exact.weights, exact.rates.reshape(-1, *(1,) * (exact.weights.ndim - 1))
    if case.family != "adam":
        for _ in range(case.steps):
            w = w - r * case.gradient(np, w, *exact.data)
        return w
    first, second = np.zeros_like(w), np.zeros_like(w)
    for step in range(1, case.steps + 1):
        g = case.gradient(np, w, *exact.data)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        w = w - r * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return w


def expected(case: Case, inputs: Inputs) -> Array:
    """The weights after all steps, good to about 1e-12."""
    return recurrence(case, inputs) if case.family in ("logistic", "adam") else fixed_point(case, inputs)


def error(case: Case, inputs: Inputs, answer: Answer, sample: int = 1000) -> float:
    """Largest error of up to `sample` problems: of the weights, or with a stop rule gradient / tolerance."""
    count = len(answer.weights)
    chosen = np.unique(np.linspace(0, count - 1, min(count, sample)).astype(np.int64))
    part = inputs.take(chosen, case.shared)
    found = answer.weights[chosen].astype(np.float64)
    if case.tolerance is None:
        return float(np.abs(found - expected(case, part)).max())
    return float(np.abs(case.gradient(np, found, *double(part).data)).max() / case.tolerance)
