"""What the user passed, checked and brought into one form, before anything is compiled."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from gdjax import device as dev
from gdjax.friends import adopted

LONG = frozenset(np.dtype(name) for name in ("int64", "uint64"))
WIDE = LONG | frozenset(np.dtype(name) for name in ("float64", "complex128"))


class Name:
    """What a leaf of a pytree is called, as in `data[0]['x']`: put together only when an error tells it."""

    __slots__ = ("number", "root", "tree")

    def __init__(self, root: str, tree: Any, number: int):
        self.root, self.tree, self.number = root, tree, number

    def __str__(self) -> str:
        return self.root + jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(self.tree)[self.number][0])


@dataclasses.dataclass(frozen=True)
class Batch:
    """N problems: weights, data and hyperparameters, with flags that say which leaves are per problem.

    `x64` says that 64-bit types are among them, so that the work must run where JAX keeps them.
    """

    weights: Any
    data: tuple[Any, ...]
    hyper: dict[str, Any]
    data_flags: tuple[Any, ...]
    hyper_flags: dict[str, bool]
    count: int
    x64: bool


SOUND: dict[Any, tuple[np.dtype, tuple[tuple[Any, ...], dict[str, bool], int, bool]]] = {}
"""The dtype of the weights and what a batch is besides its arrays, by the shapes, types and places of arrays that were
found to fit as they are."""

MOST_SOUND = 256

NUMBERS = (int, float)


def prepare(weights: Any, data: Any, in_axes: Any, hyper: dict[str, Any], dtype: Any) -> Batch:
    """The batch of what was passed to `minimize`, some of it traced perhaps.

    Raises ValueError or TypeError naming what does not fit. Looks at arrays like those of an earlier call only once.
    """
    key = look_of(weights, data, in_axes, hyper, dtype)
    found = None if key is None else SOUND.get(key)
    if found is not None:
        common, rest = found
        numbers = {name: hyper_array(name, value, common) for name, value in hyper.items() if type(value) in NUMBERS}
        return Batch(weights, data, {**hyper, **numbers}, *rest)
    batch = checked(weights, data, in_axes, hyper, dtype)
    if key is not None and unchanged((weights, data, hyper), (batch.weights, batch.data, batch.hyper)):
        if len(SOUND) >= MOST_SOUND:
            SOUND.clear()
        common = np.result_type(*[leaf.dtype for leaf in jax.tree.leaves(batch.weights)])
        SOUND[key] = common, (batch.data_flags, batch.hyper_flags, batch.count, batch.x64)
    return batch


def unchanged(given: Any, taken: Any) -> bool:
    """Whether what was taken are the arrays that were given, beside numbers."""
    pairs = zip(jax.tree.leaves(given), jax.tree.leaves(taken), strict=True)
    return all(one is other or type(one) in NUMBERS for one, other in pairs)


def look_of(weights: Any, data: Any, in_axes: Any, hyper: dict[str, Any], dtype: Any) -> Any:
    """All that `checked` looks at, as a key; None where it may look at more than the shapes and types of arrays and at
    which hyperparameters are numbers."""
    numbers = tuple([name for name, value in hyper.items() if type(value) in NUMBERS])
    arrays = {name: value for name, value in hyper.items() if name not in numbers}
    leaves, tree = jax.tree.flatten((weights, data, arrays))
    plainly = type(in_axes) in (int, type(None)) and isinstance(dtype, (str, type, np.dtype, type(None)))
    if not plainly:
        return None
    looks: tuple[Any, ...]
    if set(map(type, leaves)) == {np.ndarray}:
        looks = tuple([(leaf.shape, leaf.dtype) for leaf in leaves])
    elif all(isinstance(leaf, jax.Array) and not is_traced(leaf) and not leaf.is_deleted() for leaf in leaves):
        looks = tuple([(leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves])
    else:
        return None
    return tree, looks, numbers, in_axes, dtype, jax.config.jax_enable_x64  # type: ignore[attr-defined]


def checked(weights: Any, data: Any, in_axes: Any, hyper: dict[str, Any], dtype: Any) -> Batch:
    """The batch of what was passed, looked at thoroughly."""
    if not isinstance(data, tuple):
        raise TypeError(
            f"data is a {type(data).__name__}; pass a tuple with one entry per argument of the loss after the weights, "
            "such as (x, t)"
        )
    target = checked_dtype(dtype)
    weights = convert(weights, "weights", target)
    leaves = named_leaves(weights, "weights")
    if not leaves:
        raise ValueError("weights has no arrays; pass a pytree whose leaves are arrays [N, ...]")
    for name, leaf in leaves:
        check_weight(name, leaf, weights)
    converted = tuple(convert(d, f"data[{i}]", target) for i, d in enumerate(data))
    flags = spread_axes(in_axes, converted)
    moved = [problem_axis_first(d, f, i) for i, (d, f) in enumerate(zip(converted, flags, strict=True))]
    converted, own = tuple(entry for entry, _, _ in moved), tuple(flags for _, flags, _ in moved)
    named = [pair for _, _, pairs in moved for pair in pairs]
    if any(is_traced(leaf) for leaf in [*(leaf for _, leaf, _ in named), *jax.tree.leaves((weights, hyper))]):
        check_widths([*leaves, *((name, leaf) for name, leaf, _ in named)])
    common = np.result_type(*[leaf.dtype for _, leaf in leaves])
    hyper = {k: hyper_array(k, v, common) for k, v in hyper.items()}
    hyper_own = {k: v.ndim > 0 for k, v in hyper.items()}
    count = check_lengths(leaves, named, hyper, hyper_own)
    if all(leaf.size == 0 for _, leaf in leaves):
        raise ValueError(f"{leaves[0][0]} has shape {leaves[0][1].shape}: no weights; pass at least one per problem")
    everything = [leaf for _, leaf in leaves] + [leaf for _, leaf, _ in named] + list(hyper.values())
    x64 = any(leaf.dtype in WIDE for leaf in everything)
    return Batch(weights, converted, hyper, own, hyper_own, count, x64)


def is_traced(value: Any) -> bool:
    """Whether this stands for an array in a `jit`, `vmap` or `grad` around the call, its values not known yet."""
    return isinstance(value, jax.core.Tracer)


def check_held(name: Any, value: Any) -> None:
    """Refuse an array that was given away, of which JAX itself would speak only when it is read."""
    if isinstance(value, jax.Array) and not is_traced(value) and value.is_deleted():
        raise ValueError(
            f"{name} is a jax.Array that was deleted, as donating it to a function does; pass one that still holds its "
            "numbers, such as a copy made before (jax.numpy.copy)"
        )


def together(value: Any) -> Any:
    """A list of numbers, some of them traced, as one traced array; anything else as it is."""
    numbers = isinstance(value, (list, tuple)) and any(is_traced(leaf) for leaf in jax.tree.leaves(value))
    return jax.numpy.asarray(value) if numbers else value


def check_widths(named: list[tuple[Any, Any]]) -> None:
    """Inside a trace there is float64 only where `jax_enable_x64` is on; elsewhere JAX would narrow it unasked."""
    for name, leaf in named:
        check_width(name, leaf.dtype)


def check_width(name: Any, dtype: Any) -> None:
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"{name} is {dtype}, which JAX would narrow inside jit, vmap or grad; switch it on with "
            "jax.config.update('jax_enable_x64', True), or pass dtype='float32'"
        )


def checked_dtype(dtype: Any) -> np.dtype | None:
    if dtype is None:
        return None
    try:
        result = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype={dtype!r} is not a dtype; pass 'float32', 'float64' or None") from None
    if not jax.numpy.issubdtype(result, np.floating) or result.itemsize > 8:
        raise TypeError(f"dtype={result.name} is not a floating type JAX has; pass 'float32', 'float64' or None")
    return result


def convert(tree: Any, name: str, target: np.dtype | None) -> Any:
    """Every leaf an array; 64-bit integers that fit go as 32-bit ones, floats in `target` where one is wanted."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [to_array(leaf, Name(name, tree, number), target) for number, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, arrays)


