"""What compilers make of gdjax's programs for a GPU (H200) and a TPU (v5e), read here: nothing runs on either.

The plugins are looked for where Python finds them, and in the folder that `GDJAX_AOT` names:
`pip install --target FOLDER --no-deps jax-cuda12-plugin jax-cuda12-pjrt libtpu absl-py`, in jax's own versions.
A folder of their own keeps them out of every other process, where they would look for devices that are not there.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gdjax.engine.points import MOST_POINTS

HERE = Path(__file__).parent
TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
}


def plugins():
    """The platforms that can be compiled for."""
    path = [*sys.path, *filter(None, [os.environ.get("GDJAX_AOT")])]
    there = {d.metadata["Name"] for d in importlib.metadata.distributions(path=path)}
    return [p for p, name in (("gpu", "jax-cuda12-plugin"), ("tpu", "libtpu")) if name in there]


def compiled(what, folder):
    """What `aot_compile.py` found, in a process with the plugins."""
    there = plugins()
    if not there:
        pytest.skip("neither jax-cuda12-plugin nor libtpu is installed: nothing can be compiled for a GPU or TPU")
    dumps = folder / "dumps"
    dumps.mkdir()
    environment = {
        **os.environ,
        **TPU,
        "JAX_PLATFORMS": "cpu",
        "TPU_LOG_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("GDJAX_AOT"), str(HERE)])),
        "XLA_FLAGS": "",
    }
    if what == "figures":
        environment |= {
            # Without the last XLA writes down no PTX from jax 0.11 on.
            "XLA_FLAGS": f"--xla_dump_to={dumps} --xla_dump_hlo_as_text --xla_dump_emitter_re=.*",
            "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "MOSAIC_GPU_DUMP_TO": str(dumps),
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=final_bundles",
        }
    command = [sys.executable, str(HERE / "aot_compile.py"), what, str(dumps), ",".join(there)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("RESULT ")[2])


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    return compiled("figures", tmp_path_factory.mktemp("figures"))


def of(figures, name):
    if name not in figures:
        plugin = "jax-cuda12-plugin" if name.startswith("gpu") else "libtpu"
        pytest.skip(f"{plugin} is not installed")
    return figures[name]


def test_sixteen_steps_of_scalars_are_two_launches_on_a_gpu(figures):
    found = of(figures, "gpu scalar chunk")
    assert found["launches"] <= 2  # the descent, and the counter of the loop
    assert (found["loads"], found["stores"]) == (3, 1)  # four problems to a load
    assert found["operations"] <= 6


@pytest.mark.parametrize(("name", "most"), [("scalar", 3), ("16x4", 200), ("16x4 shared", 200)])
def test_a_descent_in_registers_is_one_launch_without_waiting_or_spilling(figures, name, most):
    found = of(figures, f"gpu {name}")
    assert (found["launches"], found["loops in hlo"]) == (1, 0)
    assert 0 < found["operations"] <= most
    assert found["other"] <= 3  # the counter of the loop
    assert found["memory in loop"] == found["talk in loop"] == found["spilled"] == 0
    assert found["talk"] <= 2  # with which Mosaic begins every kernel
    assert 0 < found["registers"] <= 128  # four blocks of threads at a time


def test_a_stop_rule_looks_around_only_every_few_steps(figures):
    found = of(figures, "gpu 16x4 until")
    assert (found["launches"], found["spilled"], found["talk in loop"]) == (1, 0, 0)
    assert found["talk"] > 2  # outside of the inner loop, so that what is counted there can be seen


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_large_batches_with_a_stop_rule_run_in_waves_in_one_program(figures, platform):
    """One kernel before the loop, and the same in it, behind what moves the problems together."""
    assert of(figures, f"{platform} 16x4 waves") == {"kernels": 2, "loops": 1}


def test_a_little_more_than_the_registers_hold_is_read_from_the_nearest_cache(figures):
    found = of(figures, "gpu 32x8")
    assert found["launches"] == 1
    assert 0 < found["spilled"] < 4000
    assert found["operations"] < 1.2 * 2 * 32 * 8


@pytest.mark.parametrize(("name", "weights"), [("304x4", 4), ("1000x16 shared", 16)])
def test_data_in_memory_is_read_once_a_step_and_used_at_once(figures, name, weights):
    found, points = of(figures, f"gpu {name}"), MOST_POINTS
    assert (found["launches"], found["loops in hlo"], found["spilled"]) == (1, 0, 0)
    assert 0 < found["memory in loop"] <= points * (weights + 1)
    assert points * 2 * weights < found["operations"] <= points * (2 * weights + 6)
    assert found["talk in loop"] == 0
    assert found["registers"] <= 200


@pytest.mark.parametrize(("name", "weights"), [("304x4", 4), ("1000x16 shared", 16)])
def test_the_same_on_a_tpu(figures, name, weights):
    assert 0 < of(figures, f"tpu {name}")["bundles"] <= MOST_POINTS * (4 * weights + 4)


@pytest.mark.parametrize(("name", "most"), [("16x4", 100), ("16x4 shared", 100)])
def test_a_step_of_a_thousand_problems_is_a_hundred_bundles_on_a_tpu(figures, name, most):
    assert 40 < of(figures, f"tpu {name}")["bundles"] <= most


def test_losses_compile_for_both_devices(tmp_path):
    found = compiled("losses", tmp_path)
    assert found
    assert set(found.values()) == {""}


@pytest.mark.slow
def test_ten_losses_and_three_rules_compile_for_both_devices(tmp_path):
    found = compiled("all-losses", tmp_path)
    assert len(found) == 30 * len(plugins())
    assert set(found.values()) == {""}
