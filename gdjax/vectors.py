"""Test vectors: problems and their exact answers in files, to check a kernel in any language.

`export_vectors` writes them, a kernel elsewhere answers them, `check_vectors` judges the answers. `FORMAT`
describes the files; it is written beside them as README.txt.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gdjax import rounding
from gdjax.bound import distance, error_bound, exact_descent
from gdjax.diagnose import diagnose
from gdjax.files import replacing
from gdjax.report import Check, Report, environment
from gdjax.rounding import FORMATS, PRODUCTS, Array, Rounding
from gdjax.trial import Problems, Trial, extreme, ordinary, same_bits, tiny

FORMAT = """gdjax test vectors, version 1

problems.json   {"version": 1, "seed": S, "cases": {NAME: CASE, ...}}
vectors.npz     the same numbers as arrays, named NAME/w, NAME/x, ... (NumPy; no pickled objects)

NAME is loss-dtype-kind, such as squared-float32-ordinary. A CASE has
  "loss"           "squared": (t - x*w)^2 / 2, or "residual": t - x*w
  "dtype"          "float16", "bfloat16", "float32" or "float64": all numbers of the case are of this format
  "steps"          how many steps of gradient descent, w <- w - learning_rate * dloss/dw
  "w", "x", "t", "learning_rate"    the problems, one entry each
  "expected"       the weights after the last step under four ways of rounding:
    "ieee"           every operation rounded: e = t - x*w, g = -(x*e), w = w - learning_rate*g
    "fma"            e and the new w as one fused multiply-add each
    "ieee_flushed", "fma_flushed"   the same, subnormal operands and results taken as zero
  "exact"          the weights in exact arithmetic, as fractions of two hexadecimal integers
  "bound"          how far from "exact" a kernel may end that rounds every operation (it may flush subnormals)

Numbers are hexadecimal floats as of C's %a and Python's float.fromhex ("0x1.8p+1" is 3; also "nan", "-inf").
An update that is not finite is carried on in "expected"; a kernel may keep the last finite weights instead.

Write your answers into the same folder, for as many cases as you like:
  outputs.json     {NAME: [w, ...], ...} with hexadecimal floats (or numbers), or
  outputs.npz      arrays named NAME
