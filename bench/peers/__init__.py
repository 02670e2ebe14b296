"""The programs that run the cases, gdjax among them.

A program is given a case and its inputs and returns a function without arguments that solves the whole batch,
from NumPy arrays on the host to NumPy arrays on the host. What it cannot do it says by raising Skip before
anything is timed. Packages are imported where they are needed, so a peer that is not installed is skipped and
hurts nobody else."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from bench.cases import Array, Case, Inputs


class Skip(Exception):
    """Why a program does not run here."""


@dataclass(frozen=True)
class Answer:
    """What a program found; `notes` is what a reader of its time must know."""

    weights: Array
    steps: Array | None = None
    converged: Array | None = None
    notes: str = ""
    work: int | None = None  # multiply-adds done, where that is what is measured


Run = Callable[[], Answer]
Build = Callable[[Case, Inputs, str], Run]


@dataclass(frozen=True)
class Program:
    """A way to solve a case; with `sample` only so many problems are run and the time is scaled to all."""

    name: str
    build: Build
    sample: int | None = None
    on_device: bool = False  # follows --device; the others stay on the host's processor


def load(module: str) -> ModuleType:
    """Import a peer, or skip with a word; some warn about themselves at import."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        raise Skip(f"{module} is not installed" if error.name == module else f"{module}: {error}") from error


def programs() -> dict[str, Program]:
    """All programs by name, in the order of the tables."""
    from bench.peers import compiled_c, jax_peers, numba_peers, own, plain, torch_peers

    table = (
        Program("gdjax", own.gdjax, on_device=True),
        Program("gdjax, fixed steps", own.gdjax_fixed, on_device=True),
        Program("vmap", jax_peers.vmap, on_device=True),
        Program("optax", jax_peers.optax, on_device=True),
        Program("jaxopt", jax_peers.jaxopt, on_device=True),
        Program("optimistix", jax_peers.optimistix, on_device=True),
        Program("torch eager", torch_peers.eager, on_device=True),
        Program("torch compiled", torch_peers.compiled, on_device=True),
        Program("torch compiled, 12 steps", torch_peers.unrolled, on_device=True),
        Program("numba", numba_peers.prange),
        Program("numpy", plain.numpy_loop),
        Program("scipy", plain.scipy_each, sample=100),
        Program("reference", plain.reference, sample=100),
        Program("c loop", compiled_c.loop),
        Program("multiply-adds", compiled_c.multiply_adds, on_device=True),
    )
    return {program.name: program for program in table}
