"""A sweep written down in a file: read, and checked key by key before anything is run.

[data]
table = "cancer.csv"          # beside this file: .csv, .parquet or .npz
inputs = ["radius", "texture"]
target = "malignant"

[model]                       # linear in its inputs, in standard units
loss = "logistic"
l2 = 0.1

[over]                        # every combination of these
learning_rate = { log = [0.01, 1.0], count = 20 }
seed = 5
fold = 10

[run]
steps = 5000

[output]
table = "runs.csv"
plot = "runs.png"
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gdjax import over
from gdjax.over import Axis

Check = Callable[[Any], Any]

DATA_SETS = ("fold", "bootstrap")
"""Axes whose positions are row weights."""


class ConfigError(ValueError):
    """A sweep's file that cannot be used; the message says where and how to mend it."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What a file asks for: its sections with all defaults filled in, and the axes that need no data."""

    path: Path
    data: dict[str, Any]
    model: dict[str, Any]
    run: dict[str, Any]
    output: dict[str, Any]
    axes: dict[str, Any]

    @property
    def swept(self) -> list[str]:
        """Every name that has more than one value."""
        return [name for axis, entry in self.axes.items() for name in (entry.values if is_joint(entry) else [axis])]


def is_joint(entry: Any) -> bool:
    return isinstance(entry, Axis) and entry.joint


def wanted(what: str, fits: Callable[[Any], bool]) -> Check:
    """A check that lets through what fits and tells `what` was wanted."""

    def check(value: Any) -> Any:
        if not fits(value):
            raise ValueError(f"it must be {what}, got {spelled(value)}")
        return value

    return check


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def spelled(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, repr(value)) if isinstance(value, bool) else repr(value)


TEXT = wanted("text", lambda value: isinstance(value, str) and value != "")
NAMES = wanted(
    "a list of column names",
    lambda value: isinstance(value, list) and len(value) > 0 and all(isinstance(name, str) and name for name in value),
)
FLAG = wanted("true or false", lambda value: isinstance(value, bool))
COUNT = wanted("a whole number of at least 1", is_count)
SEED = wanted("a whole number, 0 or more", lambda value: is_count(value) or (value == 0 and value is not False))
POSITIVE = wanted("a positive number", lambda value: is_number(value) and value > 0)
SIZE = wanted("a number, 0 or more", lambda value: is_number(value) and value >= 0)
SHARE = wanted("a number between 0 and 1", lambda value: is_number(value) and 0 < value < 1)
RATE = wanted('a positive number, or "auto"', lambda value: value == "auto" or (is_number(value) and value > 0))
DTYPE = wanted('"float32" or "float64"', lambda value: value in ("float32", "float64"))
SETTINGS = wanted(
    "a table of numbers and switches",
    lambda value: isinstance(value, dict) and all(isinstance(v, bool) or is_number(v) for v in value.values()),
)

SECTIONS: dict[str, dict[str, tuple[Check, Any]]] = {
    "data": {"table": (TEXT, ...), "inputs": (NAMES, ...), "target": (TEXT, ...)},
    "model": {
        "loss": (TEXT, "squared"),
        "l2": (SIZE, None),
        "intercept": (FLAG, True),
        "delta": (POSITIVE, 1.0),
        "quantile": (SHARE, 0.5),
    },
    "run": {
        "learning_rate": (RATE, None),
        "optimizer": (TEXT, None),
        "hyperparams": (SETTINGS, {}),
        "steps": (COUNT, 10_000),
        "tol": (POSITIVE, None),
        "dtype": (DTYPE, "float64"),
        "device": (TEXT, "auto"),
    },
    "output": {"table": (TEXT, None), "plot": (TEXT, None)},
}
"""The keys of each section: how its value is checked, and its default; `...` where there is none."""

AXES = ("over", "draw", "point")
"""The sections that say what is swept."""


def read_config(path: str | os.PathLike[str]) -> Config:
    """Read and check a sweep's file.

    Args:
        path: a TOML file as in this module's docstring. `[over]` takes for each name a list of numbers, or
            `{ log = [low, high], count = K }` or `{ linear = [low, high], count = K }`; `seed`, `fold` and `bootstrap`
            take how many. `[draw]` takes `count`, a `seed` and for each name what to draw from: a list,
            `{ log = [low, high] }` or `{ linear = [low, high] }`. Each `[[point]]` is one listed point.

    Returns:
        What it asks for.

    Raises:
        ConfigError: it is missing, is not TOML, or has a key or a value that cannot be used.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "sweep.toml"
    >>> _ = path.write_text('[data]\\ntabel = "shops.csv"')
    >>> read_config(path)
    Traceback (most recent call last):
    gdjax.sweep_config.ConfigError: sweep.toml: [data] has no key 'tabel'; did you mean 'table'? It has: table, ...
    """
    path = Path(path)
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not TOML: {error}") from None
    try:
        known_keys("the file", given, [*SECTIONS, *AXES], "section")
        sections = {name: section(name, given.get(name, {}), keys) for name, keys in SECTIONS.items()}
        config = Config(path, **sections, axes=axes_of(given, hyper_names(sections["run"])))
        check_swept(config)
    except ValueError as error:
        raise ConfigError(f"{path.name}: {error}") from None
    return config


def known_keys(where: str, given: Mapping[str, Any], known: list[str], kind: str = "key") -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"{where} has no {kind} {name!r}{hint} It has: {', '.join(known)}")


