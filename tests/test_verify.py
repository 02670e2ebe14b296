"""`verify` passes right kernels and says of wrong ones what is wrong."""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdjax.checks import find_rounding
from gdjax.plan import Plan
from gdjax.selfcheck import kernel_of
from gdjax.trial import Trial, extreme, ordinary, same_bits
from gdjax.verify import load_kernel, verify


def right(w, x, t, learning_rate, steps):
    """Gradient descent on ½(t − x·w)² in NumPy."""
    for _ in range(steps):
        w = w - learning_rate * -(x * (t - x * w))
    return w


def plain_python(w, x, t, learning_rate, steps):
    rates = [learning_rate] * len(w) if np.ndim(learning_rate) == 0 else learning_rate
    answer = []
    for weight, value, target, rate in zip(w, x, t, rates, strict=True):
        for _ in range(steps):
            weight = weight - rate * -(value * (target - value * weight))
        answer.append(weight)
    return answer


def python_floats(w, x, t, learning_rate, steps):
    rates = np.broadcast_to(learning_rate, w.shape)
    return plain_python(w.tolist(), x.tolist(), t.tolist(), rates.tolist(), steps)


def residual(w, x, t, learning_rate, steps):
    for _ in range(steps):
        w = w - learning_rate * -x
    return w


@jax.jit
def _jax_steps(w, x, t, learning_rate, steps):
    def body(_, w):
        return w - learning_rate * jax.vmap(jax.grad(lambda w, x, t: 0.5 * (t - x * w) ** 2))(w, x, t)

    return jax.lax.fori_loop(0, steps, body, w)


def in_jax(w, x, t, learning_rate, steps):
    rates = jnp.broadcast_to(jnp.asarray(learning_rate, w.dtype), w.shape)
    return _jax_steps(jnp.asarray(w), jnp.asarray(x), jnp.asarray(t), rates, steps)


@pytest.mark.parametrize("loss", ["squared", pytest.param("residual", marks=pytest.mark.slow)])
def test_the_shipped_engine(loss):
    """Every plan, all shards, scalar and vector weights: the bits of the reference."""
    report = verify(loss=loss, device="cpu", quick=True)
    assert report.passed, str(report)
    assert {"plans", "shards", "vector weights"} <= {check.name for check in report.checks}
    assert line(report, "shards").figures["devices"] == [2]
    assert "subnormals flushed" in line(report, "agreement").detail


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("magnitudes", [ordinary, extreme])
@pytest.mark.parametrize("loss", ["squared", "residual"])
def test_the_shipped_engine_on_100000_problems(loss, magnitudes, dtype):
    """50 steps, every bit in the rounding that the report names; no update to weights that are not finite."""
    problems = magnitudes(dtype, 100_000, np.random.default_rng(11))
    trial = own_trial(loss, dtype)
    assert trial.rounding is not None
    assert trial.keeps_finite
    wrong = ~same_bits(trial.run(problems, 50), trial.expected(problems, 50))
    assert np.count_nonzero(wrong) == 0


@functools.cache
def own_trial(loss, dtype):
    """gdjax's own engine under its default plan, its rounding found."""
    trial = Trial(kernel_of(loss, "cpu"), loss, np.dtype(dtype), jax.devices("cpu")[0])
    find_rounding(trial)
    return trial


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_batch_at_any_place_under_any_plan(data):
    """A search for a problem whose bits depend on anything but itself."""
    dtype = data.draw(st.sampled_from(["float32", "float64"]))
    count, steps = data.draw(st.integers(1, 600)), data.draw(st.integers(1, 9))
    # Few shapes, since each is compiled; any number of steps and problems goes through each.
    plan = Plan(*data.draw(st.sampled_from([("lanes", 32, 1, 1), ("lanes", 64, 2, 4), ("lanes", 256, 1, 3)])))
    problems = extreme(dtype, 600, np.random.default_rng(data.draw(st.integers(0, 9))))
    place = data.draw(st.integers(0, 600 - count))
    part = problems.take(slice(place, place + count))
    trial = own_trial("squared", dtype)
    trial = dataclasses.replace(trial, kernel=kernel_of("squared", "cpu", plan))
    assert np.all(same_bits(trial.run(part, steps), trial.expected(part, steps)))


def line(report, name, dtype="float32"):
    return next(c for c in report.checks if c.name == name and c.subject == dtype)


@pytest.mark.parametrize("kernel", [right, plain_python, python_floats])
def test_right_kernels_pass_and_follow_ieee(kernel):
    report = verify(kernel, quick=True)
    assert report.passed, str(report)
    assert "bit-equal under IEEE:" in line(report, "agreement", "float64").detail


def test_a_kernel_of_jax_passes_and_follows_fma():
    report = verify(in_jax, quick=True, device="cpu")
    assert report.passed, str(report)
    for dtype in ("float32", "float64"):
        assert "bit-equal under FMA, subnormals flushed" in line(report, "agreement", dtype).detail
        assert line(report, "subnormals", dtype).figures == {"kernel_flushes": True, "device_flushes": True}


