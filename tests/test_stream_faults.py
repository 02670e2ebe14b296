"""What goes wrong on the way of a stream: spoilt parts, full disks, Ctrl-C, a source that changes."""

import errno
import os
import shutil
import signal
import subprocess

import pyarrow as pa
import pytest
from pyarrow import parquet

from gdjax.jobs import StreamStopped
from gdjax.mapping import Mapped
from gdjax.sink import Sink
from tests.streaming import alone, arrays, parts, same, solve, stored, truncate


@pytest.fixture
def problems(tmp_path):
    return stored(tmp_path)


def foreign(path):
    parquet.write_table(pa.table({"weights": [1.0]}), path)


def of_another_run(path):
    shutil.copy(path.with_name("part-00000004.parquet"), path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, r"part-00000003\.parquet cannot be read .*; delete that file and run the same again"),
        (foreign, r"part-00000003\.parquet cannot be read"),
        (of_another_run, "comes from another run"),
    ],
)
def test_a_spoilt_part_is_told_and_mended_by_deleting_it(tmp_path, problems, spoil, message):
    sink = tmp_path / "out"
    solve(problems, sink)
    before = parts(sink)
    spoil(sink / "part-00000003.parquet")
    with pytest.raises(ValueError, match=message):
        solve(problems, sink)
    (sink / "part-00000003.parquet").unlink()
    solve(problems, sink)
    assert parts(sink) == before


def test_a_full_disk_is_told_and_gone_on_from(tmp_path, problems, monkeypatch):
    sink, wanted = tmp_path / "out", tmp_path / "wanted"
    solve(problems, wanted)
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, "full")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"part-\d+\.parquet cannot be written: No space left on device\. Parts that"):
        solve(problems, sink)
    monkeypatch.undo()
    left = parts(sink)
    assert 0 < len(left) < 11
    assert not list(sink.glob(".*"))
    assert left == {name: held for name, held in parts(wanted).items() if name in left}
    solve(problems, sink)
    assert parts(sink) == parts(wanted)


def test_a_disk_that_is_really_full(tmp_path, problems):
    small, wanted = tmp_path / "small", tmp_path / "wanted"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with pytest.raises(ValueError, match="cannot be written: No space left on device"):
            solve(problems, small / "out")
        subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
        solve(problems, small / "out")
        solve(problems, wanted)
        assert parts(small / "out") == parts(wanted)
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.fixture
def _control_c():
    """Ctrl-C as in a terminal: a job in the background begins with it switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_control_c")
def test_control_c_finishes_the_part_at_hand(tmp_path, problems, monkeypatch):
    sink, solved = tmp_path / "out", Mapped.solve

    def interrupted(self, number, loaded):
        if number == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return solved(self, number, loaded)

    monkeypatch.setattr(Mapped, "solve", interrupted)
    with pytest.raises(StreamStopped, match="run the same again to go on"):
        solve(problems, sink)
    assert len(parts(sink)) == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    solve(problems, sink)
    same(parquet.read_table(sink), alone(arrays()))


def test_a_source_that_changes_on_the_way_is_told(tmp_path, problems, monkeypatch):
    written = Sink.write

    def meddled(self, number, table, about):
        if number == 2:
            os.utime(problems)
        written(self, number, table, about)

    monkeypatch.setattr(Sink, "write", meddled)
    with pytest.raises(ValueError, match="another run: source was"):
        solve(problems, tmp_path / "out")
