"""The runtime type checker that the tests put on every function of the package (see conftest.py)."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# PEP 484's numeric tower: an int is a fine argument for a float.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_functions(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks annotations, shapes included, of every call except constructors.

    jax rebuilds a registered dataclass through `__init__` with whatever leaves a transformation put in
    (tracers, shape structs, None), which are not what the fields are annotated with: those pass unchecked.
    """
    return function if function.__name__ == "__init__" else _check(function)
