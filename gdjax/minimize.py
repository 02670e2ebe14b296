"""The front door: a batch goes in, a `Solution` comes out."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from gdjax import device as dev
from gdjax import stop as stops
from gdjax import traced
from gdjax.batch import Batch, check_held, is_traced, prepare
from gdjax.dispatch import choose
from gdjax.engine.program import Program
from gdjax.friends import Frame, FramedProjection, framed, split, whole
from gdjax.placed import give
from gdjax.plan import Plan
from gdjax.progress import Watch, check_watch
from gdjax.rates import Doubt, check_rate
from gdjax.rules import Descent, FreeRule, Projected, Rule, Transformation, is_pair
from gdjax.session import SESSIONS, Job, Outcome
from gdjax.sharding import Sharded, layout_of
from gdjax.solution import Solution, State

MOST_ROWS = 257
"""Rows of a record whose distance was left open: one more than a power of two, for both ends."""


def minimize(
    loss: Callable[..., Any],
    weights: Any,
    data: tuple[Any, ...] = (),
    *,
    in_axes: Any = 0,
    learning_rate: Any = None,
    optimizer: Any = None,
    hyperparams: dict[str, Any] | None = None,
    steps: int,
    stop: Any = None,
    record: Any = None,
    device: Any = "auto",
    dtype: Any = None,
    project: Callable[[Any], Any] | None = None,
    plan: Any = "auto",
    resume: State | None = None,
    progress: bool = False,
    callback: Any = None,
) -> Solution:
    """Descend N independent problems at once: `w ← w − r·∂l/∂w` for each, or any optax rule.

    Each problem's result depends on that problem alone: the same bits in any batch, at any place in it.

    Args:
        loss: `loss(weights, *data) -> scalar`, the loss of ONE problem, a pure JAX function.
        weights: start weights, a pytree of floating point arrays, every leaf `[N, ...]`.
        data: one pytree per further argument of `loss`; leaves `[N, ...]`, or without the problem axis where shared.
        in_axes: as in `jax.vmap`, over `data`: 0 per problem, None shared; one for all, or a tuple.
        learning_rate: a number, an `[N]` array, a schedule `step -> rate`, or `"auto"` (1/L per problem, L the largest
            curvature at the start), in weight units squared per loss unit; brought to the dtype of the weights.
        optimizer: instead, an optax-style `init`/`update` pair, or a function that returns one from `hyperparams`.
        hyperparams: for such a function, numbers or `[N]` arrays by name.
        steps: at most this many updates, an integer of at least 1.
        stop: None (take all steps), a rule from `gdjax.stop`, or a function of the step's state.
        record: None; k, the loss every k updates; a function of the step's state (see `gdjax.stop`), noted at most 257
            times on the way, or `(k, function)`, every k updates.
        device: `"auto"`, `"cpu"`, `"gpu"`, `"tpu"`, `"gpu:1"`, a `jax.Device`, a list of them, or a mesh.
        dtype: bring all floating arrays to this dtype; None keeps the dtypes that came in, float64 included.
        project: a function of ONE problem's weights that brings them into a set, `w ← P(w − r·∂l/∂w)`: applied to the
            start and after every update. optax's projections are such functions.
        plan: `"auto"` (a remembered plan, a sound default, or for long runs one that is measured first), `"measure"`
            (measure now and remember), or a `gdjax.Plan`. Results are the same under all but a `"vmap"` plan asked for.
        resume: the `state` of an earlier solution, whose weights are passed as `weights`, to go on from there.
        progress: whether to show a bar, on a terminal or in a notebook, while work takes longer than a second or two.
        callback: a function that is called about once a second, and at the end, with a `gdjax.progress.Progress`: the
            running counts. Where it returns true the run ends there and its results are kept; problems that were still
            running have the status `STOPPED` and go on with `resume=`.

    Returns:
        A `Solution` with the final weights, loss, gradient norm, steps and status of every problem. A problem whose
        gradient or weights stop being finite ends as `DIVERGED` at its last finite weights; its neighbours go on. So
        does one whose loss is not finite at the end; between steps the loss is looked at only where a rule asks for it.
        Its arrays are `jax.Array`s; 64-bit ones are NumPy arrays while `jax_enable_x64` is off, since the next JAX
        operation would narrow them.

    Raises:
        ValueError: shapes, lengths, rates or steps that do not fit, an array that was deleted, an unknown device, a
            loss that fails or is no scalar, an optimizer, schedule or stop rule that fails or returns something of the
            wrong shape; inside `jit`, `vmap` or `grad`, 64-bit arrays that JAX would narrow, and `device`, `progress`,
            `callback` or a plan that is to be measured.
        TypeError: weights that are not real floating point, arguments of the wrong kind.

    The tutorial's problem, f(x, w) = xw with x = 2, t = 4, w = 1 and r = 0.1, where one step takes w to 1.2:

    >>> import gdjax, numpy as np
    >>> x, t, w = (np.array([v], np.float64) for v in (2, 4, 1))
    >>> s = gdjax.minimize(gdjax.kernel.residual_loss, w, (x, t), learning_rate=0.1, steps=1)
    >>> print(s.weights, s.loss)
    [1.2] [1.6]
    """
    rule, hyper = choose_rule(learning_rate, optimizer, hyperparams)
    arrays, frame = split(weights)
    batch = prepare(arrays, data, in_axes, hyper, dtype)
    count, (asked, measure) = check_steps(steps), planned(plan)
    every, noted = choose_record(record, count)
    held, function = projected(rule, project, frame), framed(checked_loss(loss), frame)
    program = Program(function, held, None if stop is None else stops.as_rule(stop), noted)
    if traced.wanted(program, batch, resume):
        traced.check_outer(device, measure, progress, callback)
        check_resume(resume, program, batch.count)
        return whole(traced.solve(program, batch, count, every, asked, resume), frame)
    out, devices = descend(program, batch, Job(count, asked, measure, every), device, resume, callback, progress)
    rows = np.arange(count // every + 1, dtype=np.int64) * every if every else None
    if rows is not None and resume is not None:
        rows = rows + resume.total
    names = ("weights", "loss", "gradient_norm", "steps", "status", "record")
    given = give({name: getattr(out, name) for name in names}, devices[0])
    return whole(Solution(**given, record_steps=rows, state=out.state, plan=out.plan, device=dev.label(devices)), frame)


def descend(
    program: Program,
    batch: Batch,
    job: Job,
    device: Any,
    resume: State | None = None,
    callback: Any = None,
    progress: Any = False,
) -> tuple[Outcome, tuple[jax.Device, ...]]:
    """What comes of a batch, run where it lies in shards or on the devices chosen for it; and these devices."""
    layout = layout_of(batch, device)
    x64 = batch.x64 or jax.config.jax_enable_x64  # type: ignore[attr-defined]
    with traced.apart(), dev.without_mesh(), jax.enable_x64(x64):
        doubt = doubtful(program.rule, batch)
        check_resume(resume, program, batch.count)
        devices = layout.devices if layout else choose(device, program, batch, job.steps, resume).devices
        session = SESSIONS.get(program, batch, devices)
        if doubt is not None and not session.begun:  # nothing is compiled for what will be refused
            doubt.settle()
        with watching(layout.held if layout else batch.count, callback, progress) as watch:
            watched = job if watch is None else dataclasses.replace(job, watch=watch)
            out = (Sharded(session, layout) if layout else session).run(batch, watched, resume)
        if doubt is not None:
            doubt.settle()
        return out, devices


def doubtful(rule: Rule, batch: Batch) -> Doubt | None:
    """The rates of plain descent, where their values have not been looked at."""
    plain = isinstance(rule.rule if isinstance(rule, Projected) else rule, Descent)
    return Doubt.of(batch.hyper["learning_rate"]) if plain and "learning_rate" in batch.hyper else None


def projected(rule: FreeRule, project: Any, frame: Frame | None) -> Rule:
    """The rule, with a projection after its updates where one is wanted."""
    if project is None:
        return rule
    if not callable(project):
        raise TypeError(
            f"project is a {type(project).__name__}; pass a function of one problem's weights, such as "
            "optax.projections.projection_non_negative"
        )
    return Projected(rule, project if frame is None else FramedProjection(frame, project))


def checked_loss(loss: Any) -> Callable[..., Any]:
    if not callable(loss):
        raise TypeError(f"loss is a {type(loss).__name__}; pass a function loss(weights, *data) of one problem")
    return loss


def check_steps(steps: Any) -> int:
    try:
        count = operator.index(steps)
    except TypeError:
        static = ", known when the trace is made (jax.jit with static_argnums)" if is_traced(steps) else ""
        raise TypeError(f"steps={steps!r}; pass a whole number of at least 1{static}") from None
    if isinstance(steps, bool) or not 1 <= count < 2**31:
        raise ValueError(f"steps={steps}; pass a whole number of at least 1 and below 2**31")
    return count


def choose_record(record: Any, steps: int) -> tuple[int, Any]:
    """`(updates from row to row, the figure)`; `(0, None)`: no record."""
    if record is None:
        return 0, None
    if callable(record):
        return max(1, -(-steps // (MOST_ROWS - 1))), record
    every, figure = record if isinstance(record, tuple) and len(record) == 2 else (record, loss_of)
    try:
        count = operator.index(every)
    except TypeError:
        count = 0
    if isinstance(every, bool) or count < 1 or not callable(figure):
        raise ValueError(
            f"record={record!r}; pass None, a whole number k of at least 1 (the loss every k updates), a function of "
            "the step's state, or (k, function)"
        )
    return min(count, steps + 1), figure


def loss_of(step: stops.Step) -> Any:
    return step.loss


def choose_rule(learning_rate: Any, optimizer: Any, hyperparams: Any) -> tuple[FreeRule, dict[str, Any]]:
    """The update rule and the hyperparameters that are arrays."""
    if (learning_rate is None) == (optimizer is None):
        which = "neither" if optimizer is None else "both"
        raise ValueError(f"{which} of learning_rate and optimizer given; pass exactly one of them")
    if optimizer is None:
        if hyperparams:
            raise ValueError("hyperparams go with optimizer; with learning_rate leave them out")
        return plain_descent(learning_rate)
    if not isinstance(hyperparams, Mapping | None):
        raise TypeError(f"hyperparams is a {type(hyperparams).__name__}; pass a dict of numbers or [N] arrays by name")
    hyper = dict(hyperparams or {})
    if is_pair(optimizer):
        if hyper:
            raise ValueError(
                "hyperparams need an optimizer that takes them: pass the function (optax.adam), not what it returns "
                "(optax.adam(0.1))"
            )
        return Transformation(optimizer), {}
    if not callable(optimizer):
        example = optimizer if isinstance(optimizer, str) and optimizer.isidentifier() else "adam"
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; pass an optax-style init/update pair or a function that makes "
            f"one, such as optax.{example} with hyperparams={{'learning_rate': 0.1}}"
        )
    check_hyperparams(optimizer, hyper)
    constants = {k: v for k, v in hyper.items() if isinstance(v, (bool, int, float, str, type(None)))}
    arrays = {k: v for k, v in hyper.items() if k not in constants}
    return Transformation(optimizer, tuple(sorted(constants.items()))), arrays


def check_hyperparams(optimizer: Callable[..., Any], hyper: dict[str, Any]) -> None:
    """The function that makes the optimizer must take these names, and need no others."""
    try:
        parameters = inspect.signature(optimizer).parameters.values()
    except (TypeError, ValueError):  # some callables do not tell
        return
    name = getattr(optimizer, "__name__", type(optimizer).__name__)
    taken = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in parameters if p.name in taken and p.default is p.empty and p.name not in hyper]
    unknown = [given for given in hyper if given not in taken]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"hyperparams has {unknown[0]!r}, which optimizer {name} does not take; "
            f"it takes {', '.join(taken) or 'none'}"
        )
    if missing:
        example = ", ".join(f"{wanted!r}: ..." for wanted in missing)
        raise ValueError(
            f"optimizer {name} needs {' and '.join(missing)}; pass hyperparams={{{example}}}, numbers or [N] arrays"
        )


def plain_descent(rate: Any) -> tuple[FreeRule, dict[str, Any]]:
    if isinstance(rate, str):
        if rate != "auto":
            raise ValueError(f"learning_rate={rate!r}; pass a number, an [N] array, a function step -> rate, or 'auto'")
        return Descent(auto=True), {}
    if callable(rate):
        return Descent(schedule=rate), {}
    check_rate(rate)
    return Descent(), {"learning_rate": rate}


def planned(plan: Any) -> tuple[Plan | None, bool]:
    """The plan that is asked for, if one is, and whether plans are to be measured first."""
    if isinstance(plan, Plan):
        return plan, False
    if isinstance(plan, str) and plan in ("auto", "measure"):
        return None, plan == "measure"
    raise TypeError(f"plan is {plan!r}; pass 'auto', 'measure' or a gdjax.Plan")


@contextmanager
def watching(problems: int, callback: Any, progress: Any) -> Iterator[Watch | None]:
    """A watch over the run where one is asked for."""
    check_watch(callback, progress)
    if callback is None and not progress:
        yield None
        return
    watch = Watch(problems, callback, progress)
    try:
        yield watch
    finally:
        watch.close()


def check_resume(state: Any, program: Program, count: int) -> None:
    if state is None:
        return
    if not isinstance(state, State):
        raise TypeError(f"resume is a {type(state).__name__}; pass the state of an earlier solution")
    for leaf in jax.tree.leaves((state.carried, state.status, state.steps)):
        check_held("resume", leaf)
    engine = "fixed" if program.stop is None else "until"
    if state.engine != engine:
        raise ValueError(
            "resume comes from a run "
            + ("with" if state.engine == "until" else "without")
            + " a stop rule, this one is "
            + ("without" if state.engine == "until" else "with")
            + "; go on as you began"
        )
    if np.shape(state.status) != (count,):
        raise ValueError(f"resume holds {np.shape(state.status)[0]} problems, weights has {count}; pass the same batch")
