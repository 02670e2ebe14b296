"""Streams of problems: the bits of `minimize`, in parts that outlast whatever happens."""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

import gdjax
from gdjax.sink import MANIFEST
from gdjax.sources import ParquetSource, files_of
from gdjax.stream import open_job
from tests.streaming import FIELDS, SIZE, STEPS, N, alone, arrays, parts, same, solve, stored, truncate


@pytest.fixture
def problems(tmp_path):
    return stored(tmp_path)


def sources(tmp_path):
    """One set of problems in every form that can be streamed."""
    held = arrays()
    parquet.write_table(pa.table(held), tmp_path / "one.parquet", row_group_size=70)
    (tmp_path / "many" / "deep").mkdir(parents=True)
    for number, name in enumerate(["deep/a.parquet", "x.parquet", "y.parquet"]):
        cut = {key: array[number * 400 : (number + 1) * 400] for key, array in held.items()}
        parquet.write_table(pa.table(cut), tmp_path / "many" / name)
    wide = {key: array.astype(np.float64) for key, array in held.items()}
    csv.write_csv(pa.table(wide), tmp_path / "problems.csv")
    np.savez_compressed(tmp_path / "problems.npz", **held)
    np.save(tmp_path / "x.npy", held["x"])
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")

    def brought():
        for first, last in [(0, 1), (1, 1), (1, 500), (500, 576), (576, N)]:
            yield {key: array[first:last] for key, array in held.items()}

    yield "parquet", tmp_path / "one.parquet"
    yield "folder", tmp_path / "many"
    yield "csv", tmp_path / "problems.csv"
    yield "npz", tmp_path / "problems.npz"
    yield "npy", {**held, "x": tmp_path / "x.npy"}
    yield "memmap", {**held, "x": mapped}
    yield "iterator", brought()


