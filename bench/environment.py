"""Where a benchmark ran: device, driver, versions, commit, flags."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.peers.compiled_c import cores

PACKAGES = ("jax", "jaxlib", "numpy", "gdjax", "optax", "jaxopt", "optimistix", "torch", "numba", "scipy")
FLAGS = re.compile(r"XLA_FLAGS|JAX_\w+|OMP_\w+|MKL_\w+|GDJAX_\w+|CUDA_VISIBLE_DEVICES")
# Folders of the machine it ran on are nobody's business.
PRIVATE = re.compile(r"(?<![\w.])/[\w./-]+")


def versions() -> dict[str, str]:
    """The version of each package that is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package == "gdjax" and (own := getattr(sys.modules.get("gdjax"), "__version__", None)):
                found[package] = own
    return found


def commit() -> str:
    """The commit of this checkout, with a plus where files were changed since; empty outside of git."""

    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD").strip() + ("+" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def processor() -> str:
    """The name of the host's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def driver(device: Any) -> str:
    """What JAX says of the platform below it, with NVIDIA's driver where there is one."""
    version = str(device.client.platform_version).replace("\n", ", ")
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        nvidia = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()
        return f"{version}, driver {nvidia[0]}" if device.platform != "cpu" and nvidia else version
    except (OSError, subprocess.SubprocessError):
        return version


def describe(device: Any) -> dict[str, Any]:
    """All of it for one jax.Device, ready for JSON."""
    on_host = device.platform == "cpu"
    kind = f"{processor()}, {cores()} cores" if on_host else device.device_kind
    flags = {name: value for name, value in sorted(os.environ.items()) if FLAGS.fullmatch(name)}
    return {
        "device": f"{device.platform}: {kind}",
        "platform": device.platform,
        "processor": processor(),
        "cores": cores(),
        "driver": driver(device),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "commit": commit(),
        "flags": {name: PRIVATE.sub("...", value) for name, value in flags.items()},
    }


def slug(text: str) -> str:
    """A file name's worth of it: lower case letters and digits joined by hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))
