"""Prove a kernel's arithmetic: the front door of verification.

`verify` runs every check of `gdjax.checks` and `gdjax.hazards` on a kernel, or on each way in which gdjax
itself may run a batch, and returns a `Report`.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gdjax import checks, hazards, selfcheck
from gdjax.bound import LOSSES
from gdjax.report import Check, Report, environment
from gdjax.rounding import FORMATS
from gdjax.trial import Kernel, KernelError, Trial

CLAIMS = ("bits", "bound")

CHECKS: tuple[tuple[str, Callable[[Trial], checks.Outcome]], ...] = (
    ("result", checks.result),
    ("tutorial", checks.tutorial),
    ("agreement", checks.agreement),
    ("extreme magnitudes", checks.extremes),
    ("error bound", checks.bound),
    ("alone or in a batch", hazards.company),
    ("batch sizes", hazards.sizes),
    ("over 2^31 bytes", hazards.huge),
    ("NaN, inf, overflow", hazards.special_values),
    ("signed zeros", hazards.signed_zeros),
    ("subnormals", hazards.subnormals),
    ("nothing to do", hazards.nothing_to_do),
    ("neighbours", hazards.neighbours),
    ("inputs kept", hazards.inputs_kept),
    ("one rate or many", hazards.one_rate),
    ("repeatable", hazards.repeatable),
)
OWN_CHECKS: tuple[tuple[str, Callable[[Trial], checks.Outcome]], ...] = (
    ("plans", selfcheck.plans),
    ("shards", selfcheck.shards),
    ("vector weights", selfcheck.vectors),
)


def verify(
    kernel: Kernel | None = None,
    *,
    loss: str = "squared",
    device: Any = "auto",
    dtypes: Sequence[Any] = ("float32", "float64"),
    seed: int = 0,
    quick: bool = False,
    claim: str = "bits",
    patience: float = 30.0,
) -> Report:
    """Check a kernel against the reference, exact arithmetic and everything that batches get wrong.

    Args:
        kernel: called as kernel(w, x, t, learning_rate, steps) with NumPy arrays `[N]` of N scalar problems
            (`learning_rate` a number or `[N]`, `steps` an int); returns the weights after that many steps of
            gradient descent, `[N]` and of the dtype of w: a NumPy or JAX array, a list, or anything with
            DLPack or `__array__`. None verifies every plan that gdjax itself may choose on the device.
        loss: what it claims to descend: "squared", ½(t − x·w)², or "residual", t − x·w.
        device: where JAX computes while the kernel runs: a name as in `gdjax.devices()`, "auto", or a device.
        dtypes: formats to check: "float16", "bfloat16", "float32", "float64".
        seed: of the random problems.
        quick: fewer and smaller batches, for tests.
        claim: "bits": the kernel claims to round as one of the declared roundings does, bit for bit, and to
            flush subnormals only where its device does. "bound": it claims the error bound only; the distance
            in ULP is reported.
        patience: seconds that the batch of more than 2³¹ bytes per array may take; it is left out if it would
            take longer, or if there is too little memory.

    Returns:
        A `Report`: print it, test `.passed`, keep `.to_json()`.

    Raises:
        ValueError: if an argument is none of those named above.

    >>> def kernel(w, x, t, learning_rate, steps):
    ...     for _ in range(steps):
    ...         w = w + learning_rate * (x * (t - x * w))
    ...     return w
    >>> report = verify(kernel, dtypes=["float64"], quick=True)
    >>> report.passed
    True
    >>> next(check.detail for check in report.checks if check.name == "agreement")
    'bit-equal under IEEE: 5,000 problems × 50 steps'
    """
    start = time.perf_counter()
    if loss not in LOSSES:
        raise ValueError(f"loss must be 'squared' or 'residual', got {loss!r}")
    if claim not in CLAIMS:
        raise ValueError(f"claim must be 'bits' or 'bound', got {claim!r}")
    if kernel is not None and not callable(kernel):
        raise ValueError(
            f"kernel must be callable as kernel(w, x, t, learning_rate, steps), got {type(kernel).__name__}"
        )
    names = [_dtype_name(dtype) for dtype in dtypes]
    if not names:
        raise ValueError("dtypes is empty; name at least one, such as 'float32'")
    from gdjax.device import one_device

    chosen = one_device(device)
    found: list[Check] = []
    for name in names:
        tested = kernel if kernel is not None else selfcheck.kernel_of(loss, chosen)
        trial = Trial(tested, loss, FORMATS[name].dtype, chosen, claim, quick, seed, patience)
        for label, check in CHECKS + (OWN_CHECKS if kernel is None else ()):
            if check is hazards.huge and name != names[0]:
                continue  # bytes are bytes, and it takes its time
            found.append(_line(label, check, trial))
            if label == "result" and found[-1].passed is False:
                break  # there is no answer to look at
    return Report(
        kernel=getattr(kernel, "__name__", type(kernel).__name__) if kernel is not None else "gdjax.minimize",
        loss=loss,
        claim=claim,
        device=f"{chosen.platform}:{chosen.id}",
        seed=seed,
        seconds=time.perf_counter() - start,
        environment=environment(chosen),
        checks=tuple(found),
    )


def _dtype_name(dtype: Any) -> str:
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in FORMATS:
        raise ValueError(f"dtypes must be among {', '.join(FORMATS)}, got {dtype!r}")
    return name


def _line(name: str, check: Callable[[Trial], checks.Outcome], trial: Trial) -> Check:
    """One check; what the kernel raises is what the check saw."""
    try:
        outcome = check(trial)
    except KernelError as error:
        outcome = checks.Outcome(False, str(error))
    return Check(name, trial.dtype.name, *outcome)


def load_kernel(name: str) -> Kernel:
    """The kernel named "module:function"; modules in the working folder are found too.

    Raises:
        ValueError: if there is no such module, no such function, or it cannot be called.

    >>> load_kernel("math:hypot").__name__
    'hypot'
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"kernel {name!r} must be module:function, such as my_kernels:descend")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        kernel = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ValueError(f"kernel {name!r}: cannot import {module_name!r}: {error}") from error
    except AttributeError:
        raise ValueError(f"kernel {name!r}: module {module_name!r} has no {attribute!r}") from None
    if not callable(kernel):
        raise ValueError(f"kernel {name!r} is a {type(kernel).__name__}, not a function")
    return kernel