and run: gdjax verify --check FOLDER
"""

EXPECTED = {
    "ieee": rounding.IEEE,
    "fma": rounding.FMA,
    "ieee_flushed": rounding.IEEE_FLUSHED,
    "fma_flushed": rounding.FMA_FLUSHED,
}


@dataclass(frozen=True)
class Case:
    """Problems of one dtype with one loss and one number of steps."""

    loss: str
    dtype: str
    kind: str
    steps: int
    problems: Problems

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.dtype}-{self.kind}"


def export_vectors(
    folder: str | os.PathLike[str],
    *,
    losses: Sequence[str] = ("squared", "residual"),
    dtypes: Sequence[str] = ("float32", "float64"),
    seed: int = 0,
) -> list[Path]:
    """Write test vectors into a folder (made if missing), each file whole or not at all.

    Args:
        folder: where to write; the folder above it must be there.
        losses: "squared", "residual".
        dtypes: "float16", "bfloat16", "float32", "float64".
        seed: of the random problems.

    Returns:
        The files written: problems.json, vectors.npz, README.txt (the format).

    Raises:
        ValueError: if the folder cannot be made, or a loss or dtype is unknown.

    >>> import tempfile
    >>> [path.name for path in export_vectors(tempfile.mkdtemp(), dtypes=["float32"])]
    ['problems.json', 'vectors.npz', 'README.txt']
    """
    unknown = [v for v in (*losses, *dtypes) if v not in (*FORMATS, "squared", "residual")]
    if unknown:
        raise ValueError(f"unknown loss or dtype {unknown[0]!r}; dtypes are {', '.join(FORMATS)}")
    folder = Path(folder)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder {str(folder)!r} cannot be made: {error.strerror}") from error
    cases: dict[str, Any] = {}
    arrays: dict[str, Array] = {}
    for case in _cases(losses, dtypes, seed):
        content = _answers(case)
        cases[case.name] = content
        for key, values in content.items():
            if key == "expected":
                arrays |= {f"{case.name}/{how}": _read(v, case.dtype) for how, v in values.items()}
            elif key == "bound":
                arrays[f"{case.name}/bound"] = _read(values, "float64")
            elif key in ("w", "x", "t", "learning_rate"):
                arrays[f"{case.name}/{key}"] = _read(values, case.dtype)
    packed = io.BytesIO()
    # NPZ knows no bfloat16: its bits are stored.
    stored: dict[str, Any] = {
        name: v.view(np.uint16) if v.dtype.name == "bfloat16" else v for name, v in arrays.items()
    }
    np.savez(packed, **stored)
    text = json.dumps({"version": 1, "seed": seed, "cases": cases}, indent=1)
    files = {"problems.json": text.encode(), "vectors.npz": packed.getvalue(), "README.txt": FORMAT.encode()}
    for name, data in files.items():
        with replacing(folder / name) as file:
            file.write(data)
    return [folder / name for name in files]


def check_vectors(folder: str | os.PathLike[str], *, claim: str = "bits") -> Report:
    """Judge the answers in a folder against the problems in it.

    Args:
        folder: as written by `export_vectors`, with outputs.json or outputs.npz added.
        claim: "bits" or "bound", as in `gdjax.verify`.

    Returns:
        A `Report` with a line per case; a case without an answer is left out.

    Raises:
        ValueError: if a file is missing or is not what its format says.
    """
    start = time.perf_counter()
    if claim not in ("bits", "bound"):
        raise ValueError(f"claim must be 'bits' or 'bound', got {claim!r}")
    folder = Path(folder)
    try:
        content = json.loads((folder / "problems.json").read_text())
        cases = [_case(name, entry) for name, entry in content["cases"].items()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'problems.json'} holds no test vectors: {error!r}") from error
    outputs = _outputs(folder, {case.name: case.dtype for case in cases})
    device = jax.devices()[0]
    checks = []
    for case in cases:
        if case.name not in outputs:
            checks.append(Check(case.kind, f"{case.loss} {case.dtype}", None, "no answer in the outputs"))
            continue
        checks.append(_judge(case, outputs[case.name], device, claim))
    seconds = time.perf_counter() - start
    losses = " and ".join(sorted({case.loss for case in cases}))
    where = "outputs made elsewhere"
    return Report(
        str(folder), losses, claim, where, content.get("seed", 0), seconds, environment(device), tuple(checks)
    )


def _cases(losses: Sequence[str], dtypes: Sequence[str], seed: int) -> Iterator[Case]:
    for loss, dtype in itertools.product(losses, dtypes):
        rng = np.random.default_rng(seed)
        tutorial = Problems(*(np.array([v]).astype(FORMATS[dtype].dtype) for v in (1, 2, 4, 0.1)))
        yield Case(loss, dtype, "tutorial", 1, tutorial)
        yield Case(loss, dtype, "ordinary", 50, ordinary(FORMATS[dtype].dtype, 64, rng))
        yield Case(loss, dtype, "extreme", 4, extreme(FORMATS[dtype].dtype, 64, rng))
        yield Case(loss, dtype, "subnormal", 2, tiny(FORMATS[dtype].dtype))


def _answers(case: Case) -> dict[str, Any]:
    numbers = list(zip(*(v.astype(np.float64).tolist() for v in case.problems), strict=True))
    exact = [exact_descent(w, x, t, r, case.steps, case.loss) for w, x, t, r in numbers]
    with np.errstate(all="ignore"):
        expected = {
            key: _hex(rounding.descend(*case.problems, case.steps, loss=case.loss, rounding=how))
            for key, how in EXPECTED.items()
        }
    weights = [e.weight for e in exact]
    return {
        "loss": case.loss,
        "dtype": case.dtype,
        "steps": case.steps,
        **{name: _hex(v) for name, v in zip(("w", "x", "t", "learning_rate"), case.problems, strict=True)},
        "expected": expected,
        "exact": [f"{weight.numerator:#x}/{weight.denominator:#x}" for weight in weights],
        "bound": _hex(error_bound(*case.problems, exact, case.loss)),
    }


def _hex(values: Array) -> list[str]:
    return [float(v).hex() for v in values]


def _read(values: Sequence[Any], dtype: str) -> Array:
    """Hexadecimal floats, or numbers."""
    numbers = [float.fromhex(v) if isinstance(v, str) else float(v) for v in values]
    return np.array(numbers).astype(FORMATS[dtype].dtype)


def _case(name: str, entry: dict[str, Any]) -> Case:
    problems = Problems(*(_read(entry[key], entry["dtype"]) for key in ("w", "x", "t", "learning_rate")))
    return Case(entry["loss"], entry["dtype"], name.rsplit("-", 1)[-1], int(entry["steps"]), problems)


def _outputs(folder: Path, dtypes: dict[str, str]) -> dict[str, Array]:
    """The answers by name of case."""
    as_json, as_npz = folder / "outputs.json", folder / "outputs.npz"
    try:
        if as_json.exists():
            found = json.loads(as_json.read_text())
            if not isinstance(found, dict):
                raise ValueError("outputs.json is not an object of cases")
            return {name: _read(found[name], dtype) for name, dtype in dtypes.items() if name in found}
        with open(as_npz, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            found = {name: file[name] for name in dtypes if name in file}
    except FileNotFoundError as error:
        raise ValueError(f"{str(folder)!r} holds neither outputs.json nor outputs.npz; README.txt says how") from error
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"the outputs in {str(folder)!r} cannot be read: {error}") from error
    half = FORMATS["bfloat16"].dtype
    return {
        name: value.view(half) if dtypes[name] == "bfloat16" and value.dtype == np.uint16 else value
        for name, value in found.items()
    }


def _judge(case: Case, answer: Array, device: Any, claim: str) -> Check:
    """One case: which rounding it follows, and whether it lies inside the bound."""
    subject, dtype = f"{case.loss} {case.dtype}", FORMATS[case.dtype].dtype
    if answer.shape != case.problems.w.shape or answer.dtype != dtype:
        detail = f"{answer.dtype} {answer.shape}, wanted {dtype} {case.problems.w.shape}"
        return Check(case.kind, subject, False, detail)
    trial = Trial(lambda *_: answer, case.loss, dtype, device, claim)
    numbers = list(zip(*(v.astype(np.float64).tolist() for v in case.problems), strict=True))
    exact = [exact_descent(w, x, t, r, case.steps, case.loss) for w, x, t, r in numbers]
    limit = error_bound(*case.problems, exact, case.loss)
    error = np.array([distance(float(a), e.weight) for a, e in zip(answer, exact, strict=True)])
    promised = np.isfinite(limit)
    outside = int(np.count_nonzero(error[promised] > limit[promised]))
    figures = {"problems": len(answer), "outside_the_bound": outside}
    for how, keeps in itertools.product(_roundings(), (False, True)):
        trial.keeps_finite = keeps
        if np.all(same_bits(answer, trial.expected(case.problems, case.steps, how))):
            detail = f"bit-equal under {how}: {len(answer)} problems × {case.steps} steps"
            return Check(case.kind, subject, outside == 0, detail, figures | {"rounding": str(how)})
    trial.keeps_finite = False
    if claim == "bound" and outside == 0:
        return Check(case.kind, subject, True, "inside the error bound", figures)
    expected = trial.expected(case.problems, case.steps)
    where = f"{outside} outside the error bound" if outside else "all inside the error bound"
    reason = diagnose(trial, case.problems, case.steps, answer, expected)
    return Check(case.kind, subject, False, f"{reason}; {where}", figures)


def _roundings() -> Iterator[Rounding]:
    fused = ((False, False), (True, True), (True, False), (False, True))
    for product, (residual, update), flush in itertools.product(PRODUCTS, fused, (False, True)):
        yield Rounding(residual, update, flush, product)
