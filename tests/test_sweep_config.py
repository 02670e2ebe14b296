"""`gdjax sweep` as a user meets it: the file, its mistakes, and what comes out."""

import functools
import re
from importlib import resources

import numpy as np
import pytest

from gdjax import over
from gdjax.sweep_config import ConfigError, read_config
from gdjax.table import read_table
from tests import calling

GAPMINDER = resources.files("gdjax") / "data" / "gapminder.csv"

PLAIN = """
[data]
table = "TABLE"
inputs = ["year", "gdpPercap"]
target = "lifeExp"

[model]
loss = "squared"
l2 = 0.05

[over]
learning_rate = { log = [0.01, 4.0], count = 5 }
fold = 4

[run]
steps = 2000

[output]
table = "runs.csv"
"""


@pytest.fixture
def written(tmp_path):
    """The file above, changed by replacements `(old, new)`, beside a copy of the table."""

    def write(*changes, name="sweep.toml"):
        text = PLAIN.replace("TABLE", str(GAPMINDER))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


call = functools.partial(calling.call, "sweep")


def test_folds_of_a_ridge_regression_against_the_closed_form(written, tmp_path):
    result = call(written(), "--plot", tmp_path / "runs.png")
    assert "20 runs:" in result.stdout
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    runs = read_table(tmp_path / "runs.csv", ["learning_rate", "fold", "status", "held_out", "weights.year"])
    rates, numbers = np.array(runs["learning_rate"].to_pylist(), float), np.array(runs["fold"].to_pylist(), int)
    held_out = np.array(runs["held_out"].to_pylist(), float)
    slopes = np.array(runs["weights.year"].to_pylist(), float)
    status = np.array(runs["status"].to_pylist())
    np.testing.assert_allclose(np.unique(rates), np.geomspace(0.01, 4, 5))

    table = read_table(str(GAPMINDER), ["year", "gdpPercap", "lifeExp"])
    x = np.column_stack([np.array(table[name].to_pylist(), float) for name in ("year", "gdpPercap")])
    t = np.array(table["lifeExp"].to_pylist(), float)
    z, u = (x - x.mean(axis=0)) / x.std(axis=0), (t - t.mean()) / t.std()
    z = np.column_stack([z, np.ones(len(z))])
    for fold, rows in enumerate(over.folds(len(t), 4)):
        share = rows / rows.sum()
        answer = np.linalg.solve((z.T * share) @ z + np.diag([0.05, 0.05, 0]), (z.T * share) @ u)
        mine = (numbers == fold) & (status == "CONVERGED")
        assert mine.sum() >= 3
        np.testing.assert_allclose(slopes[mine], answer[0] * t.std() / x[:, 0].std(), rtol=1e-7)
        error = 0.5 * ((t - t.mean() - t.std() * (z @ answer)) ** 2)[rows == 0].mean()
        np.testing.assert_allclose(held_out[mine], error, rtol=1e-7)
    assert (status[rates > 3] == "DIVERGED").all()
    best = re.search(r"Best: held_out ([\d.]+), the mean over 4 folds, at learning_rate = ([\d.]+)\.", result.stdout)
    assert best is not None
    assert float(best[2]) < 3


def test_check_runs_nothing(written, tmp_path):
    path = written()
    assert "is fine: 5 learning_rate x 4 fold = 20 runs." in call(path, "--check").stdout
    assert [found.name for found in tmp_path.iterdir()] == ["sweep.toml"]


