"""What is done with the result of a sweep: picking, reducing, writing."""

import sys

import numpy as np
import pytest

import gdjax
from gdjax import Status, over
from gdjax.table import read_table

RATES = np.array([0.1, 0.2, 0.4, 0.6, 2.0])  # times the curvature, 4: the last two are beyond 2


def squared(w, x, t):
    return 0.5 * (t - x * w) ** 2


@pytest.fixture(scope="module")
def result():
    """Rates x targets x starts; at the largest rate float32 overflows within the steps."""
    axes = {"learning_rate": RATES, "t": [4.0, 8.0], "seed": [3, 5, 9]}
    return gdjax.sweep(squared, lambda seed: np.float32(seed), (np.float32(2.0),), over=axes, steps=30, record=10)


def test_picking_by_label(result):
    assert result.shape == (5, 2, 3)
    assert list(result.sel(t=8).axes) == ["learning_rate", "seed"]
    np.testing.assert_array_equal(result.sel(t=8).loss, result.loss[:, 1])
    np.testing.assert_array_equal(result.sel(seed=[9, 3]).loss, result.loss[:, :, [2, 0]])
    np.testing.assert_array_equal(result.sel(learning_rate=slice(0.2, 0.5)).loss, result.loss[1:3])
    np.testing.assert_array_equal(result.sel(learning_rate=slice(None, 0.3))["learning_rate"], RATES[:2])
    np.testing.assert_array_equal(result.sel(learning_rate=0.2, t=4.0, seed=5).weights, result.weights[1, 0, 1])
    np.testing.assert_array_equal(result.isel(seed=-1, t=slice(1)).steps, result.steps[:, :1, -1])
    np.testing.assert_array_equal(result.isel(seed=np.array([True, False, True])).loss, result.loss[:, :, [0, 2]])
    assert result.sel(t=8).record.shape == (5, 3, 4)
    assert result.sel(learning_rate=0.4 * (1 + 1e-9)).loss.shape == (2, 3)


def test_a_run_that_diverged_is_never_the_best(result):
    """Its last finite weights may have any loss, also a small one."""
    assert (result.status[4] == Status.DIVERGED).all()
    assert (result.status[:4] != Status.DIVERGED).all()
    loss = np.where(result.status == Status.DIVERGED, 0.0, result.loss)
    tempting = gdjax.SweepResult(result.axes, {**result.figures, "loss": loss}, {}, None, "cpu:0")
    best = tempting.best("learning_rate")
    assert best.shape == (2, 3)
    assert (best.status != Status.DIVERGED).all()
    assert np.isin(best.chosen["learning_rate"], RATES[:3]).all()
    np.testing.assert_array_equal(best.loss, result.loss[:3].min(axis=0))
    for spot in np.ndindex(2, 3):
        at = int(np.flatnonzero(best.chosen["learning_rate"][spot] == RATES)[0])
        assert best.weights[spot] == result.weights[(at, *spot)]
        np.testing.assert_array_equal(best.record[spot], result.record[(at, *spot)])


def test_where_all_diverged_there_is_no_best(result):
    none = result.isel(learning_rate=[4]).best("learning_rate", "seed")
    assert (none.status == Status.DIVERGED).all()
    for name in ("loss", "weights", "learning_rate", "seed"):
        assert np.isnan(none[name]).all()
    some = result.isel(learning_rate=[2, 4]).best("seed")
    assert np.isnan(some.loss[1]).all()
    assert np.isfinite(some.loss[0]).all()


def test_best_of_everything_and_one_after_the_other(result):
    whole, steps = result.best(), result.best("seed").best("t").best("learning_rate")
    assert set(whole.chosen) == set(steps.chosen) == {"learning_rate", "t", "seed"}
    assert whole.loss == steps.loss == result.loss[:4].min()
    spot = {name: value[()] for name, value in whole.chosen.items()}
    assert result.sel(**spot).loss == whole.loss
    fewest = result.best("learning_rate", by="gradient_norm")
    np.testing.assert_array_equal(fewest.gradient_norm, result.gradient_norm[:4].min(axis=0))


def test_reducing(result):
    mean = result.mean("seed", "t")
    assert list(mean.axes) == ["learning_rate"]
    np.testing.assert_allclose(mean.weights[:4], result.weights[:4].mean(axis=(1, 2)), rtol=1e-6)
    assert np.isnan(mean.loss[4])
    assert mean.status.tolist() == [Status.RAN_ALL_STEPS] * 4 + [Status.DIVERGED]
    np.testing.assert_allclose(result.std("seed").loss[:4], result.loss[:4].std(axis=2), rtol=1e-5)
    np.testing.assert_allclose(result.quantile(0.5, "seed").loss[:4], np.median(result.loss[:4], axis=2), rtol=1e-6)
    survivors = result.reduce(np.nanmean, "learning_rate")
    np.testing.assert_allclose(survivors.loss, result.loss[:4].mean(axis=0), rtol=1e-6)
    assert result.mean().weights.shape == ()


