"""Checks of what goes wrong around a kernel's numbers: batches, tiles, special values, neighbours, memory.

A check is a function of a `Trial` that returns an `Outcome`; it leans on what `checks.agreement` found.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from pathlib import Path

import jax
import numpy as np

from gdjax import rounding
from gdjax.checks import Outcome
from gdjax.diagnose import diagnose
from gdjax.rounding import FORMATS, Array
from gdjax.trial import KernelError, Problems, Trial, ordinary, same_bits, tiny


def company(trial: Trial) -> Outcome:
    """A problem alone, in other positions and in other company."""
    problems = ordinary(trial.dtype, 1000, trial.rng())
    steps = 12
    together = trial.run(problems, steps)
    for i in (0, 1, 127, 128, 500, 999):
        alone = trial.run(problems.take(slice(i, i + 1)), steps)
        if not same_bits(alone, together[i : i + 1])[0]:
            detail = f"problem {i} alone gives {alone[0]!s}, in a batch of 1,000 {together[i]!s}"
            return Outcome(False, detail, {"problem": i})
    order = np.arange(1000)
    for name, index in (
        ("reversed", order[::-1]),
        ("rolled by one", np.roll(order, 1)),
        ("rolled by 129", np.roll(order, 129)),
    ):
        got = trial.run(problems.take(index), steps)
        if not np.all(same_bits(got, together[index])):
            moved = problems.take(index)
            return Outcome(False, f"batch {name}: {_moved(trial, moved, steps, got, together[index])}")
    return Outcome(True, "the same bits alone, in a batch of 1,000, reversed and rolled by 1 and 129")


def _moved(trial: Trial, problems: Problems, steps: int, got: Array, expected: Array) -> str:
    exact = Trial(trial.kernel, trial.loss, trial.dtype, trial.device, rounding=rounding.IEEE)
    exact.result_dtype = trial.result_dtype
    return diagnose(exact, problems, steps, got, expected)


def sizes(trial: Trial) -> Outcome:
    """Batches of many sizes; each repeats the same 4,099 problems (a prime: no two tiles are alike)."""
    period, steps = 4099, 2
    base = ordinary(trial.dtype, period, trial.rng())
    expected = trial.run(base, steps)
    done: list[int] = []
    left_out: list[str] = []
    for count in (1, 2, 3, 17, 1000, 70_001, *([] if trial.quick else [2**20 + 1])):
        if trial.pace * count * steps > (3 if trial.quick else 10):
            left_out.append(f"{count:,} (about {trial.pace * count * steps:.0f} s)")
            continue
        problems = Problems(*(np.resize(v, count) for v in base))
        got, wanted = trial.run(problems, steps), np.resize(expected, count)
        if not np.all(same_bits(got, wanted)):
            detail = f"batch of {count:,}: {_moved(trial, problems, steps, got, wanted)}"
            return Outcome(False, detail, {"failed_at": count, "sizes": done})
        done.append(count)
    detail = "the same bits in batches of " + ", ".join(f"{n:,}" for n in done)
    if left_out:
        detail += "; left out as too slow: " + ", ".join(left_out)
    return Outcome(True, detail, {"sizes": done, "left_out": left_out})


def huge(trial: Trial) -> Outcome:
    """More than 2³¹ bytes per array, where byte and element counters overflow."""
    count = 2**31 // trial.dtype.itemsize + 1
    needed, free = 9 * count * trial.dtype.itemsize, _free_memory(trial.device)
    if trial.quick:
        return Outcome(None, "a quick run")
    if free is None or free < needed:
        free_text = "unknown" if free is None else f"{free / 2**30:.0f} GiB"
        return Outcome(None, f"needs {needed / 2**30:.0f} GiB of memory, free: {free_text}")
    _repeated(trial, 2**22)  # may compile
    sample = 2**25  # more than any memory that is kept for reuse: new memory is what takes the time
    started = time.perf_counter()
    _repeated(trial, sample)
    seconds = (time.perf_counter() - started) * count / sample
    if seconds > trial.patience:
        return Outcome(None, f"{count:,} problems would take about {seconds:.0f} s, over {trial.patience:g} s")
    wrong = _repeated(trial, count)
    if wrong is not None:
        return Outcome(False, f"the first wrong of {count:,} problems is {wrong:,}", {"first": wrong})
    size = count * trial.dtype.itemsize
    return Outcome(True, f"{count:,} problems, {size:,} bytes per array", {"problems": count})


def _repeated(trial: Trial, count: int) -> int | None:
    """The first wrong problem of `count` that repeat the same 65,537, each after one step.

    Touching fresh memory is what takes the time, so the inputs are three views of one array.
    """
    period, rate, none = 65_537, float(trial.dtype.type(0.125)), np.zeros(1, trial.dtype)
    shift = 64 * (period // 192)
    pool = np.resize(ordinary(trial.dtype, period, trial.rng()).x, count + 2 * shift)
    w, x, t = (pool[k * shift : k * shift + count] for k in range(3))
    expected = trial.run(Problems(w[:period], x[:period], t[:period], none), 1, rate)
    got = trial.run(Problems(w, x, t, none), 1, rate, copy=False)
    for start in range(0, count, 256 * period):
        part = got[start : start + 256 * period]
        equal = same_bits(part, np.resize(expected, len(part)))
        if not np.all(equal):
            return start + int(np.flatnonzero(~equal)[0])
    return None


def _free_memory(device: jax.Device) -> int | None:
    """Bytes that can be had on the host and on the device, None where the system does not say."""
    free = []
    try:
        free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # not on this system
        return None
    # A container may be allowed less than its machine has.
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        (group / "memory.max", group / "memory.current"),
        (group / "memory/memory.limit_in_bytes", group / "memory/memory.usage_in_bytes"),
    ):
        try:
            free.append(int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        free.append(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return min(free)


def special_values(trial: Trial) -> Outcome:
    """NaN and infinities in every place, and overflow on the way."""
    good = [1.0, 2.0, 4.0, 0.125]
    rows = [list(good)]
    for value, place in itertools.product((np.nan, np.inf, -np.inf), range(3)):
        rows.append([value if i == place else v for i, v in enumerate(good)])
    fmt = FORMATS[trial.dtype.name]
    largest = math.ldexp(2.0 - 2 * fmt.unit_roundoff, fmt.emax)
    rows += [
        [largest, 2.0, 4.0, 0.125],
        [1.0, largest, 4.0, 1.0],
        [1.0, 1e3, 1.0, 1e3],
        [-largest, -1.0, largest, 1.0],
    ]
    refused = _refuses_bad_rates(trial)
    if not refused:
        rows += [[1.0, 2.0, 4.0, value] for value in BAD_RATES]
    problems = _problems(trial, rows)
    got = trial.run(problems, 60)
    outcomes = []
    for keeps in (trial.keeps_finite, not trial.keeps_finite):
        expected = _with_keeping(trial, problems, 60, keeps)
        equal = trial.equal(got, expected, problems.w)
        outcomes.append(equal)
        if np.all(equal):
            what = "keeps the last finite weights" if keeps else "carries inf and NaN on as IEEE 754 says"
            return Outcome(True, f"{len(rows)} problems with NaN, ±inf or overflow: {what}{refused}")
    worst = int(np.flatnonzero(~outcomes[0])[0])
    w, x, t, r = (f"{v:g}" for v in rows[worst])
    wanted = _with_keeping(trial, problems, 60, trial.keeps_finite)[worst]
    return Outcome(False, f"w={w}, x={x}, t={t}, r={r} ends at {got[worst]!s}, wanted {wanted!s}")


BAD_RATES = (math.nan, math.inf, -math.inf)


def _refuses_bad_rates(trial: Trial) -> str:
    """A kernel may refuse rates that are no numbers, with a ValueError; a text that says so, or nothing."""
    try:
        trial.run(_problems(trial, [[1.0, 2.0, 4.0, value] for value in BAD_RATES]), 1)
    except KernelError as error:
        if isinstance(error.__cause__, ValueError):
            return "; such rates raise ValueError"
        raise
    return ""


def _with_keeping(trial: Trial, problems: Problems, steps: int, keeps: bool) -> Array:
    before, trial.keeps_finite = trial.keeps_finite, keeps
    try:
        return trial.expected(problems, steps)
    finally:
        trial.keeps_finite = before


def _problems(trial: Trial, rows: list[list[float]]) -> Problems:
    with np.errstate(over="ignore"):
        return Problems(*np.array(rows, np.float64).T.astype(trial.dtype).copy())


def signed_zeros(trial: Trial) -> Outcome:
    """Every combination of ±0 and ordinary numbers."""
    numbers = (0.0, -0.0, 1.5, -1.5)
    rows = [[*row, rate] for row in itertools.product(numbers, repeat=3) for rate in (0.0, 1.5)]
    problems = _problems(trial, rows)
    got, expected = trial.run(problems, 1), trial.expected(problems, 1)
    equal = trial.equal(got, expected, problems.w)
    if np.all(equal):
        return Outcome(True, f"{len(rows)} combinations of ±0 and ±1.5")
    i = int(np.flatnonzero(~equal)[0])
    w, x, t, r = rows[i]
    return Outcome(False, f"w={w}, x={x}, t={t}, r={r} gives {got[i]!s}, wanted {expected[i]!s}")


def subnormals(trial: Trial) -> Outcome:
    """Whether numbers below the smallest normal one are kept, and whether the device keeps them."""
    if trial.result_dtype != trial.dtype:
        return Outcome(None, f"{trial.dtype} subnormals are normal in {trial.result_dtype}")
    problems = tiny(trial.dtype)
    got = trial.run(problems, 1)
    flushes = bool(np.any((got == 0) & (trial.expected(problems, 1, rounding.IEEE) != 0)))
    device_flushes = trial.on_jax and _device_flushes(trial)
    where = f"JAX on {trial.device.platform}" if trial.on_jax else "NumPy on this host"
    figures = {"kernel_flushes": flushes, "device_flushes": device_flushes}
    does = "flushes them to zero" if flushes else "keeps them"
    if flushes and not device_flushes and trial.claim == "bits":
        return Outcome(False, f"{does}, though {where} keeps them (flush to zero)", figures)
    return Outcome(True, f"{does}; {where} {'flushes' if device_flushes else 'keeps'} them", figures)


def _device_flushes(trial: Trial) -> bool:
    smallest = np.asarray(2.0 ** FORMATS[trial.dtype.name].emin, trial.dtype)
    with jax.enable_x64(trial.dtype.name == "float64"), jax.default_device(trial.device):
        half = jax.jit(lambda a: a * a.dtype.type(0.5))(smallest)
    return bool(np.asarray(half) == 0)


def nothing_to_do(trial: Trial) -> Outcome:
    """No input, no rate, no steps: the weights come back as they were."""
    some = ordinary(trial.dtype, 64, trial.rng())
    zero = np.zeros_like(some.w)
    start = some.w.astype(trial.result_dtype)
    for name, problems in (("zero input", some._replace(x=zero)), ("zero rate", some._replace(r=zero))):
        if not np.all(same_bits(trial.run(problems, 20), start)):
            return Outcome(False, f"{name} changes the weights")
    try:
        got = trial.run(some, 0)
    except KernelError as error:
        if isinstance(error.__cause__, ValueError):
            return Outcome(True, "zero input and zero rate keep the weights; zero steps raise ValueError")
        return Outcome(False, f"zero steps: {error}")
    if not np.all(same_bits(got, start)):
        return Outcome(False, "zero steps: " + _moved(trial, some, 0, got, start))
    return Outcome(True, "zero input, zero rate and zero steps keep the weights")


def neighbours(trial: Trial) -> Outcome:
    """Problems beside a diverging one, a NaN and an infinity give the bits they give beside good ones."""
    good = ordinary(trial.dtype, 300, trial.rng())
    bad = good.copy()
    places = np.array([0, 63, 64, 150, 299])
    bad.r[places] = trial.dtype.type(1e4)
    bad.x[places[1::2]], bad.t[places[2]] = np.nan, np.inf
    others = np.setdiff1d(np.arange(300), places)
    before, after = trial.run(good, 40)[others], trial.run(bad, 40)[others]
    equal = same_bits(before, after)
    if np.all(equal):
        return Outcome(True, "295 problems beside 5 that diverge or hold NaN or inf: the same bits as without")
    return Outcome(False, f"{np.count_nonzero(~equal)} good problems change beside diverging ones", {})


def inputs_kept(trial: Trial) -> Outcome:
    """The kernel writes to none of its inputs."""
    given = ordinary(trial.dtype, 500, trial.rng())
    kept = given.copy()
    trial.run(given, 5, copy=False)
    written = [
        name
        for name, now, before in zip(("w", "x", "t", "learning_rate"), given, kept, strict=True)
        if not np.all(same_bits(now, before))
    ]
    if written:
        return Outcome(False, f"the kernel writes to its input {' and '.join(written)}")
    return Outcome(True, "no input is written to")


def one_rate(trial: Trial) -> Outcome:
    """A rate for all is the same as that rate for each."""
    problems = ordinary(trial.dtype, 300, trial.rng())
    each = problems._replace(r=np.full_like(problems.w, 0.125))
    array = trial.run(each, 10)
    number = trial.run(each, 10, 0.125)
    if number.dtype != array.dtype:
        trial.result_dtype = array.dtype
        return Outcome(False, f"returns {number.dtype} for a number as rate, {array.dtype} for an array")
    equal = same_bits(array, number)
    if np.all(equal):
        return Outcome(True, "a number and an array of that number give the same bits")
    return Outcome(False, f"{np.count_nonzero(~equal)} of 300 problems differ between a number and an array")


def repeatable(trial: Trial) -> Outcome:
    """The same call gives the same bits."""
    problems = ordinary(trial.dtype, 3000, trial.rng())
    first = trial.run(problems, 10)
    for i in range(2, 6):
        again = trial.run(problems, 10)
        if not np.all(same_bits(first, again)):
            count = np.count_nonzero(~same_bits(first, again))
            return Outcome(False, f"run {i} differs from run 1 in {count:,} of 3,000 problems")
    return Outcome(True, "five runs, the same bits")
