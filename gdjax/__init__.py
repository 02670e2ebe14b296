"""gdjax descends millions of independent weight problems at once and can prove that the answer is right."""

from gdjax import kernel, reference, stop
from gdjax.batch import random_weights
from gdjax.device import DeviceInfo, devices, select_device
from gdjax.minimize import minimize
from gdjax.plan import Plan
from gdjax.solution import Solution, Status

__version__ = "0.1.0"

__all__ = [
    "DeviceInfo",
    "Plan",
    "Solution",
    "Status",
    "__version__",
    "devices",
    "kernel",
    "minimize",
    "random_weights",
    "reference",
    "select_device",
    "stop",
]
