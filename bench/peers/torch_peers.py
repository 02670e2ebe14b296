"""torch, gradient written by hand: eager, compiled step by step, compiled with 12 steps unrolled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.cases import Case, Inputs
from bench.peers import Answer, Run, Skip, load

UNROLLED = 12


def place(torch: Any, device: str) -> Any:
    """The torch device that fits gdjax's name for it."""
    kind, _, index = device.partition(":")
    if kind in ("cpu", "auto"):
        return torch.device("cpu")
    if kind == "gpu" and torch.cuda.is_available():
        return torch.device(f"cuda:{index or 0}")
    raise Skip(f"this torch has no {device}")


def one_step(case: Case, torch: Any) -> Callable[..., tuple[Any, ...]]:
    """(w, rate, data, step, *state) -> (w, *state) one step on; `step` is a tensor and counts from 1."""

    def descend(w: Any, rate: Any, data: Any, step: Any) -> tuple[Any, ...]:
        return (w - rate * case.gradient(torch, w, *data),)

    def adam(w: Any, rate: Any, data: Any, step: Any, first: Any, second: Any) -> tuple[Any, ...]:
        g = case.gradient(torch, w, *data)
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g**2
        w = w - rate * (first / (1 - 0.9**step)) / (torch.sqrt(second / (1 - 0.999**step)) + 1e-8)
        return w, first, second

    return adam if case.family == "adam" else descend


def program(case: Case, inputs: Inputs, device: str, unroll: int, compiled: bool) -> Run:
    """A Python loop over `unroll` steps at a time; the rest is taken one by one."""
    torch = load("torch")
    if case.tolerance is not None:
        raise Skip("no stop rule per problem in torch")
    target = place(torch, device)
    step = one_step(case, torch)

    def several(w: Any, rate: Any, data: Any, number: Any, *state: Any) -> tuple[Any, ...]:
        for i in range(unroll):
            w, *state = step(w, rate, data, number + i, *state)  # type: ignore[assignment]
        return w, *state

    if compiled:
        torch._dynamo.reset()
        step_once, step_several = torch.compile(step), torch.compile(several)
    else:
        step_once, step_several = step, several

    def run() -> Answer:
        with torch.no_grad():
            to = lambda array: torch.from_numpy(array).to(target)  # noqa: E731
            w, rate, data = to(inputs.weights), to(inputs.rates), tuple(map(to, inputs.data))
            rate = rate.reshape(-1, *(1,) * (w.ndim - 1))
            state = (torch.zeros_like(w), torch.zeros_like(w)) if case.family == "adam" else ()
            # A tensor, because a plain number would make torch compile anew for every value.
            number = torch.ones((), device=target)
            for _ in range(case.steps // unroll):
                w, *state = step_several(w, rate, data, number, *state)
                number = number + unroll
            for _ in range(case.steps % unroll):
                w, *state = step_once(w, rate, data, number, *state)
                number = number + 1
            return Answer(w.cpu().numpy())

    return run


def eager(case: Case, inputs: Inputs, device: str) -> Run:
    """One operation at a time."""
    return program(case, inputs, device, 1, compiled=False)


def compiled(case: Case, inputs: Inputs, device: str) -> Run:
    """torch.compile of one step."""
    return program(case, inputs, device, 1, compiled=True)


def unrolled(case: Case, inputs: Inputs, device: str) -> Run:
    """torch.compile of 12 steps written out."""
    return program(case, inputs, device, UNROLLED, compiled=True)
