"""Test vectors go out, answers come back and are judged."""

import json
from fractions import Fraction

import numpy as np
import pytest

from gdjax import reference, rounding
from gdjax.vectors import FORMAT, check_vectors, export_vectors


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors") / "new"
    export_vectors(folder, seed=3)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    (tmp_path / "problems.json").write_bytes((exported / "problems.json").read_bytes())
    return tmp_path


def cases(folder):
    return json.loads((folder / "problems.json").read_text())["cases"]


def answer(folder, which):
    content = {name: which(case) for name, case in cases(folder).items()}
    (folder / "outputs.json").write_text(json.dumps(content))


def plain(case):
    """A kernel that knows nothing but the files: float64 cases in Python floats, others in NumPy scalars."""
    kind = np.dtype(case["dtype"]).type
    w, x, t, r = ([kind(float.fromhex(v)) for v in case[k]] for k in ("w", "x", "t", "learning_rate"))
    loss = getattr(reference, f"{case['loss']}_loss")
    with np.errstate(all="ignore"):
        return [
            float(reference.descend(*problem, case["steps"], loss=loss).weights[-1]).hex()
            for problem in zip(w, x, t, r, strict=True)
        ]


def test_a_kernel_elsewhere_passes(folder):
    answer(folder, plain)
    report = check_vectors(folder)
    assert report.passed, str(report)
    assert len(report.checks) == 16
    assert all("bit-equal under IEEE:" in check.detail for check in report.checks)


@pytest.mark.parametrize("how", ["ieee", "fma", "ieee_flushed", "fma_flushed"])
def test_each_rounding_is_recognised_from_npz(folder, exported, how):
    with np.load(exported / "vectors.npz", allow_pickle=False) as file:
        answers = {name.removesuffix(f"/{how}"): file[name] for name in file if name.endswith(f"/{how}")}
    np.savez(folder / "outputs.npz", **answers)
    report = check_vectors(folder)
    assert report.passed, str(report)
    found = {c.name: c.figures["rounding"] for c in report.checks if c.subject == "squared float32"}
    assert found["ordinary"].startswith(how[:4].strip("_").upper())
    assert found["subnormal"].endswith("flushed") == how.endswith("flushed")


def test_exact_answers_are_rationals_of_the_reference(exported):
    case = cases(exported)["squared-float64-ordinary"]
    numbers = [[Fraction(float.fromhex(v)) for v in case[k]] for k in ("w", "x", "t", "learning_rate")]
    for w, x, t, r, exact in list(zip(*numbers, case["exact"], strict=True))[:4]:
        numerator, denominator = (int(v, 16) for v in exact.split("/"))
        assert reference.descend(w, x, t, r, case["steps"]).weights[-1] == Fraction(numerator, denominator)


def test_wrong_answers_say_what_is_wrong(folder):
    def uphill(case):
        return plain(case | {"learning_rate": [f"-{v}" for v in case["learning_rate"]]})

    answer(folder, uphill)
    report = check_vectors(folder)
    line = next(c for c in report.checks if (c.name, c.subject) == ("ordinary", "squared float64"))
    assert line.passed is False
    assert "wrong sign" in line.detail
    assert "64 outside the error bound" in line.detail


def test_a_claim_of_the_bound_alone(folder):
    """Answers one ULP beside the right ones are inside the bound, and no declared rounding gives them."""

    def beside(case):
        values = np.array([float.fromhex(v) for v in plain(case)], case["dtype"])
        return [float(v).hex() for v in np.nextafter(values, np.array(np.inf, case["dtype"]))]

    answer(folder, lambda case: beside(case) if case["steps"] == 50 else plain(case))
    assert not check_vectors(folder).passed
    assert check_vectors(folder, claim="bound").passed


def test_cases_without_an_answer_are_left_out(folder):
    name = "squared-float32-tutorial"
    (folder / "outputs.json").write_text(json.dumps({name: plain(cases(folder)[name])}))
    report = check_vectors(folder)
    assert report.passed
    assert [check.verdict for check in report.checks].count("left out") == 15


def test_short_answers_are_named(folder):
    answer(folder, lambda case: plain(case)[:-1])
    assert "wanted float32 (64,)" in str(check_vectors(folder).checks[1].detail)


def test_the_format_is_written_beside(exported):
    assert (exported / "README.txt").read_text() == FORMAT
    assert sorted(path.name for path in exported.iterdir()) == ["README.txt", "problems.json", "vectors.npz"]


def test_narrow_formats_are_exported_too(tmp_path):
    export_vectors(tmp_path, losses=["squared"], dtypes=["float16", "bfloat16"])
    case = cases(tmp_path)["squared-bfloat16-ordinary"]
    with np.load(tmp_path / "vectors.npz", allow_pickle=False) as file:
        bits = file["squared-bfloat16-ordinary/fma"]
    values = bits.view(rounding.FORMATS["bfloat16"].dtype).astype(float)
    assert [float(v).hex() for v in values] == case["expected"]["fma"]


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda folder: None, "neither outputs.json nor outputs.npz"),
        (lambda folder: (folder / "outputs.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "outputs.json").write_text("[1]"), "cannot be read"),
        (lambda folder: (folder / "outputs.npz").write_bytes(b"PK nonsense"), "cannot be read"),
        (lambda folder: (folder / "outputs.npz").write_bytes(b"PK\x03\x04 cut off"), "cannot be read"),
        (lambda folder: np.savez(folder / "outputs.npz", **{NAME: np.array([object()])}), "cannot be read"),
        (lambda folder: (folder / "problems.json").write_text("{}"), "holds no test vectors"),
        (lambda folder: (folder / "problems.json").unlink(), "holds no test vectors"),
    ],
    ids=["missing", "cut", "list", "no npz", "cut npz", "pickle", "empty", "no problems"],
)
def test_bad_folders_are_named(folder, spoil, match):
    spoil(folder)
    with pytest.raises(ValueError, match=match):
        check_vectors(folder)


NAME = "squared-float32-tutorial"


def test_a_folder_that_cannot_be_made(tmp_path):
    with pytest.raises(ValueError, match="cannot be made"):
        export_vectors(tmp_path / "no" / "such")
    with pytest.raises(ValueError, match="int8"):
        export_vectors(tmp_path, dtypes=["int8"])
