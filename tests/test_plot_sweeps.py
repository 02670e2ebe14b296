"""The final loss over swept axes: lines, heat maps and points show what they were given."""

import jax.numpy as jnp
import numpy as np
import pytest
from pictures import RATES, legend, line, note, written

from gdjax import plot


def test_the_line_is_the_median_over_the_rest_and_the_best_is_named():
    final = np.arange(20.0).reshape(4, 5)[[3, 1, 0, 2]]
    figure = plot.final_loss({"learning_rate": RATES, "seed": range(5)}, final)
    axes = figure.axes[0]
    np.testing.assert_array_equal(line(axes, "median"), np.median(final, axis=1))
    assert axes.get_xscale() == "log"
    assert "best: 0.1, 2" in legend(figure)
    assert note(axes) == "5 problems each: seed"


def test_an_axis_is_drawn_in_ascending_order():
    axes = plot.final_loss({"rate": RATES[::-1]}, [4.0, 3.0, 2.0, 1.0]).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), RATES)
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [1, 2, 3, 4])


def test_rates_at_which_over_half_diverge_are_hatched_and_have_no_median():
    final = np.ones((4, 5))
    final[2, :2] = np.inf  # a minority
    final[3, :3] = np.nan
    figure = plot.final_loss({"rate": RATES, "seed": range(5)}, final)
    top, strip = figure.axes
    np.testing.assert_array_equal(line(top, "median"), [1, 1, 1, np.nan])
    (hatched,) = (patch for patch in top.patches if patch.get_label() == "over half diverge")
    assert hatched.get_x() == pytest.approx(np.sqrt(0.1 * 1.0))
    assert note(top).startswith("5 of 20 diverged")
    shares = [bar.get_height() for bar in strip.patches]
    np.testing.assert_allclose(shares, [1, 1, 0.6, 0.4, 0, 0, 0.4, 0.6])


def test_a_loss_that_runs_away_without_overflowing_leaves_the_picture():
    final = np.array([0.4, 0.25, 0.25, 1e30])[:, None] * np.linspace(1, 1.1, 5)
    axes = plot.final_loss({"rate": RATES, "seed": range(5)}, final).axes[0]
    assert axes.get_ylim()[1] < 2
    np.testing.assert_array_equal(line(axes, "median"), final[:, 2])
    figure = plot.final_loss({"rate": RATES, "momentum": RATES}, np.full((4, 4), 0.25) + np.diag([0, 0.1, 1e30, 1e40]))
    norm = figure.axes[0].collections[0].norm
    assert norm.vmax < 1e4


def test_the_status_says_what_diverged():
    status = np.array([1, 1, 0, 2])  # the last finite weights may have a finite loss
    figure = plot.final_loss({"rate": RATES}, [1.0, 1.0, 1.0, 0.1], status)
    assert "best: 0.001, 1" in legend(figure)
    assert legend(figure)[-3:] == ["converged", "took all steps", "diverged"]


def test_two_axes_make_a_heat_map_of_medians():
    momenta, seeds = [0.0, 0.5, 0.9], range(5)
    final = np.arange(60.0).reshape(4, 3, 5)
    final[3] = np.inf
    figure = plot.final_loss({"learning_rate": RATES, "momentum": momenta, "seed": seeds}, final)
    axes = figure.axes[0]
    cells = np.ma.getdata(axes.collections[0].get_array())
    np.testing.assert_array_equal(cells[:, :3], np.median(final, axis=2).T[:, :3])
    assert np.isnan(cells[:, 3]).all()
    assert axes.get_xlabel() == "learning_rate"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "0.5", "0.9"]
    assert legend(figure) == ["over half diverge", "best: 0.001 and 0, 2"]


def test_over_names_the_axes_and_their_order():
    final = np.arange(60.0).reshape(4, 3, 5)
    sweep = {"learning_rate": RATES, "optimizer": ["sgd", "adam", "lion"], "seed": range(5)}
    axes = plot.final_loss(sweep, final, over="optimizer").axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), np.sort(final.swapaxes(0, 1).reshape(3, -1))[:, 10])
    assert [text.get_text() for text in axes.get_xticklabels()] == sweep["optimizer"]
    axes = plot.final_loss(sweep, final, over=("seed", "optimizer")).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("seed", "optimizer")


def test_a_zero_among_powers_of_ten_does_not_squeeze_them():
    axes = plot.final_loss({"l2": [0, 1e-4, 1e-2, 1.0]}, [1.0, 2.0, 3.0, 4.0]).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [0, 1, 2, 3])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "0.0001", "0.01", "1"]


def test_random_draws_are_points():
    rng = np.random.default_rng(0)
    drawn = {"learning_rate": 10 ** rng.uniform(-4, 0, 50), "momentum": rng.uniform(0, 1, 50)}
    final = drawn["learning_rate"].copy()
    final[0] = np.inf
    axes = plot.final_loss(drawn, final).axes[0]
    assert len(axes.collections[0].get_offsets()) == 49
    assert axes.get_xscale() == "log"
    axes = plot.final_loss(drawn, final, over="momentum").axes[0]
    np.testing.assert_array_equal(line(axes, "one draw"), final[1:])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"loss": np.ones((4, 3))}, r"loss has shape \(4, 3\), axes has rate 4, seed 5; pass loss as \(4, 5\)"),
        ({"axes": {}}, "axes is empty"),
        ({"axes": [RATES]}, "axes is a list"),
        ({"axes": {"rate": 0.1, "seed": range(5)}}, r"axes\['rate'\] is 0.1, without a length"),
        ({"over": 0}, "over names 0; the axes are rate, seed"),
        ({"over": "rat"}, "over names 'rat'; the axes are rate, seed"),
        ({"over": ["rate", "rate"]}, "two different ones"),
        ({"over": []}, "over has 0 names"),
        ({"status": np.ones(4)}, r"status has shape \(4,\)"),
    ],
)
def test_sweeps_that_do_not_fit_are_told(arguments, told):
    good = {"axes": {"rate": RATES, "seed": range(5)}, "loss": np.ones((4, 5))}
    with pytest.raises(ValueError, match=told):
        plot.final_loss(**{**good, **arguments})


@pytest.mark.parametrize(
    ("axes", "loss"),
    [
        ({"rate": RATES, "seed": range(3)}, np.full((4, 3), np.nan)),
        ({"rate": [0.1]}, [0.0]),
        ({"rate": RATES, "momentum": RATES}, np.full((4, 4), np.inf)),
        ({"rate": RATES, "momentum": RATES}, np.zeros((4, 4))),
        ({"rate": RATES, "momentum": RATES}, 10.0 ** np.arange(0, 320, 20).reshape(4, 4)),
        ({"$x$" * 40: ["a" * 90, "b"], "c": [0.5]}, [[-1.0], [2.0]]),
        ({"rate": RATES, "momentum": RATES}, np.full(4, np.inf)),
        ({"rate": jnp.asarray(RATES), "data": [(1, 2), "x", None]}, jnp.ones((4, 3))),
    ],
)
def test_sweeps_of_every_kind_are_drawn(tmp_path, axes, loss):
    assert written(plot.final_loss(axes, loss), tmp_path)
    assert written(plot.final_loss(axes, loss, over=list(axes)), tmp_path)
