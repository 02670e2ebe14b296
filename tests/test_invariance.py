"""The result of a problem depends on that problem alone: the same bits in any batch, position, plan and shard.

https://github.com/gpufit/Gpufit/issues/136 (wrong at large batches) and DESIGN section 5.1 are why this file exists.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import CASES, answers, pick, same_bits, softmax_batch, softmax_regression

import gdjax
from gdjax import Plan, stop

COUNT = 1003
"""More than the largest small batch, and a multiple of no tile."""

STOP = stop.gradient_below(0.05) | stop.loss_below(1e-3)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A batch to be solved in many ways."""

    case: str
    rule: str = "descent"
    stop: Any = None
    dtype: Any = np.float32
    kernel: str = "lanes"

    @functools.cached_property
    def batch(self):
        if self.case == "softmax":
            weights, data = softmax_batch(COUNT)
            return jax.tree.map(lambda leaf: leaf.astype(self.dtype), weights), (data[0].astype(self.dtype), data[1])
        return CASES[self.case].batch(COUNT, self.dtype)

    @property
    def axes(self):
        return 0 if self.case == "softmax" else CASES[self.case].axes

    @property
    def options(self):
        if self.rule == "descent":
            return {"learning_rate": np.linspace(0.01, 0.1, COUNT)}
        if self.rule == "auto":
            return {"learning_rate": "auto"}
        if self.rule == "schedule":
            return {"learning_rate": optax.exponential_decay(0.1, 5, 0.9)}
        make = {"adam": optax.adam, "adamw": optax.adamw, "rmsprop": optax.rmsprop, "momentum": MOMENTUM}[self.rule]
        return {"optimizer": make, "hyperparams": {"learning_rate": np.linspace(0.01, 0.1, COUNT)}}

    def solve(self, which, **changes):
        """The problems `which`, in that order, as they come out of a batch of their own."""
        w, data = self.batch
        axes = self.axes if isinstance(self.axes, tuple) else (0,) * len(data)
        data = tuple(d if axis is None else pick(d, which) for d, axis in zip(data, axes, strict=True))
        options = dict(self.options)
        if np.ndim(options.get("learning_rate", 0.0)) and not isinstance(options["learning_rate"], str):
            options["learning_rate"] = options["learning_rate"][which]
        if "hyperparams" in options:
            options["hyperparams"] = {k: v[which] for k, v in options["hyperparams"].items()}
        loss = softmax_regression if self.case == "softmax" else CASES[self.case].loss
        # optax relies on JAX's standard promotion.
        with jax.numpy_dtype_promotion("standard"):
            return gdjax.minimize(
                loss, pick(w, which), data, in_axes=axes, steps=19, stop=self.stop, **options, **changes
            )

    @functools.cached_property
    def expected(self):
        out = self.solve(np.arange(COUNT))
        assert out.plan.kernel == self.kernel
        return answers(out)


MOMENTUM = functools.partial(optax.sgd, momentum=0.9, nesterov=True)

SETTINGS = {
    "scalar": Setting("squared"),
    "scalar, stop rule": Setting("squared", stop=STOP),
    "scalar, float64, auto": Setting("squared", "auto", dtype=np.float64),
    "scalar, schedule": Setting("squared", "schedule"),
    "scalar, adam": Setting("squared", "adam"),
    "scalar, adam, stop rule": Setting("squared", "adam", STOP),
    "vector": Setting("linear"),
    "vector, float64, stop rule": Setting("linear", stop=STOP, dtype=np.float64),
    "vector, auto, stop rule": Setting("linear", "auto", STOP),
    "vector, adamw": Setting("linear", "adamw"),
    "vector, nesterov, stop rule": Setting("linear", "momentum", STOP),
    "vector, rmsprop": Setting("logistic", "rmsprop"),
    "network, adam": Setting("tanh network", "adam"),
    "shared data": Setting("shared data"),
    "shared data, adam, stop rule": Setting("shared data", "adam", STOP),
    "all data shared, stop rule": Setting("all shared", stop=STOP),
    "scan": Setting("scan"),
    "under vmap": Setting("softmax", kernel="vmap"),
    "under vmap, adam, stop rule": Setting("softmax", "adam", STOP, kernel="vmap"),
}

PLANS = [
    Plan(kernel="lanes", tile=32, tiles=5, chunk=4),
    Plan(kernel="lanes", tile=512, tiles=1, chunk=16),
]


def assert_alike(setting, which, out):
    expected = pick(setting.expected, which)
    assert same_bits(answers(out), expected), f"{out.plan}, {len(which)} problems"


