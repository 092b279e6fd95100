"""Who comes to a model that several processes run, and who goes: all of them know before each step, and plan alike."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.inference.plans import Request
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.parallel.processes import gather


class Told(NamedTuple):
    """Requests that come, numbers of those given up, of whom a process has found what may come next (why nothing may,
    "" where something may), and whether no step follows."""

    new: list[Request]
    gone: list[int]
    settled: list[tuple[int, str]]
    over: bool


def exchange(
    new: Sequence[Request], gone: Sequence[int], settled: Sequence[tuple[int, str]] = (), *, over: bool = False
) -> Told:
    """What all processes bring, in their order, one's own as it is; it returns when all have come. ``over`` where one
    says so."""
    if jax.process_count() == 1:
        return Told([*new], [*gone], [*settled], over)
    told = gather({"new": [*map(_written, new)], "gone": [*gone], "settled": [*settled], "over": over})
    own = {request.number: request for request in new}
    return Told(
        [own.get(each[0]) or _read(*each) for process in told for each in process["new"]],
        [number for process in told for number in process["gone"]],
        [(number, error) for process in told for number, error in process["settled"]],
        any(process["over"] for process in told),
    )


def _written(request: Request) -> list[Any]:
    row = [numbers.tolist() for numbers in request.row]
    return [request.number, request.ids, request.begun, dataclasses.asdict(request.sampling), *row]


def _read(
    number: int, ids: list[int], begun: int, sampling: dict[str, Any], numbers: list[int], shares: list[float]
) -> Request:
    params = SamplingParams(**{name: _frozen(value) for name, value in sampling.items()})
    row = np.array(numbers, np.int32), np.array(shares, np.float32)
    return Request(number, ids, params, row=row, begun=begun)


def _frozen(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
