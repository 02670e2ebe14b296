"""On the CPU weights and an optimizer's moments are computed in one loop over the lanes, with the bits of several."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import answers, same_bits

import gdjax
from gdjax import Plan, kernel, stop
from gdjax.engine.joint import TURNS, Joint, in_one_loop, joint
from gdjax.engine.kernels import Lanes

RNG = np.random.default_rng(29)
N = 301
W, X, T = (RNG.normal(size=N).astype(np.float32) for _ in range(3))
SHORT = Plan("lanes", 64, 4)


def line(w, x, t):
    return 0.5 * (t - (w["a"] + w["b"] * x)) ** 2


def wide(w, x, t):
    """Leaves of one shape and two dtypes."""
    return 0.5 * jnp.sum((t - (w["a"] + w["b"] * x).astype(jnp.float64) - w["c"] - w["d"] ** 2) ** 2)


def cubic(w, x, t):
    return 0.5 * (t - (w["a"] + x * (w["b"] + x * (w["c"] + x * w["d"])))) ** 2


def vector(w, x, t):
    return 0.5 * jnp.sum((t - x * w) ** 2)


TWO = {"a": W, "b": W[::-1].copy()}
MIXED = {**TWO, "c": W.astype(np.float64), "d": T.astype(np.float64)}
RUNS = {
    "adam": (kernel.squared_loss, W, {"optimizer": optax.adam(0.05)}),
    "rate per problem": (kernel.squared_loss, W, {"optimizer": optax.adam, "hyperparams": {"learning_rate": abs(W)}}),
    "momentum": (kernel.squared_loss, W, {"optimizer": optax.sgd(0.1, momentum=0.5)}),
    "lion": (kernel.squared_loss, W, {"optimizer": optax.lion(0.05)}),
    "held in a set": (kernel.squared_loss, W, {"optimizer": optax.adam(0.05), "project": lambda w: jnp.clip(w, 0, 1)}),
    "vector": (vector, RNG.normal(size=(N, 3)).astype(np.float32), {"optimizer": optax.adam(0.05)}),
    "leaves": (line, TWO, {"learning_rate": 0.1}),
    "leaves and moments": (cubic, TWO | {"c": W, "d": W}, {"optimizer": optax.adam(0.05)}),
    "leaves of two dtypes": (wide, MIXED, {"learning_rate": 0.1}),
    "narrow": (kernel.squared_loss, W.astype(np.float16), {"optimizer": optax.adam(0.05)}),
    "a rule": (kernel.squared_loss, W, {"optimizer": optax.adam(0.05), "stop": stop.gradient_below(0.05)}),
    "a rule, leaves": (cubic, TWO | {"c": W, "d": W}, {"learning_rate": 0.1, "stop": stop.gradient_below(0.05)}),
    "a rule that remembers": (kernel.squared_loss, W, {"learning_rate": 0.1, "stop": stop.loss_change_below(1e-3)}),
    "rows": (kernel.squared_loss, W, {"optimizer": optax.adam(0.05), "record": 3}),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_one_loop_has_the_bits_of_several(run, chunk, monkeypatch):
    loss, start, options = RUNS[run]
    dtype = jax.tree.leaves(start)[-1].dtype
    data = (X.astype(dtype), T.astype(dtype))

    def descend():
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            return gdjax.minimize(
                lambda *args: loss(*args), start, data, steps=17, plan=Plan("lanes", 64, 4, chunk), **options
            )

    one = descend()
    for engine in ("fixed", "refill"):
        monkeypatch.setattr(f"gdjax.engine.{engine}.joint", lambda *arguments: Joint())
    several = descend()
    assert one.plan.kernel == several.plan.kernel == "lanes"
    assert same_bits((answers(one), one.record), (answers(several), several.record))


def test_every_bit_goes_through():
    """Zeros of both signs, numbers below the normal ones, infinities and NaNs of any kind."""
    bits = np.array([0, 1 << 31, 1, 0x7FC00001, 0xFF800001, 0x7F800000, 0x3F800000, 0x80000001] * 8, np.uint32)
    arrays = [bits.view(np.float32), bits[::-1].copy().view(np.float32)]
    assert [np.asarray(leaf).tobytes() for leaf in jax.jit(in_one_loop)(arrays)] == [leaf.tobytes() for leaf in arrays]


@pytest.mark.parametrize(("weights", "loops"), [(1, 1), (2, 1), (4, 4), (60, 0)])
def test_many_weights_are_computed_in_several_loops(weights, loops):
    """Of all arrays at once LLVM would make no vectors: there are too many pairs that might overlap."""
    lanes = Lanes(8)
    lanes.on_host = True
    some, flags = [np.ones(8)] * weights, [True] * weights
    carry, carry_flags = (some, (some, some), True), (flags, (flags, flags), False)
    groups = joint(lanes, weights, carry, carry_flags, (np.ones(8),), (True,)).groups
    assert len(groups) == loops
    assert all({place % weights for place in group} == {p for p in group if p < weights} for group in groups)
    assert sorted(place for group in groups for place in group) == list(range(3 * weights if loops else 0))


def test_nothing_is_computed_twice_and_nothing_copied(compiled):
    """A second square root would be that of another loop; copies of what is computed together would cost as much."""
    with jax.numpy_dtype_promotion("standard"):
        gdjax.minimize(kernel.squared_loss, W, (X, T), optimizer=optax.adam(0.07), steps=20, plan=SHORT)
    lanes = rf"\w+\[{SHORT.tile}\]\S*"
    parts = re.split(r"\n(?=%|ENTRY)", compiled[-1].executables[0].as_text())
    joined = [part for part in parts if " reduce(" in part]
    assert [len(re.findall(rf"{lanes} sqrt\(", part)) for part in joined] == [1] * TURNS
    rest = 1  # what is left of an odd number of updates, one by one
    assert sum(len(re.findall(rf"{lanes} sqrt\(", part)) for part in parts) == TURNS + rest
    names = [re.match(r"%(\S+)", part).group(1) for part in joined]
    body = next(part for part in parts if all(f"calls=%{name}," in part for name in names))
    assert not re.findall(rf"= {lanes} (?!get-tuple-element)", body)
