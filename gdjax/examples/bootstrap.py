"""A bootstrap of 1,000 regressions: how sure may one be of a weight?

Each resample of scikit-learn's diabetes table (442 patients; Efron, Hastie, Johnstone and Tibshirani, 2004) draws as
many patients with replacement. A resample is given as how often each patient was drawn, so that all 1,000 problems
share one table and nothing is copied. The middle 95% of the 1,000 weights is the bootstrap's confidence interval;
beside it is the textbook's, which assumes that the noise is alike for all patients.

    $ python -m gdjax.examples.bootstrap steps.png
    {'RAN_ALL_STEPS': 0, 'CONVERGED': 1000, 'DIVERGED': 0}
            weight   bootstrap 95%     textbook 95%
    bmi       28.7    22.1 to 35.3      22.7 to 34.7
    bp        12.5     6.3 to 18.5       6.6 to 18.3
    s5        25.9    19.7 to 32.1      19.8 to 31.9
    every one as the normal equations have it: True
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

import gdjax
from gdjax.examples import load, run

COLUMNS = ("bmi", "bp", "s5")  # body mass index, blood pressure, log of triglycerides
RESAMPLES = 1_000


def loss(w: Any, often: Any, x: Any, t: Any) -> Any:
    return 0.5 * jnp.sum(often * (t - x @ w) ** 2) / len(t)


def main() -> Any:
    table = load("diabetes")
    chosen = table.data[:, [table.feature_names.index(name) for name in COLUMNS]]
    x = np.column_stack([(chosen - chosen.mean(0)) / chosen.std(0), np.ones(len(chosen))])
    t = table.target
    count, width = x.shape
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)

    solution = gdjax.minimize(
        loss,
        np.zeros((RESAMPLES, width)),
        (drawn, x, t),
        in_axes=(0, None, None),
        learning_rate="auto",
        steps=2_000,
        stop=gdjax.stop.gradient_below(1e-10),
    )
    print(solution.summary())

    best, rest, *_ = np.linalg.lstsq(x, t)
    noise = rest[0] / (count - width)
    room = 1.96 * np.sqrt(noise * np.diag(np.linalg.inv(x.T @ x)))
    low, high = np.quantile(solution.weights, [0.025, 0.975], axis=0)
    print("        weight   bootstrap 95%     textbook 95%")
    for i, name in enumerate(COLUMNS):
        book = best[i] - room[i], best[i] + room[i]
        print(f"{name:6} {best[i]:7.1f}   {low[i]:5.1f} to {high[i]:4.1f}     {book[0]:5.1f} to {book[1]:4.1f}")

    known = np.linalg.solve(np.einsum("np,pi,pj->nij", drawn, x, x), np.einsum("np,pi,p->ni", drawn, x, t)[..., None])
    print("every one as the normal equations have it:", np.allclose(solution.weights, known[..., 0], rtol=0, atol=1e-7))
    return gdjax.plot.steps_to_convergence(solution)


if __name__ == "__main__":
    run(main)
