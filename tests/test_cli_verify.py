"""`gdjax verify` as a user meets it."""

import json
import sys

import pytest

from tests.calling import call, refused

KERNELS = """
def right(w, x, t, learning_rate, steps):
    for _ in range(steps):
        w = w + learning_rate * (x * (t - x * w))
    return w


def uphill(w, x, t, learning_rate, steps):
    for _ in range(steps):
        w = w - learning_rate * (x * (t - x * w))
    return w


def residual(w, x, t, learning_rate, steps):
    for _ in range(steps):
        w = w + learning_rate * x
    return w
"""


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    (tmp_path / "my_kernels.py").write_text(KERNELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_kernels"
    sys.modules.pop("my_kernels", None)


def test_verify_passes_and_fails_kernels(tmp_path, kernels):
    report = tmp_path / "report.json"
    result = call("verify", "--kernel", f"{kernels}:right", "--quick", "--seed", 3, "--json", report)
    assert "0 failed" in result.stdout
    written = json.loads(report.read_text())
    assert (written["passed"], written["seed"], written["loss"]) == (True, 3, "squared")
    call("verify", "--kernel", f"{kernels}:residual", "--loss", "residual", "--quick")
    result = call("verify", "--kernel", f"{kernels}:uphill", "--quick", "--json", report, status=1)
    assert "FAIL" in result.stdout
    assert json.loads(report.read_text())["passed"] is False


def test_verify_exports_and_checks_vectors(tmp_path):
    folder = tmp_path / "vectors"
    exported = call("verify", "--export", folder, "--loss", "squared").stdout
    assert "problems.json" in exported
    cases = json.loads((folder / "problems.json").read_text())["cases"]
    assert {case["loss"] for case in cases.values()} == {"squared"}
    answers = {name: case["expected"]["ieee"] for name, case in cases.items()}
    (folder / "outputs.json").write_text(json.dumps(answers))
    assert "0 failed" in call("verify", "--check", folder).stdout
    (folder / "outputs.json").write_text(json.dumps({name: ["0x1p+0"] * len(w) for name, w in answers.items()}))
    assert "FAIL" in call("verify", "--check", folder, status=1).stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kernel", "my_kernels:nothing"], "has no 'nothing'"),
        (["--kernel", "my_kernels"], "must be module:function"),
        (["--kernel", "no_such_module:f"], "cannot import 'no_such_module'"),
        (["--loss", "cubic"], "cubic"),
        (["--claim", "hope"], "hope"),
        (["--device", "abacus"], "device='abacus'"),
        (["--seed", "-1"], "--seed"),
        (["--json", "report.txt"], "'.txt'; it must be one of .json"),
        (["--check", "nowhere"], "holds no test vectors"),
        (["--export", "no/such/folder"], "cannot be made"),
        (["--export", "a", "--check", "b"], "--check cannot go with --export"),
        (["--kernel", "my_kernels:right", "--check", "b"], "--check cannot go with --kernel"),
        (["--export", "a", "--json", "r.json"], "--json cannot go with --export"),
    ],
)
def test_verify_tells_bad_usage(kernels, options, message):
    assert message in refused("verify", *options)
