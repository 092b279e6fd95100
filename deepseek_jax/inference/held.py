"""Answers that are held to a grammar, between one token and the next.

Of several processes each follows the grammar by itself, from its text and the tokens that all are told: so no mask
travels. How long that takes depends on threads and is no part of a plan; that all are done is, as they tell each other
before a step (``arrivals``). A process that fails at it, as where llguidance is missing, ends the answer on all.
"""

import functools
from collections.abc import Callable

import jax

from deepseek_jax.inference.constraints import Constraint, settle
from deepseek_jax.inference.plans import Request
from deepseek_jax.inference.sampling import SamplingParams


class Held:
    """Those of which this process has still to tell that it knows what may come next.

    begin: makes the constraints of what other processes are asked.
    """

    def __init__(self, begin: Callable[[SamplingParams], Constraint] | None):
        self._begin = begin
        self._finding: dict[int, Constraint] = {}

    def find(self, request: Request) -> None:
        """A request's next token is being looked for."""
        assert request.constraint is not None
        self._finding[request.number] = request.constraint

    def wait(self, request: Request) -> None:
        """For all processes to know what may come next, on one that is not asked for this request by starting to find
        out."""
        request.unsettled = jax.process_count()
        if request.constraint is None:
            assert self._begin is not None
            request.constraint = Constraint.later(functools.partial(self._begin, request.sampling))
            self.find(request)

    def found(self) -> list[tuple[int, str]]:
        """Of which answers this process knows what may come next, "", or why nothing may. It waits a moment for those
        who are at it."""
        settle(self._finding.values())
        found = [(number, constraint.error) for number, constraint in self._finding.items() if constraint.ready]
        for number, _ in found:
            del self._finding[number]
        return found

    def forget(self, number: int) -> None:
        """It has been given up."""
        self._finding.pop(number, None)
