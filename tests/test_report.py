"""Reports of `verify`: shown and saved whole."""

import json

import pytest

from gdjax.report import Check, Report


def test_report_as_a_rich_table():
    console = pytest.importorskip("rich.console").Console(width=90, record=True, force_terminal=False)
    check = Check("agreement", "float32", False, "[bold]not markup[/bold]", {"inf": float("inf")})
    report = Report("mine", "squared", "bits", "cpu:0", 0, 1.0, {}, (check,))
    with console.capture() as captured:
        console.print(report)
    assert "[bold]not markup[/bold]" in captured.get()
    assert json.loads(report.to_json())["checks"][0]["figures"] == {"inf": "inf"}


def test_report_is_saved_whole(tmp_path):
    report = Report("mine", "squared", "bits", "cpu:0", 0, 1.0, {}, ())
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
