"""Pictures of descents: what they show is what they were given, and nothing global is touched."""

import subprocess
import sys

import numpy as np
import pytest
from pictures import PNG, RATES, legend, line, note, written

import gdjax
from gdjax import Status, plot, reference

# losses over steps


def losses(count=21, recorded=5):
    return np.arange(1.0, count + 1)[:, None] * 0.5 ** np.arange(recorded)


def test_the_median_is_the_median_problems_loss():
    axes = plot.loss_over_steps(losses(), [0, 10, 20, 30, 40]).axes[0]
    np.testing.assert_array_equal(line(axes, "median"), losses()[10])
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [0, 10, 20, 30, 40])


def test_a_problem_that_ended_keeps_its_final_loss():
    ended = losses()
    ended[5:, 2:] = np.nan  # the median problem among them
    final = np.full(21, 0.25)
    axes = plot.loss_over_steps(ended, final=final, status=np.full(21, Status.CONVERGED)).axes[0]
    np.testing.assert_array_equal(line(axes, "median"), [11, 5.5, 0.25, 0.25, 0.25])
    axes = plot.loss_over_steps(ended).axes[0]  # without it, the last one recorded
    assert line(axes, "median")[-1] > 1


def test_what_diverged_is_drawn_by_itself_and_moves_neither_median_nor_scale():
    bad = np.vstack([losses(), 10.0 ** (50 * np.arange(5)) * np.ones((12, 1))])
    bad[-1, 3:] = np.nan
    status = np.r_[np.zeros(21), np.full(12, Status.DIVERGED)].astype(int)
    figure = plot.loss_over_steps(bad, status=status)
    axes = figure.axes[0]
    np.testing.assert_array_equal(line(axes, "median"), losses()[10])
    assert axes.get_ylim()[1] < 1000
    assert note(axes) == "12 of 33 diverged, the first 8 drawn"
    assert sum(one.get_label() == "diverged" for one in axes.lines) == 8
    assert legend(figure) == ["median", "50% of problems", "90% of problems", "diverged"]


def test_problems_on_demand_have_their_names():
    figure = plot.loss_over_steps(losses(), problems=[0, 20], names=["best", "worst $"])
    np.testing.assert_array_equal(line(figure.axes[0], "best"), losses()[0])
    assert legend(figure)[-2:] == ["best", r"worst \$"]


def test_a_small_batch_is_drawn_problem_by_problem():
    figure = plot.loss_over_steps(losses(3))
    np.testing.assert_array_equal(line(figure.axes[0], "problem 2"), losses(3)[2])
    assert legend(figure) == ["problem 0", "problem 1", "problem 2"]


def test_a_solution_brings_its_record():
    x = np.linspace(1, 2, 8, dtype=np.float32)
    solution = gdjax.minimize(
        gdjax.kernel.squared_loss, 0 * x, (x, 2 * x), learning_rate=0.1, steps=30, record=10,
        stop=gdjax.stop.gradient_below(1e-3),
    )  # fmt: skip
    axes = plot.loss_over_steps(solution).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [0, 10, 20, 30])
    assert line(axes, "median")[-1] == pytest.approx(np.sort(np.asarray(solution.loss))[4], rel=1e-6)
    plain = gdjax.minimize(gdjax.kernel.squared_loss, 0 * x, (x, 2 * x), learning_rate=0.1, steps=30)
    with pytest.raises(ValueError, match="run minimize with record=k"):
        plot.loss_over_steps(plain)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"record": np.ones(3)}, r"record has shape \(3,\); pass the losses of N problems"),
        ({"record": np.ones((0, 3))}, "pass at least one problem"),
        ({"steps": [0, 1]}, r"steps has shape \(2,\), record \(21, 5\)"),
        ({"final": [0, 1]}, r"final has shape \(2,\)"),
        ({"status": [0, 1]}, r"status has shape \(2,\)"),
        ({"record": {"loss": losses()}}, "record holds several figures"),
        ({"steps": [0, 1, 2, 3, np.nan]}, "steps has entries that are not finite"),
        ({"problems": 3}, "problems=3; pass a list"),
        ({"problems": [21]}, "problems has 21; there are problems 0 to 20"),
        ({"problems": range(9)}, "holds up to 6"),
        ({"problems": [1], "names": ["a", "b"]}, "names has 2 entries, 1 problems"),
    ],
)
def test_records_that_do_not_fit_are_told(arguments, told):
    with pytest.raises(ValueError, match=told):
        plot.loss_over_steps(**{"record": losses(), **arguments})


