"""How far a computed descent may be from exact arithmetic: a forward error bound per problem.

`exact_descent` follows a problem in rational arithmetic; `error_bound` says how far from it any kernel may
end that rounds each operation, fused or not, as the standard model of floating-point arithmetic allows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from gdjax.rounding import FORMATS, Array

LOSSES = ("squared", "residual")


@dataclass(frozen=True)
class ExactDescent:
    """One problem in exact arithmetic.

    Attributes:
        weight: the weight after the last step, exact.
        weights: |w| after 0, 1, …, steps steps, rounded to float64 (infinite where too large for it).
        residuals: |t − x·w| at the same places.
        contraction: the exact factor |dw′/dw| of one step, |1 − r·x²| or 1, rounded to float64.
    """

    weight: Fraction
    weights: tuple[float, ...]
    residuals: tuple[float, ...]
    contraction: float


def exact_descent(
    w: float, x: float, t: float, learning_rate: float, steps: int, loss: str = "squared"
) -> ExactDescent:
    """Descend one problem of finite floats in exact arithmetic.

    w ← w + r·x·(t − x·w) for the squared loss, w ← w + r·x for the residual loss.

    >>> exact_descent(1.0, 2.0, 4.0, 0.125, 2).weight
    Fraction(7, 4)
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be 'squared' or 'residual', got {loss!r}")
    # Floats are m·2^e: integers and shifts, where Fraction would look for common divisors at every step.
    w_, x_, t_, r_ = (_dyadic(v) for v in (w, x, t, learning_rate))
    if loss == "squared":
        factor = _add((1, 0), _multiply((-1, 0), _multiply(r_, _multiply(x_, x_))))
        constant = _multiply(r_, _multiply(x_, t_))
    else:
        factor, constant = (1, 0), _multiply(r_, x_)
    minus_x = _multiply((-1, 0), x_)
    weights, residuals = [], []
    for step in range(steps + 1):
        weights.append(abs(_to_float(w_)))
        residuals.append(abs(_to_float(_add(t_, _multiply(minus_x, w_)))))
        if step < steps:
            w_ = _add(_multiply(factor, w_), constant)
    return ExactDescent(_to_fraction(w_), tuple(weights), tuple(residuals), abs(_to_float(factor)))


