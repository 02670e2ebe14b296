"""Pictures: drawn from what was fitted, written whole, and nothing global touched."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from gdjax.plot import Picture, draw, save

PNG = b"\x89PNG\r\n\x1a\n"


def picture(groups=5, inputs=1, rows=12, labelled=True):
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(groups), rows)
    x = rng.normal(size=(groups * rows, inputs))
    weights, intercept = rng.normal(size=(groups, inputs)), rng.normal(size=groups)
    target = (x * weights[codes]).sum(axis=1) + intercept[codes]
    return Picture(
        inputs=x,
        target=target,
        codes=codes,
        labels=[f"group {code}" for code in range(groups)] if labelled else [],
        weights=weights,
        intercept=intercept,
        good=np.ones(groups, bool),
        input_names=[f"input {number}" for number in range(inputs)],
        target_name="target",
        group_name="shop",
        response=lambda prediction: prediction,
    )


def lines_of(axes):
    return [np.array(line.get_xydata()) for line in axes.lines]


def test_each_panel_holds_its_groups_data_and_its_line():
    shown = picture(groups=5)
    panels = draw(shown).axes
    assert [panel.get_title(loc="left") for panel in panels] == shown.labels
    for group, panel in enumerate(panels):
        data, line = lines_of(panel)
        np.testing.assert_array_equal(data[:, 0], shown.inputs[shown.codes == group, 0])
        np.testing.assert_allclose(line[:, 1], line[:, 0] * shown.weights[group, 0] + shown.intercept[group])


def test_only_the_first_groups_are_drawn_and_the_title_says_so():
    figure = draw(picture(groups=40))
    assert len(figure.axes) == 12
    assert figure.get_suptitle() == "target by input 0, one fit per shop, first 12 of 40"


def test_curves_follow_the_response():
    panel = draw(replace(picture(), response=np.exp)).axes[0]
    line = lines_of(panel)[1]
    shown = picture()
    np.testing.assert_allclose(line[:, 1], np.exp(line[:, 0] * shown.weights[0, 0] + shown.intercept[0]))


def test_a_fit_that_diverged_does_not_take_the_scale_with_it():
    shown = picture(groups=2)
    weights = shown.weights.copy()
    weights[1] = 1e100
    figure = draw(replace(shown, weights=weights, good=np.array([True, False])))
    low, high = figure.axes[1].get_ylim()
    assert high - low < 100
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["data", "fit", "fit that diverged"]


@pytest.mark.parametrize(("groups", "panels"), [(1, 2), (5, 5), (50, 5)])
def test_an_overview_for_several_inputs(groups, panels):
    shown = picture(groups=groups, inputs=3, labelled=groups > 1)
    figure = draw(shown)
    assert len(figure.axes) == panels
    observed = lines_of(figure.axes[-2])[0]
    np.testing.assert_allclose(observed[:, 0], observed[:, 1], atol=1e-12)  # the data lies on its models


@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize(("groups", "rows"), [(1, 1), (3, 1), (1, 20_000), (40, 2)])
def test_tables_of_every_shape_are_drawn(tmp_path, inputs, groups, rows):
    save(draw(picture(groups, inputs, rows)), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_no_fit_came_to_a_good_end(tmp_path):
    for inputs in (1, 2):
        shown = picture(groups=40, inputs=inputs)
        bad = replace(shown, good=np.zeros(40, bool), weights=np.full((40, inputs), np.inf))
        save(draw(bad), tmp_path / "a.png")


def test_names_are_drawn_as_they_are(tmp_path):
    shown = replace(picture(groups=2), labels=["$a_b$", "50% {x}"], input_names=["price in $ or $"])
    figure = draw(shown)
    assert figure.axes[0].get_title(loc="left") == r"\$a_b\$"
    save(figure, tmp_path / "a.svg")


def test_svg_is_the_same_file_every_time(tmp_path):
    for name in ("a.svg", "b.svg"):
        save(draw(picture()), tmp_path / name)
    first, second = ((tmp_path / name).read_text() for name in ("a.svg", "b.svg"))
    assert first.startswith("<?xml")
    assert "dc:date" not in first
    assert len(first) == len(second)


@pytest.mark.parametrize("name", ["a.pdf", "missing/a.png"])
def test_what_cannot_be_written_is_told(tmp_path, name):
    with pytest.raises(ValueError, match=name.rpartition("/")[2]):
        save(draw(picture()), tmp_path / name)


def test_pyplot_is_never_imported():
    code = (
        "import sys, numpy as np; from gdjax.plot import Picture, draw; one = np.ones(1);"
        "x, zero = np.ones((1, 1)), np.zeros(1, int);"
        "draw(Picture(x, one, zero, [], x, one, one > 0, ['x'], 't', '', abs));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
