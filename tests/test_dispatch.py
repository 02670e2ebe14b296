"""`device="auto"`: the cheapest device by calibrations, on devices that are not there."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from problems import answers, same_bits
from simulated import CPU, GPU, accelerator

import gdjax
from gdjax import cache, calibration, cost, dispatch, stop
from gdjax.cost import HOST, Job, Option, Pace
from gdjax.kernel import squared_loss
from gdjax.work import operations
from tests.calling import call

SCALAR = Job(problems=1, steps=1, operations=13, bytes_in=12, bytes_out=13, elementwise=True)
VECTOR = Job(problems=1, steps=1, operations=1274, bytes_in=1184, bytes_out=45)
HERE = Option(("cpu:0",), CPU, host=True, compiled=True)
THERE = Option(("gpu:0",), GPU, host=False, compiled=True)
RATES = {"gpu:0": GPU, "gpu:1": GPU}


def chosen(job, options=(HERE, THERE)):
    return cost.cheapest(cost.estimates(job, options, RATES)).devices[0]


# --- decisions from given calibrations --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("scalar", SCALAR), ("vector", VECTOR)])
def test_decisions_over_a_grid_of_sizes(name, kind):
    """The GPU is taken from a size on that falls with the steps; the crossover is where the decision turns."""
    sizes = [4**power for power in range(14)]
    turns = []
    lines = [f"{name}: seconds on cpu:0 / gpu:0, and who is taken, over problems x steps"]
    for steps in (1, 10, 100, 1_000, 10_000):
        job = dataclasses.replace(kind, steps=steps)
        taken = [chosen(job.of(size)) for size in sizes]
        first_gpu = taken.index("gpu:0") if "gpu:0" in taken else len(taken)
        assert taken == ["cpu:0"] * first_gpu + ["gpu:0"] * (len(taken) - first_gpu)
        turn = cost.crossover(job, (HERE, THERE), RATES)
        if turn is None:
            assert "gpu:0" not in taken
        else:
            assert (chosen(job.of(turn - 1)), chosen(job.of(turn))) == ("cpu:0", "gpu:0")
        turns.append(turn or math.inf)
        cells = []
        for size in sizes[::3]:
            each = [one.seconds for one in cost.estimates(job.of(size), (HERE, THERE), RATES)]
            cells.append(f"{size:>9,}: {each[0]:.1e}/{each[1]:.1e} {chosen(job.of(size))[:3]}")
        lines.append(f"{steps:>6,} steps: crossover at {turn or '-':>9} problems   " + "  ".join(cells))
    assert turns == sorted(turns, reverse=True)
    assert turns[-1] < 10_000 < turns[0]
    print("\n" + "\n".join(lines))  # pytest -s shows it


def test_few_steps_are_not_worth_the_transfer():
    """One step of 12 bytes in, 13 out: no number of problems makes up for the bus."""
    assert chosen(dataclasses.replace(SCALAR, problems=10**9, steps=1)) == "cpu:0"
    assert chosen(dataclasses.replace(SCALAR, problems=10**7, steps=10_000)) == "gpu:0"


def test_the_estimate_is_the_sum_that_is_stated():
    job = dataclasses.replace(VECTOR, problems=3_000_000, steps=50, shared=1e6)
    found = cost.estimate(job, dataclasses.replace(THERE, compiled=False), RATES)
    assert found.compile == GPU.compile
    assert found.move == pytest.approx((3e6 * 1184 + 1e6) / GPU.to + 3e6 * 45 / GPU.back)
    assert found.calls == pytest.approx(3 * GPU.call)  # 2**20 problems at a time
    assert found.steps == pytest.approx(50 * 3e6 * 1274 / GPU.vector.rate)
    assert found.seconds == pytest.approx(found.compile + found.move + found.calls + found.steps)
    few = cost.estimate(job.of(10), THERE, RATES)
    assert few.steps == pytest.approx(50 * GPU.vector.step)  # a step takes its time, however few there are
    assert cost.estimate(job, HERE, RATES).move == 0


def test_compiling_counts_until_a_job_has_come_often():
    """A program that is compiled for the CPU keeps a job there, but not for ever."""
    job = dataclasses.replace(SCALAR, problems=2_000_000, steps=1_000)
    options = HERE, dataclasses.replace(THERE, compiled=False)
    taken = [chosen(dataclasses.replace(job, runs=runs), options) for runs in range(40)]
    assert taken[0] == "cpu:0"
    assert taken[-1] == "gpu:0"
    assert taken == sorted(taken)


def test_data_on_a_device_weigh_in():
    job = dataclasses.replace(SCALAR, problems=1_000_000, steps=30)
    assert chosen(job) == "cpu:0"
    there = dataclasses.replace(job, placed={"gpu:0": 1.0}, home="gpu:0")
    assert chosen(there) == "gpu:0"
    assert cost.estimate(there, THERE, RATES).move == 0
    both_ways = cost.estimate(there, HERE, RATES).move
    assert both_ways == pytest.approx(12e6 / GPU.back + 13e6 / GPU.to)
    sibling = Option(("gpu:1",), GPU, host=False, compiled=True)
    assert chosen(there, (HERE, sibling, THERE)) == "gpu:0"
    half = dataclasses.replace(job, placed={"gpu:0": 0.5})
    assert cost.estimate(half, THERE, RATES).move == pytest.approx(6e6 / GPU.to + 13e6 / GPU.back)


def test_several_devices_of_a_kind_where_that_pays():
    ways = [Option(tuple(f"gpu:{i}" for i in range(n)), GPU, host=False, compiled=True) for n in cost.shards(6)]
    assert [len(way.devices) for way in ways] == [1, 2, 4, 6]

    def count(problems, steps):
        job = dataclasses.replace(VECTOR, problems=problems, steps=steps)
        return len(cost.cheapest(cost.estimates(job, ways, RATES)).devices)

    assert count(100, 100) == 1  # a step takes its time, however few problems there are: sharing saves nothing
    assert count(10_000_000, 10_000) == 6
    counts = [count(problems, 100) for problems in (10**3, 10**4, 10**5, 10**6, 10**7)]
    assert counts == sorted(counts)


def test_operations_are_counted():
    one = jax.ShapeDtypeStruct((), np.float32)
    vector, matrix = jax.ShapeDtypeStruct((8,), np.float32), jax.ShapeDtypeStruct((32, 8), np.float32)
    assert operations(lambda x, w: x @ w, matrix, vector) == 2 * 32 * 8
    assert operations(lambda a: jax.lax.fori_loop(0, 7, lambda _, a: a * a, a), one) >= 7
    assert operations(lambda a: a + a, one) == 1
    assert operations(lambda a: jax.numpy.exp(a), one) > operations(lambda a: a * a, one)


# --- minimize on simulated devices ------------------------------------------------------------------------------------


def batch(count, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=count).astype(np.float32) for _ in range(3))


def solve(count, steps, device="auto", put=lambda leaf: leaf, **options):
    w, x, t = map(put, batch(count))
    return gdjax.minimize(squared_loss, w, (x, t), learning_rate=0.01, steps=steps, device=device, **options)


def select(count, steps, device="auto", put=lambda leaf: leaf, **options):
    w, x, t = map(put, batch(count))
    return gdjax.select_device(device, squared_loss, w, (x, t), learning_rate=0.01, steps=steps, **options)


def test_a_small_job_stays_on_the_cpu_though_a_gpu_is_there(monkeypatch):
    (gpu,) = accelerator(monkeypatch)
    assert solve(100, 10).device == "cpu:0"
    assert select(100, 10).platform == "cpu"
    large = select(100, 2_000_000_000)  # two billion steps of 100 problems are not the GPU's either
    assert large.platform == "cpu"
    assert select(1 << 20, 100_000).device is gpu
    assert select(1 << 20, 100_000, stop=stop.gradient_below(1e-3)).device is gpu


def test_minimize_takes_what_select_device_says(monkeypatch):
    gpus = accelerator(monkeypatch, count=2)
    monkeypatch.setattr(dispatch, "calibration", lambda d: GPU if d in gpus else slow)
    slow = dataclasses.replace(CPU, scalar=Pace(1e-3, 1e3))
    choice = select(3000, 50)
    assert choice.device in gpus
    out = solve(3000, 50)
    assert out.device == choice.estimates[1].devices[0]
    assert out.weights.devices() == {choice.device}
    assert same_bits(answers(out), answers(solve(3000, 50, device=gpus[0])))


def test_data_on_an_accelerator_keep_the_job_there(monkeypatch):
    gpus = accelerator(monkeypatch, count=2)
    monkeypatch.setattr(dispatch.SESSIONS, "compiled", lambda key, devices: True)
    where = [select(1 << 20, 30, put=put).device for put in (np.asarray, lambda leaf: jax.device_put(leaf, gpus[1]))]
    assert [dispatch.dev.is_host(device) for device in where] == [True, False]
    assert where[1] is gpus[1]
    job = select(1000, 3, put=lambda leaf: jax.device_put(leaf, gpus[1])).job
    assert job.placed["gpu:7"] == pytest.approx(1.0, abs=1e-3)
    assert job.home == "gpu:7"
    assert select(1000, 3).job.home == HOST


@pytest.mark.parametrize("rule", [None, stop.gradient_below(1e-6)], ids=["all steps", "stop rule"])
def test_a_run_goes_on_where_it_was(monkeypatch, rule):
    """On another kind of device it would not have the bits of one longer run."""
    (gpu,) = accelerator(monkeypatch)
    _, x, t = batch(500)
    for device in ("cpu", gpu):
        begun = solve(500, 3, device=device, stop=rule)
        options = {"learning_rate": 0.01, "stop": rule, "steps": 3}
        more = gdjax.minimize(squared_loss, np.asarray(begun.weights), (x, t), resume=begun.state, **options)
        assert more.device == begun.device
        assert same_bits(answers(more), answers(solve(500, 6, device=device, stop=rule)))


def test_large_jobs_are_sharded_over_devices_of_a_kind(monkeypatch):
    gpus = accelerator(monkeypatch, count=4)
    assert select(1 << 20, 10_000_000).devices == tuple(gpus)


def test_the_reasons_are_told(monkeypatch):
    accelerator(monkeypatch)
    told = select(1 << 20, 1_000).explain()
    first, job, header, *rows, turn = told.splitlines()
    assert first.startswith(("cpu:0: expected to take ", "gpu:7: expected to take "))
    assert job.startswith("1,048,576 problems of ")
    assert header.split() == ["device", "compile", "move", "calls", "steps", "together"]
    assert {row.split()[0] for row in rows} == {"cpu:0", "gpu:7"}
    assert turn.startswith("From ")
    assert str(select(5, 5, device="cpu:3")) == "cpu:3: asked for"


def test_a_single_device_is_neither_calibrated_nor_weighed(monkeypatch):
    monkeypatch.setattr(dispatch, "calibration", lambda device: pytest.fail("measured"))
    monkeypatch.setattr(dispatch, "weigh", lambda *job: pytest.fail("weighed"))
    assert solve(100, 10).device == "cpu:0"
    assert select(100, 10).explain() == "cpu:0: the only device there is"


def test_jaxs_default_device_is_taken_without_weighing(monkeypatch):
    (gpu,) = accelerator(monkeypatch)
    monkeypatch.setattr(dispatch, "weigh", lambda *job: pytest.fail("weighed"))
    with jax.default_device(gpu):
        assert select(100, 10).devices == (gpu,)
    with jax.default_device(jax.devices("cpu")[2]):
        assert solve(100, 10).device == "cpu:2"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("", "JAX_PLATFORMS names it first"),
        ("jax.config.update('jax_default_device', jax.devices()[1])", "jax_default_device says so"),
    ],
)
def test_settings_of_the_environment_are_respected(code, told):
    script = f"""
