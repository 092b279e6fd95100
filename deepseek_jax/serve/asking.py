"""Who answers ids with ids: the engine, as the HTTP side sees it."""

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

State = Literal["loading", "ready", "draining"]


@dataclasses.dataclass(frozen=True)
class Served:
    """What answers. context: tokens of prompt and answer. slots: answers that are made at once. sampling: how it draws
    where a request says nothing, fields of ``SamplingParams``."""

    name: str
    context: int
    vocab_size: int
    slots: int
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Event:
    """What a step has brought to an answer. The first one, with nothing in it, says that it was taken on.

    cached: tokens of the prompt that were found in the cache, known with the first token. finish_reason: "" while it
    goes on, ``stop`` (the last id ends it and is no text) or ``length``. prompt: log-probabilities of its tokens but
    the first, and their alternatives, where they are asked for: once, with the first token or at the end."""

    ids: Sequence[int]
    logprobs: Sequence[float] = ()
    alternatives: Sequence[Sequence[tuple[int, float]]] = ()
    finish_reason: str = ""
    cached: int = 0
    prompt: tuple[Sequence[float], Sequence[Sequence[tuple[int, float]]]] | None = None


class RefusedError(Exception):
    """The engine will never answer this: the client's mistake, and what it is."""


class LostError(Exception):
    """The engine cannot answer any more, or not this: no mistake of the client's."""


@runtime_checkable
class Asker(Protocol):
    """Answers ids with ids.

    state: it may be asked while it is ``ready``.
    """

    state: State

    @property
    def served(self) -> Served: ...

    def submit(self, ids: list[int], sampling: dict[str, Any], draw: int) -> AsyncGenerator[Event]:
        """The events of an answer; who closes them early cancels it. sampling: fields of ``SamplingParams``; under
        ``begun`` how many of the ids the answer begins with, as ``Engine.submit`` has it; and under ``behind`` those of
        a grammar that a later part will be held to, which is refused now where it must be.

        Raises RefusedError in the place of the first, LostError at any time.
        """
        ...

    async def metrics(self) -> dict[str, float]:
        """``Continuous.metrics``."""
        ...