def test_the_residual_loss():
    report = verify(residual, loss="residual", quick=True)
    assert report.passed, str(report)
    assert "w 1 → 1.2, loss 2 → 1.6" in line(report, "tutorial").detail
    assert not verify(right, loss="residual", quick=True).passed


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_formats(dtype):
    """NumPy computes float16 operation by operation, and so does ml_dtypes bfloat16."""

    def kernel(w, x, t, r, steps):
        return right(w, x, t, np.asarray(r, w.dtype), steps)

    report = verify(kernel, dtypes=[dtype], quick=True)
    assert report.passed, str(report)


# Ten kernels, each wrong in one way: the kernel, the check that must fail, and what its line must say.


def wrong_sign(w, x, t, r, steps):
    return right(w, x, t, -r, steps)


def one_step_short(w, x, t, r, steps):
    return right(w, x, t, r, max(steps - 1, 0))


def one_step_more(w, x, t, r, steps):
    return right(w, x, t, r, steps + 1)


def rate_squared(w, x, t, r, steps):
    return right(w, x, t, r * r, steps)


def narrowed(w, x, t, r, steps):
    answer = right(*(np.asarray(v, np.float32) for v in (w, x, t, r)), steps)
    return answer.astype(w.dtype)


def narrowed_inside(w, x, t, r, steps):
    """Only the gradient is float32."""
    for _ in range(steps):
        gradient = -(x.astype(np.float32) * (t - x * w).astype(np.float32))
        w = w - r * gradient.astype(w.dtype)
    return w


def another_order(w, x, t, r, steps):
    """The sum multiplied out: w(1 − r·x²) + r·x·t."""
    for _ in range(steps):
        w = w * (1 - r * x * x) + r * x * t
    return w


def flushing(w, x, t, r, steps):
    smallest = np.finfo(w.dtype).tiny

    def flush(v):
        return np.where(np.abs(v) < smallest, np.copysign(np.zeros_like(v), v), v)

    w, x, t, r = (flush(np.asarray(v, w.dtype)) for v in (w, x, t, r))
    for _ in range(steps):
        w = flush(w - flush(r * flush(-flush(x * flush(t - flush(x * w))))))
    return w


def last_skipped(w, x, t, r, steps):
    answer = right(w, x, t, r, steps)
    answer = np.array(answer)
    answer[-1] = w[-1]
    return answer


def lanes_swapped(w, x, t, r, steps):
    answer = np.array(right(w, x, t, r, steps))
    if len(answer) > 128:
        answer[[127, 128]] = answer[[128, 127]]
    return answer


def wrong_beyond_65536(w, x, t, r, steps):
    answer = np.array(right(w, x, t, r, steps))
    answer[65_536:] = w[65_536:]
    return answer


def uninitialised(w, x, t, r, steps):
    """The last tile of 64 that is not full is never written."""
    answer = np.empty_like(w)
    full = len(w) // 64 * 64
    answer[:full] = right(w, x, t, r, steps)[:full]
    return answer


WRONG = [
    (wrong_sign, "agreement", "wrong sign"),
    (one_step_short, "agreement", "takes 49 steps instead of 50"),
    (one_step_more, "agreement", "takes 51 steps instead of 50"),
    (rate_squared, "agreement", "square of the learning rate"),
    (narrowed, "agreement", "float32 inside a float64 kernel"),
    (narrowed_inside, "agreement", "float32 inside a float64 kernel"),
    (another_order, "agreement", "another order of operations"),
    (flushing, "subnormals", "flushes them to zero, though NumPy on this host keeps them"),
    (last_skipped, "agreement", "last problem, 4,999, is wrong"),
    (lanes_swapped, "agreement", "127 and 128 hold each other's result"),
    (wrong_beyond_65536, "batch sizes", "every wrong problem lies at 65,536 or beyond"),
    (uninitialised, "agreement", "never written"),
]


@pytest.mark.parametrize(("kernel", "check", "says"), WRONG, ids=[kernel.__name__ for kernel, _, _ in WRONG])
def test_wrong_kernels_are_caught(kernel, check, says):
    report = verify(kernel, dtypes=["float64"], quick=True)
    assert not report.passed
    found = line(report, check, "float64")
    assert found.passed is False
    assert says in found.detail


def test_only_the_flushing_is_held_against_a_flushing_kernel():
    report = verify(flushing, dtypes=["float32"], quick=True)
    assert [check.name for check in report.failures] == ["subnormals"]
    assert "IEEE, subnormals flushed" in line(report, "agreement").detail
    assert verify(flushing, dtypes=["float32"], quick=True, claim="bound").passed


