"""Every test runs under strict promotion and sees eight virtual CPU devices; warnings are errors (pyproject)."""

import atexit
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Plans measured on a developer's machine must not steer a test, nor a test leave plans behind.
os.environ["GDJAX_CACHE_DIR"] = tempfile.mkdtemp(prefix="gdjax-test-cache-")

import jax

# Programs for processes of their own, which settle at their start what devices there are.
collect_ignore = ["aot_compile.py", "process.py"]

atexit.register(shutil.rmtree, os.environ["GDJAX_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
