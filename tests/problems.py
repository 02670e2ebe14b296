"""The shared problem collection: losses with known minima, their starts and data, and what the tests compare with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdjax import kernel

# --- functions of two weights with known minima (Jamil and Yang, "A literature survey of benchmark functions for
# global optimisation problems", 2013) -------------------------------------------------------------------------------


def rosenbrock(w: Any) -> Any:
    return 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2


def beale(w: Any) -> Any:
    x, y = w[0], w[1]
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def booth(w: Any) -> Any:
    return (w[0] + 2 * w[1] - 7) ** 2 + (2 * w[0] + w[1] - 5) ** 2


def matyas(w: Any) -> Any:
    return 0.26 * (w[0] ** 2 + w[1] ** 2) - 0.48 * w[0] * w[1]


def himmelblau(w: Any) -> Any:
    return (w[0] ** 2 + w[1] - 11) ** 2 + (w[0] + w[1] ** 2 - 7) ** 2


def softmax_regression(weights: Any, x: Any, label: Any) -> Any:
    """Multiclass logistic regression with a small ridge: weights {"w": [4, 3], "b": [3]}, x [6, 4], integers [6]."""
    logits = x @ weights["w"] + weights["b"][None, :]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)
    return -jnp.mean(chosen) + 0.005 * jnp.sum(weights["w"] ** 2)


@dataclasses.dataclass(frozen=True)
class Function:
    """A function, a rate at which plain descent behaves, where its starts lie, its minima."""

    loss: Callable[..., Any]
    rate: float
    centre: tuple[float, float]
    minima: tuple[tuple[float, float], ...]

    def starts(self, count: int) -> np.ndarray:
        """Starts `[count, 2]`; problem i's start depends on i alone."""
        rng = np.random.default_rng(7)
        return np.asarray(self.centre) + rng.uniform(-0.4, 0.4, (4096, 2))[:count]


FUNCTIONS = {
    "rosenbrock": Function(rosenbrock, 1e-3, (0.5, -1.0), ((1.0, 1.0),)),
    "beale": Function(beale, 1e-3, (2.0, 0.2), ((3.0, 0.5),)),
    "booth": Function(booth, 1e-2, (-1.0, -1.0), ((1.0, 3.0),)),
    "matyas": Function(matyas, 1e-1, (4.0, -3.0), ((0.0, 0.0),)),
    "himmelblau": Function(
        himmelblau,
        1e-3,
        (1.0, 1.0),
        (
            (3.0, 2.0),
            (-2.805118086952745, 3.131312518250573),
            (-3.779310253377747, -3.283185991286170),
            (3.584428340330492, -1.848126526964404),
        ),
    ),
}


