"""What steps bring to requests."""

import dataclasses

from deepseek_jax.inference.prompt_scores import PromptScores


@dataclasses.dataclass(frozen=True)
class Event:
    """What a step has brought to a request. finish_reason: "" while it goes on, ``stop``, ``length``, ``cancelled``, or
    ``error``: it cannot be gone on with, as ``error`` says; ``ours`` where that is no fault of the request's.
    logprobs: of each token by the network alone, before temperature, penalties and cuts. alternatives: of each token,
    as many as were asked for, (token, log-probability) from the most likely on. cached: tokens of its prompt that were
    found in the cache. prompt: with the first token, or the end, where that was asked for."""

    number: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    alternatives: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    cached: int = 0
    error: str = ""
    prompt: PromptScores | None = None
    ours: bool = False
