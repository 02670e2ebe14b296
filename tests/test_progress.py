"""progress= and callback=: counts that are true, an end that can be gone on from, and results that do not change."""

import io

import jax
import numpy as np
import pytest
from problems import CASES, answers, same_bits

import gdjax
from gdjax import Status, kernel, progress, stop

STOPS = {"all steps": None, "stop rule": stop.gradient_below(1e-3)}


def batch():
    rng = np.random.default_rng(3)
    x = rng.uniform(0.02, 1, 3000).astype(np.float32)
    x[5] = 1e12  # diverges
    return np.zeros(3000, np.float32), (x, rng.normal(size=3000).astype(np.float32))


def run(steps=4000, **options):
    w, data = batch()
    return gdjax.minimize(kernel.squared_loss, w, data, learning_rate=0.3, steps=steps, **options)


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(progress, "PERIOD", 0.0)


@pytest.mark.parametrize("record", [None, 50])
@pytest.mark.parametrize("until", STOPS)
@pytest.mark.usefixtures("often")
def test_the_counts_are_true_and_the_results_the_same(until, record):
    seen = []
    out = run(stop=STOPS[until], record=record, callback=seen.append)
    plain = run(stop=STOPS[until], record=record)
    assert same_bits(answers(out), answers(plain))
    assert same_bits(out.record, plain.record)
    last, ended = seen[-1], out.summary()
    assert (last.problems, last.done) == (3000, 3000)
    assert (last.converged, last.diverged) == (ended["CONVERGED"], ended["DIVERGED"])
    assert len(seen) > 2
    for figure in ("updates", "done", "converged", "seconds"):
        assert sorted(getattr(counts, figure) for counts in seen) == [getattr(counts, figure) for counts in seen]
    assert all(counts.diverged <= 1 for counts in seen)
    assert seen[-1].seconds_left == 0


@pytest.mark.parametrize("record", [None, 50])
@pytest.mark.parametrize("until", STOPS)
@pytest.mark.usefixtures("often")
def test_a_callback_ends_the_run_and_what_is_there_is_kept(until, record):
    options = {"stop": STOPS[until], "record": record}
    early = run(callback=lambda counts: True, **options)
    status, steps = np.asarray(early.status), np.asarray(early.steps)
    going = status == Status.STOPPED
    assert going.sum() > 100
    assert early.summary()["STOPPED"] == going.sum()
    assert np.all(steps[going] < 4000)
    left = 4000 - early.state.total
    again = gdjax.minimize(
        kernel.squared_loss, early.weights, batch()[1], learning_rate=0.3, steps=left, resume=early.state, **options
    )
    assert same_bits(answers(again), answers(run(**options)))


@pytest.mark.usefixtures("often")
def test_slabs_not_begun_stay_where_they_started(monkeypatch):
    monkeypatch.setattr("gdjax.engine.rounds.SLAB", 1024)
    early = run(stop=stop.gradient_below(1e-3), callback=lambda counts: True, record=100)
    assert np.all(np.asarray(early.steps)[2000:] == 0)
    assert np.all(np.asarray(early.weights)[2000:] == 0)
    assert np.all(np.isnan(np.asarray(early.record)[2100:]))
    assert early.record.shape == (3000, 41)


def test_short_runs_show_nothing_and_pipes_stay_silent(capfd):
    case = CASES["squared"]
    w, data = case.batch(9)
    gdjax.minimize(case.loss, w, data, learning_rate=0.1, steps=5, progress=True)
    assert capfd.readouterr() == ("", "")


def test_the_bar_tells_counts_rate_and_time_left(monkeypatch):
    rich = pytest.importorskip("rich.console")
    screen = rich.Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(rich, "Console", lambda **_: screen)
    watch = progress.Watch(100, None, True)
    watch.took(5000)
    watch.tell([Status.CONVERGED] * 30 + [Status.DIVERGED] * 2, 32)
    watch.close()
    text = screen.file.getvalue()
    assert "32 of 100 done" in text
    assert "steps/s" in text
    assert "94% converged" in text
    assert "2 diverged" in text
    assert "left" in text


def test_a_callback_that_is_no_function():
    with pytest.raises(TypeError, match="callback is a str"):
        run(callback="stop")


@pytest.mark.parametrize("wrong", ["yes", 1, None])
def test_progress_is_yes_or_no(wrong, tmp_path):
    with pytest.raises(TypeError, match=f"progress is {wrong!r}, a .*; pass True for a bar, False for none"):
        run(progress=wrong)
    sink = tmp_path / "out"
    with pytest.raises(TypeError, match="progress is"):
        gdjax.solve_stream({"x": np.ones(3)}, sink, gdjax.kernel.squared_loss, 1.0, ("x", 1.0), steps=2, progress=wrong)
    assert not sink.exists()


def test_progress_inside_jit_is_yes_or_no():
    options = {"learning_rate": 0.1, "steps": 3, "progress": None}
    solve = lambda w: gdjax.minimize(gdjax.kernel.squared_loss, w, (w, w), **options).loss  # noqa: E731
    with pytest.raises(TypeError, match="progress is None, a NoneType"):
        jax.jit(solve)(np.ones(4, np.float32))


def test_an_error_in_the_callback_reaches_the_caller():
    def fail(counts):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(callback=fail)
