"""All steps taken: every program on every case."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import Case
from bench.suite import pairs, run


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize(("case", "program"), pairs(stop_rule=False))
def test_fixed_steps(benchmark: Any, request: pytest.FixtureRequest, case: Case, program: str) -> None:
    """Its speed; and it must be right."""
    run(benchmark, case, program, request.config.getoption("--full"))
