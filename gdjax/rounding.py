"""Correctly rounded arithmetic, to say in advance which bits a descent must give.

Two implementations of the same four operations (add, sub, mul and fma, a·b + c rounded once), for float16,
bfloat16, float32 and float64, to nearest with ties to even, with gradual underflow or flushing to zero:

- `Exact` works on one number at a time, in Python's integers: it trusts no floating-point unit.
- `Fast` works on NumPy arrays, with error-free transformations; the tests hold it against `Exact`.

`descend` runs the tutorial's descent over either. Imports no JAX.

Sources: IEEE 754-2019, sections 3.3, 4.3.1, 5.4.1 and 7.5; T. J. Dekker, "A floating-point technique for
extending the available precision", Numer. Math. 18 (1971); S. Boldo and G. Melquiond, "Emulation of FMA and
correctly rounded sums: proved algorithms using rounding to odd", IEEE Trans. Computers 57 (2008).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: `precision` significand bits (the hidden one counted), normal exponents
    `emin` to `emax`, so the smallest normal number is 2^emin."""

    name: str
    precision: int
    emin: int
    emax: int

    @property
    def dtype(self) -> np.dtype:
        """The NumPy dtype."""
        return np.dtype(ml_dtypes.bfloat16 if self.name == "bfloat16" else self.name)

    @property
    def unit_roundoff(self) -> float:
        """u = 2^−precision, the largest relative error of one rounding without underflow."""
        return 2.0**-self.precision


FORMATS = {
    f.name: f
    for f in (
        Format("float16", 11, -14, 15),
        Format("bfloat16", 8, -126, 127),
        Format("float32", 24, -126, 127),
        Format("float64", 53, -1022, 1023),
    )
}


class Arithmetic(Protocol):
    """The four operations a descent needs."""

    def add(self, a: Any, b: Any) -> Any: ...
    def sub(self, a: Any, b: Any) -> Any: ...
    def mul(self, a: Any, b: Any) -> Any: ...
    def fma(self, a: Any, b: Any, c: Any) -> Any: ...


@dataclass(frozen=True)
class Exact:
    """The operations on Python floats that hold numbers of `format` (all four formats fit in exactly).

    With `flush`, subnormal operands count as zero, and a result that is tiny after rounding to an unbounded
    exponent range becomes zero, signs kept: DAZ and FTZ of x86 (Intel SDM vol. 1, 10.2.3.3 and 10.2.3.4).

    >>> exact = Exact(FORMATS["float32"])
    >>> exact.add(1.0, 2.0**-24), exact.fma(1.0, 1.0, 2.0**-23), exact.mul(2.0**127, 2.0)
    (1.0, 1.0000001192092896, inf)
    """

    format: Format
    flush: bool = False

    def add(self, a: float, b: float) -> float:
        """a + b, rounded."""
        return self.fma(1.0, a, b)

    def sub(self, a: float, b: float) -> float:
        """a − b, rounded."""
        return self.fma(1.0, a, -b)

    def mul(self, a: float, b: float) -> float:
        """a·b, rounded."""
        return self.fma(a, b, -0.0)  # adding −0 keeps the sign of a zero product

    def fma(self, a: float, b: float, c: float) -> float:
        """a·b + c, rounded once."""
        if self.flush:
            a, b, c = (math.copysign(0.0, v) if abs(v) < 2.0**self.format.emin else v for v in (a, b, c))
        if not (math.isfinite(a) and math.isfinite(b)):
            return a * b + c
        if not math.isfinite(c):
            return c
        (m_a, e_a), (m_b, e_b), (m_c, e_c) = (_integer(v) for v in (a, b, c))
        exponent = min(e_a + e_b, e_c)
        total = (m_a * m_b << e_a + e_b - exponent) + (m_c << e_c - exponent)
        if total == 0:  # IEEE 754 section 6.3: opposite numbers cancel to +0, zeros keep a common sign
            both_zero = m_c == 0 and m_a * m_b == 0
            return math.copysign(1.0, a) * math.copysign(1.0, b) * 0.0 + c if both_zero else 0.0
        return self.round(total, exponent)

    def round(self, significand: int, exponent: int) -> float:
        """significand · 2^exponent, rounded to the format."""
        sign, m = (-1.0 if significand < 0 else 1.0), abs(significand)
        last_bit = m.bit_length() + exponent - self.format.precision
        if self.flush:
            kept = _nearest_even(m, last_bit - exponent)
            if kept.bit_length() + last_bit <= self.format.emin:
                return sign * 0.0
        last_bit = max(last_bit, self.format.emin - self.format.precision + 1)
        kept = _nearest_even(m, last_bit - exponent)
        if kept.bit_length() + last_bit > self.format.emax + 1:
            return sign * math.inf
        return sign * math.ldexp(kept, last_bit)


