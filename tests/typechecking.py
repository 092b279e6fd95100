"""The runtime type checker that the tests put on every function of the package (see conftest.py)."""

from collections.abc import Callable
from typing import Any, Self, get_args

from beartype import BeartypeConf, beartype

# PEP 484's numeric tower: an int is a fine argument for a float.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def _names_self(hint: Any) -> bool:
    return hint is Self or any(_names_self(part) for part in get_args(hint))


def check_functions(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks annotations, shapes included, of every call except constructors.

    jax rebuilds a registered dataclass through `__init__` with whatever leaves a transformation put in
    (tracers, shape structs, None), which are not what the fields are annotated with: those pass unchecked.
    """
    if function.__name__ == "__init__":
        return function
    # A function does not know its class, so `Self` cannot be checked here: the other hints are.
    hints = function.__annotations__
    hints.update({name: Any for name, hint in hints.items() if _names_self(hint)})
    return _check(function)
