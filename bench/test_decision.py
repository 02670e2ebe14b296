"""What it costs to choose a device: to be had under 50 microseconds, with a CPU and eight GPUs to weigh."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from gdjax import dispatch
from gdjax.batch import prepare
from gdjax.cost import Calibration, Pace
from gdjax.engine.program import Program
from gdjax.kernel import squared_loss
from gdjax.rules import Descent

MADE_UP = Calibration(0.4, 1e-4, math.inf, math.inf, Pace(2e-8, 3e11), Pace(3e-7, 2e11))


def test_decision(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it, from a batch that is checked to the devices it runs on."""
    here = jax.devices("cpu")[0]
    monkeypatch.setattr(dispatch.dev, "candidates", lambda: ([[here], [here] * 8], ""))
    monkeypatch.setattr(dispatch, "calibration", lambda device: MADE_UP)
    monkeypatch.setattr(dispatch, "option", functools.cache(dispatch.option.__wrapped__))
    w = np.ones(1000, np.float32)
    batch = prepare(w, (w, w), 0, {"learning_rate": np.float32(0.1)}, None)
    program = Program(squared_loss, Descent(), None)
    choice = benchmark(lambda: dispatch.choose("auto", program, batch, 100))
    assert len(choice.estimates) == 5
