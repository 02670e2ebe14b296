"""Every test runs under strict promotion and sees eight virtual CPU devices; warnings are errors (pyproject).

Tests that need an accelerator are those marked `gpu`: `pytest -m gpu` runs them, and leaves JAX every device there is.
All others see the CPU alone, whatever the machine has.
"""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Plans measured on a developer's machine must not steer a test, nor a test leave plans behind.
os.environ["GDJAX_CACHE_DIR"] = tempfile.mkdtemp(prefix="gdjax-test-cache-")

import jax
import pytest

# Programs for processes of their own, which settle at their start what devices there are.
collect_ignore = ["aot_compile.py", "process.py"]

atexit.register(shutil.rmtree, os.environ["GDJAX_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    if config.option.markexpr != "gpu" and importlib.metadata.entry_points(group="jax_plugins"):
        os.environ["JAX_PLATFORMS"] = "cpu"  # for processes that tests start
        jax.config.update("jax_platforms", "cpu")
        jax.devices()  # settles what there is
        jax.config.update("jax_platforms", None)  # gdjax would respect it as a user's choice


@pytest.fixture
def compiled(monkeypatch):
    """The blocks that are compiled within the test."""
    from gdjax.engine import block

    seen = []
    compile_block = block.compile_block

    def noting(*arguments):
        seen.append(compile_block(*arguments))
        return seen[-1]

    monkeypatch.setattr("gdjax.blocks.compile_block", noting)
    return seen