@pytest.mark.parametrize(
    "record",
    [
        np.full((30, 5), np.nan),
        np.full((30, 5), np.inf),
        np.zeros((30, 5)),
        -losses(),
        losses(40, 1),
        losses(1, 1),
        np.maximum(losses() - 4, 0),
        10.0 ** (np.arange(200) / 2) * losses(10, 200),
    ],
)
def test_records_of_every_kind_are_drawn(tmp_path, record):
    assert written(plot.loss_over_steps(record), tmp_path)


# steps to convergence


def test_every_problem_that_converged_is_in_a_bar_and_the_others_are_told():
    rng = np.random.default_rng(0)
    steps = rng.lognormal(4, 2, 1000).astype(int)
    status = np.r_[np.full(900, 1), np.full(70, 0), np.full(30, 2)]
    axes = plot.steps_to_convergence(steps, status).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 900
    assert axes.get_xscale() == "log"
    assert note(axes) == "900 of 1,000 converged, 70 took all steps, 30 diverged"


def test_bars_hold_whole_numbers_of_steps():
    axes = plot.steps_to_convergence([1, 2, 2, 3, 3, 3, 9]).axes[0]
    assert {bar.get_x() + 0.5: bar.get_height() for bar in axes.patches if bar.get_height()} == {1: 1, 2: 2, 3: 3, 9: 1}
    assert axes.get_xscale() == "linear"
    assert "median 3" in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("steps", [[0], [17], np.full(142, 1), [0, 0, 500, 90_000], np.arange(10_000)])
def test_steps_of_every_kind_are_drawn(tmp_path, steps):
    assert written(plot.steps_to_convergence(steps), tmp_path)


def test_none_converged(tmp_path):
    figure = plot.steps_to_convergence([5, 5], [Status.RAN_ALL_STEPS, Status.DIVERGED])
    assert "no problem converged" in [text.get_text() for text in figure.axes[0].texts]
    assert written(figure, tmp_path)


@pytest.mark.parametrize("steps", [[], [1.5], [-1], ["a"], [np.nan]])
def test_steps_that_are_none_are_told(steps):
    with pytest.raises(ValueError, match="steps "):
        plot.steps_to_convergence(steps)


# the descent of one problem


@pytest.mark.parametrize("loss", [reference.residual_loss, reference.squared_loss, gdjax.kernel.squared_loss])
def test_the_points_lie_on_the_curve(loss):
    path = reference.descend(1.0, 2.0, 4.0, 0.1, 4).weights
    axes = plot.descent(loss, path, (2.0, 4.0)).axes[0]
    (points,) = (one for one in axes.lines if one.get_label() == "after each step")
    np.testing.assert_array_equal(points.get_xdata(), path[1:])
    np.testing.assert_allclose(points.get_ydata(), [float(loss(w, 2.0, 4.0)) for w in path[1:]], rtol=1e-6)
    curve = axes.lines[0]
    np.testing.assert_allclose(
        curve.get_ydata()[::40], [float(loss(w, 2.0, 4.0)) for w in curve.get_xdata()[::40]], rtol=1e-5, atol=1e-6
    )


def test_the_slope_is_the_derivative():
    axes = plot.descent(reference.squared_loss, [1.0, 1.4], (2.0, 4.0)).axes[0]
    (tangent,) = (one for one in axes.lines if one.get_label() == "slope")
    assert np.diff(tangent.get_ydata()) / np.diff(tangent.get_xdata()) == pytest.approx(-4, rel=1e-6)


