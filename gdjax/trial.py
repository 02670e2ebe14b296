"""A kernel under test: how it is called, what it is given, and what it should have answered."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from gdjax import rounding
from gdjax.rounding import FORMATS, Array, Format, Rounding

Kernel = Callable[..., Any]

POISON = -6.0859375  # left in memory that a kernel may be handed; exact in every format


class KernelError(Exception):
    """The kernel raised, or what it returned is no answer; the message says which."""


class Problems(NamedTuple):
    """N scalar problems, arrays `[N]` of one dtype."""

    w: Array
    x: Array
    t: Array
    r: Array

    def take(self, index: Any) -> Problems:
        """A copy of the problems at `index`."""
        return Problems(*(np.array(v[index]) for v in self))

    def copy(self) -> Problems:
        """A copy of all problems."""
        return self.take(slice(None))

    def astype(self, dtype: Any) -> Problems:
        """The same problems in another dtype."""
        return Problems(*(v.astype(dtype) for v in self))


def ordinary(dtype: Any, count: int, rng: np.random.Generator) -> Problems:
    """Random problems near 1 whose descents converge: r·x² is below 2."""
    w, x, t = rng.normal(size=(3, count))
    return Problems(*(v.astype(dtype) for v in (w, np.clip(x, -2, 2), t, rng.uniform(0, 0.49, count))))


def extreme(dtype: Any, count: int, rng: np.random.Generator) -> Problems:
    """Random problems over the whole range of the format, from subnormals to overflow."""
    fmt = FORMATS[np.dtype(dtype).name]
    lowest = fmt.emin - 5
    exponents = rng.uniform(lowest, fmt.emax, (4, count))
    # In every other one r·x² is near 1, so that it stays finite for many steps.
    exponents[1, ::2] /= 2
    balanced = -2 * exponents[1, ::2] - rng.uniform(-1, 6, count)[::2]
    exponents[3, ::2] = np.clip(balanced, lowest, fmt.emax)
    significands = rng.choice([-1.0, 1.0], (4, count)) * rng.uniform(1, 2, (4, count))
    significands[3] = np.abs(significands[3])  # a rate below zero is refused by most
    with np.errstate(over="ignore"):
        return Problems(*np.ldexp(significands / 2, exponents.astype(int) + 1).astype(dtype))


def tiny(dtype: Any) -> Problems:
    """Problems whose operands, products or results lie below the smallest normal number."""
    smallest = 2.0 ** FORMATS[np.dtype(dtype).name].emin
    rows = [
        (smallest / 2, 1.0, 0.0, 0.25),  # a subnormal weight
        (1.0, smallest / 2, 1.0, 0.25),  # a subnormal input
        (0.0, 1.0, smallest / 2, 0.25),  # a subnormal target
        (0.0, 1.0, 1.0, smallest / 2),  # a subnormal rate
        (0.0, 1.0, smallest, 0.25),  # a subnormal step
        (smallest, 1.0, 0.0, 0.25),  # a subnormal new weight
        (smallest, 0.5, smallest, 0.25),  # a subnormal product, a subnormal residual
    ]
    return Problems(*np.array(rows).T.astype(dtype).copy())


@dataclass
class Trial:
    """One kernel on one device for one dtype, and what was found out about it so far.

    Attributes:
        kernel: called as kernel(w, x, t, learning_rate, steps).
        loss: "squared" or "residual".
        dtype: of the arrays that the kernel is given.
        device: where JAX computes while the kernel runs.
        claim: "bits" or "bound".
        quick: fewer and smaller batches.
        seed: of all random problems.
        patience: seconds that the largest batch may take.
        rounding: the rounding that the kernel was found to follow, if any.
        keeps_finite: a step to weights that are not finite is not taken (rather than carried on with).
        result_dtype: of what the kernel returns; wider than dtype for one that computes in Python floats.
        on_jax: whether the kernel returns arrays of JAX.
        pace: seconds per problem and step, measured.
    """

    kernel: Kernel
    loss: str
    dtype: np.dtype
    device: jax.Device
    claim: str = "bits"
    quick: bool = False
    seed: int = 0
    patience: float = 30.0
    rounding: Rounding | None = None
    keeps_finite: bool = False
    result_dtype: np.dtype = field(init=False)
    on_jax: bool = False
    pace: float = 0.0

    def __post_init__(self) -> None:
        self.result_dtype = self.dtype

    @property
    def format(self) -> Format:
        """The format computed in."""
        return FORMATS[self.result_dtype.name]

    def rng(self) -> np.random.Generator:
        """A fresh generator: every check draws its own problems from the seed."""
        return np.random.default_rng(self.seed)

    def run(self, problems: Problems, steps: int, rate: Any = None, *, copy: bool = True) -> Array:
        """The kernel's answer as a NumPy array `[N]`; it is given copies, lest it write to our problems.

        Raises:
            KernelError: if the kernel raises or answers with the wrong length or dtype.
        """
        count = len(problems.w)
        if copy:
            problems = problems.copy()
        _poison(count, self.result_dtype)
        start = time.perf_counter()
        try:
            with (
                jax.enable_x64(self.dtype.name == "float64"),
                jax.default_device(self.device),
                warnings.catch_warnings(),
                np.errstate(all="ignore"),
            ):
                warnings.simplefilter("ignore")
                given = problems.r if rate is None else rate
                answer = self.kernel(problems.w, problems.x, problems.t, given, steps)
                self.on_jax = isinstance(answer, jax.Array)
                result = _to_numpy(answer)
        except Exception as error:  # whatever a stranger's kernel may raise is a finding
            raise KernelError(f"raised {type(error).__name__} for N={count:,}: {error}") from error
        if count * steps >= 1000:  # the best of all runs: the first of a shape may compile
            self.pace = min((time.perf_counter() - start) / (count * steps), self.pace or math.inf)
        if result.shape != (count,):
            raise KernelError(f"returned shape {result.shape} for N={count:,}, wanted ({count},)")
        if result.dtype.name not in FORMATS or FORMATS[result.dtype.name].precision < self.precision:
            raise KernelError(f"returned {result.dtype} for {self.dtype} inputs")
        self.result_dtype = result.dtype
        return result

    @property
    def precision(self) -> int:
        """Bits in a significand of the inputs."""
        return FORMATS[self.dtype.name].precision

    def expected(self, problems: Problems, steps: int, how: Rounding | None = None) -> Array:
        """What a kernel gives that follows `how`, or else the rounding found, or else IEEE."""
        how = how or self.rounding or rounding.IEEE
        wide = problems.astype(self.result_dtype)
        if not self.keeps_finite:
            return rounding.descend(*wide, steps, loss=self.loss, rounding=how)
        weights = wide.w
        for _ in range(steps):
            new = rounding.descend(weights, *wide[1:], 1, loss=self.loss, rounding=how)
            # Weights that stay as they were give the same step again: the problem has ended there.
            weights = np.where(np.isfinite(new), new, weights)
        return weights

    def fits(self, count: int, steps: int, seconds: float) -> int:
        """At most `count` problems, as many as `steps` steps can be taken of in `seconds`."""
        return int(min(count, max(100, seconds / max(self.pace * steps, 1e-12))))

    def equal(self, got: Array, expected: Array, start: Array) -> Array:
        """Where two answers agree: in every bit; or, for a kernel that claims no bits, in kind and to a
        thousand units of roundoff of the weights on the way from `start`."""
        if self.rounding is not None or self.claim == "bits":
            return same_bits(got, expected)
        with np.errstate(all="ignore"):
            a, b, s = (v.astype(np.float64) for v in (got, expected, start))
            near = np.abs(a - b) <= 1000 * self.format.unit_roundoff * (np.abs(b) + np.abs(s))
        return same_bits(got, expected) | near | ((got == 0) & (expected == 0))


def same_bits(a: Array, b: Array) -> Array:
    """Where two arrays of one dtype are equal in every bit; all NaNs are alike."""
    as_int = f"i{a.dtype.itemsize}"
    equal = np.ascontiguousarray(a).view(as_int) == np.ascontiguousarray(b).view(as_int)
    return equal | ((a != a) & (b != b))


def ulps_apart(a: Array, b: Array) -> Array:
    """How many numbers of the format lie between a and b, as float64; infinite where one is not finite."""
    bits = 8 * a.dtype.itemsize
    patterns = (np.ascontiguousarray(v).view(f"i{bits // 8}").astype(np.int64) for v in (a, b))
    low = np.int64(-(2 ** (bits - 1)))
    ordered = [np.where(p < 0, low - p, p) for p in patterns]  # −0 and +0 both become 0
    apart = np.abs(ordered[0].astype(np.float64) - ordered[1].astype(np.float64))
    close = apart < 2.0**53  # below, the difference of the integers is exact and cannot overflow
    exact = np.where(close, ordered[0], 0) - np.where(close, ordered[1], 0)
    apart = np.where(close, np.abs(exact).astype(np.float64), apart)
    return np.where(np.isfinite(a.astype(np.float64)) & np.isfinite(b.astype(np.float64)), apart, np.inf)


def _to_numpy(answer: Any) -> Array:
    if hasattr(answer, "__array__") or not hasattr(answer, "__dlpack__"):
        return np.asarray(answer)
    return np.from_dlpack(answer)


def _poison(count: int, dtype: np.dtype) -> None:
    """Fill memory of the size of the answer and give it back, so that a kernel which forgets to write its
    answer finds this rather than its last one."""
    if count <= 4_000_000:
        blocks = [np.full(count, POISON, dtype) for _ in range(4)]
        del blocks
