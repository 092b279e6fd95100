"""What a traced program does."""

from collections.abc import Iterator
from typing import Any

from jax.extend.core import jaxprs_in_params


def always_run(jaxpr: Any) -> Iterator[str]:
    """Names of the operations that run whatever the conditionals say."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        if eqn.primitive.name != "cond":
            for inner in jaxprs_in_params(eqn.params):
                yield from always_run(inner)
