"""Sweeps as one call against the loop over runs: `python -m bench.sweeps`.

The grid: 50 rates x 20 starts x 10 folds of logistic regression with an L2 penalty on scikit-learn's breast cancer data
(569 rows, 30 inputs), float64, until no entry of the gradient exceeds 2e-8. Three loops with optax do the same:

- one that makes its jitted step inside the run, as a function `train(rate, seed, fold)` does: it compiles every time
- one whose jitted step is made once and takes the rate and the fold as arguments
- one whose whole run is a single `jit(while_loop)`, made once

Each loop is timed on a sample of the runs, drawn at random, in interleaved rounds with the sweep, and scaled up to
all of them. The bootstrap: 1,000 ridge regressions x 6 rates on scikit-learn's diabetes data, against the closed form.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gdjax
from gdjax.files import replacing

PENALTY, TOLERANCE = 0.1, 2e-8
Array = np.ndarray


def standard(table: Any) -> tuple[Array, Array]:
    """The table's inputs in standard units and its target, as float64."""
    x, t = table.data, table.target.astype(np.float64)
    return (x - x.mean(axis=0)) / x.std(axis=0), t


def logistic(w: Any, x: Any, t: Any, fold: Any) -> Any:
    """Mean over a fold's rows (`fold` sums to 1), the intercept without penalty."""
    z = x @ w["slopes"] + w["bias"]
    losses = jnp.log1p(jnp.exp(-jnp.abs(z))) + jnp.maximum(z, 0.0) - t * z
    return jnp.sum(fold * losses) + 0.5 * PENALTY * jnp.sum(w["slopes"] ** 2)