def test_a_descent_that_runs_away_is_cut_and_says_so(tmp_path):
    path = reference.descend(1.0, 2.0, 4.0, 0.6, 200).weights
    figure = plot.descent(reference.squared_loss, path, (2.0, 4.0))
    assert note(figure.axes[0]) == "the 195 steps after step 5 lie outside"
    assert figure.axes[0].get_ylim()[1] < 200
    assert written(figure, tmp_path)


def test_two_weights_make_contours(tmp_path):
    path = reference.descend((1.0, -1.0), (1.0, 2.0), 3.0, 0.1, 5).weights
    figure = plot.descent(reference.squared_loss, path, ((1.0, 2.0), 3.0))
    axes = figure.axes[0]
    (points,) = (one for one in axes.lines if one.get_label() == "after each step")
    np.testing.assert_array_equal(points.get_xydata(), path[1:])
    assert written(figure, tmp_path)


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [1.0, 1.0 + 1e-9], [1.0, np.nan]])
def test_descents_of_every_kind_are_drawn(tmp_path, weights):
    assert written(plot.descent(reference.squared_loss, weights, (2.0, 4.0)), tmp_path)
    assert written(plot.descent(lambda w: 0 * w, weights), tmp_path)


@pytest.mark.parametrize("weights", [[], np.ones((3, 3)), np.ones((2, 2, 2)), [np.nan, 1.0], 1.0])
def test_paths_that_are_none_are_told(weights):
    with pytest.raises(ValueError, match="weights that one problem visited"):
        plot.descent(reference.squared_loss, weights, (2.0, 4.0))


def test_what_is_wrong_with_a_loss_or_its_data_is_told():
    with pytest.raises(ValueError, match="data is a float; pass a tuple"):
        plot.descent(reference.squared_loss, [1.0, 2.0], 2.0)
    with pytest.raises(ValueError, match="return a scalar"):
        plot.descent(lambda w, x: w * x, [1.0, 2.0], (np.ones(3),))
    with pytest.raises(ZeroDivisionError):
        plot.descent(lambda w: 1 / 0, [1.0, 2.0])


# what all have in common


def test_svg_is_the_same_file_every_time(tmp_path):
    for name in ("a.svg", "b.svg"):
        plot.save(plot.final_loss({"rate": RATES}, [1.0, 2.0, np.inf, np.inf]), tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first.startswith(b"<?xml")
    assert b"dc:date" not in first
    assert first == second


def test_names_are_drawn_as_they_are(tmp_path):
    figure = plot.final_loss({"price in $ or $": [0.1, 0.2], "$b$": [0.5, 0.6]}, np.ones((2, 2)), title="$t$ {x}")
    assert figure.axes[0].get_xlabel() == r"price in \$ or \$"
    plot.save(figure, tmp_path / "a.svg")


@pytest.mark.parametrize("name", ["a.pdf", "missing/a.png"])
def test_what_cannot_be_written_is_told(tmp_path, name):
    with pytest.raises(ValueError, match=name.rpartition("/")[2]):
        plot.save(plot.steps_to_convergence([1]), tmp_path / name)


def test_a_notebook_shows_the_figure():
    assert plot.steps_to_convergence([1, 2])._repr_png_().startswith(PNG)


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pyplot_is_never_imported():
    run(
        "import sys; from gdjax import plot; plot.fits([1.0, 2.0], [1.0, 2.0], [1.0]); plot.steps_to_convergence([1]);"
        "plot.final_loss({'a': [0.1]}, [1.0]); plot.descent(lambda w: w * w, [1.0]); plot.loss_over_steps([[1.0]]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )


def test_without_matplotlib_the_extra_is_named():
    run(
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "import gdjax.plot\n"
        "try: gdjax.plot.steps_to_convergence([1])\n"
        "except ModuleNotFoundError as error: assert 'pip install \"gdjax[cli]\"' in str(error), error\n"
        "else: raise AssertionError"
    )