def to_array(leaf: Any, name: Name, target: np.dtype | None) -> Any:
    check_held(name, leaf)
    if isinstance(leaf, (jax.Array, np.ndarray)):
        array = leaf
    elif hasattr(leaf, "__array__") or hasattr(leaf, "__dlpack__"):
        array = adopted(leaf)
    else:  # Python numbers and lists of them carry no dtype of their own: JAX's default
        array = np.asarray(leaf)
        if array.dtype.kind in "fiuc":
            array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
    kind = array.dtype.kind
    floating = jax.numpy.issubdtype(array.dtype, np.floating)
    if not (floating or kind in "iubc") or (array.dtype.itemsize > 8 and kind == "f"):
        raise TypeError(f"{name} has dtype {array.dtype}; pass numbers in a dtype JAX has, such as float32")
    if floating and target is not None and array.dtype != target:
        if is_traced(array):
            check_width("dtype", target)
            return array.astype(target)
        return dev.cast(array, target)
    if array.dtype in LONG and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        limits = np.iinfo(np.int32)
        if array.size == 0 or (array.min() >= limits.min and array.max() <= limits.max):
            return np.asarray(array, np.int32)
    return array


def named_leaves(tree: Any, name: str) -> list[tuple[Any, Any]]:
    return [(Name(name, tree, number), leaf) for number, leaf in enumerate(jax.tree.leaves(tree))]