def table_of(where: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be a section of keys and values, got {spelled(given)}")
    return given


def section(name: str, given: Any, keys: dict[str, tuple[Check, Any]]) -> dict[str, Any]:
    """A section's values, checked, with defaults for those left out."""
    known_keys(f"[{name}]", table_of(f"[{name}]", given), list(keys))
    missing = [key for key, (_, default) in keys.items() if default is ... and key not in given]
    if missing:
        raise ValueError(f"[{name}] needs {' and '.join(missing)}")
    return {
        key: told(f"[{name}] {key}", check, given[key]) if key in given else default
        for key, (check, default) in keys.items()
    }


def told(where: str, check: Callable[..., Any], *values: Any) -> Any:
    """What a check returns; its error says where."""
    try:
        return check(*values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def hyper_names(run: Mapping[str, Any]) -> list[str]:
    """The names of the hyperparameters that may be swept."""
    if run["optimizer"] is None:
        return ["learning_rate"]
    from gdjax.optimizers import optax_rules
    from gdjax.sweep_places import names_of

    rules = optax_rules()
    known_keys("optax", {run["optimizer"]: None}, list(rules), "optimizer")
    names = names_of(rules[run["optimizer"]])
    known_keys("[run] hyperparams", run["hyperparams"], names)
    return names


def axes_of(given: Mapping[str, Any], hyper: list[str]) -> dict[str, Any]:
    """The axes that the sections `over`, `draw` and `point` ask for."""
    single = [*hyper, "l2", "seed"]
    axes: dict[str, Any] = {}
    listed = given.get("point", [])
    if listed:
        rows = [table_of("[[point]]", row) for row in listed] if isinstance(listed, list) else [table_of("", listed)]
        for row in rows:
            known_keys("[[point]]", row, single)
            for name, value in row.items():
                told(f"[[point]] {name}", SIZE, value)
        axes["point"] = told("[[point]]", over.points, rows)
    if "draw" in given:
        drawn = dict(table_of("[draw]", given["draw"]))
        known_keys("[draw]", drawn, ["count", "seed", *single])
        count = told("[draw] count", COUNT, drawn.pop("count", None))
        # the seed that draws are made from; starts are drawn by [over] seed
        seed = told("[draw] seed", SEED, drawn.pop("seed", 0))
        rules = {name: told(f"[draw] {name}", distribution, value) for name, value in drawn.items()}
        axes["draw"] = told("[draw]", lambda: over.draws(count, seed, **rules))
    grid = table_of("[over]", given.get("over", {}))
    known_keys("[over]", grid, [*single, *DATA_SETS])
    for name, value in grid.items():
        counted = name in ("seed", *DATA_SETS)
        axes[name] = told(f"[over] {name}", COUNT if counted else spaced, value)
    if not axes:
        raise ValueError("nothing is swept; give [over] at least one list, such as learning_rate = [0.1, 0.2]")
    return axes


def bounds(value: dict[str, Any], kind: str) -> tuple[float, float]:
    pair = value[kind]
    if not isinstance(pair, list) or len(pair) != 2 or not all(is_number(end) for end in pair):
        raise ValueError(f"{kind} must be [low, high], got {spelled(pair)}")
    if pair[0] > pair[1] or (kind == "log" and pair[0] <= 0):
        raise ValueError(f"{kind} = {pair}; give {'two positive bounds' if kind == 'log' else 'two bounds'}, low first")
    return float(pair[0]), float(pair[1])


def kind_of(value: Any, others: list[str], form: str) -> str:
    """`log` or `linear`, whichever a range has."""
    if isinstance(value, dict):
        known_keys("a range", value, ["log", "linear", *others])
        kinds = [kind for kind in ("log", "linear") if kind in value]
        if len(kinds) == 1:
            return kinds[0]
    raise ValueError(f"it must be a list of numbers or a range such as {form}, got {spelled(value)}")


def numbers(value: list[Any]) -> np.ndarray:
    if not value or not all(is_number(entry) and entry >= 0 for entry in value):
        raise ValueError(f"a list must hold numbers, 0 or more, at least one of them; got {spelled(value)}")
    return np.array(value, np.float64)


def spaced(value: Any) -> np.ndarray:
    """The values of a list or a range."""
    if isinstance(value, list):
        return numbers(value)
    kind = kind_of(value, ["count"], "{ log = [0.001, 1.0], count = 10 }")
    count = told("count", COUNT, value.get("count"))
    return (np.geomspace if kind == "log" else np.linspace)(*bounds(value, kind), count)


def distribution(value: Any) -> Any:
    """What to draw from."""
    if isinstance(value, list):
        return numbers(value)
    kind = kind_of(value, [], "{ log = [0.001, 1.0] }")
    return (over.log_uniform if kind == "log" else over.uniform)(*bounds(value, kind))


def check_swept(config: Config) -> None:
    """Nothing is set twice, and a rate is given where the optimizer has none of its own."""
    from gdjax.optimizers import named_optimizer

    swept, run = config.swept, config.run
    for name in swept:
        if swept.count(name) > 1:
            raise ValueError(f"{name} is swept twice; leave it out of all but one of [over], [draw] and [[point]]")
        fixed = {"learning_rate": run["learning_rate"], "l2": config.model["l2"], **run["hyperparams"]}
        if fixed.get(name) is not None:
            where = "[model]" if name == "l2" else "[run]"
            raise ValueError(f"{where} sets {name}, which is swept; leave one of them out")
    if "fold" in swept and "bootstrap" in swept:
        raise ValueError("[over] has fold and bootstrap; both say which rows a run sees: leave one of them out")
    if run["optimizer"] is not None and "learning_rate" not in swept:
        if run["learning_rate"] == "auto":
            raise ValueError("[run] learning_rate: 'auto' is for plain descent; give the optimizer a number")
        named_optimizer(run["optimizer"], run["learning_rate"])
