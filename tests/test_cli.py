"""The command line as a user meets it."""

import functools
import json
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest

import gdjax
from gdjax.table import label_column, number_column, read_table
from tests.calling import call, refused

GAPMINDER = str(resources.files("gdjax") / "data" / "gapminder.csv")
TRENDS = ["solve", GAPMINDER, "--group", "country", "--inputs", "year", "--target", "lifeExp"]


@pytest.fixture
def table(tmp_path):
    """A small table of three groups; what a test wants wrong it changes."""

    def write(**columns):
        plain = {"shop": list("aaabbbccc"), "day": [1, 2, 3] * 3, "sales": [1, 2, 4, 3, 3, 5, 9, 8, 8]}
        columns = {name: values for name, values in (plain | columns).items() if values is not None}
        path = tmp_path / "shops.csv"
        rows = zip(*columns.values(), strict=True)
        path.write_text("\n".join(",".join(map(str, row)) for row in [columns, *rows]) + "\n")
        return path

    return write


@pytest.mark.parametrize(
    ("options", "tolerance"), [(["--dtype", "float64"], 1e-6), (["--dtype", "float32"], 1e-3), ([], 1e-6)]
)
def test_the_main_job(tmp_path, options, tolerance):
    """One trend of life expectancy per country, against NumPy's least squares in float64."""
    out = tmp_path / "trends.csv"
    result = call(*TRENDS, "--learning-rate", "auto", "--out", out, *options)
    assert "142 models: 142 converged, 0 took all steps, 0 diverged." in result.stdout
    assert out.read_text().splitlines()[0] == "country,intercept,year,loss,gradient_norm,steps,status"

    data = read_table(GAPMINDER, ["country", "year", "lifeExp"])
    countries, codes = label_column(data, "country")
    year, life = number_column(data, "year"), number_column(data, "lifeExp")
    fitted = read_table(out, ["country", "intercept", "year", "status"])
    assert fitted["country"].to_pylist() == countries.to_pylist()
    assert set(fitted["status"].to_pylist()) == {"CONVERGED"}
    for code in range(142):
        slope, bias = (
            np.polynomial.Polynomial.fit(year[codes == code], life[codes == code], 1).convert().coef[::-1]
        )
        assert number_column(fitted, "year")[code] == pytest.approx(slope, rel=tolerance)
        assert number_column(fitted, "intercept")[code] == pytest.approx(bias, rel=tolerance)


@pytest.mark.parametrize("ending", ["csv", "parquet", "npz", "json"])
def test_every_output_holds_the_same(tmp_path, table, ending):
    out = tmp_path / f"fits.{ending}"
    call("solve", table(), "--group", "shop", "--inputs", "day", "--target", "sales", "--out", out)
    if ending == "json":
        rows = json.loads(out.read_text())
        columns = {name: [row[name] for row in rows] for name in rows[0]}
    else:
        names = ["shop", "intercept", "day", "loss", "gradient_norm", "steps", "status"]
        read = read_table(out, names)
        columns = {name: read[name].to_pylist() for name in names}
    assert columns["shop"] == ["a", "b", "c"]
    np.testing.assert_allclose(np.array(columns["day"], float), [1.5, 1.0, -0.5], rtol=1e-9)
    assert columns["status"] == ["CONVERGED"] * 3


@pytest.mark.parametrize("ending", ["parquet", "npz"])
def test_every_input_is_taken(tmp_path, ending):
    from gdjax.table import write_table

    source, out = tmp_path / f"shops.{ending}", tmp_path / "fits.json"
    write_table(
        source, {"shop": [7, 7, 3, 3], "day": np.float32([1, 2, 1, 2]), "sales": np.array([1, 3, 5, 4])}
    )
    call("solve", source, "--group", "shop", "--inputs", "day", "--target", "sales", "--out", out)
    rows = json.loads(out.read_text())
    assert [row["shop"] for row in rows] == [7, 3]
    np.testing.assert_allclose([row["day"] for row in rows], [2, -1], rtol=1e-9)


def test_without_groups_one_model_is_fitted_and_shown_whole(table):
    result = call("solve", table(), "--inputs", "day", "--target", "sales", "--no-intercept")
    assert "1 model: 1 converged" in result.stdout
    assert "intercept" not in result.stdout
    assert f"{np.dot([1, 2, 3] * 3, [1, 2, 4, 3, 3, 5, 9, 8, 8]) / 42:.6g}" in result.stdout


def test_only_the_first_groups_are_shown_and_the_rest_is_pointed_to(tmp_path):
    result = call(*TRENDS)
    assert "Afghanistan" in result.stdout
    assert "Zimbabwe" not in result.stdout
    assert "first 10 of 142; --out FILE.csv writes all of them" in result.stdout
    result = call(*TRENDS, "--out", tmp_path / "a.csv")
    assert "All 142 models are in" in result.stdout


