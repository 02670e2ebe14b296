"""Other libraries' arrays and models: what comes in from NumPy, torch, Equinox and Flax, and the same kind out again.

None of them is imported here unless the user asks for its arrays: what comes in is told by the protocols it speaks
(`__array__`, `__dlpack__`).
"""

from __future__ import annotations

import dataclasses
import importlib
import numbers
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

KINDS = ("jax", "numpy", "torch")


class Slot:
    """Marks where a pytree holds an array."""

    def __repr__(self) -> str:
        return "array"


ARRAY = Slot()


@dataclasses.dataclass(frozen=True)
class Frame:
    """What a model holds besides arrays (activation functions, names): the pytree, and its leaves with arrays cut out.

    Equal frames are equal by value, since compiled programs are looked up by it.
    """

    treedef: Any
    leaves: tuple[Any, ...]

    def join(self, arrays: Any) -> Any:
        """The model with these arrays in it, as they come out of `split`."""
        rest = iter(jax.tree.leaves(arrays))
        return jax.tree.unflatten(self.treedef, [next(rest) if leaf is ARRAY else leaf for leaf in self.leaves])

    def cut(self, model: Any) -> Any:
        """The arrays of a model like this one, everything else None."""
        leaves = self.treedef.flatten_up_to(model)
        pairs = zip(leaves, self.leaves, strict=True)
        return jax.tree.unflatten(self.treedef, [new if old is ARRAY else None for new, old in pairs])


@dataclasses.dataclass(frozen=True)
class Framed:
    """A loss of a model, as a function of the model's arrays."""

    frame: Frame
    function: Callable[..., Any]

    def __call__(self, arrays: Any, *data: Any) -> Any:
        return self.function(self.frame.join(arrays), *data)


@dataclasses.dataclass(frozen=True)
class FramedProjection:
    """A projection of a model, as a function of the model's arrays."""

    frame: Frame
    function: Callable[[Any], Any]

    def __call__(self, arrays: Any) -> Any:
        return self.frame.cut(self.function(self.frame.join(arrays)))


def split(weights: Any) -> tuple[Any, Frame | None]:
    """`(arrays, frame)`: a pytree with None for every leaf that is no array, and what it takes to join it again.

    A pytree of arrays alone comes back as it is, with None for the frame.
    """
    leaves, treedef = jax.tree.flatten(weights)
    held = [is_number(leaf) for leaf in leaves]
    if all(held):
        return weights, None
    frame = Frame(treedef, tuple(ARRAY if number else leaf for leaf, number in zip(leaves, held, strict=True)))
    try:
        hash(frame)
    except TypeError as error:
        raise TypeError(
            f"weights holds something that is neither an array nor hashable ({error}); leave it out"
        ) from None
    return jax.tree.unflatten(
        treedef, [leaf if number else None for leaf, number in zip(leaves, held, strict=True)]
    ), frame


def framed(loss: Callable[..., Any], frame: Frame | None) -> Callable[..., Any]:
    """The loss as a function of the model's arrays."""
    return loss if frame is None else Framed(frame, loss)


def whole(solution: Any, frame: Frame | None) -> Any:
    """The solution with the model that came in around its weights."""
    return solution if frame is None else dataclasses.replace(solution, weights=frame.join(solution.weights))


def is_number(leaf: Any) -> bool:
    """Whether a leaf is, or means to be, an array of numbers; text counts, to be refused by name."""
    return isinstance(leaf, (numbers.Number, str, bytes)) or hasattr(leaf, "__array__") or hasattr(leaf, "__dlpack__")


def adopted(leaf: Any) -> Any:
    """A NumPy or `jax.Array` of an array of another library, without a copy where its memory can be read in place."""
    if callable(getattr(leaf, "detach", None)):  # torch: a tensor in an autograd graph does not give its memory away
        leaf = leaf.detach()
    if hasattr(leaf, "__array__"):
        try:
            return np.asarray(leaf)
        except (TypeError, RuntimeError, ValueError):  # on a device, or in a dtype NumPy lacks
            if not hasattr(leaf, "__dlpack__"):
                raise
    return jax.dlpack.from_dlpack(leaf)


def handed(tree: Any, kind: str) -> Any:
    """Every array of a pytree as one of `kind`; what is no array stays.

    Raises:
        ValueError: an unknown kind, or 64-bit arrays for JAX while `jax_enable_x64` is off.
        ImportError: torch is wanted and not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}; pass one of {', '.join(map(repr, KINDS))}")
    make = to_torch() if kind == "torch" else to_jax if kind == "jax" else to_numpy
    return jax.tree.map(lambda leaf: make(leaf) if isinstance(leaf, (jax.Array, np.ndarray)) else leaf, tree)


def to_jax(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray) and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        raise ValueError(
            f"the solution holds {leaf.dtype}, which JAX would narrow: jax.config.update('jax_enable_x64', True) lets "
            "JAX keep it; or pass 'numpy' or 'torch'"
        )
    return jax.numpy.asarray(leaf)


def to_numpy(leaf: Any) -> Any:
    check_concrete(leaf)
    return np.asarray(leaf)


def to_torch() -> Callable[[Any], Any]:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise ImportError("torch is not installed: pip install torch") from None

    def convert(leaf: Any) -> Any:
        check_concrete(leaf)
        if isinstance(leaf, np.ndarray):  # 64-bit arrays while JAX does not keep them
            return torch.from_numpy(leaf if leaf.flags.writeable else leaf.copy())
        return torch.from_dlpack(leaf)

    return convert


def check_concrete(leaf: Any) -> None:
    if isinstance(leaf, jax.core.Tracer):
        raise TypeError("the solution is being traced (inside jit, vmap or grad): its values are known outside only")
