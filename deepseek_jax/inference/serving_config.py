"""How requests are answered as they come, as far as a user has a say in it."""

import dataclasses
from typing import Literal

from deepseek_jax.typed import check_least, check_types

MOST_DRAFTS = 3  # the kernels of decoding take four tokens of a row


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """How requests are answered as they come (``Engine.submit``); sizes are those of one device of the batch's."""

    slots: int = 64
    """Requests that are answered at once."""
    pages: int = 1024
    """Pages of the cache."""
    page: int = 64
    """Tokens of a page; kernels take multiples of 64 on Hopper, of 128 on TPUs."""
    context: int = 0
    """Tokens of prompt and answer at most; 0: max_position_embeddings, or what all pages hold where that is less."""
    chunk: int = 512
    """Tokens of prompts that are read in between two tokens of the others' answers."""
    turns: int = 8
    """Tokens of each answer, or times a token and drafts, that are made without a look at who has come, but on CPUs in
    two steps of half as many, of which the second is sent before the first is told; one, while prompts are read in, an
    answer has none yet, one is held to a grammar, or more have just ended than go on."""
    cache: Literal["compute", "bfloat16", "float8_e4m3"] = "compute"
    """What the cache keeps numbers in: the dtype that is computed in, or bfloat16, half of float32 (on a CPU from jax
    0.11 on); float8_e4m3: MLA's latents in groups of 128 with a scale."""
    drafts: int = 0
    """Tokens that the network's MTP module guesses of each answer, 0…3; those that it would have said itself are taken
    over, so that a turn brings up to so many more. For networks with such a module."""
    score: bool = False
    """Whether requests may ask for the log-probabilities of their prompts' tokens: twice the programs that read."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "slots", "pages", "page", "chunk", "turns")
        if not 0 <= self.drafts <= MOST_DRAFTS:
            raise ValueError(f"drafts={self.drafts}: expected 0…{MOST_DRAFTS}, of an MTP module that guesses so far")

    def tokens(self, most: int) -> int:
        """``context`` for a network of ``most`` positions."""
        room = min(most, self.pages * self.page)
        if self.context > room:
            raise ValueError(
                f"context={self.context}: expected at most {room}, of max_position_embeddings={most} and of "
                f"pages={self.pages} of {self.page} tokens"
            )
        return self.context or room