def test_every_source_gives_the_bits_of_minimize(tmp_path):
    held = arrays()
    wanted = alone(held)
    assert (wanted.status == gdjax.Status.DIVERGED).sum() == 1
    for name, source in sources(tmp_path):
        sink = tmp_path / f"from-{name}"
        told = solve(source, sink, dtype="float32" if name == "csv" else None)
        assert (told.problems, told.parts) == (N, -(-N // SIZE)), name
        assert told.summary() == wanted.summary()
        same(parquet.read_table(sink), wanted)
        assert sorted(os.listdir(sink)) == [MANIFEST, *(f"part-{k:08d}.parquet" for k in range(told.parts))]


@pytest.mark.parametrize("ending", ["parquet", "csv", "npz", "json"])
def test_one_file_is_written_at_the_end_and_nothing_else(tmp_path, problems, ending):
    out = tmp_path / f"answers.{ending}"
    assert solve(problems, out).path == out
    assert sorted(os.listdir(tmp_path)) == [out.name, problems.name]
    if ending == "parquet":
        same(parquet.read_table(out), alone(arrays()))
    if ending == "npz":
        with np.load(out) as found:
            np.testing.assert_array_equal(found["weights"], np.asarray(alone(arrays()).weights))


@pytest.mark.parametrize("ending", ["csv", "npz", "parquet"])
def test_columns_are_handed_on_from_every_kind_of_file(tmp_path, ending):
    source = tmp_path / f"problems.{ending}"
    held = {**arrays(count=200), "id": np.array([f"problem {number}" for number in range(200)])}
    if ending == "csv":
        csv.write_csv(pa.table(held), source)
    elif ending == "npz":
        np.savez(source, **held)
    else:
        parquet.write_table(pa.table(held), source)
    solve(source, tmp_path / "out", keep=["id", "x"], dtype="float32")
    found = parquet.read_table(tmp_path / "out")
    assert found.column_names == ["id", "x", *FIELDS]
    assert found["id"].to_pylist() == held["id"].tolist()
    np.testing.assert_allclose(found["x"].to_numpy(), held["x"], rtol=1e-6)


def test_a_column_of_the_results_cannot_be_handed_on(tmp_path):
    with pytest.raises(ValueError, match="keep names 'loss', which is a column of the results"):
        solve({**arrays(), "loss": arrays()["w"]}, tmp_path / "out", keep=["loss"])


def loss(w, x, t, scale):
    return jnp.mean((w["a"] @ x + w["b"] - t) ** 2) * scale


def test_results_that_nobody_asked_for_are_left_out(tmp_path, problems):
    """Also where a problem diverges, which is run again, and for whoever stops by a rule."""
    for number, rule in enumerate([None, gdjax.stop.gradient_below(1e-3)]):
        expected = alone(arrays(), stop=rule)
        told = solve(problems, tmp_path / f"out-{number}", results=["weights", "status"], stop=rule)
        table = parquet.read_table(tmp_path / f"out-{number}")
        assert table.column_names == ["weights", "status"]
        for name in table.column_names:
            np.testing.assert_array_equal(table[name].to_numpy(), np.asarray(getattr(expected, name)))
        assert told.summary() == expected.summary()
        assert told.counts["DIVERGED"] == 1


def test_vectors_pytrees_rates_and_columns_that_are_handed_on(tmp_path):
    rng = np.random.default_rng(0)
    held = {"x": rng.normal(size=(50, 3, 5)), "t": rng.normal(size=(50, 5)), "rate": rng.uniform(0.01, 0.1, 50)}
    start = {"a": np.zeros(3), "b": 0.0}
    ids = pa.array([f"problem {number}" for number in range(50)])
    nested = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(held["x"].ravel(), 5), 3)
    lists = pa.array(held["t"].tolist())
    parquet.write_table(
        pa.table({"x": nested, "t": lists, "rate": held["rate"], "id": ids}), tmp_path / "problems.parquet"
    )
    rule = {"optimizer": optax.adam, "hyperparams": {"learning_rate": "rate"}, "steps": 20}
    data = ("x", "t", np.float64(2.0))
    sink = tmp_path / "out"
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        gdjax.solve_stream(tmp_path / "problems.parquet", sink, loss, start, data, keep=["id"], part_size=16, **rule)
    found = parquet.read_table(sink)
    assert found.column_names == ["id", "weights.a", "weights.b", *FIELDS[1:]]
    assert found["id"].to_pylist() == ids.to_pylist()
    weights = {"a": np.zeros((50, 3)), "b": np.zeros(50)}
    rule["hyperparams"] = {"learning_rate": held["rate"]}
    with jax.numpy_dtype_promotion("standard"):
        wanted = gdjax.minimize(loss, weights, (held["x"], held["t"], np.float64(2.0)), in_axes=(0, 0, None), **rule)
    assert found["weights.a"].to_pylist() == wanted.weights["a"].tolist()
    assert found["weights.b"].to_pylist() == wanted.weights["b"].tolist()
    with pytest.raises(ValueError, match=r"cannot hold weights\.a, which has shape \[3\]"):
        gdjax.solve_stream(held, tmp_path / "a.csv", loss, start, data, learning_rate="rate", steps=20)


def test_what_is_done_stays_and_what_is_missing_is_done(tmp_path, problems):
    sink = tmp_path / "out"
    solve(problems, sink)
    before = parts(sink)
    for number in (0, 3, 10):
        (sink / f"part-{number:08d}.parquet").unlink()
    (sink / ".part-00000003.0123.tmp").write_bytes(b"left by a process that was killed")
    stamps = {path.name: path.stat().st_mtime_ns for path in sink.glob("part-*")}
    solve(problems, sink)
    assert parts(sink) == before
    assert {name: (sink / name).stat().st_mtime_ns for name in stamps} == stamps
    assert not list(sink.glob(".*"))


def test_shares_make_the_whole(tmp_path, problems):
    out, whole = tmp_path / "shared.parquet", tmp_path / "whole.parquet"
    assert solve(problems, out, share=(1, 3)) is None
    assert solve(problems, out, share=(0, 3)) is None
    held = {path.name for path in (tmp_path / "shared.parquet.parts").glob("part-*")}
    assert held == {f"part-{k:08d}.parquet" for k in range(11) if k % 3 != 2}
    assert solve(problems, out, share=(2, 3)).problems == N
    solve(problems, whole)
    assert out.read_bytes() == whole.read_bytes()


def changed_source(path):
    parquet.write_table(pa.table(arrays(seed=1)), path)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"steps": 31}, None, r"options\.steps was 30, now it is 31"),
        ({"learning_rate": 0.2}, None, r"learning_rate was 0\.1, now it is 0\.2"),
        ({"stop": gdjax.stop.loss_below(1e-3)}, None, r"program \(loss, optimizer or stop rule\) is another"),
        ({"part_size": 100}, None, "part_size was 96, now it is 100"),
        ({"results": ["loss"]}, None, "results was"),
        ({}, changed_source, r"source was .*, now it is"),
    ],
)
def test_another_run_is_refused_and_nothing_is_touched(tmp_path, problems, options, change, message):
    sink = tmp_path / "out"
    solve(problems, sink)
    before = parts(sink)
    if change:
        change(problems)
    with pytest.raises(ValueError, match=f"holds results of another run: .*{message}"):
        solve(problems, sink, **options)
    assert parts(sink) == before


