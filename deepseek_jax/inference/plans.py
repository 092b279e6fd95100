"""Requests, and what a plan has the device do for them."""

import dataclasses
from typing import Any

import numpy as np

from deepseek_jax.inference.constraints import Constraint
from deepseek_jax.inference.prompt_scores import PromptScores
from deepseek_jax.inference.sampling import SamplingParams


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and its answer so far (``ids``), and where they are: the first ``length`` tokens lie in ``pages``.

    number: the order of arrival. row: what decoding it takes, see ``Rows``. constraint: what its answer is held to.
    begun: tokens at the end of the prompt that came which are the answer's. prompt: those of it that are not.
    slot: -1 while it waits. prefix: of the first ``named`` pages, which others can find, by the weights of ``root``.
    cached: tokens of the prompt that were there when it was first let in. drafts: guesses of what comes next.
    unsettled: processes that have not said yet that they know what may come next. doubted: its scores were NaN, and it
    has been read in anew. scores: of so much of the prompt as is read in; None where nobody asks for them, or has been
    told them.
    """

    number: int
    ids: list[int]
    sampling: SamplingParams
    row: Any = None
    constraint: Constraint | None = None
    begun: int = 0
    prompt: int = 0
    slot: int = -1
    length: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    prefix: int = 0
    named: int = 0
    root: int = -1
    drafts: list[int] = dataclasses.field(default_factory=list)
    cached: int = -1
    unsettled: int = 0
    doubted: bool = False
    scores: PromptScores | None = None
    _known: np.ndarray | None = None

    @property
    def known(self) -> np.ndarray:
        """``ids``, made an array once while nothing is added to them: who waits is looked at in each step."""
        if self._known is None or len(self._known) != len(self.ids):
            self._known = np.array(self.ids, np.int32)
        return self._known

    @property
    def unread(self) -> int:
        """Tokens to be read in before it can be decoded."""
        return len(self.ids) - 1 - self.length

    @property
    def ready(self) -> bool:
        """Whether it can be decoded: it is read in, and what may come next is known."""
        return not self.unread and self.left > 0 and not self.unsettled

    @property
    def left(self) -> int:
        """Tokens that its answer may still have."""
        return self.sampling.max_tokens - (len(self.ids) - self.prompt)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens ``start`` … ``start + count - 1`` of a request, to be read in, and where their scores go."""

    request: Request
    start: int
    count: int
    scores: PromptScores | None = None


@dataclasses.dataclass(frozen=True)
class ReadPlan:
    """Pages to be copied, all at once, and then pieces of prompts to be read in."""

    copies: list[tuple[int, int]]
    pieces: list[Piece]


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Requests that are decoded ``turns`` times a token, and drafts. until_end: but no more once one of them has ended,
    since others wait for its place. read: those that are read in, which is all that they ask."""

    decoded: list[Request]
    turns: int
    until_end: bool
    read: list[Request]
