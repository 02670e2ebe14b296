"""optax's optimizers by name."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any


def named_optimizer(name: str, learning_rate: float | None) -> tuple[Callable[..., Any], dict[str, float]]:
    """Find an optimizer of optax by its name.

    Args:
        name: "adam", "lbfgs", ...
        learning_rate: its rate; None for the optimizer's own default, where it has one.

    Returns:
        The function that makes the optimizer, and its hyperparameters: `optimizer` and `hyperparams` of
        `gdjax.minimize`.

    Raises:
        ValueError: if optax has no such optimizer, or it needs a rate or takes none.

    >>> named_optimizer("adam", 0.1)[1]
    {'learning_rate': 0.1}
    >>> named_optimizer("adm", 0.1)
    Traceback (most recent call last):
    ValueError: optax has no optimizer 'adm'; did you mean adam? It has: adabelief, adadelta, ...
    """
    rules = optax_rules()
    if name not in rules:
        near = difflib.get_close_matches(name.lower(), rules, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"optax has no optimizer '{name}'{hint} It has: {', '.join(rules)}")
    accepted = inspect.signature(rules[name]).parameters
    needed = "learning_rate" in accepted and accepted["learning_rate"].default is inspect.Parameter.empty
    if learning_rate is None and needed:
        raise ValueError(f"optimizer {name} has no learning rate of its own; give one, such as 0.1")
    if learning_rate is not None and "learning_rate" not in accepted:
        raise ValueError(f"optimizer {name} takes no learning rate; leave it out")
    return rules[name], {} if learning_rate is None else {"learning_rate": learning_rate}


def optax_rules() -> dict[str, Callable[..., Any]]:
    """optax's ready-made optimizers by name: functions from a learning rate to a transformation.

    >>> {"adam", "lbfgs", "rmsprop", "polyak_sgd"} <= set(optax_rules())
    True
    >>> "scale_by_adam" in optax_rules()
    False
    """
    import optax

    rules = {}
    for name, function in vars(optax).items():
        if not inspect.isfunction(function) or name.startswith(("_", "scale_by")):
            continue
        signature = inspect.signature(function)
        makes = str(signature.return_annotation)
        if "GradientTransformation" in makes and any("learning_rate" in name for name in signature.parameters):
            rules[name] = function
    return dict(sorted(rules.items()))
