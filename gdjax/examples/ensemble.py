"""An ensemble of small neural networks: a hundred opinions are better than one.

Each network learns life expectancy from income, population and continent (gapminder, 2007), on a resample of 60
countries of its own and from a random start of its own, with Adam from optax. On the 82 countries that none has seen,
the mean of the networks errs less than the networks do on average, by exactly as much as they differ from each other:
the ensemble's square error = the networks' mean square error - the variance between them (Krogh and Vedelsby, 1995).

    $ python -m gdjax.examples.ensemble ensemble.png
    {'RAN_ALL_STEPS': 100, 'CONVERGED': 0, 'DIVERGED': 0}
    error in years: a network 8.2, the ensemble 6.5
    better than it: 1 of 100 networks
    what it gains is their variance: True
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdjax
from gdjax.examples import gapminder, run

NETWORKS, HIDDEN, TRAINED = 100, 6, 60


def network(w: Any, x: Any) -> Any:
    """Life expectancy in standard units, for each row of `x`."""
    return jnp.tanh(x @ w["in"] + w["bias"][None]) @ w["out"] + w["level"]


def loss(w: Any, often: Any, x: Any, t: Any) -> Any:
    return jnp.sum(often * (network(w, x) - t) ** 2) / TRAINED


def main() -> Any:
    table = {name: column[gapminder()["year"] == 2007] for name, column in gapminder().items()}
    columns = [np.log10(table["gdpPercap"]), np.log10(table["pop"])]
    columns += [1.0 * (table["continent"] == name) for name in ("Africa", "Americas", "Asia", "Europe")]
    x = np.column_stack([(column - column.mean()) / column.std() for column in columns])
    spread = table["lifeExp"].std()
    t = (table["lifeExp"] - table["lifeExp"].mean()) / spread

    rng = np.random.default_rng(0)
    learn, unseen = np.split(rng.permutation(len(t)), [TRAINED])
    often = rng.multinomial(TRAINED, np.full(TRAINED, 1 / TRAINED), NETWORKS).astype(np.float64)
    shape = {"in": (x.shape[1], HIDDEN), "bias": (HIDDEN,), "out": (HIDDEN,), "level": ()}
    solution = gdjax.minimize(
        loss,
        gdjax.random_weights(0, shape, NETWORKS, scale=0.7, dtype=np.float64),
        (often, x[learn], t[learn]),
        in_axes=(0, None, None),
        optimizer=optax.adam(0.02),
        steps=200,
    )
    print(solution.summary())

    with jax.enable_x64(True):
        said = np.asarray(jax.vmap(network, in_axes=(0, None))(solution.weights, x[unseen])) * spread
    truth = t[unseen] * spread
    alone = np.mean((said - truth) ** 2, axis=1)
    together = np.mean((said.mean(axis=0) - truth) ** 2)
    print(f"error in years: a network {np.sqrt(alone.mean()):.1f}, the ensemble {np.sqrt(together):.1f}")
    print(f"better than it: {np.sum(alone < together)} of {NETWORKS} networks")
    print("what it gains is their variance:", np.allclose(alone.mean() - together, said.var(axis=0).mean()))
    mean, names = table["lifeExp"].mean(), ["life expectancy that the ensemble predicts"]
    return gdjax.plot.fits(mean + said.mean(axis=0), mean + truth, [1.0], input_names=names, target_name="observed")


if __name__ == "__main__":
    run(main)
