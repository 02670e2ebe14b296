"""What the pictures are given, checked: solutions or plain arrays."""

from typing import Any

import numpy as np

from gdjax.solution import Status

WORDS = {
    Status.CONVERGED: "converged",
    Status.RAN_ALL_STEPS: "took all steps",
    Status.STOPPED: "stopped early",
    Status.DIVERGED: "diverged",
}


def is_solution(value: Any) -> bool:
    """Whether this is a `Solution`, or another result with the same names, told by what it has."""
    return hasattr(value, "status") and hasattr(value, "steps")


def numbers(name: str, values: Any, ndim: int | None = None) -> np.ndarray:
    """Numbers as float64, in which every picture is drawn.

    Raises:
        ValueError: what came is not an array of numbers, or has another number of axes.
    """
    try:
        array = np.asarray(values).astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is a {type(values).__name__} that does not hold numbers; pass an array") from None
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}; pass an array with {ndim} {'axis' if ndim == 1 else 'axes'}")
    return array


def statuses(status: Any, shape: tuple[int, ...], diverged: np.ndarray) -> np.ndarray:
    """Each problem's `gdjax.Status` as given, else what can be told: diverged, or took its steps.

    Raises:
        ValueError: another shape, or numbers that are no status.
    """
    if status is None:
        return np.where(diverged, Status.DIVERGED, Status.RAN_ALL_STEPS)
    found = np.asarray(status)
    if found.shape != shape:
        raise ValueError(f"status has shape {found.shape}, the problems have {shape}; pass one gdjax.Status for each")
    if found.size and not np.isin(found, [int(one) for one in Status]).all():
        raise ValueError("status has numbers that are no gdjax.Status; pass solution.status")
    return found


def quantile(values: np.ndarray, share: float) -> np.ndarray:
    """The problem below which this share of the problems on axis 0 lies, without those that are NaN.

    One of the problems rather than a mixture of two: next to an infinite loss a finite one stays what it is.

    >>> quantile(np.array([[1.0], [np.nan], [2.0], [np.inf]]), 0.5)
    array([2.])
    """
    ordered = np.sort(values, axis=0)  # NaN last
    there = (~np.isnan(values)).sum(axis=0)
    place = np.rint(share * np.maximum(there - 1, 0)).astype(int)
    return np.take_along_axis(ordered, place[None], axis=0)[0]
