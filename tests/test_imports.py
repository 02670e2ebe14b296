"""The public names: there in every order of imports, and no heavier than they need be."""

import subprocess
import sys

import pytest

import gdjax

CHECKS = """
import pickle, sys, types
import gdjax
assert isinstance(gdjax.minimize, types.FunctionType), gdjax.minimize
assert isinstance(gdjax.verify, types.FunctionType), gdjax.verify
import gdjax.minimize, gdjax.verify, gdjax.regression
assert isinstance(gdjax.minimize, types.FunctionType), gdjax.minimize
assert isinstance(gdjax.verify, types.FunctionType), gdjax.verify
from gdjax.minimize import minimize
assert minimize is gdjax.minimize is pickle.loads(pickle.dumps(minimize))
assert gdjax.stop is sys.modules["gdjax.stop"]
assert gdjax.kernel.squared_loss and gdjax.reference.descend
for name in gdjax.__all__:
    getattr(gdjax, name)
"""


def run(code):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "first",
    [
        "import gdjax",
        "from gdjax import *",
        "from gdjax import minimize, verify",
        "import gdjax.minimize",
        "import gdjax.verify",
        "from gdjax.minimize import minimize",
        "import gdjax.regression",
        "import gdjax.stop",
    ],
)
def test_functions_are_not_hidden_by_their_modules(first):
    run(first + CHECKS)


def test_every_public_name_is_listed_and_no_other_is_found():
    assert set(gdjax.__all__) <= set(dir(gdjax))
    for name in gdjax.__all__:
        assert getattr(gdjax, name) is not None
    with pytest.raises(AttributeError, match="module 'gdjax' has no attribute 'maximize'"):
        gdjax.maximize  # noqa: B018


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["solve", "--help"], ["verify", "--help"]])
def test_help_does_not_wait_for_jax(arguments):
    code = f"""
import sys
from gdjax.cli import main
sys.argv = ["gdjax", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert end.code == 0
print({{"jax", "numpy"}} & set(sys.modules))
"""
    assert run(code).splitlines()[-1] == "set()"
