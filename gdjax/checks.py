"""Checks of a kernel's numbers: the tutorial, the reference in every rounding, the bound on the error.

A check is a function of a `Trial` that returns an `Outcome`. The first ones find out what the later build on.
"""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from gdjax import reference, rounding
from gdjax.bound import distance, error_bound, exact_descent
from gdjax.diagnose import diagnose
from gdjax.rounding import PRODUCTS, Array, Rounding
from gdjax.trial import Problems, Trial, extreme, ordinary, same_bits, tiny, ulps_apart

STEPS = 50


class Outcome(NamedTuple):
    """Passed (None: left out), what was seen, and the figures."""

    passed: bool | None
    detail: str
    figures: dict[str, Any] = {}  # noqa: RUF012 (never written to)


def tutorial(trial: Trial) -> Outcome:
    """One step of x = 2, w = 1, t = 4, r = 0.1."""
    w, x, t, r = numbers = Fraction(1), Fraction(2), Fraction(4), Fraction(1, 10)
    run = reference.descend(w, x, t, r, 1, loss=getattr(reference, f"{trial.loss}_loss"))
    problem = Problems(*(np.array([float(v)], trial.dtype) for v in numbers))
    got_w = float(trial.run(problem, 1)[0])
    residual = 4 - 2 * got_w
    loss = residual if trial.loss == "residual" else residual * residual / 2
    # The rate 0.1 is itself rounded, then at most five operations.
    near = abs(got_w - run.weights[1]) <= 16 * rounding.FORMATS[trial.dtype.name].unit_roundoff
    wanted = f"w 1 → {float(run.weights[1]):g}, loss 2 → {float(run.losses[1]):g}"
    got = f"w 1 → {got_w:.7g}, loss 2 → {loss:.5g}"
    return Outcome(near, got if near else f"{got}; wanted {wanted}", {"w": got_w, "loss": loss})


def result(trial: Trial) -> Outcome:
    """Shape and dtype of the answer (`Trial.run` refuses wrong ones), and the kernel's pace."""
    problems = ordinary(trial.dtype, 1000, trial.rng())
    for _ in range(2):  # the first call may compile
        trial.run(problems, STEPS)
    speed = f"{1 / max(trial.pace, 1e-12):.2g} steps/s on 1,000 problems"
    wide = "" if trial.result_dtype == trial.dtype else ", judged as such: it computes in a wider format"
    return Outcome(True, f"{trial.result_dtype} for {trial.dtype}{wide}; {speed}", {"seconds_per_step": trial.pace})


def agreement(trial: Trial) -> Outcome:
    """Ordinary problems against the reference in every rounding; remembers which one fits."""
    steps = STEPS
    count = trial.fits(5_000 if trial.quick else 100_000, steps, 1.0 if trial.quick else 3.0)
    problems = ordinary(trial.dtype, count, trial.rng())
    got = trial.run(problems, steps)
    find_rounding(trial)
    expected = trial.expected(problems, steps)
    apart = ulps_apart(got, expected)
    figures = {
        "problems": count,
        "steps": steps,
        "rounding": str(trial.rounding) if trial.rounding else None,
        "bit_equal": float(np.mean(same_bits(got, expected))),
        "largest_ulp": float(np.max(apart)),
    }
    if trial.rounding is None:
        # The rounding that comes nearest tells most.
        nearest = max((rounding.IEEE, rounding.FMA), key=lambda how: _equal_bits(trial, problems, got, how))
        trial_claims_bits = trial.claim == "bits"
        expected = trial.expected(problems, steps, nearest)
        if trial_claims_bits or not np.all(trial.equal(got, expected, problems.w)):
            return Outcome(False, diagnose(trial, problems, steps, got, expected), figures)
        apart = ulps_apart(got, expected)
        share = np.mean(apart == 0)
        return Outcome(
            True, f"largest distance {int(apart.max()):,} ULP from {nearest}, {share:.1%} bit-equal", figures
        )
    if not np.all(same_bits(got, expected)):
        return Outcome(False, diagnose(trial, problems, steps, got, expected), figures)
    return Outcome(True, f"bit-equal under {trial.rounding}: {count:,} problems × {steps} steps", figures)


def _equal_bits(trial: Trial, problems: Problems, got: Array, how: Rounding) -> int:
    return int(np.count_nonzero(same_bits(got, trial.expected(problems, STEPS, how))))