def list_hint(tree: Any) -> str:
    """What to say of a leaf without axes, where it may be an entry of a list that was meant as an array."""
    if isinstance(tree, list) or (isinstance(tree, dict) and any(isinstance(entry, list) for entry in tree.values())):
        return "; a list is a pytree of its entries: where one array is meant, pass np.array(...) of the list"
    return ""


def check_weight(name: Any, leaf: Any, weights: Any) -> None:
    if not jax.numpy.issubdtype(leaf.dtype, np.floating):
        kind = "complex" if leaf.dtype.kind == "c" else "integer" if leaf.dtype.kind in "iu" else leaf.dtype.name
        raise TypeError(
            f"{name} has dtype {leaf.dtype} ({kind}); gradient descent needs real floating point weights: "
            f"pass {name}.astype('float32')"
        )
    if leaf.ndim == 0:
        raise ValueError(
            f"{name} is a single number, without a problem axis; every leaf of weights is [N, ...], N problems "
            f"in front: pass {name}[None] for one problem, or keep it out of weights if it is a setting"
            f"{list_hint(weights)}"
        )


def spread_axes(in_axes: Any, data: tuple[Any, ...]) -> tuple[Any, ...]:
    """`in_axes` as in `jax.vmap`, over the data tuple, spread to one entry (an axis or None) per leaf."""
    if in_axes is None or isinstance(in_axes, int):
        in_axes = (in_axes,) * len(data)
    if not isinstance(in_axes, (tuple, list)) or len(in_axes) != len(data):
        raise ValueError(
            f"in_axes={in_axes!r} does not fit data, which has {len(data)} entries; pass 0, None or a tuple with one "
            "entry per data argument (the weights always have their problem axis in front)"
        )
    out = []
    for index, (axes, entry) in enumerate(zip(in_axes, data, strict=True)):
        try:
            if axes is None or isinstance(axes, int):
                spread = jax.tree.map(lambda _, axis=axes: axis, entry)
            else:
                spread = jax.tree.map(
                    lambda axis, sub: jax.tree.map(lambda _: axis, sub), axes, entry, is_leaf=lambda a: a is None
                )
        except (ValueError, TypeError) as error:
            raise ValueError(f"in_axes[{index}]={axes!r} is no prefix of the pytree data[{index}]: {error}") from None
        for axis in jax.tree.leaves(spread):
            if isinstance(axis, bool) or not isinstance(axis, int):
                raise TypeError(
                    f"in_axes[{index}] has {axis!r}; each entry is the number of an axis, or None for shared"
                )
        out.append(spread)
    return tuple(out)


def problem_axis_first(entry: Any, axes: Any, index: int) -> tuple[Any, Any, list[tuple[Any, Any, bool]]]:
    """`(the entry with its problems in front, whether each leaf has problems, the leaves by name with that flag)`."""
    leaves, treedef = jax.tree.flatten(entry)
    flat_axes = jax.tree.leaves(axes, is_leaf=lambda a: a is None)
    named = []
    for number, (leaf, axis) in enumerate(zip(leaves, flat_axes, strict=True)):
        name = Name(f"data[{index}]", entry, number)
        if axis is not None and not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(
                f"{name} has shape {tuple(leaf.shape)}, without axis {axis} for the problems; pass it with a problem "
                f"axis, or in_axes=None for it if all problems share it{list_hint(entry)}"
            )
        named.append((name, leaf if axis in (0, None) else axis_first(leaf, axis), axis is not None))
    whole = jax.tree.unflatten(treedef, [leaf for _, leaf, _ in named])
    return whole, jax.tree.unflatten(treedef, [flag for _, _, flag in named]), named


def axis_first(leaf: Any, axis: int) -> Any:
    """The array with this axis in front; one that lies in shards stays in shards."""
    if is_traced(leaf):
        return jax.numpy.moveaxis(leaf, axis, 0)
    if not dev.in_shards(leaf):
        return np.moveaxis(np.asarray(leaf), axis, 0)
    with jax.enable_x64(True):
        return jax.numpy.moveaxis(leaf, axis, 0)


