"""Output files are written whole or not at all."""

import os
import stat

import pytest

from gdjax.files import check_output, replacing


def test_a_file_takes_its_place_only_when_complete(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("before")
    with replacing(path) as file:
        file.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert os.listdir(tmp_path) == ["out.csv"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("before")
    with pytest.raises(RuntimeError), replacing(path) as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["out.csv"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.csv").write_text("before")
    link = tmp_path / "link.csv"
    link.symlink_to(tmp_path / "real.csv")
    with replacing(link) as file:
        file.write(b"after")
    assert link.is_symlink()
    assert (tmp_path / "real.csv").read_text() == "after"


def test_others_may_read_the_file_as_the_umask_says(tmp_path):
    mask = os.umask(0o022)
    try:
        with replacing(tmp_path / "out.csv") as file:
            file.write(b"1")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "out.csv").stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/out.csv", "there is no folder"),
        ("out.xlsx", r"ending '\.xlsx'; it must be one of \.csv"),
        ("out", "ending ''"),
        ("folder.csv", "is a folder"),
    ],
)
def test_what_cannot_be_written_is_told_at_once(tmp_path, name, message):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match=message):
        check_output(tmp_path / name, [".csv"])
