"""On the CPU a tile is one function of machine code."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import answers, pick, same_bits

import gdjax
from gdjax import Plan, device, kernel, stop

RNG = np.random.default_rng(17)
N = 1003
X, T, W = (RNG.normal(size=(N, *shape)).astype(np.float32) for shape in ((5, 3), (5,), (3,)))
SHARED = RNG.normal(size=(6, 3)).astype(np.float32)
SMALL = Plan("lanes", 32, 4)
"""Blocks of 128 problems that run through 32 lanes."""


def left_out(w, x, t):
    """The targets are an argument that nothing uses."""
    return 0.5 * jnp.sum((x @ w) ** 2)


def folded(w, x, t):
    """XLA finds out by itself that the targets are not used."""
    return 0.5 * jnp.sum((x @ w - jnp.where(jnp.array(True), jnp.float32(1), t)) ** 2)


def library(w, x, t, shared):
    """What all problems share goes through a matrix product, which XLA takes from a library."""
    return 0.5 * jnp.mean((x @ w - t) ** 2) + 0.5 * w @ ((shared.T @ shared) @ w)


def sorting(w, x, t, shared):
    return 0.5 * jnp.mean((x @ w - t) ** 2) + 0.5 * jnp.sum(jnp.sort(shared[:, 0])[:3] * w**2)


@pytest.mark.parametrize("rule", [None, stop.gradient_below(1e-3)], ids=["fixed", "stop"])
def test_arithmetic_is_done_on_what_the_tile_has_laid_out(compiled, rule):
    """Problems last: for the report, which comes after the loop, XLA would gather from the user's layout."""
    gdjax.minimize(
        lambda w, x, t: 0.5 * jnp.mean((x @ w - t) ** 2), W, (X, T), learning_rate=0.04, steps=9, stop=rule, plan=SMALL
    )
    seen = 0
    for made in compiled:
        for computation in re.split(r"\n(?=%|ENTRY)", made.executables[0].as_text()):
            if " multiply(" in computation:
                layouts = [
                    [int(axis) for axis in layout.split(",")]
                    for layout in re.findall(r"\{([\d,]+)\} parameter\(", computation)
                ]
                seen += len(layouts)
                assert layouts == [sorted(layout, reverse=True) for layout in layouts], computation
    assert seen


RULE = stop.gradient_below(1e-3)


@pytest.mark.parametrize(
    ("loss", "rule"),
    [(left_out, None), (folded, None), (library, None), (sorting, None), (left_out, RULE), (sorting, RULE)],
    ids=["left out", "folded", "library", "sorting", "left out, stop rule", "sorting, stop rule"],
)
def test_whatever_a_loss_makes_of_its_arguments(loss, rule, compiled):
    data, axes = ((X, T, SHARED), (0, 0, None)) if loss in (library, sorting) else ((X, T), 0)
    options = {"in_axes": axes, "learning_rate": 0.1, "steps": 40, "stop": rule}
    together = gdjax.minimize(loss, W, data, **options)
    assert together.plan.kernel == "lanes"
    assert all(made.whole for made in compiled) == (loss in (left_out, folded))
    for one in (0, 500, N - 1):
        some = tuple(d if len(d) == 6 else d[one : one + 1] for d in data)
        alone = gdjax.minimize(loss, W[one : one + 1], some, **options)
        assert same_bits(answers(alone), pick(answers(together), [one]))
    expected = W.astype(np.float64)
    if rule is None:
        gradient = jax.jit(jax.vmap(jax.grad(loss), (0, *(axes if isinstance(axes, tuple) else (0, 0)))))
        for _ in range(40):
            expected = expected - 0.1 * np.asarray(gradient(expected.astype(np.float32), *data), np.float64)
        np.testing.assert_allclose(together.weights, expected, rtol=1e-3, atol=1e-4)


def test_the_loop_over_tiles_lies_inside_and_copies_nothing(compiled):
    """XLA's CPU runtime would take the operations of a loop's body one by one, some tens of nanoseconds each."""
    x, t, w = (np.ones(1000, np.float32) for _ in range(3))
    plan = Plan("lanes", 32, 4096)  # large enough that results are written into memory that is handed over
    gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=0.1, steps=3, plan=plan)
    assert compiled[-1].room
    text = compiled[-1].executables[0].as_text()
    entry = re.search(r"^ENTRY .*?^}", text, re.DOTALL | re.MULTILINE).group()
    assert 'xla_cpu_small_call="true"' in entry
    assert " while(" not in entry
    assert not re.findall(rf"\[{plan.tile * plan.tiles}\].* copy\(", text)


def test_programs_run_where_they_are_called_on_a_device_that_nobody_sees(compiled):
    """A call returns when its results are there; those of users lie on JAX's own devices."""
    x, t, w = (np.ones(1000, np.float32) for _ in range(3))
    before = jax.devices("cpu")
    out = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=0.1, steps=3, device="cpu:1")
    assert jax.devices("cpu") == before
    assert out.weights.devices() == out.loss.devices() == (out.weights + out.loss).devices() == {before[1]}
    made = compiled[-1]
    assert made.devices[0] not in before
    inputs, start, steps, used, zero, room = jax.tree.map(
        lambda info: np.ones(info.shape, info.dtype), made.executables[0].args_info[0]
    )
    results = made.executables[0](inputs, start, steps * 300_000, used, zero, room)
    assert all(leaf.is_ready() for leaf in jax.tree.leaves(results))


@pytest.mark.parametrize("rule", [None, stop.gradient_below(1e-2)], ids=["fixed", "stop"])
def test_without_such_a_device_the_bits_are_the_same(monkeypatch, compiled, rule):
    def solve(loss):
        return gdjax.minimize(loss, W, (X, T), learning_rate=0.05, steps=40, stop=rule, plan=SMALL)

    here = solve(lambda w, x, t: jnp.mean((x @ w - t) ** 2))
    monkeypatch.setattr(device.xla_client, "make_cpu_client", refused)
    device.host_in_place.cache_clear()
    try:
        there = solve(lambda w, x, t: jnp.mean((x @ w - t) ** 2))
        assert compiled[-1].devices[0] in jax.devices("cpu")
    finally:
        device.host_in_place.cache_clear()
    assert same_bits(answers(here), answers(there))


def refused(**_):
    raise RuntimeError("no other client")
