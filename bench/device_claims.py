"""What kernels in registers promise on a GPU or TPU, measured where one is at hand: `python -m bench.device_claims`.

Data lies on the device before the clock starts and the answer stays there: these are claims about the descent, and at
such speeds moving the batch over the bus would take longer than all of its steps. `gdjax.minimize` and
`jit(vmap(fori_loop))` run in turn, round after round; the ratio is the median over the rounds. A share of the limit is
what was done, in multiply-adds or operations of the compiled loop, over what the device could issue.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import environment, losses

ISSUES = {"NVIDIA H200": 132 * 128 * 1.98e9, "NVIDIA H100": 132 * 128 * 1.98e9}
"""float32 instructions per second: multiprocessors × lanes × clock (NVIDIA H100 architecture white paper, 2022)."""


@dataclass(frozen=True)
class Claim:
    """A case with what is promised for it; `operations` of one step of one problem are counted against the limit."""

    name: str
    loss: Callable[..., Any]
    problems: int
    shape: tuple[int, ...]
    operations: int
    ratio: float
    share: float
    steps: int = 1000

    def inputs(self, count: int) -> tuple[Any, tuple[Any, Any], Any]:
        """Weights, data and rates at which every problem converges."""
        rng = np.random.default_rng(0)
        draw = lambda *s: rng.standard_normal((count, *s), np.float32)  # noqa: E731
        x, t, w = draw(*self.shape), draw(*self.shape[:1]), draw(*self.shape[1:])
        rates = (0.1 + 0.1 * rng.random(count, np.float32)) / (1 if self.shape else np.maximum(1, x**2))
        return w, (x, t), rates.astype(np.float32)


CLAIMS = (
    # The compiled loop: two multiply-adds and a product a step (tests/test_aot.py).
    Claim("scalar", losses.squared, 1 << 24, (), 3, ratio=20, share=0.6),
    Claim("vector-16x4", losses.mean_squared, 1 << 20, (16, 4), 128, ratio=20, share=0.5),
)


def measure(claim: Claim, device: jax.Device, rounds: int, problems: int, steps: int) -> dict[str, Any]:
    """Both programs in interleaved rounds."""
    import gdjax

    weights, data, rates = jax.device_put(claim.inputs(problems), device)
    gradient = jax.grad(claim.loss)

    def one(w: Any, x: Any, t: Any, rate: Any) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, w: w - rate * gradient(w, x, t), w)

    plain = jax.jit(jax.vmap(one))
    programs: dict[str, Callable[[], Any]] = {
        "gdjax": lambda: gdjax.minimize(claim.loss, weights, data, learning_rate=rates, steps=steps, device=device),
        "vmap": lambda: plain(weights, *data, rates),
    }
    answers, seconds = {name: jax.block_until_ready(run()) for name, run in programs.items()}, {}
    for _ in range(rounds):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    plan = answers["gdjax"].plan
    limit = next((rate for kind, rate in ISSUES.items() if device.device_kind.startswith(kind)), None)
    best = statistics.median(seconds["gdjax"])
    return {
        "case": claim.name,
        "problems": problems,
        "steps": steps,
        "plan": f"{plan.kernel}, tile {plan.tile}, chunk {plan.chunk}{plan.reason and ': ' + plan.reason}",
        "seconds": seconds,
        "largest difference": float(np.max(np.abs(np.asarray(answers["gdjax"].weights) - np.asarray(answers["vmap"])))),
        "times vmap": statistics.median(b / a for a, b in zip(seconds["gdjax"], seconds["vmap"], strict=True)),
        "share of limit": problems * steps * claim.operations / best / limit if limit else None,
        "promised": {"times vmap": claim.ratio, "share of limit": claim.share},
    }


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where a promise is not kept."""
    import gdjax

    options = argparse.ArgumentParser("python -m bench.device_claims", description=__doc__)
    options.add_argument("--device", default="gpu", help="as gdjax names it (default gpu)")
    options.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default 7)")
    options.add_argument("--quick", action="store_true", help="few problems and steps: whether it runs at all")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the result")
    given = options.parse_args(arguments)
    device = gdjax.select_device(given.device).device
    about = environment.describe(device) | {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    found = []
    for claim in CLAIMS:
        problems, steps = (4096, 20) if given.quick else (claim.problems, claim.steps)
        found.append(measure(claim, device, 2 if given.quick else given.rounds, problems, steps))
        print(json.dumps(found[-1], indent=1), flush=True)
    if given.quick:
        return 0
    path = given.out / f"{environment.slug(about['device'])}-{datetime.date.today()}-device-claims.json"
    from gdjax.files import replacing

    given.out.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(about | {"claims": found}, indent=1).encode())
    print(f"written: {path}")
    kept = [case["times vmap"] >= case["promised"]["times vmap"] for case in found]
    kept += [(case["share of limit"] or 0) >= case["promised"]["share of limit"] for case in found]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
