"""Requests as rows of a decoding step: all that may differ between them, in few arrays."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from flax import struct

from deepseek_jax.inference.limits import BIASES
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.serving_config import MOST_DRAFTS

STOPS = 16  # ids that end an answer, at most


class State(NamedTuple):
    """Where a row of a decoding step is, in the order of ``Rows.state_BK``; behind these follow its drafts, -1 where
    there are no more."""

    token: Any  # its last one, which is not in the cache
    length: Any  # tokens before that
    answered: Any


class Numbers(NamedTuple):
    """What a row of a decoding step is, in the order of ``Rows.numbers_BK``; behind these follow its stop ids and the
    tokens of its biases, -1 where there are no more."""

    most: Any
    seed: Any
    draw: Any
    top_k: Any
    alternatives: Any
    constrained: Any
    high: Any  # the upper word of the key that it draws with, of which the seed is the lower one


class Shares(NamedTuple):
    """The same for ``Rows.shares_BF``; behind these follow its biases."""

    temperature: Any
    top_p: Any
    min_p: Any
    repetition: Any
    presence: Any
    frequency: Any
    scored: Any  # the temperature of its log-probabilities


@struct.dataclass
class Rows:
    """Rows that are decoded. state_BK: see ``State``; a row that has answered ``most`` only fills the batch.
    numbers_BK: see ``Numbers``. shares_BF: see ``Shares``. table_BJ: see ``PagedMemory``. Few arrays, since each is a
    transfer of its own. allowed_BV: of the next token, a bit for each that a constrained row may draw; such a row may
    have no other behind it in this step. The array of all that others may draw stays on the device."""

    state_BK: Any
    numbers_BK: Any
    shares_BF: Any
    table_BJ: Any
    allowed_BV: Any = None

    @property
    def drafts(self) -> Any:
        """(B, MOST_DRAFTS)."""
        return self.state_BK[:, len(State._fields) :]

    @property
    def stops(self) -> Any:
        """(B, STOPS)."""
        return self.numbers_BK[:, len(Numbers._fields) : -BIASES]

    @classmethod
    def filling(cls, batch: int, pages: int) -> Self:
        """None, on the host."""
        state_BK = np.zeros((batch, len(State._fields) + MOST_DRAFTS), np.int32)
        state_BK[:, len(State._fields) :] = -1
        numbers_BK = np.zeros((batch, len(Numbers._fields) + STOPS + BIASES), np.int32)
        shares_BF = np.zeros((batch, len(Shares._fields) + BIASES), np.float32)
        numbers_BK[:, -BIASES:] = -1
        shares_BF[:, [Shares._fields.index(name) for name in ("repetition", "scored")]] = 1
        return cls(state_BK, numbers_BK, shares_BF, np.full((batch, pages), -1, np.int32))

    @staticmethod
    def described(
        params: SamplingParams,
        stop_ids: tuple[int, ...],
        draw: int,
        key: Sequence[int] | None = None,
        *,
        tempered: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(K numbers, F shares) of a request. key: the two words of one in the place of the seed's. tempered:
        log-probabilities by its temperature, as ``sample`` reports them."""
        stops, biased = [*stop_ids, *params.stop_token_ids], [token for token, _ in params.logit_bias]
        assert len(stops) <= STOPS, stops
        high, seed = np.array((0, params.seed) if key is None else key, np.uint32).view(np.int32)
        asked = params.top_k, params.alternatives, params.constrained
        head = Numbers(params.max_tokens, seed, draw, *asked, high)
        filled = [*stops, *[-1] * (STOPS - len(stops)), *biased, *[-1] * (BIASES - len(biased))]
        cuts = params.temperature, params.top_p, params.min_p
        penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        shares = Shares(*cuts, *penalties, (tempered and params.temperature) or 1.0)
        biases = [*(bias for _, bias in params.logit_bias), *[0.0] * (BIASES - len(biased))]
        return np.array([*head, *filled], np.int32), np.array([*shares, *biases], np.float32)


def check_request(
    ids: Sequence[int],
    sampling: SamplingParams,
    stop_ids: Sequence[int],
    *,
    draw: int,
    begun: int,
    width: int,
    context: int,
) -> None:
    """ValueError for what no row has room for; arguments as of ``Continuous.submit``. width: of the vocabulary."""
    if not ids or not 0 <= min(ids) <= max(ids) < width:
        wrong = f"has the ids {min(ids)}…{max(ids)}" if ids else "has no tokens"
        raise ValueError(f"the prompt {wrong}: expected ids from 0 to below vocab_size={width}")
    if begun and not 0 < begun < min(len(ids), sampling.max_tokens):
        expected = f"from 0 to below max_tokens={sampling.max_tokens}, and a token of the prompt before it"
        raise ValueError(f"begun={begun} of {len(ids)} tokens: expected {expected}")
    if (prompt := len(ids) - begun) + sampling.max_tokens > context:
        most = f"max_tokens={sampling.max_tokens} pass context={context}"
        raise ValueError(f"a prompt of {prompt} tokens and {most}")
    sampling.check_no_text()
    if (stops := len(stop_ids) + len(sampling.stop_token_ids)) > STOPS:
        raise ValueError(f"{stops} ids that end an answer, the tokenizer's among them: expected at most {STOPS}")
    named = {"stop_token_ids": sampling.stop_token_ids, "logit_bias": [token for token, _ in sampling.logit_bias]}
    for name, tokens in named.items():
        if (most := max(tokens, default=0)) >= width:
            raise ValueError(f"{name} has the id {most}: expected below vocab_size={width}")
    if not 0 <= draw < 2**31:
        raise ValueError(f"draw={draw}: expected from 0 to below 2**31")
