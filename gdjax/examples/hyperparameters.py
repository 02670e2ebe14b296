"""Hyperparameters learned by gradient: a ridge penalty of its own for each of ten inputs.

Which penalties serve best is asked of rows that were held out. The loss there depends on the penalties through the
weights that `minimize` finds, and has a gradient with respect to them (by the implicit function theorem, so that how
the weights were found does not matter). Descending along it, on ten folds of scikit-learn's diabetes table at once,
learns all ten penalties together; a grid of ten per input would take 10¹⁰ fits.

    $ python -m gdjax.examples.hyperparameters errors.png
    gradient as through the closed form: True
    error on rows held out: 0.503 with the best common penalty, 0.497 with one each
    all but silenced: age, s3, s4
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdjax
from gdjax.examples import load, run

FOLDS, ROUNDS = 10, 40


def loss(w: Any, log_penalty: Any, trained: Any, x: Any, t: Any) -> Any:
    errors = jnp.sum(trained * (t - x @ w) ** 2) / jnp.sum(trained)
    return 0.5 * (errors + jnp.sum(jnp.exp(log_penalty) * w**2))


def main() -> Any:
    table = load("diabetes")
    x = table.data / table.data.std(0)
    t = (table.target - table.target.mean()) / table.target.std()
    held = np.eye(FOLDS)[np.random.default_rng(0).permutation(len(t)) % FOLDS].T

    def fitted(log_penalty: Any) -> Any:
        return gdjax.minimize(
            loss,
            jnp.zeros((FOLDS, x.shape[1])),
            (log_penalty, 1 - held, x, t),
            in_axes=(None, 0, None, None),
            learning_rate="auto",
            steps=50_000,
            stop=gdjax.stop.gradient_below(1e-9),
        ).weights

    def normal_equations(log_penalty: Any) -> Any:
        def one(trained: Any) -> Any:
            share = trained / trained.sum()
            return jnp.linalg.solve(x.T @ (share[:, None] * x) + jnp.diag(jnp.exp(log_penalty)), x.T @ (share * t))

        return jax.vmap(one)(1 - held)

    def unseen(log_penalty: Any, weights: Any) -> Any:
        """Mean square error on the rows held out."""
        return jnp.mean(jnp.sum(held * (t - weights(log_penalty) @ x.T) ** 2, axis=0))

    with jax.enable_x64(True):
        slope = jax.jit(jax.value_and_grad(lambda log_penalty: unseen(log_penalty, fitted)))
        common = np.log(np.geomspace(1e-3, 1.0, 50))
        by_grid = [float(unseen(jnp.full(x.shape[1], entry), normal_equations)) for entry in common]
        log_penalty = jnp.full(x.shape[1], common[np.argmin(by_grid)])
        known = jax.grad(unseen)(log_penalty, normal_equations)
        print("gradient as through the closed form:", np.allclose(slope(log_penalty)[1], known, rtol=1e-5, atol=1e-10))

        adam, errors = optax.adam(0.2), []
        state = adam.init(log_penalty)
        for _ in range(ROUNDS):
            error, gradient = slope(log_penalty)
            errors.append(float(error))
            step, state = adam.update(gradient, state)
            log_penalty = optax.apply_updates(log_penalty, step)

    print(f"error on rows held out: {min(by_grid):.3f} with the best common penalty, {errors[-1]:.3f} with one each")
    heavy = np.asarray(log_penalty) > 0
    print("all but silenced:", ", ".join(np.array(table.feature_names)[heavy]))
    return gdjax.plot.loss_over_steps([errors], title="Mean square error on rows held out, round by round")


if __name__ == "__main__":
    run(main)