import jax, gdjax, numpy as np
{code}
w = np.ones(3, np.float32)
print(gdjax.select_device("auto", gdjax.kernel.squared_loss, w, (w, w), learning_rate=0.1, steps=1))
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert told in done.stdout


def test_a_job_that_minimize_would_not_take_is_refused(monkeypatch):
    accelerator(monkeypatch)
    w = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="loss raised"):
        gdjax.select_device("auto", lambda w, x: w @ x, w, (np.ones((3, 2)),), learning_rate=0.1, steps=1)
    with pytest.raises(ValueError, match="loss raised"):
        gdjax.minimize(lambda w, x: w @ x, w, (np.ones((3, 2)),), learning_rate=0.1, steps=1)
    with pytest.raises(TypeError, match="steps=None"):
        gdjax.select_device("auto", squared_loss, w, (w, w), learning_rate=0.1)


# --- calibrations -----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Small measurements, with a cache of their own."""
    monkeypatch.setenv("GDJAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "MANY_BYTES", 1 << 18)
    monkeypatch.setattr(calibration, "PATIENCE", 1e-4)
    monkeypatch.setattr(calibration, "TRANSFER_BYTES", (1 << 10, 1 << 16))
    yield tmp_path / "cache"
    calibration.calibration.cache_clear()


def test_a_calibration_is_measured_once_and_kept(quick, monkeypatch):
    device = jax.devices("cpu")[0]
    found = calibration.calibration(device)
    assert 1e6 < found.to == found.back
    assert all(0 < pace.step < 1 and 1e3 < pace.rate for pace in (found.scalar, found.vector))
    (kept,) = quick.glob("*.json")
    assert json.loads(kept.read_text())["scalar"]["rate"] == found.scalar.rate
    calibration.calibration.cache_clear()  # as in another process
    monkeypatch.setattr(calibration, "measure", lambda device: pytest.fail("measured again"))
    assert calibration.calibration(device) == found


def test_an_accelerators_transfers_are_measured(quick, monkeypatch):
    (gpu,) = accelerator(monkeypatch)
    found = calibration.measure(gpu)
    assert 0 < found.to < math.inf
    assert 0 < found.back < math.inf


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"7", b"null", b'{"scalar": {"step": 1, "rate": 1}}', b"\xff", b'{"scalar": 1, "vector": 2}'],
)
def test_a_torn_or_foreign_calibration_is_measured_anew(quick, monkeypatch, content):
    device, sound = jax.devices("cpu")[0], dataclasses.replace(CPU, call=1.0)
    monkeypatch.setattr(calibration, "measure", lambda device: sound)
    assert calibration.calibration(device) == sound
    (kept,) = quick.glob("*.json")
    kept.write_bytes(content)
    calibration.calibration.cache_clear()
    assert calibration.calibration(device) == sound
    assert calibration.parsed(cache.read(kept.stem)) == sound


def test_figures_that_cannot_be_are_no_calibration():
    entry = dataclasses.asdict(CPU)
    assert calibration.parsed(json.loads(json.dumps(entry))) == CPU
    for wrong in (0, -1.0, math.nan):
        assert calibration.parsed(json.loads(json.dumps(entry | {"call": wrong}))) is None
    assert calibration.parsed(entry | {"call": "fast"}) is None


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_explains(monkeypatch):
    assert "cpu:0: the only device there is" in call("devices", "--problems", 1000).output
    accelerator(monkeypatch)
    done = call("devices", "--problems", 1_000_000, "--points", 16, "--weights", 4)
    assert "auto weighs it" in done.output
    assert "together" in done.output
    assert "1,000,000 problems of " in done.output
