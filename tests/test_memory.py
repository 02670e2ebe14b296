"""Memory: what does not fit runs in smaller calls, with the same bits, and no more is held than is said."""

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import answers, same_bits
from simulated import accelerator, full_device

import gdjax
from gdjax import Plan, memory, stop
from gdjax import device as dev
from gdjax.kernel import squared_loss

COUNT = 5000
RNG = np.random.default_rng(3)
W, X, T = RNG.normal(size=(3, COUNT)).astype(np.float32)
RATES = np.linspace(0.01, 0.5, COUNT).astype(np.float32)
RULE = stop.gradient_below(1e-2)


def sorted_loss(w, x, t):
    """No lane form: runs under vmap."""
    return jnp.mean(jnp.square(jnp.sort(x * w) - t))


def solve(device="cpu", **options):
    return gdjax.minimize(squared_loss, W, (X, T), learning_rate=RATES, steps=40, device=device, **options)


def under_vmap(device="cpu"):
    x = X[: 4 * (COUNT // 4)].reshape(-1, 4)
    out = gdjax.minimize(sorted_loss, W[: len(x)], (x, x[:, ::-1]), learning_rate=0.01, steps=9, device=device)
    assert out.plan.kernel == "vmap"
    return out


# --- out of memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["host", "accelerator"])
@pytest.mark.parametrize("rule", [None, RULE], ids=["all steps", "stop rule"])
def test_an_out_of_memory_halves_the_calls_and_goes_on(monkeypatch, where, rule):
    device = "cpu" if where == "host" else accelerator(monkeypatch)[0]
    expected = answers(solve(device, stop=rule))
    with full_device(monkeypatch, most=600) as full:
        out = solve(device, stop=rule)
        assert same_bits(answers(out), expected)
        assert full.refused
        assert out.plan.tile * out.plan.tiles <= 600
        refused = len(full.refused)
        again = solve(device, stop=rule)  # the size that fits is remembered
        assert same_bits(answers(again), expected)
        assert len(full.refused) == refused


@pytest.mark.parametrize("where", ["host", "accelerator"])
def test_what_was_done_before_the_memory_ran_out_is_kept(monkeypatch, where):
    device = "cpu" if where == "host" else accelerator(monkeypatch)[0]
    plan = Plan("lanes", tile=64, tiles=8, chunk=1)
    expected = answers(solve(device, plan=plan))
    with full_device(monkeypatch, most=1000) as full:
        solve(device, plan=plan)
        full.ran.clear()
        seen = iter(range(100))

        class Later(float):
            """Room for this size at first, then for half of it."""

            def __lt__(self, size):
                return size > (1000 if next(seen) < 4 else 256)

        full.most = Later(0)
        out = solve(device, plan=plan)
        assert same_bits(answers(out), expected)
        assert full.ran.count(512) == 4
        assert full.ran.count(256) < 2 * -(-COUNT // 512)  # not from the beginning again
        assert (out.plan.tile, out.plan.tiles) == (64, 4)


def test_several_devices_go_on_together(monkeypatch):
    devices = accelerator(monkeypatch, count=3)
    plan = Plan("lanes", tile=64, tiles=8, chunk=1)
    expected = answers(solve(devices[0], plan=plan)), answers(solve("cpu", plan=plan))
    with full_device(monkeypatch, most=300):
        assert same_bits(answers(solve(devices, plan=plan)), expected[0])
        assert same_bits(answers(solve(["cpu:0", "cpu:1"], plan=plan)), expected[1])


def test_shards_go_on_each_for_itself(monkeypatch):
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:4]), ("all",))
    w, x, t = (jax.device_put(a, jax.NamedSharding(mesh, jax.P("all"))) for a in (W, X, T))
    plan = Plan("lanes", tile=64, tiles=8, chunk=1)
    with full_device(monkeypatch, most=300) as full:
        out = gdjax.minimize(squared_loss, w, (x, t), learning_rate=RATES, steps=40, plan=plan)
        assert full.refused
    assert same_bits(answers(out), answers(solve(plan=plan)))


