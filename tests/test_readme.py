"""The README tells the truth: its Python prints what it shows, and it names what there is."""

import csv
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import gdjax
from gdjax.commands import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPENT = re.compile(r"\d+\.\d\d s")  # differs from run to run


def blocks() -> list[tuple[str, str, str]]:
    """Each block's language and text, and the output shown right below it, empty where none is."""
    found = list(BLOCK.finditer(README))
    result = []
    for block, after in zip(found, [*found[1:], None], strict=True):
        follows = after is not None and after[1] == "text" and not README[block.end() : after.start()].strip()
        if block[1] != "text":
            result.append((block[1], block[2], after[2] if after is not None and follows else ""))
    return result


def commands() -> list[tuple[str, str]]:
    return [(text.strip(), shown) for language, text, shown in blocks() if language == "sh"]


def lines(printed: str) -> list[str]:
    """The lines that are not empty, without times and trailing blanks."""
    return [SPENT.sub("# s", line.rstrip()) for line in printed.splitlines() if line.strip()]


def test_the_python_prints_what_is_shown_below_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some of it writes files
    code = [(text, shown) for language, text, shown in blocks() if language == "python"]
    assert len(code) >= 4
    session: dict[str, object] = {}  # as a reader would: one block after the other
    for text, shown in code:
        with jax.numpy_dtype_promotion("standard"):  # a reader's setting; optax needs it
            exec(compile(text, "README.md", "exec"), session)
        assert lines(capsys.readouterr().out) == lines(shown), text


def test_set_up_is_two_commands():
    install = [command for command, _ in commands() if "pip install" in command]
    assert len(install) == 2
    assert install[0].startswith('pip install ".[cli]" && gdjax solve ')
    assert install[1] == 'pip install -e ".[cli,test]" && pytest -n 2'


def test_the_main_command_fits_142_countries_and_prints_what_is_shown(tmp_path):
    command, shown = commands()[0]
    words = shlex.split(command.partition("&&")[2])
    assert words[:2] == ["gdjax", "solve"]
    done = subprocess.run(
        [sys.executable, "-m", "gdjax", "solve", str(ROOT / words[2]), *words[3:]],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert lines(done.stdout) == lines(shown)
    with open(tmp_path / "trends.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 142
    assert {row["status"] for row in rows} == {"CONVERGED"}
    assert float(rows[0]["year"]) == pytest.approx(0.2753287, rel=1e-6)
    assert (tmp_path / "trends.png").read_bytes().startswith(b"\x89PNG")


def table(heading: str) -> list[str]:
    """The names in code in the first column of the table below a heading."""
    below = README.partition(f"\n{heading}\n")[2].partition("\n#")[0]
    first = [line.split("|")[1] for line in below.splitlines() if line.startswith("| `")]
    return [name for cell in first for name in re.findall(r"`(?:gdjax\.stop\.)?(\w+)", cell)]


def test_the_tables_name_what_there_is():
    assert sorted(table("## Arguments of `minimize`")) == sorted(inspect.signature(gdjax.minimize).parameters)
    assert table("### Status") == [status.name for status in gdjax.Status]
    rules = [name for name in vars(gdjax.stop) if name.endswith("_below")]
    assert sorted(table("### Stop rules")) == sorted(name for name in rules if not name.startswith("_"))


def test_the_commands_it_names_are_there():
    named = set(re.findall(r"`gdjax (\w+)", README))
    assert named >= {"solve", "devices"}
    assert named <= {command.callback.__name__ for command in app.registered_commands}


def test_files_the_readme_names_are_there():
    for target in re.findall(r"\]\(([^):#]+)\)", README):
        assert (ROOT / target).exists(), target
