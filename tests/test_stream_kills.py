"""Killed at any instant, a stream goes on and ends with the same bytes."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import csv

from tests import streaming

PROGRAM = Path(streaming.__file__)


def start(kind, source, sink):
    """The program, at the instant at which its work begins."""
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[1])}
    command = [sys.executable, str(PROGRAM), kind, str(source), str(sink)]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8")
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    return child


def killed_and_finished(tmp_path, kind, kills, seed):
    """Kill the program `kills` times in all, each time at a random instant; every run that ends must end alike."""
    source, wanted, sink = tmp_path / "problems.csv", tmp_path / "wanted.parquet", tmp_path / "answers.parquet"
    csv.write_csv(pa.table(streaming.arrays() if kind == "arrays" else streaming.tidy()), source)
    begun = time.monotonic()
    with start(kind, source, wanted) as child:
        assert child.wait() == 0
    length = time.monotonic() - begun
    chance = random.Random(seed)
    done = 0
    while done < kills:
        sink.unlink(missing_ok=True)
        finished = False
        while not finished:
            with start(kind, source, sink) as child:
                try:
                    finished = child.wait(chance.uniform(0, 0.8 * length) if done < kills else None) == 0
                    assert finished
                except subprocess.TimeoutExpired:
                    child.kill()
                    done += 1
        assert sink.read_bytes() == wanted.read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == [sink.name, source.name, wanted.name]


def test_a_few_kills(tmp_path):
    killed_and_finished(tmp_path, "arrays", 4, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["arrays", "groups"])
def test_two_hundred_kills(tmp_path, kind):
    killed_and_finished(tmp_path, kind, 200, 1)
