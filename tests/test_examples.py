"""The worked examples print what their docstrings show."""

import importlib
import pkgutil
from pathlib import Path

import jax
import pytest

from gdjax import examples

NAMES = [module.name for module in pkgutil.iter_modules(examples.__path__)]


def shown(text):
    """The lines below the command in a docstring."""
    _, _, below = text.partition("    $ python -m ")
    return [line.strip() for line in below.splitlines()[1:] if line.strip()]


def examples_doc(name):
    return importlib.import_module(f"gdjax.examples.{name}").__doc__


def test_there_are_five_and_the_package_names_them():
    assert len(NAMES) == 5
    for name in NAMES:
        assert f"`{name}` (" in examples.__doc__


def test_the_readme_shows_one_and_links_all():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    _, _, below = readme.partition("python -m gdjax.examples.rate_sweep rates.png\n```\n\n```text\n")
    assert below.partition("\n```")[0].splitlines() == shown(examples_doc("rate_sweep"))
    for name in NAMES:
        assert f"gdjax/examples/{name}.py" in readme


@pytest.mark.parametrize("name", NAMES)
def test_an_example_prints_what_its_docstring_shows(name, capsys, tmp_path, monkeypatch):
    module = importlib.import_module(f"gdjax.examples.{name}")
    monkeypatch.setattr("sys.argv", [name, str(tmp_path / "a.png")])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # a reader's settings
        examples.run(module.main)
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert printed == shown(examples_doc(name))
    assert "False" not in " ".join(printed)
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_without_scikit_learn_it_is_told(monkeypatch):
    monkeypatch.setitem(importlib.import_module("sys").modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        examples.load("diabetes")