def test_optimizer_draws_points_seeds_and_bootstrap(written, tmp_path):
    path = written(
        ("learning_rate = { log = [0.01, 4.0], count = 5 }", "seed = 2"),
        ("fold = 4", "bootstrap = 3"),
        ("l2 = 0.05\n", ""),
        (
            "[run]",
            "[draw]\ncount = 2\nlearning_rate = { log = [0.01, 0.1] }\nmomentum = [0.5, 0.9]\n\n[[point]]\nl2 = 0.1",
        ),
        ("steps = 2000", '\n[run]\nsteps = 50\noptimizer = "sgd"\nhyperparams = { nesterov = true }'),
    )
    call(path, "--out", tmp_path / "other.parquet")
    names = ["draw", "learning_rate", "momentum", "point", "l2", "seed", "bootstrap", "held_out"]
    runs = read_table(tmp_path / "other.parquet", names)
    assert runs.num_rows == 2 * 1 * 2 * 3
    assert set(runs["momentum"].to_pylist()) <= {0.5, 0.9}
    assert set(runs["l2"].to_pylist()) == {0.1}
    assert not (tmp_path / "runs.csv").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("[over]", "[ovr]")], "the file has no section 'ovr'; did you mean 'over'?"),
        ([("steps =", "step =")], r"\[run\] has no key 'step'; did you mean 'steps'?"),
        ([("learning_rate =", "learning_rat =")], r"\[over\] has no key 'learning_rat'; did you mean 'learning_rate'?"),
        ([("log =", "logs =")], r"\[over\] learning_rate: a range has no key 'logs'; did you mean 'log'?"),
        ([("steps = 2000", 'steps = "many"')], r"\[run\] steps: it must be a whole number of at least 1, got 'many'"),
        ([("steps = 2000", "steps = 0")], r"\[run\] steps: it must be a whole number of at least 1, got 0"),
        ([("l2 = 0.05", "l2 = true")], r"\[model\] l2: it must be a number, 0 or more, got true"),
        ([('"year", "gdpPercap"', "1")], r"\[data\] inputs: it must be a list of column names"),
        ([("fold = 4", "fold = [4]")], r"\[over\] fold: it must be a whole number"),
        ([("fold = 4", "fold = 1")], r"\[over\] fold = 1; the table's 1704 rows can be"),
        ([("fold = 4", "fold = 4\nbootstrap = 5")], "has fold and bootstrap"),
        ([("count = 5", "count = 0")], r"\[over\] learning_rate: count: it must be a whole number"),
        ([("[0.01, 4.0]", "[0.0, 4.0]")], "give two positive bounds, low first"),
        ([("[0.01, 4.0]", "[4.0, 1.0]")], "two positive bounds, low first"),
        ([("{ log = [0.01, 4.0], count = 5 }", "0.1")], "it must be a list of numbers or a range such as"),
        ([("{ log = [0.01, 4.0], count = 5 }", "[]")], "a list must hold numbers"),
        ([("fold = 4", "l2 = [0.1]")], r"\[model\] sets l2, which is swept"),
        ([("steps = 2000", "learning_rate = 0.1")], r"\[run\] sets learning_rate, which is swept"),
        ([("steps = 2000", 'optimizer = "adm"')], "optax has no optimizer 'adm'; did you mean 'adam'?"),
        (
            [("steps = 2000", 'optimizer = "adam"\nhyperparams = { esp = 0.1 }')],
            r"\[run\] hyperparams has no key 'esp'; did you mean 'eps'",
        ),
        (
            [("learning_rate = { log = [0.01, 4.0], count = 5 }", ""), ("steps = 2000", 'optimizer = "adam"')],
            "optimizer adam has no learning rate of its own",
        ),
        (
            [("learning_rate = { log = [0.01, 4.0], count = 5 }\nfold = 4", "")],
            "nothing is swept; give .over. at least one list",
        ),
        ([('loss = "squared"', 'loss = "squard"')], "no loss 'squard'"),
        ([('"lifeExp"', '"lifeexp"')], "has no column 'lifeexp'; did you mean 'lifeExp'"),
        ([('"lifeExp"', '"year"')], r"\[data\] names a column twice"),
        ([("target", "targets")], r"\[data\] has no key 'targets'; did you mean 'target'"),
        ([('target = "lifeExp"', "")], r"\[data\] needs target"),
        ([("runs.csv", "runs.txt")], "has the ending '.txt'"),
        ([("runs.csv", "nowhere/runs.csv")], "there is no folder"),
        ([("[model]", "[model")], "sweep.toml is not TOML: "),
        ([('"squared"', '"poisson"'), ("learning_rate = { log = [0.01, 4.0], count = 5 }", "")], "give learning_rate"),
    ],
)
def test_mistakes_are_named_before_anything_runs(written, tmp_path, changes, message):
    result = call(written(*changes), status=2)
    assert re.search(message, result.stderr), result.stderr
    assert [found.name for found in tmp_path.iterdir()] == ["sweep.toml"]


def test_a_file_that_is_not_there(tmp_path):
    assert "there is no file" in call(tmp_path / "sweep.toml", status=2).stderr
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path)


def test_every_run_diverged(written):
    path = written(("{ log = [0.01, 4.0], count = 5 }", "[50.0]"), ("fold = 4", ""))
    result = call(path, status=1)
    assert "1 runs: 1 diverged." in result.stdout
    assert "There is no best run" in result.stderr