def test_another_order_may_claim_the_bound():
    """Products multiplied out follow no declared order: such a kernel keeps the bound only."""

    def apart(w, x, t, r, steps):
        for _ in range(steps):
            w = w + (r * x * t - r * x * (x * w))
        return w

    assert not verify(apart, dtypes=["float64"], quick=True).passed
    report = verify(apart, dtypes=["float64"], quick=True, claim="bound")
    assert "ULP from" in line(report, "agreement", "float64").detail


@pytest.mark.parametrize(
    ("kernel", "check", "says"),
    [
        (lambda w, x, t, r, steps: w[:-1], "result", "returned shape (999,)"),
        (lambda w, x, t, r, steps: w.astype(np.float32), "result", "returned float32 for float64 inputs"),
        (lambda w, x, t, r, steps: [1 / 0], "result", "raised ZeroDivisionError"),
        (
            lambda w, x, t, r, steps: right(w, x, t, np.asarray(r) * 2, steps),
            "agreement",
            "twice the right one",
        ),
        (lambda w, x, t, r, steps: w, "agreement", "returns the start weights"),
        (lambda w, x, t, r, steps: right(w, x, t, np.mean(r), steps), "one rate or many", ""),
    ],
    ids=["short", "narrow", "raises", "twice", "idle", "mean rate"],
)
def test_more_wrong_kernels(kernel, check, says):
    report = verify(kernel, dtypes=["float64"], quick=True)
    assert not report.passed
    if says:
        assert says in line(report, check, "float64").detail


def test_written_inputs_are_named():
    def in_place(w, x, t, r, steps):
        w[:] = right(w, x, t, r, steps)
        return w

    found = line(verify(in_place, dtypes=["float32"], quick=True), "inputs kept")
    assert (found.passed, found.detail) == (False, "the kernel writes to its input w")


def test_a_number_as_rate_may_not_change_the_dtype():
    def widened(w, x, t, r, steps):
        return right(w, x, t, np.float64(r) if np.ndim(r) == 0 else r, steps)

    found = line(verify(widened, dtypes=["float32"], quick=True), "one rate or many")
    assert (found.passed, found.detail) == (
        False,
        "returns float64 for a number as rate, float32 for an array",
    )


def test_results_that_change_from_run_to_run_are_caught():
    runs = iter(range(10**9))

    def moody(w, x, t, r, steps):
        answer = np.array(right(w, x, t, r, steps))
        answer[next(runs) % len(answer)] += 1
        return answer

    found = line(verify(moody, dtypes=["float32"], quick=True), "repeatable")
    assert found.passed is False


def test_a_mixing_kernel_is_caught():
    """One bad problem spoils the batch: a global stop."""

    def mixing(w, x, t, r, steps):
        answer = right(w, x, t, r, steps)
        return answer if np.all(np.isfinite(answer)) else w

    report = verify(mixing, dtypes=["float32"], quick=True)
    assert line(report, "neighbours").passed is False


@pytest.mark.slow
def test_more_than_two_gib_per_array():
    report = verify(dtypes=["float32"], device="cpu", patience=600)
    assert line(report, "over 2^31 bytes").passed, str(report)


def test_slow_kernels_get_what_they_can_do(monkeypatch):
    from gdjax.trial import Trial

    monkeypatch.setattr(Trial, "fits", lambda self, count, steps, seconds: 128)
    report = verify(right, dtypes=["float32"], quick=True)
    assert line(report, "agreement").figures["problems"] == 128


def test_report_as_json_and_text():
    report = verify(right, dtypes=["float32"], quick=True, seed=7)
    content = json.loads(report.to_json())
    assert content["passed"] is True
    assert content["seed"] == 7
    assert {"versions", "driver", "device_kind", "machine"} <= set(content["environment"])
    assert {check["name"] for check in content["checks"]} == {check.name for check in report.checks}
    assert content["checks"][2]["figures"]["problems"] == 5000
    assert all(len(text) <= 110 for text in str(report).splitlines())


def test_a_kernel_by_name(tmp_path, monkeypatch):
    (tmp_path / "kernels_of_mine.py").write_text("def mine(w, x, t, r, steps):\n    return w\nnumber = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert load_kernel("kernels_of_mine:mine")(1, 2, 3, 4, 5) == 1
    for name, match in (
        ("kernels_of_mine", "must be module:function"),
        ("kernels_of_mine:no", "has no 'no'"),
        ("kernels_of_mine:number", "not a function"),
        ("no_such_module_here:f", "cannot import"),
    ):
        with pytest.raises(ValueError, match=match):
            load_kernel(name)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"kernel": 3}, "callable"),
        ({"loss": "cubic"}, "cubic"),
        ({"claim": "magic"}, "magic"),
        ({"dtypes": ["int32"]}, "int32"),
        ({"dtypes": []}, "empty"),
        ({"device": "gpu:77"}, "gpu"),
    ],
)
def test_bad_input_is_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        verify(**({"kernel": right} | arguments))
