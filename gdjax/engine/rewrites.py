"""Operations that a compiler lacks, or has only in a slow form, written with those it has.

Each takes arrays of one shape and `zero`, a −0.0 known at run time only, and returns an array of that shape. Errors are
in units of the last place (ulp) of the result for float32 arguments, over what the operations they use bring in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax


def one_at_run_time(x: Any, zero: Any) -> Any:
    """Ones that a compiler does not know: it would simplify `(x + 1) − 1` to `x`."""
    return lax.full_like(x, 1) + lax.convert_element_type(zero, x.dtype)


def log1p(x: Any, zero: Any) -> Any:
    """`log(1 + x) = x · log(u) / (u − 1)` with `u = 1 + x` rounded: a few ulp, as a vector.

    XLA's own log1p branches, which compilers cannot turn into vector code. (Kahan's form: D. Goldberg, What Every
    Computer Scientist Should Know About Floating-Point Arithmetic, 1991, theorem 4.)
    """
    one = one_at_run_time(x, zero)
    u = x + one
    rest = u - one
    safe = lax.select(rest == 0, one, rest)
    near = lax.select(rest == 0, x, lax.log(u) * (x / safe))
    return lax.select(u == jnp.inf, u, near)


def expm1(x: Any, zero: Any) -> Any:
    """`exp(x) − 1 = (u − 1) · x / log(u)` with `u = exp(x)` rounded: a few ulp.

    (Kahan's form: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 1.14.1.)
    """
    u = lax.exp(x) + lax.convert_element_type(zero, x.dtype)  # else XLA simplifies log(exp(x)) to x
    rest = u - one_at_run_time(x, zero)
    log = lax.log(u)
    near = lax.select(log == 0, x, rest * (x / lax.select(log == 0, lax.full_like(x, 1), log)))
    return lax.select(abs(x) < 1, near, rest)


def cosh(x: Any, zero: Any) -> Any:
    """`(e^|x| + e^−|x|)/2`, halved before it is summed where the sum would overflow: a few ulp."""
    half = lax.exp(abs(x) - np.log(np.float32(2)))
    return half + np.float32(0.25) / half


def sinh(x: Any, zero: Any) -> Any:
    """`(m + m/(m + 1))/2` with `m = e^|x| − 1`: a few ulp."""
    m = expm1(abs(x), zero)
    small = np.float32(0.5) * (m + m / (m + 1))
    large = lax.exp(abs(x) - np.log(np.float32(2)))
    size = lax.select(abs(x) < 80, small, large)
    return lax.select(x < 0, -size, size)


def tan(x: Any, zero: Any) -> Any:
    return lax.sin(x) / lax.cos(x)


def atan(x: Any, zero: Any) -> Any:
    return lax.atan2(x, lax.full_like(x, 1))


def sqrt(x: Any, zero: Any) -> Any:
    """Heron's step on `x · 1/√x`: rounded correctly with multiply-adds but for rare cases, else to 1 ulp.

    (P. Markstein, IA-64 and Elementary Functions, 2000, section 9.2.)
    """
    start = lax.rsqrt(x)
    root = x * start
    better = root + (x - root * root) * (np.float32(0.5) * start)
    return lax.select((x == 0) | (x == jnp.inf), x, better)


def is_finite(x: Any, zero: Any) -> Any:
    return abs(x) < jnp.inf


def logistic(x: Any, zero: Any) -> Any:
    return 1 / (1 + lax.exp(-x))


def sign(x: Any, zero: Any) -> Any:
    """Of a NaN it is NaN, of a zero that zero."""
    return lax.select(x > 0, lax.full_like(x, 1), lax.select(x < 0, lax.full_like(x, -1), x))


def integer_power(x: Any, exponent: int) -> Any:
    """`x^n` by repeated squaring."""
    if exponent < 0:
        return 1 / integer_power(x, -exponent)
    result, square = None, x
    while exponent:
        if exponent & 1:
            result = square if result is None else result * square
        exponent >>= 1
        square = square * square if exponent else square
    return lax.full_like(x, 1) if result is None else result


def power(x: Any, y: Any, zero: Any, base: float | None = None) -> Any:
    """`x^y = e^(y·log x)`: `1 + |y·log x|` ulp. `base` is x where it is known now, its logarithm in two parts."""
    whole = jnp.issubdtype(y.dtype, jnp.integer)
    exponent = lax.convert_element_type(y, x.dtype) if whole else y
    if base is not None and base > 0:
        high = np.float32(np.log(base))
        low = np.float32(np.log(base) - np.float64(high))
        product = exponent * high
        return lax.exp(product) * (1 + exponent * low)
    size = lax.exp(exponent * lax.log(abs(x) if whole else x))
    size = lax.select(exponent == 0, lax.full_like(x, 1), size)
    if not whole:
        return size
    odd = lax.bitwise_and(y, lax.full_like(y, 1)) == 1
    return lax.select((x < 0) & odd, -size, size)


def power_of(base: float, y: Any, zero: Any) -> Any:
    """`b^y = 2^(y·log₂ b)` for a positive number `base` known now, and float32 exponents: 1 ulp.

    `y·log₂ b` is computed in two parts, the first of them, of two factors of 12 bits, without rounding; what it is off
    its nearest integer k goes into `2^f = 1 + f·q(f)`, q a polynomial fitted at Chebyshev's points, and k into the
    exponent, half by half, since `2^k` may lie beyond the numbers where `2^(k + f)` does not. (W. J. Cody, W. Waite,
    Software Manual for the Elementary Functions, 1980, chapter 7.)
    """
    log = np.log2(np.float64(base))
    high = (np.float32(log).view(np.int32) & LEADING).view(np.float32)
    low = np.float32(log - np.float64(high))
    bound = np.float32(160 / max(abs(log), 1e-30))  # beyond it all is zero or infinite
    y = lax.clamp(-bound, y, bound)
    y_high = lax.bitcast_convert_type(lax.bitcast_convert_type(y, jnp.int32) & LEADING, jnp.float32)
    whole = y_high * high
    rest = (y - y_high) * high + (y * low + zero)
    shift = LARGE + zero  # at run time: a compiler would simplify `(x + c) − c`
    rounded = whole + shift
    f = (whole - (rounded - shift)) + rest
    power = functools.reduce(lambda sum_, c: sum_ * f + np.float32(c), EXP2, jnp.zeros_like(f))
    k = lax.bitcast_convert_type(rounded, jnp.int32) - LARGE.view(np.int32)
    half = lax.shift_right_arithmetic(k, jnp.full_like(k, 1))
    return (power * f + 1) * two_to(half) * two_to(k - half)


EXP2 = (0.00015461447765, 0.00133908668067, 0.00961805693794, 0.05550356954336, 0.24022650718689, 0.69314718246460)
"""`(2^f − 1)/f` for |f| up to one half, highest power first, to a third of an ulp of `f`."""


LEADING = np.int32(-1 << 12)
"""Of the bits of a float32, those of the 12 leading digits of its 24."""

LARGE = np.float32(3 << 22)
"""Among numbers this large the last bit is 1: adding it rounds to integers."""


def two_to(k: Any) -> Any:
    """`2^k`."""
    return lax.bitcast_convert_type(lax.shift_left(k + 127, jnp.full_like(k, 23)), jnp.float32)


UNARY: dict[str, Callable[[Any, Any], Any]] = {
    "atan": atan,
    "cosh": cosh,
    "expm1": expm1,
    "is_finite": is_finite,
    "log1p": log1p,
    "logistic": logistic,
    "sign": sign,
    "sinh": sinh,
    "sqrt": sqrt,
    "tan": tan,
}
