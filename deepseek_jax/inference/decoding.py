"""Answers go on: turns in which each row is given a token, or several where drafts are made."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference import generate, speculation
from deepseek_jax.inference.limits import ALTERNATIVES, BIASES
from deepseek_jax.inference.paged import Store, memory_of, over_batch, reading, to_hosts
from deepseek_jax.inference.penalties import Wishes, adjusted, beside
from deepseek_jax.inference.rows import Numbers, Rows, Shares, State
from deepseek_jax.inference.sampling import first_maximum, most_likely, sample
from deepseek_jax.inference.serving_config import MOST_DRAFTS
from deepseek_jax.model import parameters

# On a GPU all turns are one graph, their loop and what rows ask for with them: the host is asked nothing, and the next
# step can be sent while this one is under way. CUB's sorts cannot stand in a graph, XLA's own can.
OPTIONS = generate.OPTIONS | {
    "xla_gpu_enable_cub_radix_sort": False,
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
}


@struct.dataclass
class Decoded:
    """tokens_BN, logprobs_BN: of each row those that it was given, -1 behind them; log-probabilities are those of the
    network, before penalties and cuts, by the temperature ``Shares.scored``. stopped_B: it ended with a stop id.
    drafts_BK: guesses of what is drawn next. counts_BK2: of drafts in each place how many there were and how many were
    kept. likely_BNA, likely_logprobs_BNA: beside each token the most likely ones, where any row asks for alternatives;
    else they say nothing. state_BK: ``Rows.state_BK`` of the same rows' next call, where who has stopped only fills the
    batch; it stays where it is, split as they are.
    """

    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    stopped_B: jax.Array
    drafts_BK: jax.Array
    counts_BK2: jax.Array
    likely_BNA: jax.Array
    likely_logprobs_BNA: jax.Array
    state_BK: jax.Array


@struct.dataclass
class _Now:
    """The n-th turn of a call: of each row its last token, the length before it, how many tokens it was given."""

    n: Any
    pages: Store
    token_B: Any
    length_B: Any
    count_B: Any
    done_B: Any
    found: Decoded


@functools.partial(
    jax.jit,
    static_argnames=("config", "compute", "most", "drafts", "forced"),
    donate_argnames="pages",
    compiler_options=OPTIONS,
)
def decode(
    config: ModelConfig,
    compute: ComputeConfig,
    params: Any,
    router_bias: jax.Array | None,
    pages: Store,
    rows: Rows,
    turns: jax.typing.ArrayLike,
    until_end: jax.typing.ArrayLike,
    *,
    most: int,
    drafts: int = 0,
    forced: float = 0.0,
) -> tuple[Store, Decoded]:
    """Up to ``turns`` (``most`` at most) times a token of each row's answer, or up to ``1 + drafts``. A row draws its
    token n with ``fold_in(fold_in(key(seed), draw), n)``, or with another key than the seed's, whatever stands beside
    it. until_end: no more once a row has ended. drafts, forced: see ``speculation``.
    """
    network = parameters.merge(config, params, router_bias, compute)
    rows = jax.tree.map(lambda x: over_batch(x, compute), rows)
    at = State(*rows.state_BK[:, : len(State._fields)].T)
    most_B, size = rows.numbers_BK[:, Numbers._fields.index("most")], 1 + drafts
    filling_B = at.answered >= most_B
    page = pages.tokens_PN1.shape[1]
    room_B = jnp.sum(rows.table_BJ >= 0, axis=1) * page
    each, alone = _Drawing.of(rows, size), _Drawing.of(rows, 1)

    def goes_on(now: _Now):
        return (now.n < turns) & ~jnp.all(now.done_B) & ~(until_end & jnp.any(now.done_B & ~filling_B))

    def step(now: _Now) -> _Now:
        length_B, done_B, found = now.length_B, now.done_B, now.found
        table_BJ = jnp.where(done_B[:, None], -1, rows.table_BJ)

        def memory(entries, position_BS):
            hands, visible = reading(network, position_BS, table_BJ, page)
            return memory_of(compute, entries, position_BS[:, 0], table_BJ, hands), visible

        places_S = jnp.arange(size, dtype=jnp.int32)
        position_BS, place_BS = (x_B[:, None] + places_S for x_B in (length_B, at.answered + now.count_B))
        tokens_BS = jnp.concatenate([now.token_B[:, None], jnp.maximum(found.drafts_BK, 0)], axis=1)
        memories = [memory(layer, position_BS) for layer in now.pages.layers]
        options: dict[str, Any] = {"positions_BS": position_BS, "visible": memories[0][1], "absorbed": True}
        out = network(tokens_BS, memories=tuple(memory for memory, _ in memories), head=False, **options)
        tokens = memory_of(compute, now.pages.tokens_PN1, length_B, table_BJ, "rows")
        tokens, said_BT1 = tokens.write(tokens_BS[..., None])
        said_BT = said_BT1[:, :, 0]
        logits_RW = network.logits(out.hidden.reshape(-1, out.hidden.shape[2]))
        drawn_BS, likely = each.draw(logits_RW, said_BT, place_BS, position_BS + 1)
        if forced:
            drawn_BS = speculation.forced(found.drafts_BK, drawn_BS, each.keys(place_BS), forced, config.vocab_size)
        ends_BS = jnp.any(drawn_BS[:, :, None] == rows.stops[:, None], axis=2)
        left_B = most_B - at.answered - now.count_B
        kept_BS = speculation.kept(found.drafts_BK, drawn_BS, ends_BS, jnp.minimum(left_B, room_B - length_B))
        kept_BS &= ~done_B[:, None]
        found = _put_down(found, drawn_BS, logits_RW / each.how.scored[:, None], likely, now.count_B, kept_BS)
        found = dataclasses.replace(found, stopped_B=found.stopped_B | jnp.any(kept_BS & ends_BS, axis=1))
        new_B = jnp.sum(kept_BS, axis=1, dtype=jnp.int32)
        last_B1 = jnp.maximum(new_B - 1, 0)[:, None]
        token_B = jnp.where(done_B, now.token_B, jnp.take_along_axis(drawn_BS, last_B1, axis=1)[:, 0])
        pages = Store(tuple(memory.pages_PNW for memory in out.memories), tokens.pages_PNW, now.pages.mtp)
        count_B = now.count_B + new_B
        if drafts:
            place_B1, known_B1 = (at.answered + count_B)[:, None], (length_B + new_B)[:, None]
            guess = lambda hidden, k: alone.draw(network.logits(hidden), said_BT, place_B1 + k, known_B1)[0][:, 0]  # noqa: E731
            given = now.pages.mtp, out.hidden, drawn_BS, length_B, new_B, guess
            guessed_BK, mtp = speculation.draft(network, memory, *given)
            found, pages = dataclasses.replace(found, drafts_BK=guessed_BK), dataclasses.replace(pages, mtp=mtp)
        done_B |= found.stopped_B | (at.answered + count_B >= most_B)
        return _Now(now.n + 1, pages, token_B, length_B + new_B, count_B, done_B, found)

    found = _nothing(rows, drafts, most * size, config.vocab_size)
    found = jax.tree.map(lambda x: over_batch(x, compute), found)
    now = _Now(jnp.int32(0), pages, at.token, at.length, jnp.zeros_like(at.length), filling_B, found)
    with jax.named_scope("decode"):
        now = jax.lax.while_loop(goes_on, step, now)
    answered_B = jnp.where(now.found.stopped_B, most_B, at.answered + now.count_B)
    guessed_BK = jnp.pad(now.found.drafts_BK, ((0, 0), (0, MOST_DRAFTS - drafts)), constant_values=-1)
    state_BK = jnp.concatenate([jnp.stack(State(now.token_B, now.length_B, answered_B), axis=1), guessed_BK], axis=1)
    return now.pages, dataclasses.replace(to_hosts(now.found, compute), state_BK=over_batch(state_BK, compute))


def _nothing(rows: Rows, drafts: int, most: int, width: int) -> Decoded:
    drafts_BK, batch = rows.drafts[:, :drafts], len(rows.drafts)
    alternatives = (batch, most, min(ALTERNATIVES, width))
    tokens_BN, logprobs_BN = jnp.full((batch, most), -1, jnp.int32), jnp.full((batch, most), -1.0)
    counts_BK2, likely_BNA = jnp.zeros((*drafts_BK.shape, 2), jnp.int32), jnp.zeros(alternatives, jnp.int32)
    stopped_B = jnp.zeros(batch, bool)
    likely = likely_BNA, jnp.zeros(alternatives)
    return Decoded(tokens_BN, logprobs_BN, stopped_B, drafts_BK, counts_BK2, *likely, rows.state_BK)


@struct.dataclass
class _Likely:
    """The most likely tokens of rows, and their logits by the temperature ``Shares.scored``."""

    ids_RA: jax.Array
    logits_RA: jax.Array


@struct.dataclass
class _Drawing:
    """How rows draw, each S times beside each other."""

    at: Numbers
    how: Shares
    prompt_R: Int[Array, "R"]
    wishes: Wishes

    @classmethod
    def of(cls, rows: Rows, size: int) -> Self:
        numbers_RK, shares_RF = beside(rows.numbers_BK, size), beside(rows.shares_BF, size)
        at, how = Numbers(*numbers_RK[:, : len(Numbers._fields)].T), Shares(*shares_RF[:, : len(Shares._fields)].T)
        state = State(*beside(rows.state_BK, size)[:, : len(State._fields)].T)
        biases_RX = shares_RF[:, len(Shares._fields) :]
        penalties, biases = (how.repetition, how.presence, how.frequency), (numbers_RK[:, -BIASES:], biases_RX)
        wishes = Wishes(*penalties, *biases, at.constrained, beside(rows.allowed_BV, size))
        return cls(at, how, state.length + 1 - state.answered, wishes)

    def keys(self, place_BS: Int[Array, "B S"]) -> jax.Array:
        """Of tokens n = place of the answers."""
        words_R2 = jax.lax.bitcast_convert_type(jnp.stack([self.at.high, self.at.seed], axis=1), jnp.uint32)
        keys_R = jax.random.wrap_key_data(words_R2, impl="threefry2x32")
        key = lambda key, *at: functools.reduce(jax.random.fold_in, at, key)  # noqa: E731
        return jax.vmap(key)(keys_R, self.at.draw, place_BS.reshape(-1)).reshape(place_BS.shape)

    def draw(self, logits_RW, said_BT, place_BS, known_BS) -> tuple[Int[Array, "B S"], "_Likely"]:
        """A token for each place, and the most likely ones there, where a row asks for them; known: tokens before it.

        One question: whether all are greedy, or draw from all tokens, or some ask for more. What a row draws is the
        same in each case."""
        at, how, keys_R = self.at, self.how, lambda: self.keys(place_BS).reshape(-1)
        rows, count = len(logits_RW), min(ALTERNATIVES, logits_RW.shape[1])
        none = _Likely(jnp.zeros((rows, count), jnp.int32), jnp.zeros((rows, count)))

        def greedy(logits_RW):
            return first_maximum(logits_RW), none

        def drawn(logits_RW):
            return sample(logits_RW, keys_R(), how.temperature)[0], none

        def wanted(logits_RW):
            wanted_RW = adjusted(logits_RW, self.wishes, said_BT, self.prompt_R, known_BS.reshape(-1))
            best = lambda logits_RW: _Likely(*most_likely(logits_RW / how.scored[:, None], count)[::-1])  # noqa: E731
            likely = jax.lax.cond(asked, best, lambda _: none, logits_RW)
            return sample(wanted_RW, keys_R(), how.temperature, how.top_p, at.top_k, how.min_p)[0], likely

        draws_R, asked = how.temperature > 0, jnp.any(at.alternatives > 0)
        cut = jnp.any(draws_R & ((how.top_p < 1) | (at.top_k > 0) | (how.min_p > 0)))
        case = jnp.where(asked | cut | self.wishes.any(), 2, jnp.any(draws_R))
        tokens_R, likely = jax.lax.switch(case, (greedy, drawn, wanted), logits_RW)
        return tokens_R.reshape(place_BS.shape), likely


def _put_down(found: Decoded, drawn_BS, logits_RW, likely: _Likely, count_B, kept_BS) -> Decoded:
    """With the tokens kept, behind the first ``count`` of each row."""
    total_R = jax.nn.logsumexp(logits_RW, axis=1)
    logprob_R = jnp.take_along_axis(logits_RW, drawn_BS.reshape(-1, 1), axis=1)[:, 0] - total_R

    def put(x_BN, new_RX):
        new_BSX = new_RX.reshape(*drawn_BS.shape, *x_BN.shape[2:])
        for s in range(drawn_BS.shape[1]):
            here_BN = (jnp.arange(x_BN.shape[1]) == (count_B + s)[:, None]) & kept_BS[:, s : s + 1]
            here = here_BN.reshape(*here_BN.shape, *[1] * (x_BN.ndim - 2))
            x_BN = jnp.where(here, new_BSX[:, s : s + 1], x_BN)
        return x_BN

    made_BK = (found.drafts_BK >= 0) & kept_BS[:, :1]
    counts_BK2 = found.counts_BK2 + jnp.stack([made_BK, kept_BS[:, 1:]], axis=2)
    return dataclasses.replace(
        found,
        tokens_BN=put(found.tokens_BN, drawn_BS),
        logprobs_BN=put(found.logprobs_BN, logprob_R),
        counts_BK2=counts_BK2,
        likely_BNA=put(found.likely_BNA, likely.ids_RA),
        likely_logprobs_BNA=put(found.likely_logprobs_BNA, likely.logits_RA - total_R[:, None]),
    )
