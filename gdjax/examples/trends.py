"""A trend per country: life expectancy over the years, 142 regressions at once.

Gapminder's table has 12 years for each of 142 countries. Every country is a problem with its own data and its own two
weights; years are brought to standard units, so that both weights matter alike.

    $ python -m gdjax.examples.trends trends.png
    {'RAN_ALL_STEPS': 0, 'CONVERGED': 142, 'DIVERGED': 0}
    gained most, in years of life per year:
      Oman                   0.77
      Vietnam                0.67
      Saudi Arabia           0.65
    gained least:
      Rwanda                -0.05
      Zambia                -0.06
      Zimbabwe              -0.09
    as numpy.polyfit finds: True
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

import gdjax
from gdjax.examples import gapminder, run


def loss(w: Any, z: Any, t: Any) -> Any:
    return 0.5 * jnp.mean((t - (w["level"] + w["trend"] * z)) ** 2)


def main() -> Any:
    table = gapminder()
    names = list(dict.fromkeys(table["country"]))
    year, life = (table[name].reshape(len(names), -1) for name in ("year", "lifeExp"))
    centre, spread = year.mean(), year.std()

    solution = gdjax.minimize(
        loss,
        {"level": np.zeros(len(names)), "trend": np.zeros(len(names))},
        ((year - centre) / spread, life),
        learning_rate="auto",
        steps=100,
        stop=gdjax.stop.gradient_below(1e-10),
    )
    print(solution.summary())

    slope = np.asarray(solution.weights["trend"]) / spread
    order = np.argsort(-slope)
    for heading, chosen in (("gained most, in years of life per year", order[:3]), ("gained least", order[-3:])):
        print(f"{heading}:")
        for country in chosen:
            print(f"  {names[country]:20} {slope[country]:6.2f}")
    known = np.array([np.polyfit(x, t, 1)[0] for x, t in zip(year, life, strict=True)])
    print("as numpy.polyfit finds:", np.allclose(slope, known, rtol=0, atol=1e-9))

    intercept = np.asarray(solution.weights["level"]) - slope * centre
    return gdjax.plot.fits(
        year.ravel(),
        life.ravel(),
        slope[order],
        intercept[order],
        groups=np.repeat(np.argsort(order), year.shape[1]),
        labels=[names[country] for country in order],
        input_names=["year"],
        target_name="life expectancy",
        group_name="country",
    )


if __name__ == "__main__":
    run(main)
