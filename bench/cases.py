"""What is solved: the cases, each with its inputs, its size and what gdjax has promised for it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench import losses

Array = np.ndarray


@dataclass(frozen=True)
class Inputs:
    """One batch as the user has it: float32 NumPy arrays on the host."""

    weights: Array
    data: tuple[Array, ...]
    rates: Array
    useful_steps: Array | None = None  # steps each problem needs in exact arithmetic, where that is known beforehand

    def __len__(self) -> int:
        return len(self.weights)

    def take(self, problems: Any, shared: bool) -> Inputs:
        """The batch of these problems alone."""
        data = self.data if shared else tuple(array[problems] for array in self.data)
        useful = None if self.useful_steps is None else self.useful_steps[problems]
        return Inputs(self.weights[problems], data, self.rates[problems], useful)


@dataclass(frozen=True)
class Target:
    """At least `least` times as fast as `program` (a share, where that is the limit), `aim` hoped for."""

    program: str
    least: float
    aim: float | None = None


@dataclass(frozen=True)
class Case:
    """One benchmark. `family` says which hand-written loops fit; `programs` names who runs it."""

    name: str
    title: str
    family: str  # scalar | vector | shared | logistic | adam
    problems: int
    steps: int
    loss: Callable[..., Any]
    gradient: Callable[..., Any]
    make: Callable[[Case, int, np.random.Generator], Inputs]
    programs: tuple[str, ...]
    points: int = 1
    weights: int = 1
    tolerance: float | None = None  # of the gradient rule; None takes all steps
    needed: tuple[float, float] = (10, 10_000)  # fewest and most steps needed, where the case is about that
    targets: tuple[Target, ...] = ()
    limit: str = "multiply-adds"  # or "c loop"
    sweep: str | None = None  # the cases of one sweep share this word and are drawn as one line

    @property
    def shared(self) -> bool:
        """Whether all problems have the same data."""
        return self.family == "shared"

    @property
    def in_axes(self) -> int | None:
        """The problem axis of the data, as `jax.vmap` and `gdjax.minimize` want it."""
        return None if self.shared else 0

    @property
    def multiply_adds(self) -> int:
        """Fewest multiply-adds of one step of one problem: two per data value, one per weight of a vector."""
        if self.family == "adam":
            return 10
        return 2 if self.family == "scalar" else (2 * self.points + 1) * self.weights

    def inputs(self, problems: int | None = None) -> Inputs:
        """The batch, the same at every call."""
        count = self.problems if problems is None else problems
        return self.make(self, count, np.random.default_rng(zlib.crc32(self.name.encode())))

    def smaller(self, factor: float) -> Case:
        """The same case with fewer problems, for a quick look."""
        return replace(self, problems=max(int(self.problems * factor), min(self.problems, 64)))


def _float32(*arrays: Array) -> list[Array]:
    return [np.ascontiguousarray(array, dtype=np.float32) for array in arrays]


def scalar_inputs(case: Case, count: int, rng: np.random.Generator) -> Inputs:
    """Own input, target, start and rate for each problem; r x^2 < 2 keeps every one of them stable."""
    x, t, w, r = _float32(
        rng.uniform(0.5, 2, count),
        rng.normal(size=count),
        rng.normal(size=count),
        rng.uniform(0.01, 0.3, count),
    )
    return Inputs(w, (x, t), r)


def vector_inputs(case: Case, count: int, rng: np.random.Generator) -> Inputs:
    """Own Gaussian data for each problem; the targets are those of some true weights plus noise."""
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    x, truth = draw(count, case.points, case.weights), draw(count, case.weights)
    t = (x @ truth[..., None])[..., 0] + np.float32(0.1) * draw(count, case.points)
    return Inputs(draw(count, case.weights), (x, t), rng.uniform(0.05, 0.3, count).astype(np.float32))


def shared_inputs(case: Case, count: int, rng: np.random.Generator) -> Inputs:
    """One data set, a rate and a start per problem."""
    one = vector_inputs(case, 1, rng)
    weights = rng.standard_normal((count, case.weights), dtype=np.float32)
    rates = rng.uniform(0.01, 0.5, count).astype(np.float32)
    return Inputs(weights, tuple(array[0] for array in one.data), rates)


def logistic_inputs(case: Case, count: int, rng: np.random.Generator) -> Inputs:
    """Labels drawn from the model itself, so that the classes overlap."""
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    x, truth = draw(count, case.points, case.weights), draw(count, case.weights)
    y = (rng.random((count, case.points)) < 1 / (1 + np.exp(-(x @ truth[..., None])[..., 0]))).astype(np.float32)
    weights, rates = _float32(0.1 * draw(count, case.weights), rng.uniform(0.1, 1, count))
    return Inputs(weights, (x, y), rates)


def scalar_stop_inputs(case: Case, count: int, rng: np.random.Generator) -> Inputs:
    """Rates chosen so that the steps needed are log-uniform between the bounds of `case.needed`.

    The gradient shrinks by 1 - r x^2 a step, so K steps bring it from g to the tolerance where
    r = (1 - (tolerance / |g|)^(1/K)) / x^2.
    """
    assert case.tolerance is not None
    low, high = case.needed
    needed = np.exp(rng.uniform(np.log(low), np.log(high), count)).round()
    x, answer = rng.uniform(0.5, 1, count), rng.uniform(-0.5, 0.5, count)
    w = answer + rng.choice([-1, 1], count) * rng.uniform(1, 2, count)
    gradient = np.abs(x * x * (w - answer))
    r = (1 - (0.99 * case.tolerance / gradient) ** (1 / needed)) / x**2
    x, t, w, r = _float32(x, x * answer, w, r)
    return Inputs(w, (x, t), r, needed)


def logistic_stop_inputs(case: Case, count: int, rng: np.random.Generator) -> Inputs:
    """Columns on different scales, as tables have them: condition numbers spread over two decades."""
    spread = rng.uniform(0, 1, count)
    scales = 10.0 ** (-spread[:, None] * np.linspace(0, 1, case.weights))
    x = rng.normal(size=(count, case.points, case.weights)) * scales[:, None, :]
    truth = rng.normal(size=(count, case.weights)) / scales
    y = rng.random((count, case.points)) < 0.1 + 0.8 / (1 + np.exp(-(x @ truth[..., None])[..., 0]))
    curvature = np.linalg.eigvalsh(x.transpose(0, 2, 1) @ x / case.points)[:, -1] / 4
    w, x, y, r = _float32(np.zeros((count, case.weights)), x, y, 1 / curvature)
    return Inputs(w, (x, y), r)


def logistic_equal_inputs(case: Case, count: int, rng: np.random.Generator) -> Inputs:
    """One of these problems, over and over: all need the same number of steps."""
    return logistic_stop_inputs(case, 1, rng).take(np.zeros(count, int), shared=False)


EVERYONE = (
    "gdjax",
    "vmap",
    "optax",
    "jaxopt",
    "optimistix",
    "torch eager",
    "torch compiled",
    "torch compiled, 12 steps",
    "numba",
    "numpy",
    "reference",
    "multiply-adds",
)
STOPPERS = ("gdjax", "vmap", "optax", "jaxopt", "optimistix", "numba", "scipy", "reference", "multiply-adds")

_scalar = Case(
    "scalar",
    "scalar, own rate, 4M x 240 steps",
    "scalar",
    4_000_000,
    240,
    losses.squared,
    losses.squared_gradient,
    scalar_inputs,
    (*EVERYONE, "c loop"),
    limit="c loop",
    targets=(
        Target("vmap", 8, 12),
        Target("c loop", 0.45, 0.65),
        Target("torch compiled", 8),
        Target("torch compiled, 12 steps", 1.5),
        Target("numpy", 20),
        Target("optax", 8),
        Target("reference", 5000),
    ),
)
_vector = Case(
    "vector-32x8",
    "vector, 32 points x 8 weights, own data, 50k x 100 steps",
    "vector",
    50_000,
    100,
    losses.mean_squared,
    losses.mean_squared_gradient,
    vector_inputs,
    (*EVERYONE, "c loop"),
    32,
    8,
    limit="c loop",
    targets=(Target("vmap", 6, 12),),
)
_logistic = Case(
    "logistic-32x8",
    "logistic regression, 32 points x 8 weights, own data, 50k x 100 steps",
    "logistic",
    50_000,
    100,
    losses.logistic,
    losses.logistic_gradient,
    logistic_inputs,
    EVERYONE,
    32,
    8,
    targets=(Target("vmap", 3, 6),),
)
_stop = Case(
    "stop-scalar",
    "scalar, gradient rule, 10 to 10^4 steps log-uniform, 200k",
    "scalar",
    200_000,
    30_000,
    losses.squared,
    losses.squared_gradient,
    scalar_stop_inputs,
    (*STOPPERS, "c loop"),
    tolerance=1e-2,
    limit="c loop",
    targets=(Target("vmap", 50, 120), Target("numba", 5, 12)),
)

SIZE_SWEEPS = {
    "size": (240, ("gdjax", "vmap", "numba", "c loop")),
    "long": (2_400, ("gdjax", "c loop")),
    "longest": (24_000, ("gdjax",)),
}
"""Steps and programs of the sweeps over the number of problems."""

_SIZES = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
_SPREADS = ((316, 316), (100, 1_000), (32, 3_162), (10, 10_000), (1, 100_000))

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _scalar,
        _vector,
        replace(
            _vector,
            name="vector-16x4",
            title="vector, 16 points x 4 weights, own data, 50k x 100 steps",
            points=16,
            weights=4,
            targets=(Target("vmap", 18, 30),),
        ),
        replace(
            _vector,
            name="vector-300x4",
            title="vector, 300 points x 4 weights, own data, 20k x 50 steps",
            problems=20_000,
            steps=50,
            points=300,
            weights=4,
            targets=(),
        ),
        replace(
            _vector,
            name="shared",
            title="vector, 20k rates on one set of 1,000 points x 16 weights, 100 steps",
            family="shared",
            problems=20_000,
            gradient=losses.shared_squared_gradient,
            make=shared_inputs,
            programs=EVERYONE,
            points=1000,
            weights=16,
            limit="multiply-adds",
            targets=(Target("vmap", 1.2, 2),),
        ),
        _logistic,
        replace(
            _scalar,
            name="adam",
            title="Adam, scalar, 1M x 200 steps",
            family="adam",
            problems=1_000_000,
            steps=200,
            programs=tuple(
                name for name in (*EVERYONE, "c loop") if name not in ("vmap", "jaxopt", "optimistix", "reference")
            ),
            targets=(Target("optax", 3, 6),),
        ),
        *(
            replace(
                _scalar,
                name=f"{sweep}-1e{len(str(size)) - 1}",
                title=f"scalar, {size:,} problems x {steps:,} steps",
                problems=size,
                steps=steps,
                # numba would need minutes for the largest.
                programs=tuple(name for name in programs if name != "numba" or size < 10**8),
                targets=(),
                sweep=sweep,
            )
            for sweep, (steps, programs) in SIZE_SWEEPS.items()
            for size in _SIZES
        ),
        _stop,
        replace(
            _logistic,
            name="stop-logistic",
            title="logistic regression, 50 points x 5 weights, gradient rule, 20k",
            problems=20_000,
            steps=20_000,
            make=logistic_stop_inputs,
            programs=STOPPERS,
            points=50,
            weights=5,
            tolerance=1e-3,
            targets=(Target("vmap", 5, 10),),
        ),
        replace(
            _stop,
            name="stop-equal",
            title="scalar, gradient rule, all need 1,000 steps, 200k",
            needed=(1000, 1000),
            programs=("gdjax", "gdjax, fixed steps", "vmap", "numba", "c loop"),
            targets=(Target("gdjax, fixed steps", 0.6, 0.9),),
        ),
        replace(
            _logistic,
            name="stop-equal-logistic",
            title="logistic regression, 50 points x 5 weights, gradient rule, all alike, 20k",
            problems=20_000,
            steps=20_000,
            make=logistic_equal_inputs,
            programs=("gdjax", "gdjax, fixed steps", "vmap"),
            points=50,
            weights=5,
            tolerance=1e-3,
            targets=(Target("gdjax, fixed steps", 0.6, 0.9),),
        ),
        replace(
            _stop,
            name="stop-adam",
            title="Adam, scalar, gradient rule, 200k",
            family="adam",
            steps=5_000,
            make=scalar_inputs,
            programs=("gdjax", "optax"),
            tolerance=1e-4,
            limit="multiply-adds",
            targets=(),
        ),
        *(
            replace(
                _stop,
                name=f"spread-{low}-{high}",
                title=f"scalar, gradient rule, {low} to {high:,} steps, 100k",
                problems=100_000,
                steps=300_000,
                needed=(low, high),
                programs=("gdjax", "vmap", "numba", "c loop"),
                targets=(),
                sweep="spread",
            )
            for low, high in _SPREADS
        ),
    )
}


SWEEPS = tuple(dict.fromkeys(case.sweep for case in CASES.values() if case.sweep))


def choose(names: list[str] | None) -> list[Case]:
    """The cases of these names or sweeps, all of them for None; an unknown name raises ValueError."""
    if not names:
        return list(CASES.values())
    unknown = [name for name in names if not any(name in (case.name, case.sweep) for case in CASES.values())]
    if unknown:
        known = ", ".join([*CASES, *SWEEPS])
        raise ValueError(f"no such case: {', '.join(unknown)}; there are {known}")
    return [case for case in CASES.values() if case.name in names or case.sweep in names]