def softmax_batch(count: int) -> tuple[dict[str, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Start weights and data of `count` multiclass logistic regressions, float64 and int64."""
    rng = np.random.default_rng(11)
    x = rng.normal(size=(1024, 6, 4))[:count]
    label = rng.integers(0, 3, (1024, 6))[:count]
    weights = {"w": 0.1 * rng.normal(size=(1024, 4, 3))[:count], "b": np.zeros((count, 3))}
    return weights, (x, label)


# --- one loss for every family of operations -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss with the shapes of one problem's weights and data; `in_axes` None marks data that all share."""

    loss: Callable[..., Any]
    weights: Any
    data: tuple[tuple[int, ...], ...]
    in_axes: tuple[int | None, ...] = ()
    rate: float = 0.05

    def batch(self, count: int, dtype: Any = np.float64, seed: int = 3) -> tuple[Any, tuple[np.ndarray, ...]]:
        rng = np.random.default_rng(seed)
        is_shape = lambda entry: isinstance(entry, tuple)  # noqa: E731
        weights = jax.tree.map(lambda s: rng.normal(size=(count, *s)).astype(dtype), self.weights, is_leaf=is_shape)
        axes = self.axes
        data = tuple(
            rng.normal(size=s if axis is None else (count, *s)).astype(dtype)
            for s, axis in zip(self.data, axes, strict=True)
        )
        return weights, data

    @property
    def axes(self) -> tuple[int | None, ...]:
        return self.in_axes or (0,) * len(self.data)


def linear(w: Any, x: Any, t: Any) -> Any:
    return 0.5 * jnp.mean(jnp.square(x @ w - t))


def logistic(w: Any, x: Any, t: Any) -> Any:
    return jnp.mean(jnp.logaddexp(jnp.zeros_like(t), -jnp.sign(t) * (x @ w)))


def huber(w: Any, x: Any, t: Any) -> Any:
    e = jnp.abs(x @ w - t)
    return jnp.mean(jnp.where(e < 1, 0.5 * e**2, e - 0.5))


def later(w: Any, x: Any) -> Any:
    """Made operations of their own by jax 0.11: log2, and 1 − y² in the derivative of tanh; by 0.12: polyval."""
    return 0.1 * jnp.mean(jnp.square(jnp.polyval(w, jnp.tanh(x * w[0])))) + jnp.mean(jnp.log2(1.5 + jnp.tanh(w)))


def softplus(w: Any, x: Any, t: Any) -> Any:
    return jnp.mean(jax.nn.softplus(x @ w) - t * (x @ w))


def tanh_network(p: Any, x: Any, t: Any) -> Any:
    hidden = jnp.tanh(x @ p["first"] + p["bias"][None, :])
    return jnp.mean(jnp.square(hidden @ p["second"] - t))


def log_cosh(w: Any, x: Any, t: Any) -> Any:
    return jnp.mean(jnp.log(jnp.cosh(x @ w - t)))


def poisson(w: Any, x: Any, t: Any) -> Any:
    f = x @ w
    return jnp.mean(jnp.exp(f) - jnp.abs(t) * f)


def quantile(w: Any, x: Any, t: Any) -> Any:
    e = t - x @ w
    return jnp.mean(jnp.maximum(0.3 * e, -0.7 * e))


def clipped(w: Any, x: Any, t: Any) -> Any:
    return jnp.sum(jnp.where(t > 0, jnp.clip(x @ w, -1, 1) ** 2, jnp.abs(w[0])))


def extremes(w: Any, x: Any) -> Any:
    return jnp.max(x @ w) - jnp.min(x @ w) + 0.1 * jnp.sum(w * w)


def joined(p: Any, t: Any) -> Any:
    whole = jnp.concatenate([p["a"], 2 * p["b"], p["a"][::-1]])
    return jnp.mean(jnp.square(whole - t)) + jnp.sum(jnp.square(jnp.pad(p["b"], (1, 2)) - 0.5))


def sliced(w: Any, x: Any) -> Any:
    return jnp.sum(jnp.square(w[1:4] - x)) + w[0] * w[-1] + jnp.sum(w[::2] ** 4) + w[0] ** 2 + w[-1] ** 2


def einsums(p: Any, x: Any) -> Any:
    return jnp.sum(jnp.square(jnp.einsum("ij,jk,k->i", x, p["m"], p["v"]))) + jnp.trace(p["m"] @ p["m"].T)


def outers(w: Any, x: Any) -> Any:
    return jnp.mean(jnp.square(jnp.outer(w, w) - x)) + jnp.prod(w) ** 2


def transposed(p: Any, x: Any) -> Any:
    return jnp.sum(jnp.square(p.T - x)) + jnp.sum(jnp.square(p.reshape(6) - 1)) + jnp.linalg.norm(p) ** 2


def recurrent(w: Any, x: Any) -> Any:
    """A scan inside a loss: a one-unit recurrent network over a sequence."""

    def cell(state: Any, entry: Any) -> tuple[Any, Any]:
        state = jnp.tanh(w[0] * state + w[1] * entry)
        return state, state

    last, states = jax.lax.scan(cell, jnp.zeros((), w.dtype), x)
    return jnp.square(last - 0.3) + jnp.mean(jnp.square(states))


def shared_linear(w: Any, x: Any, t: Any) -> Any:
    return 0.5 * jnp.mean(jnp.square(x @ w - t)) + 0.01 * jnp.sum(jnp.square(w))


def rational(w: Any, x: Any) -> Any:
    return jnp.mean(jnp.square(x) / (1 + jnp.square(w - x))) + jnp.mean(jax.nn.sigmoid(w) * jnp.sqrt(1 + w**2))


POINTS: tuple[tuple[int, ...], ...] = ((5, 3), (5,))

CASES = {
    "squared": Case(kernel.squared_loss, (), ((), ()), rate=0.1),
    "squared vector": Case(kernel.squared_loss, (4,), ((4,), ())),
    "linear": Case(linear, (3,), POINTS),
    "logistic": Case(logistic, (3,), POINTS),
    "huber": Case(huber, (3,), POINTS),
    "softplus": Case(softplus, (3,), POINTS),
    "tanh network": Case(tanh_network, {"first": (3, 4), "bias": (4,), "second": (4,)}, POINTS),
    "log cosh": Case(log_cosh, (3,), POINTS),
    "log2 and polyval": Case(later, (3,), ((4,),), rate=0.01),
    "poisson": Case(poisson, (3,), POINTS, rate=0.005),
    "quantile": Case(quantile, (3,), POINTS),
    "where and clip": Case(clipped, (3,), POINTS),
    "max and min": Case(extremes, (3,), ((5, 3),)),
    "concatenate, flip, pad": Case(joined, {"a": (2,), "b": (3,)}, ((7,),)),
    "slices and indices": Case(sliced, (6,), ((3,),), rate=0.01),
    "einsum and trace": Case(einsums, {"m": (3, 2), "v": (2,)}, ((4, 3),), rate=0.005),
    "outer and prod": Case(outers, (3,), ((3, 3),)),
    "transpose and reshape": Case(transposed, (2, 3), ((3, 2),), rate=0.02),
    "scan": Case(recurrent, (2,), ((6,),)),
    "shared data": Case(shared_linear, (3,), POINTS, (None, 0)),
    "all shared": Case(shared_linear, (3,), POINTS, (None, None)),
    "rational": Case(rational, (3,), ((3,),)),
}


# --- comparing -------------------------------------------------------------------------------------------------------


def same_bits(a: Any, b: Any) -> bool:
    """Whether two pytrees of arrays are alike in structure, dtypes, shapes and every bit (NaNs are alike)."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(same_array(np.asarray(p), np.asarray(q)) for p, q in pairs)


def same_array(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind in "biu":
        return bool(np.array_equal(a, b))
    whole = f"u{a.dtype.itemsize}"
    alike = np.ascontiguousarray(a).view(whole) == np.ascontiguousarray(b).view(whole)
    return bool(np.all(alike | (np.isnan(a) & np.isnan(b))))


def pick(tree: Any, which: Any) -> Any:
    """The problems `which` of a pytree with the problem axis in front."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[which], tree)


def answers(solution: Any) -> tuple[Any, ...]:
    """What a solution says of each problem."""
    return solution.weights, solution.loss, solution.gradient_norm, solution.steps, solution.status


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Notes every program that XLA compiles within the block."""
    seen: list[str] = []

    def listen(event: str, duration: float, **details: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(str(details.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
