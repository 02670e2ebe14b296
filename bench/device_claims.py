"""The cases with their data on a GPU or TPU, where one is at hand: `python -m bench.device_claims`.

Data lies on the device before the clock starts and the answer stays there: `python -m bench --device gpu` has the bus
in every figure, which at such speeds takes longer than most descents. `gdjax.minimize` and `jit(vmap(loop))` (with
optax's Adam in the loop where that is the case) run in turn, round after round; a ratio is the median over the rounds.
Where problems share their data the loop runs once more with matrix products in float32.
A share of the limit is what was done, in multiply-adds or operations of the compiled loop, over the multiply-adds that
the device was measured to do in a kernel that does nothing else (`gdjax.limits`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import environment
from bench.cases import CASES, Inputs
from bench.peers.jax_peers import compiled, descent, optax_descent
from bench.peers.own import arguments


@dataclass(frozen=True)
class Claim:
    """A case, perhaps at another size, with what is promised for it; `operations` of one step of one problem are
    counted against the limit."""

    case: str
    problems: int | None = None
    steps: int | None = None
    operations: int | None = None
    ratio: float | None = None
    share: float | None = None


CLAIMS = (
    # The compiled loop: two multiply-adds and a product a step (tests/test_aot.py).
    Claim("scalar", 1 << 24, 1000, operations=3, ratio=20, share=0.6),
    Claim("vector-16x4", 1 << 20, 1000, ratio=20, share=0.5),
    Claim("stop-scalar", 1 << 21, ratio=20),
    Claim("scalar", ratio=1),
    *(
        Claim(name, ratio=1)
        for name in (
            "vector-32x8",
            "vector-16x4",
            "vector-300x4",
            "shared",
            "logistic-32x8",
            "adam",
            "stop-scalar",
            "stop-logistic",
            "stop-equal",
        )
    ),
)


def measure(claim: Claim, device: jax.Device, rounds: int, problems: int, steps: int, limit: float) -> dict[str, Any]:
    """Both programs in interleaved rounds."""
    import gdjax

    case = replace(CASES[claim.case], steps=steps)
    host = case.inputs(problems)
    inputs = Inputs(*jax.device_put((host.weights, host.data, host.rates), device))
    keywords = arguments(case, inputs, device)
    loop = compiled(case, optax_descent(case) if case.family == "adam" else descent(case))
    programs: dict[str, Callable[[], Any]] = {
        "gdjax": lambda: gdjax.minimize(case.loss, inputs.weights, inputs.data, **keywords),
        "vmap": lambda: loop(inputs.weights, inputs.rates, *inputs.data),
    }
    if case.in_axes is None:  # a matrix product, which JAX takes in tf32 or bfloat16 unless it is told otherwise
        with jax.default_matmul_precision("highest"):
            precise = loop.lower(inputs.weights, inputs.rates, *inputs.data).compile()
        programs["vmap in float32"] = lambda: precise(inputs.weights, inputs.rates, *inputs.data)
    first, answers = {}, {}
    for name, run in programs.items():
        start = time.perf_counter()
        answers[name] = jax.block_until_ready(run())
        first[name] = time.perf_counter() - start
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    solution, best = answers["gdjax"], statistics.median(seconds["gdjax"])
    taken = int(np.asarray(solution.steps).sum(dtype=np.int64))
    work = taken * (claim.operations or case.multiply_adds)
    return {
        "case": claim.case,
        "title": case.title,
        "problems": problems,
        "steps": steps,
        "steps taken": taken,
        "plan": f"{solution.plan.kernel}, tile {solution.plan.tile}, chunk {solution.plan.chunk}"
        + (solution.plan.reason and f": {solution.plan.reason}"),
        "seconds": seconds,
        "first seconds": first,
        "largest difference": float(np.max(np.abs(np.asarray(solution.weights) - np.asarray(answers["vmap"][0])))),
        **{
            f"times {name}": statistics.median(b / a for a, b in zip(seconds["gdjax"], seconds[name], strict=True))
            for name in programs
            if name != "gdjax"
        },
        "G steps/s": taken / best / 1e9,
        "share of limit": work / best / limit,
        "promised": {"times vmap": claim.ratio, "share of limit": claim.share},
    }


def kept(found: dict[str, Any]) -> bool:
    """Whether a case does what is promised for it."""
    return all(least is None or found[name] >= least for name, least in found["promised"].items())


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where a promise is not kept."""
    import gdjax
    from gdjax.limits import multiply_add_rate

    options = argparse.ArgumentParser("python -m bench.device_claims", description=__doc__)
    options.add_argument("--device", default="gpu", help="as gdjax names it (default gpu)")
    options.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default 7)")
    options.add_argument("--quick", action="store_true", help="few problems and steps: whether it runs at all")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the result")
    given = options.parse_args(arguments)
    device = gdjax.select_device(given.device).device
    about = environment.describe(device) | {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    limit = multiply_add_rate(device)
    found = []
    for claim in CLAIMS:
        case = CASES[claim.case]
        problems, steps = claim.problems or case.problems, claim.steps or case.steps
        if given.quick:
            problems, steps = min(problems, 512), min(steps, 20)
        found.append(measure(claim, device, 2 if given.quick else given.rounds, problems, steps, limit))
        told = {name: value for name, value in found[-1].items() if name not in ("seconds", "title")}
        print(json.dumps(told | {"kept": kept(found[-1])}), flush=True)
    if given.quick:
        return 0
    now = datetime.datetime.now(datetime.UTC)
    path = given.out / f"{environment.slug(about['device'])}-{now:%Y-%m-%d-%H%M}-device-claims.json"
    from gdjax.files import replacing

    given.out.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(about | {"multiply-adds per second": limit, "claims": found}, indent=1).encode())
    print(f"written: {path}")
    return 0 if all(map(kept, found)) else 1


if __name__ == "__main__":
    sys.exit(main())
