"""`pytest bench/`: the same cases under pytest-benchmark, which stores and compares runs in its own way."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--full` runs the cases at the size they are judged at; without it at a fiftieth."""
    parser.addoption("--full", action="store_true", help="benchmarks at their full size (slow)")