@pytest.mark.parametrize("rule", [None, RULE], ids=["all steps", "stop rule"])
def test_kernels_in_registers_take_fewer_problems(monkeypatch, rule):
    plan = Plan("registers", tile=8192)
    with full_device(monkeypatch, most=math.inf):
        expected = answers(solve(plan=plan, stop=rule))
    with full_device(monkeypatch, most=5000) as full:
        out = solve(plan=plan, stop=rule)
        assert full.refused
    assert out.plan.kernel == "registers"
    assert out.plan.tile == 4096
    assert same_bits(answers(out), expected)


def test_under_vmap_the_tile_keeps_its_shape(monkeypatch):
    expected = under_vmap()
    tile = expected.plan.tile
    assert expected.plan.tiles > 1
    with full_device(monkeypatch, most=tile) as full:
        out = under_vmap()
        assert full.refused
        assert (out.plan.tile, out.plan.tiles) == (tile, 1)
        assert same_bits(answers(out), answers(expected))


def test_too_little_memory_for_the_smallest_call_is_told(monkeypatch):
    with full_device(monkeypatch, most=0), pytest.raises(MemoryError, match="cpu:0 is out of memory with 32 problems"):
        solve(plan=Plan("lanes", tile=64, tiles=2))


def test_other_errors_of_the_device_are_not_swallowed(monkeypatch):
    with full_device(monkeypatch, most=0):
        monkeypatch.setattr("simulated.FULL", "INTERNAL: broken")
        with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
            solve()


# --- the need, before anything is placed ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [None, RULE], ids=["all steps", "stop rule"])
def test_a_batch_larger_than_the_device_runs_in_calls_that_fit(monkeypatch, rule):
    """Points of 64 numbers: the default of 5,120 problems at a time, two at a time, would take over 2 MB."""
    x = RNG.normal(size=(COUNT, 64)).astype(np.float32)

    def loss(w, x):
        return jnp.mean(jnp.square(x - w))

    def run(device):
        w = np.zeros(COUNT, np.float32)
        return gdjax.minimize(loss, w, (x,), learning_rate=0.3, steps=4, stop=rule, device=device)

    # XLA holds one more copy of the points from jax 0.11 on: in this room 512 problems fit in either way, but not 1024.
    bytes_each, room = x[0].nbytes, 5 << 18
    (device,) = accelerator(monkeypatch, room=1 << 40)
    whole = run(device)
    assert whole.plan.kernel == "lanes"
    assert 2 * memory.size(whole.plan) * bytes_each > room
    monkeypatch.undo()
    monkeypatch.setattr(memory, "MODEST", 1 << 16)
    (device,) = accelerator(monkeypatch, room=room)
    with full_device(monkeypatch, most=float("inf")) as full:
        out = run(device)
    assert 2 * max(full.ran) * bytes_each < room  # two at a time
    assert 16 * max(full.ran) * bytes_each > room  # and not cut finer than need be
    assert same_bits(answers(out), answers(whole))


def test_results_without_room_on_the_device_come_to_host_memory(monkeypatch):
    """Every piece's results would pile up there."""
    plan = Plan("lanes", tile=64, tiles=2, chunk=1)
    (device,) = accelerator(monkeypatch, room=1 << 40)
    roomy = solve(device, plan=plan)
    monkeypatch.undo()
    (device,) = accelerator(monkeypatch, room=1 << 12)
    tight = solve(device, plan=plan)
    assert same_bits(answers(tight), answers(roomy))
    assert roomy.weights.devices() == {device}
    assert isinstance(tight.weights, np.ndarray)


