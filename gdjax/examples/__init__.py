"""Five worked examples on real data, each a file to read and to run, as in `python -m gdjax.examples.trends`.

`trends` (a trend per country), `bootstrap` (1,000 regressions, confidence intervals), `rate_sweep` (final loss over the
learning rate), `ensemble` (small neural networks) and `hyperparameters` (penalties learned by gradient). Each prints
what its docstring shows and checks itself against an answer that does not come from gdjax; with a file name, such as
`python -m gdjax.examples.trends trends.png`, it draws its picture.
"""

import csv
import io
import sys
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np


def run(main: Callable[[], Any]) -> None:
    """Run an example; write the figure that it returns to the file named on the command line."""
    from gdjax.plot import save

    figure = main()
    for path in sys.argv[1:2]:
        save(figure, path)


def gapminder() -> dict[str, np.ndarray]:
    """The columns of the table that comes with gdjax, sorted by country and year."""
    text = (files("gdjax") / "data" / "gapminder.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    words = ("country", "continent")
    return {name: np.array([row[name] if name in words else float(row[name]) for row in rows]) for name in rows[0]}


def load(name: str) -> Any:
    """A data set of scikit-learn's, such as "diabetes"."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"this example reads the data set {name!r} that comes with scikit-learn: pip install scikit-learn"
        ) from None
    return getattr(datasets, f"load_{name}")()
