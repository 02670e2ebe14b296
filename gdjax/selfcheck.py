"""Checks of gdjax's own engine that a stranger's kernel has no part in: plans, shards, vector weights."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np

from gdjax import rounding
from gdjax.checks import Outcome
from gdjax.rounding import Array
from gdjax.trial import Kernel, Problems, Trial, extreme, ordinary, same_bits, tiny

# Tile, tiles per call, steps per pass: both ends and the middle of what a plan may be.
PLANS = ((32, 1, 1), (256, 8, 4), (256, 1, 16), (1024, 4, 3), (4096, 1, 1), (4096, 2, 16), (16384, 2, 4))


def kernel_of(loss: str, device: Any, plan: Any = "auto") -> Kernel:
    """`gdjax.minimize` as a kernel."""

    def minimize(w: Any, x: Any, t: Any, learning_rate: Any, steps: int) -> Any:
        return solve(loss, device, plan, w, x, t, learning_rate, steps)

    return minimize


def solve(loss: str, device: Any, plan: Any, w: Any, x: Any, t: Any, learning_rate: Any, steps: int) -> Any:
    """The final weights of `gdjax.minimize`."""
    return solution(loss, device, plan, w, x, t, learning_rate, steps).weights


def solution(loss: str, device: Any, plan: Any, w: Any, x: Any, t: Any, learning_rate: Any, steps: int) -> Any:
    import gdjax  # here, because gdjax itself imports this module

    function = getattr(gdjax.kernel, f"{loss}_loss")
    return gdjax.minimize(function, w, (x, t), learning_rate=learning_rate, steps=steps, device=device, plan=plan)


def plans(trial: Trial) -> Outcome:
    """Every shape of plan gives the bits of the plan that gdjax chooses; where that is a kernel in registers, which may
    round otherwise than XLA, the plans in lanes are held to each other as well."""
    from gdjax.plan import Plan

    problems, steps = _mixed(trial), 19  # no multiple of any number of steps per pass
    shapes = PLANS[:2] if trial.quick else PLANS
    chosen = solution(trial.loss, trial.device, "auto", *problems, steps)
    kernels = dict.fromkeys([chosen.plan.kernel, "lanes"])
    for kernel in kernels:
        expected = _as_numpy(chosen.weights) if kernel == chosen.plan.kernel else None
        for tile, tiles, chunk in shapes:
            plan = Plan(kernel, tile, tiles, chunk)
            got = _as_numpy(solve(trial.loss, trial.device, plan, *problems, steps))
            expected = got if expected is None else expected
            wrong = np.count_nonzero(~same_bits(got, expected))
            if wrong:
                return Outcome(False, f"{wrong:,} problems get other bits under {plan}", {"plan": str(plan)})
    detail = f"{len(shapes)} plans of 32 to 16,384 lanes, 1 to 16 steps per pass: the same bits"
    return Outcome(True, detail + (" in registers, and the same in lanes" if len(kernels) > 1 else ""))


def shards(trial: Trial) -> Outcome:
    """The batch split over all devices of the kind gives the bits of one device."""
    alike = jax.devices(trial.device.platform)
    if len(alike) == 1:
        return Outcome(None, "there is one device of this kind")
    problems, steps = _mixed(trial), 7
    expected = trial.run(problems, steps)
    counts = sorted({2, 2 if trial.quick else len(alike)})
    for count in counts:
        got = _as_numpy(solve(trial.loss, alike[:count], "auto", *problems, steps))
        wrong = np.count_nonzero(~same_bits(got, expected))
        if wrong:
            return Outcome(False, f"{wrong:,} problems get other bits on {count} devices")
    return Outcome(True, f"the same bits on {' and '.join(map(str, [1, *counts]))} devices", {"devices": counts})


def vectors(trial: Trial) -> Outcome:
    """Vector weights: the declared order of summation, alone as in a batch."""
    steps, count, sizes = 12, 500, (2, 5, 16)
    rng = trial.rng()
    named: dict[str, str] = {}
    for size in sizes:
        w, x = rng.normal(size=(2, count, size)).astype(trial.dtype)
        t, r = (
            rng.normal(size=count).astype(trial.dtype),
            rng.uniform(0, 0.5 / size, count).astype(trial.dtype),
        )
        got = _as_numpy(solve(trial.loss, trial.device, "auto", w, x, t, r, steps))
        alone = _as_numpy(solve(trial.loss, trial.device, "auto", w[7:8], x[7:8], t[7:8], r[7:8], steps))
        if not np.all(same_bits(alone, got[7:8])):
            return Outcome(False, f"{size} weights: a problem alone gets other bits than in a batch of {count}")
        share, how = max(
            (
                float(np.mean(same_bits(got, rounding.descend(w, x, t, r, steps, loss=trial.loss, rounding=h)))),
                str(h),
            )
            for h in ROUNDINGS
        )
        if share < 1:
            detail = f"{size} weights: {share:.1%} bit-equal under {how}, the sum from left to right"
            return Outcome(False, detail, {"weights": size, "bit_equal": share})
        named.setdefault(how, f"{size} weights")
    detail = "; ".join(f"from {size} on bit-equal under {how}" for how, size in named.items())
    return Outcome(True, f"summed from left to right, {detail}", {"sizes": sizes, "roundings": list(named)})


ROUNDINGS = tuple(rounding.Rounding(*flags) for flags in itertools.product((False, True), (False, True), (True, False)))


def _mixed(trial: Trial) -> Problems:
    """Ordinary, extreme and underflowing problems, more than one small tile of them."""
    rng = trial.rng()
    parts = ordinary(trial.dtype, 5000, rng), extreme(trial.dtype, 1000, rng), tiny(trial.dtype)
    return Problems(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _as_numpy(answer: Any) -> Array:
    return np.asarray(answer)