def error_bound(
    w: Array,
    x: Array,
    t: Array,
    learning_rate: Array,
    exact: list[ExactDescent],
    loss: str = "squared",
    *,
    dtype: str | None = None,
    flush: bool = True,
) -> Array:
    """A bound on |w_computed − w_exact| after the steps of `exact`, for each problem.

    Derivation. With u the unit roundoff, every rounded operation obeys fl(a ∘ b) = (a ∘ b)(1 + δ) + η with
    |δ| ≤ u and |η| ≤ λ (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., SIAM 2002, (2.4) and
    (2.8)); a fused multiply-add rounds once what is bounded here as two. λ is the smallest normal number if
    results may be flushed to zero, else the smallest subnormal one. Let E_k bound |ŵ_k − w_k|. One exact step
    taken from ŵ_k instead of w_k turns the distance into |1 − r·x²|·E_k, without any rounding. What the
    rounded step adds, with W = |w_k| + E_k ≥ |ŵ_k| and R = |t − x·w_k| + |x|·E_k ≥ |t − x·ŵ_k|, is

        B = u·|x|·W + λ,  A = B + u·(R + B) + λ             the residual ê: a product, a subtraction
        C = |r·x|·A + 2u(1 + u)·|r·x|·(R + A)               r·x·ê: two products, in any order,
            + (1 + u)·λ·(|r| + |x| + R + A) + λ             the first one's λ times the third factor
        E_{k+1} = |1 − r·x²|·E_k + C + u·(|w_{k+1}| + |1 − r·x²|·E_k + C) + λ

    a running error bound (Higham, section 3.3) that takes its magnitudes from the exact descent. Operands
    that a flushing device drops on input count as lost whole. For the residual loss R is 1, A is 0 and the
    distance is not contracted. Where an intermediate may pass the largest number the bound is infinite:
    nothing is promised about a problem that overflows.

    Args:
        w, x, t, learning_rate: the problems, `[N]` each (the rate may be a number), of the kernel's dtype.
        exact: `exact_descent` of each.
        loss: "squared" or "residual".
        dtype: the name of the format computed in; by default that of w.
        flush: whether the device may flush subnormals to zero.

    Returns:
        float64 `[N]`.

    >>> one = np.ones(1)
    >>> bound = error_bound(one, 2 * one, 4 * one, 0.1 * one, [exact_descent(1.0, 2.0, 4.0, 0.1, 3)])
    >>> bool(0 < bound[0] < 1e-14)
    True
    """
    fmt = FORMATS[dtype or np.asarray(w).dtype.name]
    u, smallest = fmt.unit_roundoff, 2.0**fmt.emin
    largest = math.ldexp(2.0 - 4 * u, fmt.emax)
    # Eight times the smallest subnormal also covers what underflows while this very bound is computed.
    lam = smallest if flush else 8 * math.ldexp(1.0, fmt.emin - fmt.precision + 1)
    w, x, t, r = (np.abs(np.broadcast_to(v, np.shape(w)).astype(np.float64)) for v in (w, x, t, learning_rate))
    lost_w, lost_x, lost_t, lost_r = (np.where(flush & (v < smallest), v, 0.0) for v in (w, x, t, r))
    weights, residuals = (np.array([getattr(e, k) for e in exact]).T for k in ("weights", "residuals"))
    contraction = np.array([e.contraction for e in exact])
    steps = len(weights) - 1
    error = np.zeros(len(w))
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(steps):
            size = weights[k] + error
            product = x * size
            if loss == "squared":
                third = residuals[k] + x * error
                wrong = u * product + lam + lost_x * size + lost_t
                if k == 0:
                    wrong += x * lost_w
                wrong += u * (third + wrong) + lam
            else:
                third, wrong = np.ones(len(w)), np.zeros(len(w))
            change = r * x * (third + wrong)
            added = r * x * wrong + 2 * u * (1 + u) * change + (1 + u) * lam * (r + x + third + wrong) + lam
            added += np.where((lost_x > 0) | (lost_r > 0), change, 0.0)
            added += lost_w if k == 0 else 0.0
            carried = contraction * error
            overflow = np.maximum.reduce(
                [product, r * x, r * third, x * third, 2 * third, change, size, weights[k + 1]]
            )
            error = carried + added + u * (weights[k + 1] + carried + added) + lam
            error = np.where(overflow * (1 + 8 * u) + error < largest, error, np.inf)
    # The bound was itself computed in float64: fewer than 64 roundings a step, each of 2^−53.
    return error * (1 + 64 * (steps + 1) * 2.0**-53)


def distance(computed: float, exact: Fraction) -> float:
    """|computed − exact|, rounded up to float64; infinite for a computed weight that is not finite."""
    if not math.isfinite(computed):
        return math.inf
    gap = abs(Fraction(computed) - exact)
    try:
        return math.nextafter(float(gap), math.inf) if gap else 0.0
    except OverflowError:
        return math.inf


Dyadic = tuple[int, int]


def _dyadic(v: float) -> Dyadic:
    numerator, denominator = float(v).as_integer_ratio()
    return numerator, 1 - denominator.bit_length()


def _multiply(a: Dyadic, b: Dyadic) -> Dyadic:
    return a[0] * b[0], a[1] + b[1]


def _add(a: Dyadic, b: Dyadic) -> Dyadic:
    if a[0] == 0 or b[0] == 0:
        return b if a[0] == 0 else a
    e = min(a[1], b[1])
    return (a[0] << a[1] - e) + (b[0] << b[1] - e), e


def _to_float(a: Dyadic) -> float:
    """Rounded to about 60 bits first, which is enough for a bound."""
    m, e = a
    cut = max(abs(m).bit_length() - 60, 0)
    try:
        return math.ldexp(m >> cut, e + cut)
    except OverflowError:
        return math.inf if m > 0 else -math.inf


def _to_fraction(a: Dyadic) -> Fraction:
    m, e = a
    if m == 0:
        return Fraction(0)
    spare = (m & -m).bit_length() - 1
    m, e = m >> spare, e + spare
    return Fraction(m << e) if e >= 0 else Fraction(m, 1 << -e)
