"""A stop rule per problem: every program that has one on every case."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import Case
from bench.suite import pairs, run


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize(("case", "program"), pairs(stop_rule=True))
def test_stop_rules(benchmark: Any, request: pytest.FixtureRequest, case: Case, program: str) -> None:
    """Its speed; and all problems must converge."""
    run(benchmark, case, program, request.config.getoption("--full"))
