"""Groups in a stream: a table gone through in parts gives what `gdjax solve` gives of it in memory."""

import functools

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from gdjax import regroup
from gdjax.regression import fit
from gdjax.streamed_fit import open_fit_job
from gdjax.table import label_column
from tests import calling
from tests.streaming import tidy


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Passes on disk with little in memory."""
    monkeypatch.setattr(regroup, "PARTITION_ROWS", 300)
    monkeypatch.setattr(regroup, "BATCH_ROWS", 100)


def arranged(kind):
    """A tidy table whose groups lie in order, together, or anywhere."""
    held = pa.table(tidy())
    if kind == "ascending":
        return held.sort_by("label")
    if kind == "together":
        firsts = {label: number for number, label in enumerate(dict.fromkeys(held["label"].to_pylist()))}
        order = np.argsort([firsts[label] for label in held["label"].to_pylist()], kind="stable")
        return held.take(pa.array(order))
    if kind == "numbers":
        numbers = [int(label.removeprefix("group ")) - 7 for label in held["label"].to_pylist()]
        return held.set_column(0, "label", pa.array(numbers))
    return held


def in_memory(table, **options):
    labels, codes = label_column(table, "label")
    x = np.column_stack([table["a"].to_numpy(), table["b"].to_numpy()])
    return labels, fit(x, table["y"].to_numpy(), codes, names=["a", "b"], **options)


def streamed(path, sink, **options):
    job = open_fit_job(path, sink, group="label", names=["a", "b"], target="y", part_rows=150, **options)
    job.run()
    totals = job.finish()
    return job, totals, pa.concat_tables(job.sink.tables(job.count))


PLAIN, OTHER = {"steps": 40}, {"steps": 30, "seed": 3, "dtype": "float32", "intercept": False}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("ascending", PLAIN), ("together", PLAIN), ("anywhere", PLAIN), ("numbers", OTHER), ("anywhere", OTHER)],
)
def test_the_bits_of_the_table_in_memory(tmp_path, kind, options):
    table, path = arranged(kind), tmp_path / "table.parquet"
    parquet.write_table(table, path, row_group_size=77)
    labels, wanted = in_memory(table, **options)
    job, totals, found = streamed(path, tmp_path / "out", **options)
    assert job.count > 3
    assert job.sorted_on_disk == (kind in ("anywhere", "numbers"))
    assert totals.problems == len(labels) == 60
    assert found["label"].to_pylist() == labels.to_pylist()
    for name, column in [("a", wanted.weights[:, 0]), ("b", wanted.weights[:, 1]), ("loss", wanted.loss)]:
        np.testing.assert_array_equal(found[name].to_numpy(), column, name)
    if wanted.intercept is not None:
        np.testing.assert_array_equal(found["intercept"].to_numpy(), wanted.intercept)
    np.testing.assert_array_equal(found["gradient_norm"].to_numpy(), wanted.gradient_norm)
    np.testing.assert_array_equal(found["steps"].to_numpy(), wanted.steps)
    assert found["note"].to_pylist() == wanted.notes.tolist()
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if "part" not in path.name) == ["_manifest.json"]


def test_a_group_follows_from_its_own_rows_alone():
    """A long group must not change how the short ones are summed."""
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], [9, 12, 700])
    x = rng.normal(size=(len(codes), 2)) * [1, 50]
    y = x @ [2, 0.1] + rng.normal(size=len(codes))
    together = fit(x, y, codes, steps=30, tol=0)
    for number in (0, 1):
        rows = codes == number
        alone = fit(x[rows], y[rows], steps=30, tol=0)
        np.testing.assert_array_equal(alone.weights[0], together.weights[number])
        np.testing.assert_array_equal(alone.loss[0], together.loss[number])


call = functools.partial(calling.call, "solve")

COLUMNS = ["--group", "label", "--inputs", "a,b", "--target", "y", "--steps", "50"]


@pytest.mark.parametrize("ending", ["csv", "npz", "parquet"])
def test_the_command_writes_the_same_file(tmp_path, ending):
    table, path = arranged("numbers"), tmp_path / f"table.{ending}"
    if ending == "csv":
        csv.write_csv(table, path)
    elif ending == "npz":
        np.savez(path, **{name: table[name].to_numpy() for name in table.column_names})
    else:
        parquet.write_table(table, path)
    plain = call(path, *COLUMNS, "--out", tmp_path / "plain.csv")
    other = call(path, *COLUMNS, "--out", tmp_path / "streamed.csv", "--stream")
    assert (tmp_path / "streamed.csv").read_bytes() == (tmp_path / "plain.csv").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3
    shown = plain.stdout.partition("rows read")[0]
    assert other.stdout.startswith(shown.rpartition("\n")[0])
    assert "do not lie together: sorting" in other.stderr.replace("\n", " ")


def test_a_folder_is_streamed_in_parts_and_gone_on_with(tmp_path):
    (tmp_path / "table").mkdir()
    table = arranged("ascending")
    parquet.write_table(table.slice(0, 500), tmp_path / "table" / "1.parquet")
    parquet.write_table(table.slice(500), tmp_path / "table" / "2.parquet")
    out = tmp_path / "models"
    call(tmp_path / "table", *COLUMNS, "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "part-00000000.parquet").unlink()
    call(tmp_path / "table", *COLUMNS, "--out", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    refused = call(tmp_path / "table", *COLUMNS, "--loss", "absolute", "--out", out, status=2)
    assert "holds results of another run" in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda t: t.set_column(3, "y", pa.array([1.0] * 800 + [None] * (len(t) - 800))),
            [],
            "row 801: the",
        ),
        (
            lambda t: t.set_column(0, "label", pa.array([*t["label"].to_pylist()[:-1], None])),
            [],
            "the label is missing",
        ),
        (lambda t: t, ["--plot", "a.png"], "--plot needs the table in memory"),
        (lambda t: t.drop_columns(["a"]), [], "no column 'a'"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, change, options, message):
    path = tmp_path / "table.parquet"
    parquet.write_table(change(arranged("ascending")), path)
    told = call(path, *COLUMNS, "--out", tmp_path / "out.csv", "--stream", *options, status=2)
    assert message in " ".join(told.stderr.split())


def test_a_stream_needs_a_place(tmp_path):
    parquet.write_table(arranged("ascending"), tmp_path / "table.parquet")
    told = call(tmp_path / "table.parquet", *COLUMNS, "--stream", status=2)
    assert "needs --out" in told.stderr