def test_an_iterator_that_brings_something_else_is_refused(tmp_path):
    sink = tmp_path / "out"
    solve(iter([arrays()]), sink)
    with pytest.raises(ValueError, match="part 0 was computed from other problems"):
        solve(iter([arrays(seed=1)]), sink)
    with pytest.raises(ValueError, match="part 5 was computed from other problems"):
        solve(iter([{name: array[:500] for name, array in arrays().items()}]), sink)


def test_sinks_that_are_none(tmp_path, problems):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files \(notes\.txt\) but no _manifest"):
        solve(problems, tmp_path / "used")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"_manifest\.json cannot be read"):
        solve(problems, tmp_path / "broken")
    with pytest.raises(ValueError, match="is, or lies in, the source"):
        solve(problems, problems)
    with pytest.raises(ValueError, match="is, or lies in, the source"):
        solve(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="name a folder, or a file that ends in"):
        solve(problems, tmp_path / "out.xlsx")
    with pytest.raises(TypeError, match="source is a function; pass a path"):
        solve(lambda: arrays(), tmp_path / "out")
    with pytest.raises(ValueError, match="there is no folder"):
        solve(problems, tmp_path / "no" / "out.csv")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        solve(problems, problems.rename(tmp_path / "problems"))


def write(path, **columns):
    parquet.write_table(pa.table({**arrays(), **columns}), path)