def test_a_picture_is_drawn(tmp_path, table):
    for name in ("a.png", "a.svg"):
        call(
            "solve",
            table(),
            "--group",
            "shop",
            "--inputs",
            "day",
            "--target",
            "sales",
            "--plot",
            tmp_path / name,
        )
        assert (tmp_path / name).stat().st_size > 1000


def test_divergence_has_its_own_exit_status_and_is_written_all_the_same(tmp_path, table):
    out = tmp_path / "fits.json"
    result = call("solve", table(), "--group", "shop", "--inputs", "day", "--target", "sales",
                  "--learning-rate", 9, "--out", out, status=1)  # fmt: skip
    assert "3 diverged" in result.stdout
    assert [row["status"] for row in json.loads(out.read_text())] == ["DIVERGED"] * 3
    row = next(line for line in result.stdout.splitlines() if "diverged" in line)
    assert row.split()[1:4] == ["–", "–", "–"]  # what is left of them is no answer


def test_a_small_group_is_solved_and_flagged(tmp_path, table):
    out = tmp_path / "fits.csv"
    source = table(shop=list("aaaabbbbc"))
    result = call("solve", source, "--group", "shop", "--inputs", "day", "--target", "sales", "--out", out)
    assert "converged *" in result.stdout
    assert "fewer rows than weights" in result.stdout
    lines = out.read_text().splitlines()
    assert lines[0].endswith(",status,note")
    assert "fewer rows than weights" in lines[3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--loss", "huber", "--delta", "0.5"], "3 converged"),
        (["--loss", "quantile", "--quantile", "0.9", "--steps", "50"], "has kinks"),
        (["--loss", "poisson", "--seed", "3"], "3 converged"),
        (["--optimizer", "sgd", "--learning-rate", "0.3"], "3 converged"),
        (["--tol", "1e-3", "--seed", "1"], "3 converged"),
        (["--device", "cpu", "--steps", "1", "--loss", "huber", "--delta", "0.1"], "0 converged, 3 took all"),
    ],
)
def test_options_are_heard(table, options, words):
    assert words in call(
        "solve", table(), "--group", "shop", "--inputs", "day", "--target", "sales", *options
    ).stdout.replace("\n", " ")


