"""The plain-Python tutorial: exact over Fractions, the same program over floats and Decimals."""

import subprocess
import sys
from decimal import Decimal
from fractions import Fraction as F

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdjax import reference as ref

rationals = st.fractions(min_value=-50, max_value=50, max_denominator=64)


def test_tutorial_is_exact_over_fractions():
    run = ref.descend(F(1), F(2), F(4), F(1, 10), 1, loss=ref.residual_loss)
    assert run.weights == (1, F(6, 5))
    assert run.losses == (2, F(8, 5))


def test_tutorial_over_decimals_and_floats():
    run = ref.descend(Decimal(1), Decimal(2), Decimal(4), Decimal("0.1"), 1, loss=ref.residual_loss)
    assert run.weights[-1] == Decimal("1.2")
    assert run.losses[-1] == Decimal("1.6")
    run = ref.descend(1.0, 2.0, 4.0, 0.1, 1, loss=ref.residual_loss)
    assert (run.weights[-1], run.losses[-1]) == (1.2, 1.6)


def test_float_residual_descent_misses_zero_at_step_five():
    """Five steps are w = 2 on paper, one ULP below in float64: a stop rule meets arithmetic, not algebra."""
    assert ref.descend(1.0, 2.0, 4.0, 0.1, 5, loss=ref.residual_loss).weights[-1] == 1.9999999999999998
    assert ref.descend(F(1), F(2), F(4), F(1, 10), 5, loss=ref.residual_loss).weights[-1] == 2


@given(rationals, rationals, rationals)
def test_difference_quotient_tends_to_the_derivative(w, x, t):
    quotients = ref.difference_quotients(ref.squared_loss, w, x, t, F(1), 12)
    slope = ref.partial_derivative(ref.squared_loss, w, x, t)
    # The quotient of a parabola with curvature x² misses its slope by exactly h·x²/2.
    assert [q - slope for q in quotients] == [x * x / 2 / 2**k for k in range(13)]


@given(rationals, rationals, rationals)
def test_difference_quotient_of_the_residual_is_minus_x_for_every_h(w, x, t):
    assert set(ref.difference_quotients(ref.residual_loss, w, x, t, F(1), 6)) == {-x}


def test_difference_quotient_along_one_weight_of_a_vector():
    w, x, t = [F(1), F(-2), F(3)], [F(4), F(5), F(6)], F(7)
    for i in range(3):
        slope = ref.partial_derivative(ref.squared_loss, w, x, t, i)
        quotient = ref.difference_quotient(ref.squared_loss, w, x, t, F(1, 10**9), i)
        assert abs(quotient - slope) == x[i] ** 2 / (2 * 10**9)


@given(rationals, rationals, rationals, rationals, st.integers(0, 12))
def test_squared_descent_has_the_closed_form(w, x, t, r, steps):
    """The residual shrinks by the factor 1 − r·x² each step."""
    run = ref.descend(w, x, t, r, steps)
    assert ref.residual_loss(run.weights[-1], x, t) == (t - x * w) * (1 - r * x * x) ** steps
    assert len(run.weights) == len(run.losses) == steps + 1


def test_a_thousand_weights():
    x = [F(i % 7 - 3) for i in range(1000)]
    norm = sum(x_i * x_i for x_i in x)
    run = ref.descend([F(0)] * 1000, x, F(5), 1 / norm, 1)
    assert run.losses[-1] == 0  # r = 1/|x|² lands on the target in one step
    assert run.weights[-1] == tuple(x_i * 5 / norm for x_i in x)


def test_sums_run_from_left_to_right():
    assert ref.predict([1.0, 1.0, 1.0], [1e16, 1.0, -1e16]) == 0.0
    assert ref.predict([1.0, 1.0, 1.0], [1e16, -1e16, 1.0]) == 1.0
    assert str(ref.predict([1.0], [-0.0])) == "-0.0"  # no +0 to begin with


def test_zero_steps_returns_the_start():
    run = ref.descend(1.0, 2.0, 4.0, 0.1, 0)
    assert run.weights == (1.0,)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ref.descend(1.0, 2.0, 4.0, 0.1, -1), "steps"),
        (lambda: ref.predict([1.0, 2.0], [1.0]), "equally long"),
        (lambda: ref.predict(1.0, [1.0]), "equally long"),
        (lambda: ref.predict([], []), "not empty"),
        (lambda: ref.partial_derivative(lambda w, x, t: w, 1.0, 1.0, 1.0), "loss must be"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_the_reference_stands_alone():
    """Loaded as a bare file it brings in neither JAX nor NumPy."""
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); "
        "sys.exit(any(m.split('.')[0] in ('jax', 'numpy') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code, ref.__file__], check=False).returncode == 0
