"""What is wrong with a wrong answer, in a sentence: where it is wrong, and what it computes instead."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gdjax import rounding
from gdjax.rounding import Array
from gdjax.trial import POISON, Problems, Trial, same_bits, ulps_apart

MANY = 400  # problems are enough to recognise what a kernel computes instead


def diagnose(trial: Trial, problems: Problems, steps: int, got: Array, expected: Array) -> str:
    """Why `got` is not `expected`: one sentence with the figures."""
    wrong = np.flatnonzero(~trial.equal(got, expected, problems.w))
    count = len(got)
    what = f"{len(wrong):,} of {count:,} problems differ"
    for explain in (_unwritten, _places, _another_program):
        reason = explain(trial, problems, steps, got, expected, wrong)
        if reason:
            return f"{what}: {reason}"
    i = wrong[0]
    apart = ulps_apart(got, expected)
    finite = apart[np.isfinite(apart)]
    largest = f"{int(finite.max()):,}" if len(finite) else "no finite number of"
    return f"{what}, first problem {i:,}: got {got[i]!s}, wanted {expected[i]!s}; largest distance {largest} ULP"


def _unwritten(trial: Trial, problems: Problems, steps: int, got: Array, expected: Array, wrong: Array) -> str | None:
    left = np.count_nonzero(got[wrong] == np.asarray(POISON, got.dtype))
    if left == 0:
        return None
    return f"{left:,} results were never written, they hold what was in memory before (uninitialised output)"


def _places(trial: Trial, problems: Problems, steps: int, got: Array, expected: Array, wrong: Array) -> str | None:
    """Only some places are wrong: say which."""
    count = len(got)
    if len(wrong) > count * 0.999 and count > 1:
        return None
    unchanged = bool(np.all(same_bits(got[wrong], problems.w[wrong].astype(got.dtype))))
    ending = ", returned with their start weights: never descended" if unchanged else ""
    if len(wrong) == 1 and wrong[0] == count - 1:
        return f"only the last problem, {count - 1:,}, is wrong (last problem skipped?)" + ending
    if 2 <= len(wrong) <= 64:
        pairs = _swapped(got, expected, wrong)
        if len(pairs) * 2 == len(wrong):
            shown = ", ".join(f"{i:,} and {j:,}" for i, j in pairs[:3])
            return f"problems {shown} hold each other's result (lanes swapped at a tile's edge?)"
    first, last = int(wrong[0]), int(wrong[-1])
    if first >= 64 and len(wrong) > (last - first + 1) * 0.9:
        return f"every wrong problem lies at {first:,} or beyond, those before are right" + ending
    if unchanged and len(wrong) > 1:
        return "they were returned with their start weights: never descended"
    return None


def _swapped(got: Array, expected: Array, wrong: Array) -> list[tuple[int, int]]:
    """Pairs of wrong places that hold each other's expected result."""
    pairs, free = [], [int(i) for i in wrong]
    while free:
        i = free.pop(0)
        partner = next((j for j in free if got[i] == expected[j] and got[j] == expected[i]), None)
        if partner is not None:
            free.remove(partner)
            pairs.append((i, partner))
    return pairs


def _another_program(
    trial: Trial, problems: Problems, steps: int, got: Array, expected: Array, wrong: Array
) -> str | None:
    """Nearly every place is wrong: find what is computed instead."""
    index = np.arange(len(got))[:MANY]
    some = problems.take(index).astype(trial.result_dtype)
    answer = got[index]
    other = "residual" if trial.loss == "squared" else "squared"

    def descend(problems: Problems, steps: int, loss: str = trial.loss) -> Array:
        return rounding.descend(*problems, steps, loss=loss, rounding=trial.rounding or rounding.IEEE)

    alternatives: list[tuple[str, Callable[[], Array]]] = [
        ("it steps uphill, w + r·∂l/∂w (wrong sign)", lambda: descend(some._replace(r=-some.r), steps)),
        (f"it takes {steps - 1} steps instead of {steps} (off by one)", lambda: descend(some, steps - 1)),
        (f"it takes {steps + 1} steps instead of {steps} (off by one)", lambda: descend(some, steps + 1)),
        ("it uses the square of the learning rate", lambda: descend(some._replace(r=some.r * some.r), steps)),
        ("its gradient is twice the right one", lambda: descend(some._replace(r=2 * some.r), steps)),
        ("its gradient is half the right one", lambda: descend(some._replace(r=some.r / 2), steps)),
        (f"it descends the {other} loss", lambda: descend(some, steps, other)),
        ("it returns the start weights", lambda: some.w),
        ("it returns zeros", lambda: np.zeros_like(some.w)),
    ]
    if _near(answer, descend(some, steps), 2.0**-16 if trial.format.precision > 24 else 2.0**-6):
        return _precision(trial, some, steps, answer)
    for reason, compute in alternatives:
        with np.errstate(all="ignore"):
            if _near(answer, compute(), 1e4 * trial.format.unit_roundoff):
                return reason
    return None


def _precision(trial: Trial, problems: Problems, steps: int, answer: Array) -> str | None:
    """The right program, not rounded as it should be."""
    inside = trial.result_dtype
    narrow = [f for f in rounding.FORMATS.values() if f.precision < trial.format.precision]
    for fmt in sorted(narrow, key=lambda fmt: -fmt.precision):
        with np.errstate(all="ignore"):
            if np.array_equal(answer.astype(fmt.dtype).astype(answer.dtype), answer):
                return f"every result is a {fmt.name} number: {fmt.name} inside a {inside} kernel"
            computed = rounding.descend(*problems.astype(fmt.dtype), steps, loss=trial.loss)
            rough = np.abs(answer - rounding.descend(*problems, steps, loss=trial.loss))
            size = np.abs(computed.astype(answer.dtype)) * fmt.unit_roundoff
            if np.median(rough) > 0.01 * np.median(size):
                return f"the results are only as exact as {fmt.name}: {fmt.name} inside a {inside} kernel"
    reference = rounding.descend(*problems, steps, loss=trial.loss, rounding=trial.rounding or rounding.IEEE)
    apart = ulps_apart(answer, reference)
    return (
        "the right steps in another order of operations or rounding, not bit-equal to any declared one: "
        f"{np.mean(apart == 0):.1%} equal to {trial.rounding or rounding.IEEE}, "
        f"largest distance {int(np.max(apart[np.isfinite(apart)], initial=0)):,} ULP"
    )


def _near(a: Array, b: Array, tolerance: float) -> bool:
    """Almost all entries agree, relative to their size."""
    with np.errstate(all="ignore"):
        scale = np.maximum(np.abs(b), np.median(np.abs(b)) * 1e-3)
        close = (np.abs(a - b) <= tolerance * scale) | same_bits(a, b)
    return bool(np.mean(close) >= 0.98)