def _integer(a: float) -> tuple[int, int]:
    """Integers m, e with a = m·2^e."""
    fraction, exponent = math.frexp(a)
    return int(fraction * 2.0**53), exponent - 53


def _nearest_even(m: int, shift: int) -> int:
    """m / 2^shift, rounded to the nearest integer, ties to even."""
    if shift <= 0:
        return m << -shift
    kept, rest, half = m >> shift, m & ((1 << shift) - 1), 1 << (shift - 1)
    return kept + (rest > half or (rest == half and kept & 1 == 1))


@dataclass(frozen=True)
class Fast:
    """The operations of `Exact` on NumPy arrays of `format`, shapes broadcast. Results keep the dtype.

    >>> fast = Fast(FORMATS["float64"])
    >>> float(fast.fma(np.float64(0.1), np.float64(10.0), np.float64(-1.0)))
    5.551115123125783e-17
    """

    format: Format
    flush: bool = False

    def add(self, a: Array, b: Array) -> Array:
        """a + b, rounded."""
        a, b = np.asarray(a), np.asarray(b)
        return self._native(np.add, a, b, (np.ones_like(a), a, b))

    def sub(self, a: Array, b: Array) -> Array:
        """a − b, rounded."""
        return self.add(a, -np.asarray(b))

    def mul(self, a: Array, b: Array) -> Array:
        """a·b, rounded."""
        a, b = np.asarray(a), np.asarray(b)
        return self._native(np.multiply, a, b, (a, b, np.full_like(a, -0.0)))

    def _native(self, operation: np.ufunc, a: Array, b: Array, as_fma: tuple[Array, ...]) -> Array:
        """NumPy's own operation where it rounds once and nothing is flushed, else the same as an fma."""
        if self.format.precision < 24:
            return self.fma(*as_fma)
        with np.errstate(all="ignore"):
            result = operation(a, b)
        if self.flush and np.any(np.minimum(np.minimum(abs(a), abs(b)), abs(result)) <= 2.0**self.format.emin):
            return self.fma(*as_fma)
        return result

    def fma(self, a: Array, b: Array, c: Array) -> Array:
        """a·b + c, rounded once."""
        with np.errstate(all="ignore"):
            wide = [np.asarray(v, self.format.dtype).astype(np.float64) for v in (a, b, c)]
            if self.flush:
                smallest = 2.0**self.format.emin
                wide = [np.where(np.abs(v) < smallest, np.copysign(0.0, v), v) for v in wide]
            result = self._fma64(*wide) if self.format.name == "float64" else self._narrow_fma(*wide)
            return result.astype(self.format.dtype)

    def _narrow_fma(self, a: Array, b: Array, c: Array) -> Array:
        """Operands of at most 24 bits: their product is exact in float64, and rounding the sum to odd first
        makes the second rounding innocent (Boldo and Melquiond, theorem 1: 53 ≥ 24 + 2)."""
        product = a * b
        total = _to_odd(*_two_sum(product, c))
        total = np.where(np.isfinite(total), total, product + c)  # the error term of ±inf is NaN
        return _narrow(total, self.format, self.flush)

    def _fma64(self, a: Array, b: Array, c: Array) -> Array:
        """The operands are scaled near 1 first, so that no error term over- or underflows; Boldo and
        Melquiond's Fma algorithm then rounds their exact sum, and the scale is put back."""
        fmt = self.format
        a, b, c = np.broadcast_arrays(a, b, c)
        naive = a * b + c
        (m_a, e_a), (m_b, e_b), (m_c, e_c) = np.frexp(a), np.frexp(b), np.frexp(c)
        nowhere = np.int32(-100_000)  # the exponent of zero: below all others
        e_product = np.where((m_a == 0) | (m_b == 0), nowhere, e_a + e_b)
        e_c = np.where(m_c == 0, nowhere, e_c)
        scale = np.maximum(e_product, e_c)
        # 250 binades below the larger term the smaller one only says "not exact", wherever it lies.
        m_a = np.ldexp(m_a, np.maximum(e_product - scale, -250))
        m_c = np.ldexp(m_c, np.maximum(e_c - scale, -250))
        high, low = _exact_product(m_a, m_b)
        upper, upper_error = _two_sum(m_c, low)
        total, total_error = _two_sum(high, upper)
        tail = _to_odd(*_two_sum(total_error, upper_error))
        scaled = total + tail
        result = np.ldexp(scaled, scale)
        cancelled = (scaled == 0) & (scale > nowhere)
        result = np.where(cancelled, 0.0, result)
        special = ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c)) | (scale == nowhere)
        finite_product = np.isfinite(a) & np.isfinite(b)
        result = np.where(special, np.where(finite_product & ~np.isfinite(c), c, naive), result)
        tiny = ~special & ~cancelled & (np.frexp(scaled)[1] + scale <= fmt.emin)
        if self.flush:
            return np.where(tiny, np.copysign(0.0, scaled), result)
        exact = Exact(fmt)  # putting the scale back rounded a second time: the few subnormal results
        for i in map(tuple, np.argwhere(tiny)):
            result[i] = exact.fma(float(a[i]), float(b[i]), float(c[i]))
        return result


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """s = fl(a + b) and the exact error a + b − s (Knuth's TwoSum)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _exact_product(a: Array, b: Array) -> tuple[Array, Array]:
    """p = fl(a·b) and the exact error a·b − p (Dekker, by Veltkamp's splitting into halves of 26 bits)."""
    p = a * b
    a_high = (t := a * 134217729.0) - (t - a)  # 2^27 + 1
    b_high = (t := b * 134217729.0) - (t - b)
    a_low, b_low = a - a_high, b - b_high
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def _to_odd(s: Array, error: Array) -> Array:
    """s + error rounded to odd: exact, or the one of its two neighbours whose last bit is 1."""
    even = (np.ascontiguousarray(s).view(np.int64) & 1 == 0).reshape(s.shape)
    return np.where((error != 0) & even, np.nextafter(s, np.copysign(np.inf, error)), s)


def _narrow(value: Array, fmt: Format, flush: bool) -> Array:
    """float64 values that were rounded to odd, rounded to a narrower format (still held in float64)."""
    smallest = 2.0**fmt.emin
    exponent = np.frexp(value)[1].astype(np.int64)
    last_bit = np.maximum(exponent - fmt.precision, fmt.emin - fmt.precision + 1)
    rounded = np.ldexp(np.rint(np.ldexp(value, -last_bit)), last_bit)
    rounded = np.where(np.abs(rounded) >= 2.0 ** (fmt.emax + 1), np.copysign(np.inf, value), rounded)
    rounded = np.where(np.isfinite(value), rounded, value)
    if flush:  # tiny after rounding with an unbounded exponent: below the midpoint next to the smallest normal
        tiny = np.abs(value) < smallest * (1 - fmt.unit_roundoff / 2)
        rounded = np.where(tiny, np.copysign(0.0, value), rounded)
    return rounded


PRODUCTS = ("r·(x·e)", "(r·x)·e", "(r·e)·x")


@dataclass(frozen=True)
class Rounding:
    """Where a descent rounds.

    Attributes:
        residual_fma: t − x·w as one fma(−x, w, t); for vectors each but the first product of the sum as well.
        update_fma: w + r·g as one fma(r, g, w).
        flush: subnormal operands and results become zero.
        product: the order in which the squared loss's update multiplies its three factors; the first is
            gradient descent as it is written, w − r·g with g = −(x·e).
    """

    residual_fma: bool = False
    update_fma: bool = False
    flush: bool = False
    product: str = PRODUCTS[0]

    def __str__(self) -> str:
        names = {(False, False): "IEEE", (True, True): "FMA", (True, False): "FMA in the residual only"}
        name = names.get((self.residual_fma, self.update_fma), "FMA in the update only")
        flushed = ", subnormals flushed" if self.flush else ""
        return name + flushed + (f", product as {self.product}" if self.product != PRODUCTS[0] else "")


IEEE = Rounding()
FMA = Rounding(residual_fma=True, update_fma=True)
IEEE_FLUSHED = Rounding(flush=True)
FMA_FLUSHED = Rounding(residual_fma=True, update_fma=True, flush=True)


def descend(
    w: Any,
    x: Any,
    t: Any,
    learning_rate: Any,
    steps: int,
    *,
    loss: str = "squared",
    rounding: Rounding = IEEE,
    arithmetic: type[Fast] | type[Exact] = Fast,
) -> Array:
    """Descend N problems and round as declared: per step e = t − x·w, g = −(x·e), w ← w − r·g.

    Vector weights sum x·w from left to right: x₀w₀ is rounded, then each xᵢwᵢ is added, as one fma if
    `rounding.residual_fma`; t − x·w is then a subtraction. The residual loss has g = −x.

    Args:
        w: start weights, `[N]` or `[N, D]`; their dtype is the one computed in.
        x: inputs, shaped as w.
        t: targets, `[N]`.
        learning_rate: a number or `[N]`; cast to the dtype of w.
        steps: how many updates, 0 or more.
        loss: "squared", ½(t − x·w)², or "residual", t − x·w.
        rounding: where to round.
        arithmetic: `Fast`, or `Exact` for the integer arithmetic (slow).

    Returns:
        The weights after the last step, shaped as w and of its dtype.

    >>> start = np.ones(1, np.float32)
    >>> descend(start, 2 * start, 4 * start, 0.1, 1, loss="residual", rounding=FMA)
    array([1.2], dtype=float32)
    """
    if loss not in ("squared", "residual"):
        raise ValueError(f"loss must be 'squared' or 'residual', got {loss!r}")
    w = np.asarray(w)
    fmt = FORMATS.get(w.dtype.name)
    if fmt is None:
        raise TypeError(f"w must be one of {', '.join(FORMATS)}, got {w.dtype}; convert it with w.astype(...)")
    x, t, r = (np.asarray(v, w.dtype) for v in (x, t, learning_rate))
    if x.shape != w.shape or t.shape != w.shape[:1] or r.shape not in ((), t.shape):
        raise ValueError(
            f"w {w.shape}, x {x.shape}, t {t.shape} and learning_rate {r.shape} do not fit; "
            "wanted w and x alike, [N] or [N, D], t [N] and learning_rate a number or [N]"
        )
    operations = arithmetic(fmt, rounding.flush)
    result = np.empty_like(w)
    r = np.broadcast_to(r, t.shape)
    # Blocks of this size stay in the cache; Exact takes one problem at a time.
    block = 16_384 if arithmetic is Fast else 1
    for i in range(0, len(w), block):
        rows = slice(i, i + block) if arithmetic is Fast else i
        weights, inputs = ([v[rows]] if v.ndim == 1 else list(v[rows].T) for v in (w, x))
        if arithmetic is Exact:
            weights, inputs = ([float(v) for v in values] for values in (weights, inputs))
        target, rate = (v[rows] if arithmetic is Fast else float(v[rows]) for v in (t, r))
        for _ in range(steps):
            weights = _step(weights, inputs, target, rate, loss, rounding, operations)
        result[rows] = weights[0] if w.ndim == 1 else np.stack(weights, -1)
    return result


def _step(w: list, x: list, t: Any, r: Any, loss: str, rounding: Rounding, do: Arithmetic) -> list:
    """One update of the weights of one problem, or of a block of problems."""
    if loss == "residual":
        factors = [(r, x_i) for x_i in x]
    else:
        e = _residual(w, x, t, rounding.residual_fma, do)
        if rounding.product == PRODUCTS[0]:
            factors = [(r, do.mul(x_i, e)) for x_i in x]
        elif rounding.product == PRODUCTS[1]:
            factors = [(do.mul(r, x_i), e) for x_i in x]
        else:
            r_e = do.mul(r, e)
            factors = [(r_e, x_i) for x_i in x]
    if rounding.update_fma:
        return [do.fma(a, b, w_i) for (a, b), w_i in zip(factors, w, strict=True)]
    return [do.add(w_i, do.mul(a, b)) for (a, b), w_i in zip(factors, w, strict=True)]


def _residual(w: list, x: list, t: Any, fused: bool, do: Arithmetic) -> Any:
    """t − x·w, the sum from left to right."""
    if len(w) == 1:
        return do.fma(-x[0], w[0], t) if fused else do.sub(t, do.mul(x[0], w[0]))
    total = do.mul(x[0], w[0])
    for x_i, w_i in zip(x[1:], w[1:], strict=True):
        total = do.fma(x_i, w_i, total) if fused else do.add(total, do.mul(x_i, w_i))
    return do.sub(t, total)
