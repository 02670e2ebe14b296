"""A rate sweep with its picture: how large may a learning rate be?

Gradient descent on a quadratic loss converges for rates up to 2/L, where L is its largest curvature, and runs away
beyond. A ridge regression of scikit-learn's diabetes table shows it: 60 rates on each of 10 folds, 600 descents of one
call that share the table. A fold is given as the rows it trains on.

    $ python -m gdjax.examples.rate_sweep rates.png
    2/L, fold by fold: 0.473 to 0.509
    converged at rates from 0.075 to 0.491, diverged from 0.574 on
    below 2/L none diverges, above it none converges: True
    as the normal equations have it: True
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

import gdjax
from gdjax.examples import load, run

PENALTY = 0.1


def loss(w: Any, trained: Any, x: Any, t: Any) -> Any:
    errors = jnp.sum(trained * (t - x @ w) ** 2) / jnp.sum(trained)
    return 0.5 * (errors + PENALTY * jnp.sum(w**2))


def main() -> Any:
    table = load("diabetes")
    x = table.data / table.data.std(0)
    t = (table.target - table.target.mean()) / table.target.std()
    folds = gdjax.over.folds(len(t), 10)
    result = gdjax.sweep(
        loss,
        np.zeros(x.shape[1]),
        (x, t),
        over={"learning_rate": np.geomspace(0.0002, 2.0, 60), "trained": folds},
        steps=1_000,
        stop=gdjax.stop.gradient_below(1e-6),
    )

    shares = folds / folds.sum(axis=1, keepdims=True)
    curvature = np.einsum("fp,pi,pj->fij", shares, x, x) + PENALTY * np.eye(x.shape[1])
    limit = 2 / np.linalg.eigvalsh(curvature)[:, -1]
    rates = np.broadcast_to(result["learning_rate"][:, None], result.shape)
    well, badly = result.status == gdjax.Status.CONVERGED, result.status == gdjax.Status.DIVERGED
    print(f"2/L, fold by fold: {limit.min():.3f} to {limit.max():.3f}")
    print(
        f"converged at rates from {rates[well].min():.3f} to {rates[well].max():.3f}, "
        f"diverged from {rates[badly].min():.3f} on"
    )
    fine = not (badly & (rates < limit)).any() and not (well & (rates > limit)).any()
    print("below 2/L none diverges, above it none converges:", fine)
    known = np.linalg.solve(curvature, np.einsum("fp,pi,p->fi", shares, x, t)[..., None])[..., 0]
    apart = np.abs(result.weights - known)[well].max()
    print("as the normal equations have it:", bool(apart < 1e-5))
    axes = {"learning_rate": result["learning_rate"], "fold": range(len(folds))}
    return gdjax.plot.final_loss(axes, result.loss, result.status)


if __name__ == "__main__":
    run(main)