def start(seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {"slopes": generator.normal(size=30), "bias": np.float64(generator.normal())}


class Grid:
    """The grid of logistic regressions."""

    def __init__(self, quick: bool):
        from sklearn.datasets import load_breast_cancer

        self.x, self.t = standard(load_breast_cancer())
        folds = gdjax.over.folds(len(self.t), 10)
        self.steps = 300 if quick else 2000
        self.axes = {
            "learning_rate": np.geomspace(0.05, 1.0, 5 if quick else 50),
            "seed": range(2 if quick else 20),
            "fold": (folds / folds.sum(axis=1, keepdims=True))[: 2 if quick else 10],
        }

    def sweep(self, few: int | None = None) -> gdjax.SweepResult:
        """All runs in one call."""
        return gdjax.sweep(
            logistic,
            start,
            (self.x, self.t),
            over={name: values[:few] for name, values in self.axes.items()},
            steps=self.steps,
            stop=gdjax.stop.gradient_below(TOLERANCE),
        )

    def error(self, result: gdjax.SweepResult) -> float:
        """Largest distance of a converged weight from scikit-learn's optimum of its fold."""
        from sklearn.linear_model import LogisticRegression

        worst = 0.0
        for number, fold in enumerate(self.axes["fold"]):
            rows = fold > 0
            model = LogisticRegression(C=1 / (PENALTY * rows.sum()), tol=1e-13, solver="newton-cholesky")
            model.fit(self.x[rows], self.t[rows])
            runs = result.sel(fold=number)
            good = runs.status == gdjax.Status.CONVERGED
            worst = max(worst, float(np.abs(runs.weights["slopes"] - model.coef_[0])[good].max()))
            worst = max(worst, float(np.abs(runs.weights["bias"] - model.intercept_[0])[good].max()))
        return worst


def loops(grid: Grid) -> dict[str, Callable[[float, int, int], Any]]:
    """The three loops' run of one rate, seed and fold."""
    import optax

    def jitted(make: Callable[..., Any]) -> Callable[..., Any]:
        @jax.jit
        def step(w: Any, state: Any, rate: Any, fold: Any) -> Any:
            gradient = jax.grad(logistic)(w, grid.x, grid.t, fold)
            moves, state = make(rate).update(gradient, state)
            norm = jnp.max(jnp.array([jnp.max(jnp.abs(g)) for g in jax.tree.leaves(gradient)]))
            return optax.apply_updates(w, moves), state, norm

        return step

    once = jitted(optax.sgd)

    def run(step: Callable[..., Any], rate: float, seed: int, fold: int) -> Any:
        w = jax.tree.map(jnp.asarray, start(seed))
        state, rows = optax.sgd(rate).init(w), jnp.asarray(grid.axes["fold"][fold])
        for _ in range(grid.steps):
            after, state, norm = step(w, state, rate, rows)
            if norm <= TOLERANCE:
                break
            w = after
        return w

    @jax.jit
    def whole(w: Any, rate: Any, fold: Any) -> Any:
        def body(carry: Any) -> Any:
            w, state, index, _ = carry
            after, state, norm = once(w, state, rate, fold)
            done = norm <= TOLERANCE
            return jax.tree.map(lambda a, b: jnp.where(done, a, b), w, after), state, index + 1, done

        going = lambda carry: (carry[2] < grid.steps) & ~carry[3]  # noqa: E731
        return jax.lax.while_loop(going, body, (w, optax.sgd(rate).init(w), 0, False))[0]

    return {
        "optax, step jitted in each run": lambda rate, seed, fold: run(jitted(optax.sgd), rate, seed, fold),
        "optax, step jitted once": lambda rate, seed, fold: run(once, rate, seed, fold),
        "optax, whole run jitted once": lambda rate, seed, fold: whole(start(seed), rate, grid.axes["fold"][fold]),
    }


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    out = jax.block_until_ready(work())
    return time.perf_counter() - began, out


def against_loops(grid: Grid, sampled: int, rounds: int) -> dict[str, Any]:
    """Seconds of the sweep and of each loop, the latter scaled from a sample; medians of interleaved rounds."""
    names = list(grid.axes)
    first, result = seconds(grid.sweep)
    with jax.enable_x64(True):
        programs = loops(grid)
        for program in programs.values():
            jax.block_until_ready(program(0.5, 0, 0))
    generator = np.random.default_rng(0)
    taken: dict[str, list[float]] = {name: [] for name in ("gdjax", *programs)}
    apart = 0.0
    for _ in range(rounds):
        spent, result = seconds(grid.sweep)
        taken["gdjax"].append(spent)
        spots = [tuple(int(generator.integers(len(grid.axes[name]))) for name in names) for _ in range(sampled)]
        for name, program in programs.items():
            with jax.enable_x64(True):
                spent, ended = seconds(
                    lambda program=program, spots=spots: [
                        program(float(grid.axes["learning_rate"][rate]), seed, fold) for rate, seed, fold in spots
                    ]
                )
            taken[name].append(spent / sampled * result.status.size)
            apart = max(
                apart,
                *(
                    float(np.abs(np.asarray(w["slopes"]) - result.weights["slopes"][spot]).max())
                    for spot, w in zip(spots, ended, strict=True)
                    if result.status[spot] == gdjax.Status.CONVERGED
                ),
                0.0,
            )
    median = {name: float(np.median(values)) for name, values in taken.items()}
    return {
        "runs": int(result.status.size),
        "updates": int(result.steps.astype(np.int64).sum()),
        "ended": result.summary(),
        "first call, compiling included": first,
        "seconds": median,
        "rounds": taken,
        "sampled runs per round": sampled,
        "times as fast": {name: value / median["gdjax"] for name, value in median.items()},
        "largest distance from scikit-learn": grid.error(result),
        "largest distance from the loops": apart,
    }


def resident(field: str) -> float:
    """MB of memory that this process has, now (`VmRSS`) or at most (`VmHWM`) (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def memory(quick: bool) -> dict[str, float]:
    """MB that a sweep needs while it runs, after a first one has loaded and compiled what there is."""
    command = [sys.executable, "-m", "bench.sweeps", "--memory", *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_memory(grid: Grid) -> None:
    grid.sweep()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    result = grid.sweep()
    runs = result.status.size
    found = {
        "peak of a second call": resident("VmHWM") - before,
        "data": grid.x.nbytes / 2**20,
        "weights": runs * 31 * 8 / 2**20,
    }
    found |= {"row weights, if copied": runs * len(grid.t) * 8 / 2**20, "data, if copied": runs * grid.x.nbytes / 2**20}
    print(json.dumps({name: round(value, 1) for name, value in found.items()}))


def ridge(w: Any, x: Any, t: Any, resample: Any) -> Any:
    return 0.5 * jnp.sum(resample * (x @ w - t) ** 2) / len(t) + 0.5 * PENALTY * jnp.sum(w**2)


def bootstrap(resamples: int) -> dict[str, Any]:
    """Ridge regressions on resamples of the diabetes data, at rates on both sides of 2 / λmax."""
    from sklearn.datasets import load_diabetes

    x, t = standard(load_diabetes())
    t, rows = (t - t.mean()) / t.std(), len(t)
    counts = gdjax.over.bootstrap(rows, resamples)
    hessians = np.einsum("bi,ip,iq->bpq", counts, x, x, optimize=True) / rows + PENALTY * np.eye(x.shape[1])
    answers = np.linalg.solve(hessians, (counts * t @ x / rows)[..., None])[..., 0]
    curvature = np.linalg.eigvalsh(hessians)[:, -1:]
    rates = np.array([0.3, 1.0, 1.85, 2.05, 2.3, 8.0]) / np.median(curvature)

    def run() -> gdjax.SweepResult:
        return gdjax.sweep(
            ridge,
            np.zeros(x.shape[1]),
            (x, t),
            over={"resample": counts, "learning_rate": rates},
            steps=4000,
            stop=gdjax.stop.gradient_below(1e-12),
        )

    run()
    spent, result = seconds(run)
    converged, product = result.status == gdjax.Status.CONVERGED, curvature * rates
    return {
        "runs": int(result.status.size),
        "seconds": spent,
        "ended": result.summary(),
        "largest distance from the closed form": float(np.abs(result.weights - answers[:, None])[converged].max()),
        "below 1.9, converged": f"{converged[product < 1.9].sum()} of {(product < 1.9).sum()}",
        "beyond 2, converged": f"{converged[product > 2].sum()} of {(product > 2).sum()}",
    }


def main() -> None:
    """Run both, print what came out and write it to bench/results."""
    from bench import environment

    options = argparse.ArgumentParser("python -m bench.sweeps", description=__doc__.partition("\n")[0])
    options.add_argument("--quick", action="store_true", help="small grids: a smoke test")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--sample", type=int, default=20, help="runs of each loop per round")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    grid = Grid(given.quick)
    if given.memory:
        print_memory(grid)
        return
    now = datetime.datetime.now(datetime.UTC)
    about = environment.describe(jax.devices()[0]) | {"date": now.isoformat(timespec="seconds"), "quick": given.quick}
    found = {
        "grid": against_loops(grid, given.sample, given.rounds),
        "memory, MB": memory(given.quick),
        "bootstrap": bootstrap(30 if given.quick else 1000),
    }
    print(json.dumps(found, indent=1))
    path = given.out / f"sweeps-{environment.slug(about['device'])}-{now:%Y-%m-%d-%H%M}.json"
    with replacing(path) as file:
        file.write((json.dumps({**about, **found}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