def find_rounding(trial: Trial) -> None:
    """Ordinary problems tell the fused operations and the order, extreme ones the flushing and the fate of
    a step that is not finite."""
    problems, steps = ordinary(trial.dtype, 400, trial.rng()), 6
    got = trial.run(problems, steps)
    products = PRODUCTS if trial.loss == "squared" else PRODUCTS[:1]
    fitting = [
        Rounding(in_residual, in_update, False, product)
        for product in products
        for in_residual, in_update in ((False, False), (True, True), (True, False), (False, True))
        if np.all(same_bits(got, trial.expected(problems, steps, Rounding(in_residual, in_update, False, product))))
    ]
    if not fitting:
        return
    trial.rounding = fitting[0]
    problems = _edges(trial, 300)
    got = trial.run(problems, steps)
    for how, flush, keeps in itertools.product(fitting, (False, True), (False, True)):
        trial.keeps_finite = keeps
        candidate = dataclasses.replace(how, flush=flush)
        if np.all(same_bits(got, trial.expected(problems, steps, candidate))):
            trial.rounding = candidate
            return
    trial.keeps_finite = False


def _edges(trial: Trial, count: int) -> Problems:
    """Extreme problems, and some that surely underflow."""
    wild = extreme(trial.dtype, count, trial.rng())
    return Problems(*(np.concatenate(pair) for pair in zip(wild, tiny(trial.dtype), strict=True)))


def extremes(trial: Trial) -> Outcome:
    """The same agreement over the whole range of the format."""
    if trial.rounding is None:
        return Outcome(None, "no rounding was found to hold it against")
    count = trial.fits(2_000 if trial.quick else 100_000, STEPS, 1.0 if trial.quick else 3.0)
    problems = _edges(trial, count)
    got, expected = trial.run(problems, STEPS), trial.expected(problems, STEPS)
    finite = float(np.mean(np.isfinite(expected)))
    figures = {
        "problems": count,
        "steps": STEPS,
        "finite": finite,
        "bit_equal": float(np.mean(same_bits(got, expected))),
    }
    if not np.all(same_bits(got, expected)):
        return Outcome(False, diagnose(trial, problems, STEPS, got, expected), figures)
    ends = "the last finite weights are kept" if trial.keeps_finite else "inf and NaN are carried on"
    return Outcome(True, f"bit-equal from subnormals to overflow: {count:,} problems × {STEPS} steps; {ends}", figures)


def bound(trial: Trial) -> Outcome:
    """The distance from exact rational arithmetic, against the bound derived in `gdjax.bound`."""
    count = 100 if trial.quick else 1000
    problems = ordinary(trial.dtype, trial.fits(count, STEPS, 1.0), trial.rng())
    wild = extreme(trial.dtype, 50, trial.rng())
    worst, ratios, promised = 0.0, [], 0
    for batch, steps in ((problems, STEPS), (wild, 6)):
        got = trial.run(batch, steps).astype(np.float64)
        numbers = zip(*(v.astype(np.float64).tolist() for v in batch), strict=True)
        exact = [exact_descent(w, x, t, r, steps, trial.loss) for w, x, t, r in numbers]
        limit = error_bound(*batch, exact, trial.loss, dtype=trial.format.name)
        error = np.array([distance(g, e.weight) for g, e in zip(got, exact, strict=True)])
        finite = np.isfinite(limit)
        promised += int(np.count_nonzero(finite))
        with np.errstate(all="ignore"):
            ratio = np.where(error == 0, 0.0, error / limit)[finite]
        worst = max(worst, float(np.max(ratio, initial=0.0)))
        if steps == STEPS:
            ratios = [1 / r for r in ratio if r > 0]
            worst_error = float(np.max(error[finite], initial=0.0))
    median = float(np.median(ratios)) if ratios else float("nan")
    figures = {"problems": promised, "largest_share_of_bound": worst, "median_bound_over_error": median}
    figures["largest_error"] = worst_error
    if worst > 1:
        return Outcome(False, f"{worst:.3g} times the bound on |w − exact| in the worst problem", figures)
    return Outcome(
        True,
        f"at most {worst:.0%} of the bound on |w − exact|; in the median it is {median:.2g} × the error",
        figures,
    )