def hyper_array(name: str, value: Any, dtype: np.dtype) -> Any:
    """A hyperparameter as an array, scalar or `[N]`, in the dtype of the weights."""
    check_held(name, value)
    value = together(value)
    stays = is_traced(value) or dev.in_shards(value) or dev.on_accelerator(value)
    array = value if stays else np.asarray(value)
    if array.dtype.kind not in "fiub" and not jax.numpy.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{name} has dtype {array.dtype}; pass a number or an [N] array of numbers")
    if array.ndim > 1:
        raise ValueError(f"{name} has shape {array.shape}; pass a number, or an [N] array with one per problem")
    if array.dtype.kind == "b":
        return array
    return array.astype(dtype) if is_traced(array) else dev.cast(array, dtype)


def check_lengths(
    leaves: list[tuple[Any, Any]],
    data: list[tuple[Any, Any, bool]],
    hyper: dict[str, Any],
    hyper_own: dict[str, bool],
) -> int:
    first, count = leaves[0][0], leaves[0][1].shape[0]
    if count == 0:
        raise ValueError(f"{first} has 0 problems on axis 0; pass at least one problem")
    others = leaves[1:] + [(name, leaf) for name, leaf, flag in data if flag]
    others += [(name, value) for name, value in hyper.items() if hyper_own[name]]
    for name, leaf in others:
        if leaf.shape[0] != count:
            raise ValueError(
                f"{first} has {count} problems on axis 0, {name} has {leaf.shape[0]}; "
                "give both the same number of problems"
                + (", or in_axes=None for data that all problems share" if str(name).startswith("data") else "")
            )
    return count


def problem_shapes(tree: Any, flags: Any) -> Any:
    """Shapes and dtypes of one problem."""
    return jax.tree.map(
        lambda leaf, flag: jax.ShapeDtypeStruct(leaf.shape[1:] if flag else leaf.shape, leaf.dtype),
        tree,
        flags,
    )


def brief(tree: Any) -> str:
    """Dtypes and shapes of a pytree, as in `{w: float32[3], b: float32[]}`."""
    return str(jax.tree.map(lambda leaf: f"{leaf.dtype.name}{list(leaf.shape)}", tree)).replace("'", "")


def random_weights(key: Any, shape: Any, count: int, *, scale: float = 1.0, dtype: Any = np.float32) -> Any:
    """Random start weights, normal with mean 0, for `count` problems: `w ~ scale · N(0, 1)`.

    Problem i's weights depend on the key, the shapes and i alone, not on how many problems there are.

    Args:
        key: a `jax.random.key`, or an integer seed.
        shape: shape of one problem's weights (a tuple of ints, `()` for a scalar), or a pytree of such tuples.
        count: number of problems N.
        scale: standard deviation, in units of the weights.
        dtype: a floating dtype; float64 works whatever the global x64 flag says.

    Returns:
        A pytree of NumPy arrays `[N, *shape]`; of traced arrays where the key is traced.

    Raises:
        ValueError: `count` is not positive, or the key was deleted.
        TypeError: `dtype` is not floating.

    >>> random_weights(0, {"w": (3,), "b": ()}, 5)["w"].shape
    (5, 3)
    """
    if count < 1:
        raise ValueError(f"N is {count}; pass at least one problem")
    wanted = checked_dtype(dtype)
    assert wanted is not None
    check_held("key", key)
    key = jax.random.key(key) if isinstance(key, (int, np.integer)) else key
    shapes, treedef = jax.tree.flatten(shape, is_leaf=is_shape)
    with jax.enable_x64(wanted.itemsize == 8 or jax.config.jax_enable_x64):  # type: ignore[attr-defined]

        def one(index: Any) -> list[Any]:
            keys = jax.random.split(jax.random.fold_in(key, index), len(shapes))
            return [scale * jax.random.normal(k, s, wanted) for k, s in zip(keys, shapes, strict=True)]

        leaves = jax.jit(jax.vmap(one))(jax.numpy.arange(count, dtype=np.uint32))
        return jax.tree.unflatten(treedef, [leaf if is_traced(leaf) else np.asarray(leaf) for leaf in leaves])


def is_shape(entry: Any) -> bool:
    return isinstance(entry, tuple) and all(isinstance(d, (int, np.integer)) for d in entry)