def test_statuses_from_good_to_bad():
    """One run that does not converge spoils the mean's status, one that diverges spoils it more."""
    axes = {"learning_rate": [0.25, 0.01, 2.0], "t": [4.0, 8.0]}
    result = gdjax.sweep(
        squared, np.float32(1), (np.float32(2),), over=axes, steps=40, stop=gdjax.stop.gradient_below(1e-3)
    )
    assert result.mean("t").status.tolist() == [Status.CONVERGED, Status.RAN_ALL_STEPS, Status.DIVERGED]
    assert result.isel(learning_rate=[0, 1]).mean().status == Status.RAN_ALL_STEPS
    assert result.mean().status == Status.DIVERGED
    assert result.summary()["DIVERGED"] == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.sel(rate=0.1), "there is no axis 'rate'; there are learning_rate, t, seed"),
        (lambda r: r.sel(learning_rate=0.3), "learning_rate has no 0.3; next to it is 0.2, 0.4. isel picks"),
        (lambda r: r.sel(seed=4), "seed has no 4; next to it is 3, 5"),
        (lambda r: r.sel(seed=slice(1, 2, 3)), "a lower and an upper end only"),
        (lambda r: r.best("seed").sel(seed=3), "no axis 'seed' .it was taken away.; there are learning_rate, t"),
        (
            lambda r: r.best(by="los"),
            "by='los' has not one number per run; choose by loss, gradient_norm, steps, weights",
        ),
        (lambda r: r.best(by="record"), "by='record' has not one number per run"),
        (lambda r: r.best("seed", "seed"), "'seed' is named twice"),
        (lambda r: r["lr"], "no 'lr'; there are loss, gradient_norm"),
        (lambda r: r.save("runs.txt"), "ending '.txt'"),
    ],
)
def test_what_is_not_there_is_named(result, call, message):
    with pytest.raises((ValueError, KeyError), match=message):
        call(result)


def test_labels_that_are_words_and_axes_of_several_names():
    rows = over.Axis([[4.0], [8.0]], labels=["low", "high"])
    draw = over.draws(3, learning_rate=[0.1, 0.2])
    result = gdjax.sweep(lambda w, x, t: squared(w, x, t[0]), 1.0, (2.0,), over={"draw": draw, "t": rows}, steps=2)
    assert result.sel(t="high").shape == (3,)
    assert result.best().chosen["t"] == "low"
    assert result.columns()["t"].tolist() == ["low", "high"] * 3
    assert set(result.columns()) >= {"draw", "learning_rate", "t"}
    with pytest.raises(ValueError, match="learning_rate is part of the axis 'draw'; pick by draw"):
        result.sel(learning_rate=0.1)
    with pytest.raises(ValueError, match="t has no 'middle'; it has low, high"):
        result.sel(t="middle")


def test_pictures_of_grids_and_of_draws(result):
    """A grid over the axis of floating point labels; draws as points over the parameters they set."""
    assert result.plot(over="learning_rate").axes[-1].get_xlabel() == "learning_rate"
    draw = over.draws(6, x=over.uniform(1, 2), learning_rate=over.log_uniform(0.01, 0.1))
    drawn = gdjax.sweep(squared, np.float32(1), over={"draw": draw, "t": [1.0, 2.0]}, steps=2)
    labels = {axes.get_xlabel() for axes in drawn.plot().axes} | {axes.get_ylabel() for axes in drawn.plot().axes}
    assert labels >= {"x", "learning_rate"}


@pytest.mark.parametrize("ending", ["csv", "parquet", "npz"])
def test_a_table_has_a_row_per_run(result, ending, tmp_path):
    path = tmp_path / f"runs.{ending}"
    result.save(path)
    names = ["learning_rate", "t", "seed", "loss", "gradient_norm", "steps", "status", "weights"]
    table = read_table(path, names)
    assert table.num_rows == 30
    read = {name: np.array(table[name].to_pylist(), np.float64) for name in names if name != "status"}
    for name, column in read.items():
        np.testing.assert_array_equal(column.astype(np.float32), result.columns()[name].astype(np.float32))
    spot = 1 * 6 + 1 * 3 + 2
    assert [read[name][spot] for name in names[:3]] == [0.2, 8.0, 9.0]
    assert np.float32(read["loss"][spot]) == result.sel(learning_rate=0.2, t=8, seed=9).loss
    assert set(table["status"].to_pylist()) == {"RAN_ALL_STEPS", "DIVERGED"}
    assert result.best("seed").to_arrow().column_names[:3] == ["learning_rate", "t", "seed"]


def test_columns_of_weights_that_are_trees():
    def loss(w, x):
        return ((x * w["a"]).sum() + w["b"][0, 1]) ** 2

    start = {"a": np.ones(2), "b": np.ones((1, 2))}
    result = gdjax.sweep(loss, start, (np.ones(2),), over={"learning_rate": [0.01, 0.02]}, steps=1)
    columns = result.columns()
    assert {"weights.a[0]", "weights.a[1]", "weights.b[0,0]", "weights.b[0,1]"} <= set(columns)
    np.testing.assert_array_equal(columns["weights.a[1]"], result.weights["a"][:, 1])
    assert "weights.a[0]" not in result.columns(weights=False)


def test_without_pyarrow_there_is_npz(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"gdjax\[cli\]"):
        result.save(tmp_path / "runs.csv")
    result.save(tmp_path / "runs.npz")
    with np.load(tmp_path / "runs.npz") as archive:
        np.testing.assert_array_equal(archive["loss"], result.loss.ravel())
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        result.to_pandas()
    assert [path.name for path in tmp_path.iterdir()] == ["runs.npz"]


def test_pandas(result):
    pytest.importorskip("pandas")
    assert result.to_pandas().groupby("learning_rate")["loss"].min().shape == (5,)
