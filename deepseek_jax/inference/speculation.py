"""Several tokens of an answer in one pass: the MTP module guesses what comes, and the network says what it would have.

A pass takes a row's last token and K drafts behind it. What the network draws at each of these 1 + K places is what it
would draw there one token at a time, by the noise of that place, which depends on seed, draw and place alone: so the
first is an answer's next token in any case, and each further one is where the draft in front of it was what was drawn
there. Answers are those without drafts, greedy or not, whatever penalties, cuts and biases they have, but where two
tokens are so near each other that sums of another shape change which of them is ahead.

For a draft d that was chosen without noise this is speculative sampling (Leviathan and others, Chen and others, 2023):
it is taken with probability p(d), and what takes its place has p's distribution without d. Drafts here are drawn from
the module's q by the noise that the network will draw with, which changes no answer: each is taken with probability
(1 - TV) / (1 + TV) at least, for the total variation TV between p and q (Daliri, Musco, Suresh, 2024).

The first draft is the module's own guess (V3 section 2.2): from the hidden state h_i and token i + 1 it says token
i + 2. Released models have one module. For further drafts it is applied to its own result: in the place of h_{i+1},
which nobody has yet, it takes what came out of it behind its norm, as h comes from behind the network's. So SGLang does
it; vLLM hands on what is before that norm. Its cache is a layer more of the pages, written for every token that is
read in; what drafts have written in it the next pass writes over. The entry of a page's last token is made with the
token behind the page, which may be another's where the page is shared: a draft may be the worse for it, no answer is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.transformer import Transformer


def check_drafts(config: ModelConfig, drafts: int) -> None:
    """ValueError for drafts by a network without an MTP module."""
    if drafts and not config.num_nextn_predict_layers:
        raise ValueError(f"drafts={drafts}: num_nextn_predict_layers=0, no MTP module that could make any")


def kept(
    drafts_BK: Int[Array, "B K"], drawn_BS: Int[Array, "B S"], ends_BS: Bool[Array, "B S"], room_B: Int[Array, "B"]
) -> Bool[Array, "B S"]:
    """Which of the S = 1 + K tokens drawn are the answer's: the first, and others behind a draft that was right, as
    long as all before are kept, none of them ends the answer, and there is room."""
    places_K = jnp.arange(1, drawn_BS.shape[1])
    goes_on_BK = (drafts_BK == drawn_BS[:, :-1]) & ~ends_BS[:, :-1] & (places_K < room_B[:, None])
    first_B1 = room_B[:, None] > 0
    return jnp.cumprod(jnp.concatenate([first_B1, goes_on_BK], axis=1).astype(jnp.int32), axis=1) > 0


def draft(
    network: Transformer,
    memory: Callable[[Any, Int[Array, "B S"]], tuple[Any, Any]],
    pages: Any,
    hidden_BSD: jax.Array,
    drawn_BS: Int[Array, "B S"],
    length_B: Int[Array, "B"],
    count_B: Int[Array, "B"],
    guess: Callable[[jax.Array, int], Int[Array, "B"]],
) -> tuple[Int[Array, "B K"], Any]:
    """(K drafts behind the first ``count`` of the tokens drawn, the module's pages with all that the pass has read.)

    Args:
      memory: (pages, positions) -> the module's memory of these pages and what is seen from there.
      length_B: where the pass began. hidden_BSD: the network's hidden states there.
      guess: (hidden state, how many drafts there are before) -> the draft that it makes. Asked S - 1 times.
    """

    def run(pages, hidden_BSD, following_BS, position_BS):
        with jax.named_scope("draft"):
            kept, visible = memory(pages, position_BS)
            context = network.context(following_BS, positions_BS=position_BS, visible=visible)
            hidden_BSD, _, kept = network.predict_next(hidden_BSD, following_BS, context, memory=kept, absorbed=True)
        return hidden_BSD, kept.pages_PNW

    places_S = jnp.arange(drawn_BS.shape[1], dtype=jnp.int32)
    hidden_BSD, pages = run(pages, hidden_BSD, drawn_BS, length_B[:, None] + places_S)
    last_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
    hidden_BD = jnp.take_along_axis(hidden_BSD, last_B11, axis=1)[:, 0]
    drafts = [guess(hidden_BD, 0)]
    for k in range(1, drawn_BS.shape[1] - 1):
        position_B1 = (length_B + count_B - 1 + k)[:, None]
        hidden_B1D, pages = run(pages, hidden_BD[:, None], drafts[-1][:, None], position_B1)
        hidden_BD = hidden_B1D[:, 0]
        drafts.append(guess(hidden_BD, k))
    return jnp.stack(drafts, axis=1), pages


def forced(
    drafts_BK: Int[Array, "B K"], drawn_BS: Int[Array, "B S"], keys_BS: jax.Array, share: float, width: int
) -> Int[Array, "B S"]:
    """For measurements with a module that has learnt nothing: a draft is taken as what was drawn with probability
    ``share``, and is not else, whatever the network says. What is answered then means nothing."""
    taken_BK = jax.vmap(jax.vmap(jax.random.uniform))(keys_BS[:, :-1]) < share
    first_BK = drawn_BS[:, :-1]
    other_BK = jnp.where(first_BK == drafts_BK, (first_BK + 1) % width, first_BK)
    first_BK = jnp.where(drafts_BK < 0, first_BK, jnp.where(taken_BK, drafts_BK, other_BK))
    return jnp.concatenate([first_BK, drawn_BS[:, -1:]], axis=1)