SPOILT = {
    "cut short": (lambda path: (write(path), truncate(path)), r"cannot be read as Parquet: .*; is it whole"),
    "no column": (lambda path: parquet.write_table(pa.table({"w": [1.0], "T": [1.0]}), path), "no column 'x'"),
    "missing": (
        lambda path: write(path, x=pa.array([1.0] * 500 + [None] * 500, pa.float32())),
        "'x', row 501: the value is missing",
    ),
    "text": (lambda path: write(path, x=["one"] * N), "'x' holds string, not numbers"),
    "empty": (lambda path: parquet.write_table(pa.table(arrays()).slice(0, 0), path), "has no rows"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_source_is_told(tmp_path, kind):
    spoil, message = SPOILT[kind]
    path = tmp_path / "problems.parquet"
    spoil(path)
    with pytest.raises(ValueError, match=message):
        solve(path, tmp_path / "out", part_size=1000)


def test_lists_of_another_length_are_told(tmp_path):
    write(tmp_path / "a.parquet", x=pa.array([[1.0]] * 700 + [[1.0, 2.0]] * 300, pa.list_(pa.float32())))
    with pytest.raises(ValueError, match="'x', row 701: a list of another length than the 1 of row 673"):
        gdjax.solve_stream(
            tmp_path / "a.parquet",
            tmp_path / "out",
            lambda w, x: jnp.sum(w * x) ** 2,
            "w",
            ("x",),
            learning_rate=0.1,
            steps=2,
            part_size=SIZE,
        )
    assert len(parts(tmp_path / "out")) == 7  # those that were whole are there


def test_other_sources_that_cannot_be(tmp_path):
    (tmp_path / "a.csv").write_text("w,x,t\n1,2,3\n1,two,3\n")
    np.save(tmp_path / "x.npy", arrays()["x"])
    truncate(tmp_path / "x.npy")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("w x t")
    for source, message in [
        (tmp_path / "a.csv", "cannot be read as CSV: .*two"),
        ({**arrays(), "x": tmp_path / "x.npy"}, "cannot be read as a NumPy array: .*is it whole"),
        ({**arrays(), "x": arrays()["x"][:5]}, "'w' has 1,000 rows, 'x' has 5"),
        (tmp_path / "none.parquet", "there is no file"),
        (tmp_path / "empty", "without Parquet files"),
        (tmp_path / "a.txt", "has the ending '.txt'"),
        ([{"w": np.ones(3)}], "has no 'x'"),
        (iter([]), "brings no batch"),
    ]:
        with pytest.raises(ValueError, match=message):
            solve(source, tmp_path / "out")
        assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"results": ["weight"]}, ValueError, "name some of weights, loss"),
        ({"results": 5}, TypeError, "results=5; pass a name or a list"),
        ({"keep": [5]}, TypeError, r"keep=\[5\]; pass a name or a list"),
        ({"keep": "rte"}, ValueError, "no column 'rte'"),
        ({"part_size": 0}, ValueError, "part_size=0; pass a whole number"),
        ({"share": (2, 2)}, ValueError, r"share=\(2, 2\)"),
        ({"share": 3}, TypeError, r"pass \(p, P\)"),
        ({"steps": 0}, ValueError, "steps=0"),
        ({"keep": ["t"], "learning_rate": "rte"}, ValueError, "no column 'rte'"),
    ],
)
def test_options_that_cannot_be(tmp_path, problems, options, kind, message):
    with pytest.raises(kind, match=message):
        solve(problems, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "part-00000000.parquet").exists()


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs pyarrow: pip install \"gdjax\[cli\]\""):
        solve(arrays(), tmp_path / "out")


def test_row_groups_that_are_read_together_lie_in_one_piece(tmp_path):
    held = {"x": np.arange(400, dtype=np.float32), "t": np.arange(400) * 0.5}
    for name, rows in (("a", slice(0, 210)), ("b", slice(210, 400))):
        table = pa.table({key: array[rows] for key, array in held.items()})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=70)
    source = ParquetSource(files_of(tmp_path), ["x", "t"])
    for (first, last), chunks in {(0, 210): 1, (0, 400): 2, (35, 175): 3, (1, 2): 1, (69, 211): 3, (0, 140): 1}.items():
        table = source.table(first, last)
        assert {name: column.num_chunks for name, column in table.items()} == {"x": chunks, "t": chunks}
        for name, array in source.read(first, last).items():
            np.testing.assert_array_equal(array, held[name][first:last])
    first, again = (source.table(*range_) for range_ in ((0, 70), (0, 140)))
    np.testing.assert_array_equal(again["x"].to_numpy(), held["x"][:140])
    np.testing.assert_array_equal(first["x"].to_numpy(), held["x"][:70])


def test_large_row_groups_are_read_a_piece_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("gdjax.sources.WHOLE_GROUP_BYTES", 0)
    parquet.write_table(pa.table(arrays()), tmp_path / "problems.parquet", row_group_size=400)
    solve(tmp_path / "problems.parquet", tmp_path / "out")
    same(parquet.read_table(tmp_path / "out"), alone(arrays()))


def test_a_job_says_what_is_missing(tmp_path, problems):
    plain = {"learning_rate": 0.1, "steps": STEPS, "part_size": SIZE}
    job = open_job(problems, tmp_path / "out", gdjax.kernel.squared_loss, "w", ("x", "t"), **plain)
    assert job.missing() == list(range(11))
    job.run(share=(0, 2))
    assert job.missing() == [1, 3, 5, 7, 9]
    with pytest.raises(FileNotFoundError, match=r"part-00000001\.parquet is missing"):
        job.finish()
