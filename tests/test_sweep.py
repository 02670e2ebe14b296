"""Sweeps against scikit-learn, closed forms and loops over `minimize`."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import compilations
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LogisticRegression

import gdjax
from gdjax import Status, over, stop

PENALTY = 0.1
X, Y = load_breast_cancer(return_X_y=True)
X, Y = (X - X.mean(axis=0)) / X.std(axis=0), Y.astype(np.float64)


def cross_entropy(z, t):
    return jnp.log1p(jnp.exp(-jnp.abs(z))) + jnp.maximum(z, 0.0) - t * z


def logistic(w, x, t, fold):
    """Mean over a fold's rows, with an L2 penalty that leaves the intercept out."""
    z = x @ w["slopes"] + w["bias"]
    return jnp.sum(fold * cross_entropy(z, t)) / jnp.sum(fold) + 0.5 * PENALTY * jnp.sum(w["slopes"] ** 2)


def held_out(w, x, t, fold):
    """Mean loss over the rows that a fold leaves out."""
    out = 1 - fold
    return jnp.sum(out * cross_entropy(x @ w["slopes"] + w["bias"], t)) / jnp.sum(out)


def random_start(seed):
    rng = np.random.default_rng(seed)
    return {"slopes": rng.normal(size=X.shape[1]), "bias": rng.normal()}


@pytest.fixture(scope="module")
def grid():
    """Rates x starts x folds of logistic regression on the breast cancer data, in one call."""
    return gdjax.sweep(
        logistic,
        random_start,
        (X, Y),
        over={"learning_rate": [0.2, 0.4, 0.5], "seed": range(2), "fold": over.folds(len(X), 3, seed=1)},
        steps=3000,
        stop=stop.gradient_below(2e-8),
        measures={"held_out": held_out},
    )


def test_every_fold_has_the_optimum_that_scikit_learn_finds(grid):
    """Issue 7: the same optimum per fold to 1e-6, in float64, whatever the start and the rate."""
    assert grid.shape == (3, 2, 3)
    assert (grid.status == Status.CONVERGED).all()
    for number, fold in enumerate(over.folds(len(X), 3, seed=1)):
        rows = fold > 0
        model = LogisticRegression(C=1 / (PENALTY * rows.sum()), tol=1e-13, solver="newton-cholesky")
        model.fit(X[rows], Y[rows])
        mine = grid.sel(fold=number).weights
        np.testing.assert_allclose(mine["slopes"], np.broadcast_to(model.coef_, (3, 2, 30)), rtol=0, atol=1e-6)
        np.testing.assert_allclose(mine["bias"], model.intercept_[0], rtol=0, atol=1e-6)
        probability = model.predict_proba(X[~rows])[np.arange((~rows).sum()), Y[~rows].astype(int)]
        expected = -np.log(probability).mean()
        np.testing.assert_allclose(grid.sel(fold=number)["held_out"], expected, rtol=1e-5)


def test_a_grid_is_chosen_from_by_name(grid):
    over_folds = grid.best("seed").mean("fold")
    assert list(over_folds.axes) == ["learning_rate"]
    np.testing.assert_allclose(over_folds["held_out"], grid["held_out"].min(axis=1).mean(axis=1), rtol=1e-6)
    best = over_folds.best("learning_rate", by="held_out")
    assert best.chosen["learning_rate"] == [0.2, 0.4, 0.5][int(np.argmin(over_folds["held_out"]))]
    assert best.loss.shape == ()
    assert best.weights["slopes"].shape == (30,)


DIABETES, TARGET = load_diabetes(return_X_y=True)
DIABETES = (DIABETES - DIABETES.mean(axis=0)) / DIABETES.std(axis=0)
TARGET = (TARGET - TARGET.mean()) / TARGET.std()


def ridge(w, x, t, resample):
    return 0.5 * jnp.sum(resample * (x @ w - t) ** 2) / len(t) + 0.5 * PENALTY * jnp.sum(w**2)