def test_plans_are_halved_down_to_the_smallest():
    sizes = []
    plan = Plan("lanes", tile=96, tiles=5)
    while plan is not None:
        sizes.append((plan.tile, plan.tiles))
        plan = memory.halved(plan)
    assert sizes == [(96, 5), (96, 2), (96, 1), (32, 1)]
    assert memory.halved(Plan("vmap", tile=96, tiles=1)) is None
    assert memory.capped(Plan("lanes", 1024, 16), 5000) == Plan("lanes", 1024, 4)
    assert memory.within(Plan("lanes", 1024, 16), 1000, None) == Plan("lanes", 1024, 16)
    assert memory.within(Plan("lanes", 1024, 16), 1000, 300) == Plan("lanes", 1024, 4)


# --- the peak ---------------------------------------------------------------------------------------------------------

PEAK = """
import json, sys
import jax, numpy as np, gdjax
from gdjax.kernel import squared_loss

def vector_loss(w, x, t):
    return 0.5 * ((t - x @ w) ** 2).mean()

kind, count = sys.argv[1], int(sys.argv[2])
rng = np.random.default_rng(0)
shape = {"scalar": (), "stop": (), "diverging": (), "vector": (16, 4)}[kind]
options = {"steps": 8, "learning_rate": 0.1, "device": "cpu"}
if kind == "stop":
    options["stop"] = gdjax.stop.gradient_below(1e-3)
if kind == "diverging":
    options["learning_rate"] = 1e30
loss = vector_loss if shape else squared_loss

def batch(n):
    x = np.full((n, *shape), 0.5, np.float32)
    x.reshape(n, -1)[:, 0] += 0.5 * rng.random(n, np.float32)
    return np.ones((n, *shape[1:]), np.float32), (x, np.ones((n, *shape[:1]), np.float32))

def resident(what):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))

small = batch(1 << 19)  # compiles what is needed
gdjax.minimize(loss, *small, **options)
w, data = batch(count)
held = [(a, a.copy()) for a in (w, *data)] if kind == "scalar" else []
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far
before = resident("VmRSS")
out = gdjax.minimize(loss, w, data, **options)
after = resident("VmHWM")
assert all((a == b).all() for a, b in held), "an input was changed"
leaves = jax.tree.leaves((out.weights, out.loss, out.gradient_norm, out.steps, out.status, out.state.carried))
results = sum({id(leaf) if isinstance(leaf, np.ndarray) else leaf.unsafe_buffer_pointer(): leaf.nbytes
               for leaf in leaves}.values())
print(json.dumps({"extra": after - before, "results": results, "inputs": w.nbytes + sum(d.nbytes for d in data),
                  "statuses": out.summary()}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "count"), [("scalar", 8_000_000), ("vector", 1_000_000), ("stop", 4_000_000)])
def test_peak_memory_is_the_results_and_little_more(kind, count):
    """README: on the CPU `minimize` takes the memory of its results once, and at most 32 MiB per core beside."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, kind, str(count)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["results"] + found["inputs"] > 128 << 20  # another copy of them would be seen
    assert found["extra"] <= found["results"] + dev.workers(jax.devices("cpu")[0]) * (32 << 20), found


LIMITED = """
import logging, resource, sys
import jax.numpy as jnp, numpy as np, gdjax
logging.getLogger("gdjax").setLevel("INFO"); logging.getLogger("gdjax").addHandler(logging.StreamHandler(sys.stdout))
x = np.random.default_rng(0).normal(size=(400_000, 100)).astype(np.float32)

def solve(tiles):
    loss = lambda w, x: jnp.mean(jnp.square(x - w))
    plan = gdjax.Plan("lanes", tile=64, tiles=tiles)
    w = np.zeros(len(x), np.float32)
    return gdjax.minimize(loss, w, (x,), learning_rate=0.3, steps=3, plan=plan, device="cpu")

small = solve(4)
with open("/proc/self/status") as lines:
    taken = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (taken + (150 << 20),) * 2)
large = solve(4096)
print(large.plan.tiles, (np.asarray(large.weights) == np.asarray(small.weights)).all())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_true_limit_of_memory():
    """150 MiB where two calls of 100 MB each want to run side by side."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "out of memory with 262144 problems at a time" in done.stdout
    tiles, same = done.stdout.split()[-2:]
    assert int(tiles) < 4096
    assert same == "True"
