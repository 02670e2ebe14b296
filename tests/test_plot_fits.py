"""Pictures of fitted models: drawn from what was fitted, whatever the shape of the table."""

import numpy as np
import pytest

from gdjax import Status
from gdjax.plot import fits, save

PNG = b"\x89PNG\r\n\x1a\n"


def picture(groups=5, inputs=1, rows=12, labelled=True):
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(groups), rows)
    x = rng.normal(size=(groups * rows, inputs))
    weights, intercept = rng.normal(size=(groups, inputs)), rng.normal(size=groups)
    target = (x * weights[codes]).sum(axis=1) + intercept[codes]
    return {
        "inputs": x,
        "target": target,
        "groups": codes,
        "labels": [f"group {code}" for code in range(groups)] if labelled else [],
        "weights": weights,
        "intercept": intercept,
        "status": np.ones(groups, np.int8),
        "input_names": [f"input {number}" for number in range(inputs)],
        "group_name": "shop",
    }


def draw(picture, **changes):
    return fits(**{**picture, **changes})


def lines_of(axes):
    return [np.array(line.get_xydata()) for line in axes.lines]


def test_each_panel_holds_its_groups_data_and_its_line():
    shown = picture(groups=5)
    panels = draw(shown).axes
    assert [panel.get_title(loc="left") for panel in panels] == shown["labels"]
    for group, panel in enumerate(panels):
        data, line = lines_of(panel)
        np.testing.assert_array_equal(data[:, 0], shown["inputs"][shown["groups"] == group, 0])
        np.testing.assert_allclose(line[:, 1], line[:, 0] * shown["weights"][group, 0] + shown["intercept"][group])


def test_only_the_first_groups_are_drawn_and_the_title_says_so():
    figure = draw(picture(groups=40))
    assert len(figure.axes) == 12
    assert figure.get_suptitle() == "target by input 0, one fit per shop, first 12 of 40"


def test_curves_follow_the_response():
    panel = draw(picture(), response=np.exp).axes[0]
    line = lines_of(panel)[1]
    shown = picture()
    np.testing.assert_allclose(line[:, 1], np.exp(line[:, 0] * shown["weights"][0, 0] + shown["intercept"][0]))


def test_a_fit_that_diverged_does_not_take_the_scale_with_it():
    shown = picture(groups=2)
    weights = shown["weights"].copy()
    weights[1] = 1e100
    figure = draw(shown, weights=weights, status=[Status.CONVERGED, Status.DIVERGED])
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
        gone = {"weights": np.full((40, inputs), np.inf), "intercept": np.full(40, -np.inf)}
        save(draw(shown, status=None, **gone), tmp_path / "a.png")


def test_names_are_drawn_as_they_are(tmp_path):
    figure = draw(picture(groups=2), labels=["$a_b$", "50% {x}"], input_names=["price in $ or $"])
    assert figure.axes[0].get_title(loc="left") == r"\$a_b\$"
    save(figure, tmp_path / "a.svg")


def test_plain_arrays_are_enough():
    figure = fits([1.0, 2.0, 3.0], [3.0, 5.0, 7.0], [2.0], [1.0])
    data, line = lines_of(figure.axes[0])
    np.testing.assert_array_equal(data, [[1, 3], [2, 5], [3, 7]])
    np.testing.assert_allclose(line[:, 1], 2 * line[:, 0] + 1)


def test_a_group_without_rows_leaves_its_panel_empty():
    figure = draw(picture(groups=3), groups=np.repeat([0, 0, 2], 12))
    assert [len(panel.lines) for panel in figure.axes] == [2, 0, 2]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"inputs": np.ones(3)}, r"inputs has shape \(3, 1\), target \(24,\)"),
        ({"weights": np.ones((2, 2))}, r"weights has shape \(2, 2\), inputs \(24, 1\)"),
        ({"intercept": np.ones(3)}, "intercept has 3 entries, weights 2 groups"),
        ({"groups": None}, "weights has 2 groups; pass groups="),
        ({"groups": np.full(24, 2)}, "groups must be whole numbers from 0 to 1"),
        ({"labels": ["one"]}, "labels has 1 entries; pass 2"),
        ({"input_names": ["a", "b"]}, "input_names has 2 entries; pass 1"),
        ({"status": [1, 7]}, "status has numbers that are no gdjax.Status"),
        ({"target": ["a"] * 24}, "target is a list that does not hold numbers"),
    ],
)
def test_what_does_not_fit_is_told(changes, told):
    with pytest.raises(ValueError, match=told):
        draw(picture(groups=2), **changes)
