"""The error bound holds for every way of rounding, and is no empty promise."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdjax import reference, rounding
from gdjax.bound import distance, error_bound, exact_descent
from gdjax.rounding import FORMATS, PRODUCTS, Rounding

ROUNDINGS = [Rounding(a, b, flush, p) for a in (0, 1) for b in (0, 1) for flush in (0, 1) for p in PRODUCTS]


def numbers(fmt, low, high):
    """Numbers of the format with exponents from `low` to `high`, zero among them."""
    scaled = st.builds(
        lambda m, e: float(np.array(math.ldexp(m, e - fmt.precision + 1)).astype(fmt.dtype)),
        st.integers(-(2**fmt.precision) + 1, 2**fmt.precision - 1),
        st.integers(low, high),
    )
    return st.one_of(st.just(0.0), scaled)


@st.composite
def cases(draw):
    fmt = draw(st.sampled_from(list(FORMATS.values())))
    wide = draw(st.booleans())
    # Wide: from subnormals to overflow. Narrow: inputs near 1 and a rate up to 2, some of them diverging.
    low, high = (fmt.emin - fmt.precision, fmt.emax) if wide else (-4, 4)
    w, x, t = (draw(numbers(fmt, low, high)) for _ in range(3))
    r = draw(numbers(fmt, low, high if wide else 0))
    return fmt, (w, x, t, r), draw(st.integers(0, 12)), draw(st.sampled_from(["squared", "residual"]))


def check_bound(case, how):
    fmt, (w, x, t, r), steps, loss = case
    arrays = [np.array([v], fmt.dtype) for v in (w, x, t, r)]
    computed = float(rounding.descend(*arrays, steps, loss=loss, rounding=how)[0])
    exact = exact_descent(w, x, t, r, steps, loss)
    bound = error_bound(*arrays, [exact], loss, flush=bool(how.flush))[0]
    assert not math.isnan(bound)
    assert distance(computed, exact.weight) <= bound


@given(cases(), st.sampled_from(ROUNDINGS))
@settings(max_examples=600)
def test_the_bound_holds(case, how):
    check_bound(case, how)


@pytest.mark.slow
@given(cases(), st.sampled_from(ROUNDINGS))
@settings(max_examples=100_000, deadline=None)
def test_the_bound_holds_long(case, how):
    check_bound(case, how)


@pytest.mark.parametrize("loss", ["squared", "residual"])
@pytest.mark.parametrize("dtype", [f.dtype for f in FORMATS.values()], ids=str)
def test_the_bound_is_within_a_factor_100_of_the_error(dtype, loss):
    rng = np.random.default_rng(0)
    w, x, t = rng.normal(size=(3, 300)).astype(dtype)
    r = rng.uniform(0, 0.5, 300).astype(dtype)
    exact = [exact_descent(*map(float, problem), 50, loss) for problem in zip(w, x, t, r, strict=True)]
    for how in (rounding.IEEE, rounding.FMA):
        bound = error_bound(w, x, t, r, exact, loss)
        computed = rounding.descend(w, x, t, r, 50, loss=loss, rounding=how)
        error = np.array([distance(float(c), e.weight) for c, e in zip(computed, exact, strict=True)])
        assert np.all(error <= bound)
        assert np.median(bound[error > 1e-300] / error[error > 1e-300]) < 100


def test_the_bound_catches_narrower_arithmetic():
    """float32 inside a float64 kernel leaves the bound of float64 by far."""
    rng = np.random.default_rng(1)
    w, x, t = rng.normal(size=(3, 50))
    r = np.full(50, 0.125)
    exact = [exact_descent(*problem, 20) for problem in zip(w, x, t, r, strict=True)]
    computed = rounding.descend(*(v.astype(np.float32) for v in (w, x, t, r)), 20)
    error = np.array([distance(float(c), e.weight) for c, e in zip(computed, exact, strict=True)])
    assert np.all(error > 1e6 * error_bound(w, x, t, r, exact))


def test_nothing_is_promised_after_overflow_and_all_at_zero_steps():
    one = np.ones(1, np.float32)
    exact = exact_descent(1.0, 1e30, 1.0, 1.0, 3)
    assert error_bound(one, 1e30 * one, one, one, [exact])[0] == math.inf
    assert error_bound(one, 2 * one, one, one, [exact_descent(1.0, 2.0, 1.0, 1.0, 0)])[0] == 0


rationals = st.fractions(min_value=-8, max_value=8).map(float)


@given(
    rationals, rationals, rationals, rationals, st.integers(0, 9), st.sampled_from(["squared", "residual"])
)
def test_the_exact_descent_is_the_reference_over_fractions(w, x, t, r, steps, loss):
    run = reference.descend(*map(Fraction, (w, x, t, r)), steps, loss=getattr(reference, f"{loss}_loss"))
    exact = exact_descent(w, x, t, r, steps, loss)
    assert exact.weight == run.weights[-1]
    assert exact.weights == pytest.approx([float(abs(v)) for v in run.weights], rel=1e-15)
    assert exact.residuals == pytest.approx(
        [float(abs(Fraction(t) - Fraction(x) * v)) for v in run.weights], rel=1e-15
    )


def test_unknown_loss_is_named():
    with pytest.raises(ValueError, match="cubic"):
        exact_descent(1.0, 2.0, 4.0, 0.1, 1, "cubic")
