"""numba: the scalar program, compiled, one problem after another on all cores (`prange`)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from bench.cases import Case, Inputs
from bench.losses import adam_corrections
from bench.peers import Answer, Run, load


@cache
def scalar_kernel() -> Any:
    """0.5 (t - x w)^2, with or without a stop rule (tolerance < 0)."""
    numba = load("numba")

    @numba.njit(parallel=True, error_model="numpy")
    def kernel(w0: Any, r: Any, x: Any, t: Any, limit: int, tolerance: Any, w_out: Any, steps: Any) -> None:
        for i in numba.prange(len(w0)):
            w, a, b, rate = w0[i], x[i], t[i], r[i]
            step = 0
            while step < limit:
                g = (a * w - b) * a
                if abs(g) <= tolerance:
                    break
                w -= rate * g
                step += 1
            w_out[i] = w
            steps[i] = step

    return kernel


@cache
def adam_kernel() -> Any:
    """The scalar loss with Adam; `corrections` holds 1/(1 - b1^s) and 1/(1 - b2^s)."""
    numba = load("numba")

    @numba.njit(parallel=True, error_model="numpy")
    def kernel(w0: Any, r: Any, x: Any, t: Any, corrections: Any, w_out: Any) -> None:
        b1, b2, c1, c2 = np.float32(0.9), np.float32(0.999), np.float32(0.1), np.float32(0.001)
        eps = np.float32(1e-8)
        for i in numba.prange(len(w0)):
            w, m, v = w0[i], np.float32(0), np.float32(0)
            for step in range(len(corrections)):
                g = (x[i] * w - t[i]) * x[i]
                m = b1 * m + c1 * g
                v = b2 * v + c2 * (g * g)
                w -= r[i] * (m * corrections[step, 0]) / (np.sqrt(v * corrections[step, 1]) + eps)
            w_out[i] = w

    return kernel


@cache
def vector_kernel(logistic: bool, shared: bool) -> Any:
    """Squared or logistic loss over points and weights; data [N, points, weights], or one set for all."""
    numba = load("numba")

    @numba.njit(parallel=True, error_model="numpy")
    def kernel(w0: Any, r: Any, x: Any, t: Any, limit: int, tolerance: Any, w_out: Any, steps: Any) -> None:
        points, weights = x.shape[-2], x.shape[-1]
        for i in numba.prange(len(w0)):
            rows, targets = x[0 if shared else i], t[0 if shared else i]
            w, g = w0[i].copy(), np.empty(weights, np.float32)
            step = 0
            while step < limit:
                g[:] = 0
                for p in range(points):
                    f = np.float32(0)
                    for k in range(weights):
                        f += rows[p, k] * w[k]
                    if logistic:
                        f = np.float32(1) / (np.float32(1) + np.exp(-f))
                    f -= targets[p]
                    for k in range(weights):
                        g[k] += rows[p, k] * f
                g /= np.float32(points)
                if np.max(np.abs(g)) <= tolerance:
                    break
                w -= r[i] * g
                step += 1
            w_out[i] = w
            steps[i] = step

    return kernel


def prange(case: Case, inputs: Inputs, device: str) -> Run:
    """One compiled scalar program per problem, in parallel over problems."""
    w, r, (x, t) = inputs.weights, inputs.rates, inputs.data
    if case.family == "adam":

        def adam() -> Answer:
            out = np.empty_like(w)
            adam_kernel()(w, r, x, t, adam_corrections(case.steps), out)
            return Answer(out)

        adam_kernel()
        return adam

    kernel = scalar_kernel() if case.family == "scalar" else vector_kernel(case.family == "logistic", case.shared)
    tolerance = np.float32(-1 if case.tolerance is None else case.tolerance)
    data = (x[None], t[None]) if case.shared else (x, t)

    def run() -> Answer:
        out, steps = np.empty_like(w), np.empty(len(w), np.int32)
        kernel(w, r, *data, case.steps, tolerance, out, steps)
        return Answer(out) if case.tolerance is None else Answer(out, steps, steps < case.steps)

    return run