def test_a_users_own_loss_is_found_in_the_current_folder(tmp_path, table, monkeypatch):
    (tmp_path / "my_losses.py").write_text("def half_square(f, t):\n    return 0.5 * (f - t) ** 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    out = tmp_path / "fits.json"
    call("solve", table(), "--group", "shop", "--inputs", "day", "--target", "sales",
         "--loss", "my_losses:half_square", "--out", out)  # fmt: skip
    np.testing.assert_allclose(
        [row["day"] for row in json.loads(out.read_text())], [1.5, 1.0, -0.5], rtol=1e-7
    )


BAD_TABLES = [
    ({"sales": [1, 2, 4, 3, "many", 5, 9, 8, 8]}, "column 'sales', row 5: 'many' is not a number"),
    ({"day": [1, 2, 3, 1, 2, 3, 1, "", 3]}, "column 'day', row 8: the value is missing"),
    ({"day": [1, 2, 3, 1, 2, 3, 1, "inf", 3]}, "column 'day', row 8: inf is not a finite number"),
    ({"shop": ["a", "a", "", *"bbbccc"]}, "column 'shop', row 3: the label is missing"),
    ({"sales": None}, "no column 'sales'. It has: shop, day"),
    ({"sales": None, "sale": [1] * 9}, "did you mean 'sale'?"),
]


@pytest.mark.parametrize(("columns", "message"), BAD_TABLES)
def test_a_bad_table_is_told_on_stderr_with_status_2(tmp_path, table, columns, message):
    out = tmp_path / "fits.csv"
    source = table(**columns)
    said = refused("solve", source, "--group", "shop", "--inputs", "day", "--target", "sales", "--out", out)
    assert message in said
    assert not out.exists()


BAD_OPTIONS = [
    (["--inputs", ","], "--inputs names no column"),
    (["--inputs", "shop"], "--inputs names 'shop', which is named by --group already"),
    (["--inputs", "day,day"], "--inputs names 'day', which is named by --inputs already"),
    (["--inputs", "loss"], "which is a column of the result already"),
    (["--target", "day"], "--target names 'day'"),
    (["--loss", "square"], "no loss 'square'"),
    (["--loss", "logistic"], "the logistic loss wants 0 or 1"),
    (["--loss", "no_module:f"], "module 'no_module' cannot be imported"),
    (["--learning-rate", "fast"], "--learning-rate must be auto or a positive number, got 'fast'"),
    (["--learning-rate", "-1"], "--learning-rate must be auto or a positive number"),
    (["--optimizer", "adm"], "did you mean adam?"),
    (["--optimizer", "adam"], "adam has no learning rate of its own"),
    (["--steps", "0"], "steps"),
    (["--tol", "-1"], "tol must be 0 or more"),
    (["--dtype", "float16"], "float16"),
    (["--device", "gpu:99"], "gpu"),
    (["--device", "abacus"], "abacus"),
    (["--out", "no/such/folder/fits.csv"], "there is no folder"),
    (["--out", "fits.xlsx"], "'.xlsx'; it must be one of .csv"),
    (["--plot-kind", "steps"], "--plot-kind steps says what --plot draws; give --plot FILE as well"),
    (["--plot", "fits.pdf"], "'.pdf'; it must be one of .png, .svg"),
    (["--plot", "no/such/folder/fits.png"], "there is no folder"),
    (["--speed", "9"], "--speed"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_usage_is_told_on_stderr_with_status_2(table, options, message):
    plain = {"--group": "shop", "--inputs": "day", "--target": "sales"}
    arguments = [part for pair in (plain | {options[0]: options[1]}).items() for part in pair]
    assert message in refused("solve", table(), *arguments)


def test_the_picture_may_be_of_the_steps_instead(tmp_path):
    for kind, told in (("steps", "Steps to convergence"), ("fits", "Afghanistan")):
        call(*TRENDS, "--plot", tmp_path / "a.svg", "--plot-kind", kind)
        picture = (tmp_path / "a.svg").read_text()
        assert f"<!-- {told} -->" in picture


@pytest.mark.parametrize("option", ["--out", "--plot"])
@pytest.mark.parametrize("through_a_link", [False, True])
def test_the_table_is_never_overwritten(tmp_path, table, option, through_a_link):
    source = table()
    if option == "--plot":
        source = source.rename(tmp_path / "shops.png")
    before = source.read_bytes()
    named = source
    if through_a_link:
        named = tmp_path / f"link{source.suffix}"
        named.symlink_to(source)
    result = call("solve", source, "--inputs", "day", "--target", "sales", option, named, status=2)
    assert f"{option} names" in result.stderr
    assert "the table that is read" in " ".join(result.stderr.split())
    assert source.read_bytes() == before


@pytest.mark.parametrize(("options", "status"), [([], 0), (["--learning-rate", "9"], 1)])
def test_a_closed_pipe_leaves_the_exit_status_as_it_is(tmp_path, options, status):
    """As in `gdjax solve ... | head`."""
    out = tmp_path / "fits.csv"
    arguments = [sys.executable, "-m", "gdjax", *TRENDS, "--out", str(out), *options]
    run = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    message = run.stderr.read()
    run.stderr.close()
    assert run.wait() == status
    assert message == ""
    assert len(out.read_text().splitlines()) == 143


def test_bench_prints_and_writes_what_was_measured(tmp_path, monkeypatch):
    from gdjax import measure

    tiny = [measure.Kind("scalar", 0, 1, 8, (4, 64), (4, 64))]
    monkeypatch.setattr(measure, "measure", functools.partial(measure.measure, kinds=tiny))
    out, plot = tmp_path / "speed.json", tmp_path / "speed.svg"
    result = call("bench", "--device", "cpu", "--quick", "--out", out, "--plot", plot)
    assert "steps/s" in result.stdout
    assert "scalar, cpu:0: " in result.stdout
    assert [point["problems"] for point in json.loads(out.read_text())["points"]] == [4, 64]
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "abacus"], "device='abacus'"),
        (["--out", "speed.csv"], "'.csv'; it must be one of .json"),
        (["--plot", "speed.pdf"], "'.pdf'; it must be one of .png, .svg"),
        (["--out", "no/such/folder/speed.json"], "there is no folder"),
    ],
)
def test_bench_tells_bad_usage(options, message):
    assert message in refused("bench", "--quick", *options)


def test_devices_and_version():
    assert "cpu:0" in call("devices").stdout
    assert call("--version").stdout == f"gdjax {gdjax.__version__}\n"


def test_as_a_program():
    """The one test through the whole way in: status and no traceback."""
    run = subprocess.run(
        [sys.executable, "-m", "gdjax", "solve", "absent.csv", "--inputs", "x", "--target", "y"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr == "error: there is no file absent.csv\n"


def test_a_missing_extra_is_told_kindly():
    code = "import sys; sys.modules['typer'] = None; from gdjax.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == 'gdjax: the command line needs typer: pip install "gdjax[cli]"\n'


def test_the_library_needs_nothing_of_the_extra():
    code = (
        "import sys; import gdjax, gdjax.table, gdjax.plot, gdjax.regression;"
        "print({'typer', 'rich', 'pyarrow', 'matplotlib', 'optax'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
