"""gdjax descends millions of independent weight problems at once and can prove that the answer is right."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdjax import distributed, host, kernel, over, plot, reference, stop
    from gdjax.batch import random_weights
    from gdjax.device import DeviceInfo, devices, select_device
    from gdjax.minimize import minimize
    from gdjax.plan import Plan
    from gdjax.progress import Progress
    from gdjax.solution import Solution, Status
    from gdjax.stream import StreamSolution, solve_stream
    from gdjax.sweep import sweep
    from gdjax.sweep_result import SweepResult
    from gdjax.verify import verify

__version__ = "0.1.0"

__all__ = [
    "DeviceInfo",
    "Plan",
    "Progress",
    "Solution",
    "Status",
    "StreamSolution",
    "SweepResult",
    "__version__",
    "devices",
    "distributed",
    "host",
    "kernel",
    "minimize",
    "over",
    "plot",
    "random_weights",
    "reference",
    "select_device",
    "solve_stream",
    "stop",
    "sweep",
    "verify",
]

_MODULES = frozenset({"distributed", "host", "kernel", "over", "plot", "reference", "stop"})
_HOMES = {
    "DeviceInfo": "device",
    "Plan": "plan",
    "Progress": "progress",
    "Solution": "solution",
    "Status": "solution",
    "StreamSolution": "stream",
    "SweepResult": "sweep_result",
    "devices": "device",
    "minimize": "minimize",
    "random_weights": "batch",
    "select_device": "device",
    "solve_stream": "stream",
    "sweep": "sweep",
    "verify": "verify",
}


class _Package(ModuleType):
    """Loads a public name when it is first asked for: `gdjax --help` need not wait for JAX.

    `gdjax.minimize`, `gdjax.sweep` and `gdjax.verify` are functions; importing the modules of the same names must not
    hide them.
    """

    def __getattr__(self, name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"gdjax.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module 'gdjax' has no attribute {name!r}")
        found = getattr(importlib.import_module(f"gdjax.{_HOMES[name]}"), name)
        setattr(self, name, found)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