@pytest.mark.parametrize("resamples", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_bootstrap_of_ridge_regressions(resamples):
    """Issue 7: the closed form to 1e-10, nothing converged beyond r λmax = 2, everything below 1.9, and what
    overflows has diverged: the error along the steepest direction is multiplied by 1 - r λmax each step."""
    rows, steps = len(DIABETES), 4000
    weights = over.bootstrap(rows, resamples)
    hessians = np.einsum("bi,ip,iq->bpq", weights, DIABETES, DIABETES, optimize=True) / rows
    hessians += PENALTY * np.eye(DIABETES.shape[1])
    answers = np.linalg.solve(hessians, (weights * TARGET @ DIABETES / rows)[..., None])[..., 0]
    curvatures, directions = np.linalg.eigh(hessians)
    rates = np.array([0.3, 1.0, 1.85, 2.05, 2.3, 8.0]) / np.median(curvatures[:, -1])
    result = gdjax.sweep(
        ridge,
        np.zeros(DIABETES.shape[1]),
        (DIABETES, TARGET),
        over={"resample": weights, "learning_rate": rates},
        steps=steps,
        stop=stop.gradient_below(1e-12),
    )
    product = curvatures[:, -1:] * rates
    converged, diverged = result.status == Status.CONVERGED, result.status == Status.DIVERGED
    assert converged[product < 1.9].all()
    assert not converged[product > 2].any()
    assert (product < 1.9).any()
    assert (product > 2).any()
    error = np.abs(result.weights - answers[:, None])
    assert error[converged].max() < 1e-10
    # the exponent of the weights after all steps, and of the loss, their square
    along = np.log10(np.abs(np.einsum("bp,bp->b", directions[..., -1], answers)))[:, None]
    growth = along + steps * np.log10(np.maximum(np.abs(1 - product), 1e-300))
    assert diverged[growth > 310].all()
    assert (growth > 310).any()
    assert not diverged[growth < 150].any()
    assert (result.best("learning_rate").status == Status.CONVERGED).all()
    assert np.isfinite(result.weights[diverged]).all()


def plane(w, x, t, rows, pull):
    return 0.5 * jnp.sum(rows * (x @ w - t) ** 2) + pull * jnp.sum(jnp.abs(w))


@functools.cache
def rows_of(count):
    rng = np.random.default_rng(count)
    x = rng.normal(size=(count, 3))
    return x, x @ rng.normal(size=3), rng.uniform(0, 2 / count, size=(4, count))


@pytest.mark.parametrize(
    ("count", "rule", "dtype"),
    [
        pytest.param(20, None, np.float64, id="own row weights, all steps, float64"),
        pytest.param(20, stop.gradient_below(1e-3), np.float32, id="own row weights, stop rule, float32"),
        pytest.param(400, None, np.float32, id="looked up, all steps, float32"),
        pytest.param(400, stop.gradient_below(1e-3), np.float64, id="looked up, stop rule, float64"),
    ],
)
def test_a_sweep_is_the_loop_over_its_runs(count, rule, dtype):
    """Rates, starts, data sets and a parameter of the loss, whichever way they are handed over."""
    x, t, rows = (array.astype(dtype) for array in rows_of(count))

    def start(seed):
        return np.full(3, 0.1 * seed, dtype)

    rates, pulls = np.array([0.05, 0.3]), [0.0, 0.01]
    axes = {"learning_rate": rates, "rows": rows.astype(np.float64), "seed": [3, 1], "pull": pulls}
    result = gdjax.sweep(plane, start, (x, t), over=axes, steps=60, stop=rule, record=20)
    assert result.weights.dtype == result.loss.dtype == dtype
    assert result.record.shape == (2, 4, 2, 2, 4)
    assert result.record_steps.tolist() == [0, 20, 40, 60]
    for spot in np.ndindex(2, 4, 2, 2):
        rate, row, seed, pull = (axes[name][at] for name, at in zip(axes, spot, strict=True))
        one = gdjax.minimize(
            plane,
            start(seed)[None],
            (x, t, row.astype(dtype), dtype(pull)),
            in_axes=None,
            learning_rate=rate,
            steps=60,
            stop=rule,
            record=20,
        )
        tolerance = {"rtol": 1e-12 if dtype == np.float64 else 2e-4, "atol": 1e-14 if dtype == np.float64 else 1e-6}
        np.testing.assert_allclose(result.weights[spot], one.weights[0], **tolerance)
        np.testing.assert_allclose(result.loss[spot], one.loss[0], **tolerance)
        np.testing.assert_allclose(result.record[spot], one.record[0], **tolerance)
        assert result.steps[spot] == one.steps[0]
        assert result.status[spot] == one.status[0]


def test_data_sets_of_many_runs_are_gone_through_one_by_one():
    """Matrices that 32 runs and more share are multiplied with all their weights at once, by one compiled program."""
    rng = np.random.default_rng(0)
    sets = {"x": rng.normal(size=(3, 120, 4)), "t": rng.normal(size=(3, 120))}

    def loss(w, site):
        return 0.5 * jnp.mean((site["x"] @ w - site["t"]) ** 2)

    def run(factor):
        axes = {
            "learning_rate": factor * np.geomspace(0.01, 1, 40),
            "site": over.Axis(sets, labels=["north", "east", "west"]),
        }
        return gdjax.sweep(
            loss, np.zeros(4), over=axes, steps=300, measures={"twice": lambda w, site: 2 * loss(w, site)}
        )

    result = run(1.0)
    with compilations() as compiled:
        run(0.9)
    assert compiled == [] or all("loss" not in str(name) for name in compiled)
    assert result.shape == (40, 3)
    for number, name in enumerate(["north", "east", "west"]):
        answer = np.linalg.lstsq(sets["x"][number], sets["t"][number], rcond=None)[0]
        np.testing.assert_allclose(result.sel(site=name, learning_rate=1.0).weights, answer, rtol=1e-9)
    np.testing.assert_allclose(result["twice"], 2 * result.loss, rtol=1e-12)


def test_hyperparameters_points_and_draws():
    x, t, rows = rows_of(20)

    def one(pull=0.0, **hyper):
        data = (x, t, rows[0], np.float64(pull))
        solution = gdjax.minimize(
            plane, np.zeros((1, 3)), data, in_axes=None, optimizer=optax.sgd, hyperparams=hyper, steps=50
        )
        return np.asarray(solution.weights)[0]

    options = {"optimizer": optax.sgd, "hyperparams": {"nesterov": True}, "steps": 50}

    def fixed(w, x, t, pull=0.0):
        return plane(w, x, t, rows[0], jnp.asarray(pull, np.float64))

    listed = [{"learning_rate": 0.1, "momentum": 0.5}, {"learning_rate": 0.01, "momentum": 0.9}]
    result = gdjax.sweep(fixed, np.zeros(3), (x, t), over=listed, **options)
    for at, point in enumerate(listed):
        np.testing.assert_allclose(result.sel(point=at).weights, one(nesterov=True, **point), rtol=1e-9)
    assert result.columns()["momentum"].tolist() == [0.5, 0.9]

    draw = over.draws(5, seed=3, learning_rate=over.log_uniform(1e-3, 1.0), momentum=over.uniform(0.5, 0.9))
    result = gdjax.sweep(fixed, np.zeros(3), (x, t), over={"draw": draw, "pull": [0.0, 0.1]}, **options)
    assert result.shape == (5, 2)
    rates, decays = draw.values["learning_rate"], draw.values["momentum"]
    assert ((rates >= 1e-3) & (rates <= 1)).all()
    assert ((decays >= 0.5) & (decays <= 0.9)).all()
    expected = one(nesterov=True, pull=0.1, learning_rate=rates[4], momentum=decays[4])
    np.testing.assert_allclose(result.isel(draw=4, pull=1).weights, expected, rtol=1e-9)
    best = result.best()
    assert set(best.chosen) == {"draw", "learning_rate", "momentum", "pull"}
    assert best.chosen["learning_rate"] == rates[int(best.chosen["draw"])]


def test_more_draws_begin_with_the_same():
    few, many = (over.draws(n, seed=1, a=over.uniform(0, 1), b=[1, 2, 3]).values for n in (4, 9))
    for name in ("a", "b"):
        assert few[name].tolist() == many[name][:4].tolist()


def test_folds_and_resamples():
    folds = over.folds(23, 4, seed=5)
    assert folds.shape == (4, 23)
    assert set(np.unique(folds)) == {0.0, 1.0}
    assert ((1 - folds).sum(axis=0) == 1).all()
    assert sorted((1 - folds).sum(axis=1)) == [5, 6, 6, 6]
    resamples = over.bootstrap(1000, 50, seed=2)
    assert (resamples.sum(axis=1) == 1000).all()
    assert (resamples == 0).mean() == pytest.approx((1 - 1 / 1000) ** 1000, abs=0.01)
    np.testing.assert_array_equal(over.bootstrap(1000, 3, seed=2), resamples[:3])


MEMORY = """
import json, tracemalloc
import numpy as np, jax.numpy as jnp, gdjax
rows = 4096
rng = np.random.default_rng(0)
x, t = rng.normal(size=(rows, 8)).astype(np.float32), rng.normal(size=rows).astype(np.float32)
resamples = gdjax.over.bootstrap(rows, 100).astype(np.float32)

def loss(w, x, t, resample):
    return 0.5 * jnp.mean(resample * (x @ w - t) ** 2)

def run(count):
    axes = {"learning_rate": np.geomspace(1e-3, 0.1, count), "resample": resamples}
    gdjax.sweep(loss, np.zeros(8, np.float32), (x, t), over=axes, steps=2, stop=gdjax.stop.gradient_below(1e-9))

run(2)
tracemalloc.start()
run(60)
print(json.dumps([tracemalloc.get_traced_memory()[1], resamples.nbytes, 6000 * rows * 4]))
"""


def test_shared_data_and_row_weights_are_not_copied():
    """6,000 runs on one data set with 100 resamples; row weights of their own would take 98 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, table, copies = json.loads(done.stdout)
    assert peak < 2 * table + 6000 * 1800 < copies / 6


def test_what_is_laid_out_run_by_run_goes_slab_by_slab(monkeypatch):
    """Small row weights are given to each run: with little memory set aside, in several runs of one program."""
    from gdjax import sweep_places

    x, t, rows = rows_of(20)
    axes = {"pull": np.linspace(0, 0.1, 300), "rows": rows}
    counts = []
    options = {"learning_rate": 0.1, "steps": 30, "stop": stop.gradient_below(1e-4)}
    whole = gdjax.sweep(plane, np.zeros(3), (x, t), over=axes, **options)
    monkeypatch.setattr(sweep_places, "OWN_BYTES", 1)
    pieces = gdjax.sweep(plane, np.zeros(3), (x, t), over=axes, callback=counts.append, **options)
    np.testing.assert_array_equal(whole.weights, pieces.weights)
    np.testing.assert_array_equal(whole.steps, pieces.steps)
    assert {count.problems for count in counts} == {1200}
    assert counts[-1].done == 1200
    assert counts[-1].converged == (pieces.status == Status.CONVERGED).sum()
    assert [count.done for count in counts] == sorted(count.done for count in counts)


def squared(w, x, t, scale=1.0):
    return 0.5 * scale * (t - x * w) ** 2


def plain(axes, weights=1.0, data=(2.0, 4.0), loss=squared, **options):
    options = {"steps": 5, **options}
    if isinstance(axes, dict) and "learning_rate" not in axes and "optimizer" not in options:
        options.setdefault("learning_rate", 0.1)
    return gdjax.sweep(loss, weights, data, over=axes, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plain({"scael": [1.0]}), "over has 'scael', which nothing takes; did you mean 'scale'"),
        (lambda: plain({"seed": [1]}), "over has 'seed', which nothing takes.*lambda seed"),
        (
            lambda: plain({"learning_rate": [0.1]}, optimizer=optax.adam(0.1)),
            "has its rate: pass the function",
        ),
        (
            lambda: plain({"moment": [0.9]}, optimizer=optax.sgd, hyperparams={"learning_rate": 0.1}),
            "did you mean 'momentum'",
        ),
        (lambda: plain({"learning_rate": [0.1]}, learning_rate=0.1), "learning_rate is given for all runs and is an"),
        (lambda: plain({"learning_rate": [0.1]}, data=(2.0,)), "loss needs 't'; give it in data"),
        (lambda: plain({"scale": [1.0]}, data=(2.0, 4.0, 1.0)), "data has 3 entries; .* loss takes x, t"),
        (lambda: plain({"learning_rate": []}), r"over\['learning_rate'\]: it has no values"),
        (lambda: plain({"learning_rate": 0.1}), r"over\['learning_rate'\]: it is 0.1, one value"),
        (lambda: plain({"learning_rate": [0.1, -1.0]}), r"learning_rate\[1\] is -1.0"),
        (lambda: plain({}), "over has no axis"),
        (lambda: plain(0.1), "over is a float"),
        (lambda: plain([{"scale": 1.0}, {"t": 1.0}]), r"point 1 is \['t'\], point 0 has \['scale'\]"),
        (lambda: plain({"scale": [[1.0], [1.0, 2.0]]}), "values have the shapes"),
        (
            lambda: plain({"scale": [1.0], "draw": over.draws(2, scale=over.uniform(0, 1))}),
            "over sets 'scale' twice, by 'scale' and by 'draw'",
        ),
        (lambda: plain({"seed": [1, 2]}, weights=lambda seed: np.zeros(seed)), "weights gave .*1.* but .*2.* for"),
        (lambda: plain({"loss": [1.0]}, loss=lambda w, x, t, loss: loss * w), "which is the name of a figure"),
        (lambda: plain({"scale": [1.0]}, measures={"scale": squared}), "measures has 'scale', which is the name of"),
        (
            lambda: plain({"scale": [1.0]}, measures={"other": lambda w, scales: w}),
            r"measures\['other'\] asks for 'scales', which is no argument of the loss and no axis; did you mean",
        ),
        (lambda: plain({"scale": [1.0]}, data=[2.0, 4.0]), "data is a list; pass a tuple"),
        (lambda: plain({"scale": [1.0]}, loss="squared"), "loss is a str"),
        (lambda: plain({"scale": over.Axis([1.0, 2.0], labels=["one"])}), "labels has shape"),
        (lambda: over.folds(10, 11), "11 folds of 10 rows"),
        (lambda: over.log_uniform(0.0, 1.0), "give two positive bounds"),
        (lambda: over.draws(0, a=[1]), "count is 0"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_compiled(call, message):
    with compilations() as compiled, pytest.raises((ValueError, TypeError), match=message):
        call()
    assert compiled == []


def test_python_numbers_take_the_dtype_of_the_arrays_beside_them():
    result = gdjax.sweep(
        lambda w, x: jnp.sum((x * w["a"] - w["b"]) ** 2),
        lambda seed: {"a": float(seed), "b": np.ones(2)},
        (np.ones(2),),
        over={"seed": [1, 2], "learning_rate": [0.1]},
        steps=3,
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(result.weights)} == {np.dtype("float64")}