@pytest.mark.parametrize("name", SETTINGS)
def test_any_batch_size_position_and_order(name):
    """Batches of one size after the other, the problems drawn anew for each."""
    setting = SETTINGS[name]
    rng = np.random.default_rng(1)
    for count in (1, 2, 3, 17, 255, 256, 257, 1000):
        which = rng.permutation(COUNT)[:count]
        assert_alike(setting, which, setting.solve(which))
    assert_alike(setting, np.full(40, 77), setting.solve(np.full(40, 77)))  # one problem in every place


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.kernel == "lanes"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.tile}x{p.tiles}, {p.chunk} at once")
def test_any_plan(name, plan):
    setting = SETTINGS[name]
    which = np.arange(3, 3 + 203)
    out = setting.solve(which, plan=plan)
    assert out.plan.tile == plan.tile
    assert_alike(setting, which, out)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nesterov_of_scalars_in_any_chunk(dtype):
    """The next step's 0.9·m is this step's 0.9·m′: fused steps share the product, single steps do not."""
    w, data = CASES["squared"].batch(203, dtype)

    def solve(chunk):
        plan = Plan(kernel="lanes", tile=256, tiles=1, chunk=chunk)
        with jax.numpy_dtype_promotion("standard"):
            optimizer = optax.sgd(0.02, momentum=0.9, nesterov=True)
            return gdjax.minimize(CASES["squared"].loss, w, data, optimizer=optimizer, steps=11, plan=plan)

    for chunk in (2, 3, 4, 8):
        assert same_bits(answers(solve(chunk)), answers(solve(1))), chunk


@pytest.mark.parametrize("name", ["scalar", "vector, auto, stop rule", "vector, adamw", "shared data", "under vmap"])
def test_any_shard(name):
    setting = SETTINGS[name]
    which = np.arange(700)
    for devices in (["cpu:5"], ["cpu:1", "cpu:2", "cpu:3"]):
        assert_alike(setting, which, setting.solve(which, device=devices))


@given(
    name=st.sampled_from(["scalar", "scalar, adam, stop rule", "vector, float64, stop rule", "shared data"]),
    seed=st.integers(0, 2**32 - 1),
    count=st.one_of(st.integers(1, COUNT), st.sampled_from([31, 32, 33, 63, 64, 65, 159, 160, 161, 511, 512, 513])),
    plan=st.sampled_from(["auto", *PLANS[:2]]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_counterexample_is_found(name, seed, count, plan):
    setting = SETTINGS[name]
    which = np.random.default_rng(seed).integers(0, COUNT, count)
    assert_alike(setting, which, setting.solve(which, plan=plan))


def test_a_neighbour_may_change_without_being_noticed():
    setting = SETTINGS["vector"]
    w, (x, t) = setting.batch
    other = t.copy()
    other[1::2] = np.nan
    rates = np.linspace(0.01, 0.1, COUNT)
    out = gdjax.minimize(CASES["linear"].loss, w, (x, other), learning_rate=rates, steps=19)
    assert same_bits(pick(answers(out), slice(0, None, 2)), pick(setting.expected, slice(0, None, 2)))


def test_shared_data_of_one_problem():
    """Plain vmap takes another dot kernel for a batch of one; the lanes do not."""
    setting = SETTINGS["all data shared, stop rule"]
    for i in (0, 500, COUNT - 1):
        assert_alike(setting, np.array([i]), setting.solve(np.array([i])))


def test_shared_matrix_products_under_vmap():
    """A loss without lane form whose data all problems share: the fixed tile keeps its matrix products alike."""

    def loss(w, x, t):
        return jnp.mean(jnp.square(jnp.sort(x @ w) - t))

    rng = np.random.default_rng(0)
    w = rng.normal(size=(600, 16)).astype(np.float32)
    x, t = rng.normal(size=(100, 16)).astype(np.float32), np.sort(rng.normal(size=100)).astype(np.float32)

    def solve(w):
        return gdjax.minimize(loss, w, (x, t), in_axes=None, learning_rate=0.05, steps=5)

    whole = solve(w)
    assert whole.plan.kernel == "vmap"
    for which in (np.arange(1), np.array([599]), np.arange(300, 317), np.random.default_rng(1).permutation(600)):
        assert same_bits(answers(solve(w[which])), pick(answers(whole), which))


def test_products_of_the_data_alone_are_rounded_in_the_report_too():
    """Found in a stream: `t · share`, computed once for the loop and the report, was contracted in some tiles only."""

    def poisson(w, x, t, share):
        predicted = x @ w
        return jnp.sum(share * (jnp.exp(predicted) - t * predicted))

    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(300, 16, 1)), np.ones((300, 16, 1))], 2)
    data = x, rng.poisson(1, size=(300, 16)).astype(np.float64), 1 / (16 + 16 * rng.random((300, 16)))
    options = {"learning_rate": 0.1, "steps": 20, "stop": stop.gradient_below(1e-10)}
    whole = gdjax.minimize(poisson, np.zeros((300, 2)), data, **options)
    few = gdjax.minimize(poisson, np.zeros((10, 2)), tuple(d[:10] for d in data), **options)
    assert same_bits(answers(few), pick(answers(whole), np.arange(10)))
