"""Fill in the middle: some documents are turned round so that the model learns to complete a hole."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_jax.data.special_tokens import FIM_BEGIN, FIM_END, FIM_HOLE
from deepseek_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class FimTokens:
    """The ids of the three markers. `of`: ValueError where the tokenizer lacks one."""

    begin: int
    hole: int
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "FimTokens":
        try:
            begin, hole, end = map(tokenizer.token_id, (FIM_BEGIN, FIM_HOLE, FIM_END))
        except ValueError as error:
            whole = tokenizer.usable >= tokenizer.vocab_size  # else it is the model's vocabulary that is too small
            hint = " (--data.fim-rate 0 trains without)" if whole else ""
            raise ValueError(f"fill in the middle{hint}: {error}") from error
        return cls(begin, hole, end)


def apply_fim(ids: Sequence[int], *, rng: np.random.Generator, rate: float, tokens: FimTokens | None) -> list[int]:
    """With probability `rate`, reorders one document as prefix-suffix-middle (DeepSeek-V3, section 4.1):

        <fim_begin> prefix <fim_hole> suffix <fim_end> middle

    The two cuts are uniform over the document. `ids` is one document without BOS and EOS, which are added
    afterwards. ValueError when `rate` is no probability. tokens: None does where `rate` is 0.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate={rate}: the share of documents must lie between 0 and 1")
    ids = list(ids)
    if rng.random() >= rate:
        return ids
    assert tokens is not None
    start, stop = sorted(rng.integers(0, len(ids) + 1, size=2).tolist())
    return [tokens.begin, *ids[:start], tokens.hole, *ids[stop:], tokens.end, *ids[start:stop]]
