"""Devices: which there are, which are taken, and that answers lie where they were computed."""

import pathlib
import re

import jax
import numpy as np
import pytest
from problems import answers, same_bits

import gdjax
from gdjax import kernel
from gdjax.arena import aligned_empty

RNG = np.random.default_rng(0)
W, X, T = RNG.normal(size=(3, 700)).astype(np.float32)


def solve(device, **options):
    return gdjax.minimize(kernel.squared_loss, W, (X, T), learning_rate=0.1, steps=9, device=device, **options)


def test_devices_describe_what_is_there():
    found = gdjax.devices()
    hosts = [d for d in found if d.platform == "cpu"]
    assert [d.name for d in hosts] == [f"cpu:{i}" for i in range(8)]
    assert {d.count for d in hosts} == {8}
    assert hosts[3].device is jax.devices("cpu")[3]
    assert hosts[0].memory_bytes is None or hosts[0].memory_bytes > 2**28
    assert all(d.kind for d in found)


def test_select_by_platform_number_and_device():
    cpus = jax.devices("cpu")
    assert gdjax.select_device("cpu").device is cpus[0]
    assert gdjax.select_device("cpu:5").device is cpus[5]
    assert gdjax.select_device(cpus[2]).device is cpus[2]
    assert gdjax.select_device("auto").device is jax.devices()[0]
    assert gdjax.select_device(["cpu:1", "cpu:2"]).devices == (cpus[1], cpus[2])


def test_auto_respects_jaxs_default_device():
    with jax.default_device(jax.devices("cpu")[4]):
        assert gdjax.select_device("auto").device is jax.devices("cpu")[4]
        assert solve("auto").device == "cpu:4"
    with jax.default_device("cpu"):
        assert gdjax.select_device("auto").device is jax.devices("cpu")[0]


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("gpu:99", ["device='gpu:99'", "cpu:0"]),
        ("tpu", ["device='tpu'", "there is", 'pip install "gdjax[tpu]"']),
        ("cpu:8", ["device='cpu:8'", "cpu:7"]),
        ("cpus", ["device='cpus'", "did you mean 'cpu'?"]),
        ("quantum", ["device='quantum'", "'auto', 'cpu', 'gpu', 'tpu'"]),
        ("cpu:one", ["'one' is not a device number", "cpu:0"]),
    ],
)
def test_what_is_not_there_is_named_with_what_is(name, fragments):
    with pytest.raises(ValueError) as raised:
        gdjax.select_device(name)
    assert all(fragment in str(raised.value) for fragment in fragments)


def test_one_is_wanted():
    with pytest.raises(ValueError, match="2 devices where one is wanted"):
        gdjax.verify(device=["cpu:0", "cpu:1"])
    with pytest.raises(TypeError, match="NoneType"):
        gdjax.select_device(None)


def test_answers_lie_on_the_device_asked_for():
    out = solve("cpu:3")
    assert out.device == "cpu:3"
    for leaf in jax.tree.leaves(answers(out)):
        assert leaf.devices() == {jax.devices("cpu")[3]}


def test_inputs_may_lie_on_another_device():
    w = jax.device_put(W, jax.devices("cpu")[6])
    out = gdjax.minimize(kernel.squared_loss, w, (X, T), learning_rate=0.1, steps=9, device="cpu:1")
    assert same_bits(answers(out), answers(solve("cpu")))


@pytest.mark.parametrize("stop", [None, gdjax.stop.gradient_below(1e-2)], ids=["all steps", "stop rule"])
def test_many_devices_give_the_bits_of_one(stop):
    plan = gdjax.Plan(kernel="lanes", tile=64, tiles=2, chunk=1)
    expected = answers(solve("cpu", stop=stop, plan=plan))
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[2:6]).reshape(2, 2), ("a", "b"))
    for several in (["cpu:1", "cpu:7"], jax.devices("cpu")[:3], mesh):
        out = solve(several, stop=stop, plan=plan)
        assert same_bits(answers(out), expected)
    assert out.device == "cpu:2 and 3 more"


def test_device_names_stay_in_device_py():
    """No other module names a platform."""
    folder = pathlib.Path(gdjax.__file__).parent
    core = ["kernel", "batch", "rules", "stop", "plan", "solution", "session", "minimize"]
    core += ["cost", "calibration", "dispatch", "selection", "memory", "pieces"]
    for path in [folder / f"{name}.py" for name in core] + sorted((folder / "engine").glob("*.py")):
        code = "\n".join(
            line
            for line in path.read_text(encoding="utf-8").splitlines()
            if '"""' not in line and "device:" not in line
        )
        assert not re.findall(r"""==\s*["'](?:cpu|gpu|tpu|cuda)["']""", code), path.name


def test_aligned_arrays_are_aligned():
    for shape, dtype in (((7,), np.float64), ((3, 5), np.int8), ((0,), np.float32), ((), np.float32)):
        array = aligned_empty(shape, dtype)
        assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
        assert array.ctypes.data % 64 == 0 or array.size == 0
