"""How the next token is drawn."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from deepseek_jax.inference.limits import BIASES, CHARACTERS, GRAMMAR, RANGES, STRINGS
from deepseek_jax.typed import check_least, check_types

MOST_BIAS = 1e6  # which outweighs any logit; what passes float32 would make no number of them
PART = 128  # tokens of a vocabulary whose maximum is looked at first
COLDEST = 1e-30  # by less a logit may pass float32, and would be no largest one


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy. top_p keeps the most likely tokens until their sum reaches it, top_k that many (0: all).

    max_tokens: per answer. stop_token_ids: end an answer, beside the tokenizer's end of sentence. seed: the same seed,
    prompts and parameters give the same tokens. stop: strings that end an answer where text is made (``Engine.answer``,
    ``generate``, ``stream``), which is cut before the first that ends; the last token is the one that completes it.

    The others are for requests (``Engine.answer``, ``submit``) alone, and ``penalties.adjusted`` says what they do.
    min_p: keeps tokens with at least this share of the most likely one's probability. repetition_penalty 1,
    presence_penalty 0, frequency_penalty 0: none. logit_bias: (token, what its logit gets). alternatives: of each token
    of the answer, so many of the most likely ones with their log-probabilities. json_schema, regex: the answer, but for
    what ends it, is JSON by this schema (text; ``{}``: any), or the expression from end to end. prompt_logprobs: tell
    the prompt's, too, with as many alternatives; then max_tokens may be 0.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    alternatives: int = 0
    json_schema: str = ""
    regex: str = ""
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        check_types(self, signed=("presence_penalty", "frequency_penalty"))
        if 0 < self.temperature < COLDEST:
            raise ValueError(f"temperature={self.temperature}: must be 0, or at least {COLDEST:g}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must lie in (0, 1]")
        check_least(self, 0 if self.prompt_logprobs else 1, "max_tokens")
        for name, (least, most) in RANGES.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise ValueError(f"{name}={value}: must lie in [{least}, {most}]")
        if not (len(self.stop) <= STRINGS and all(0 < len(string) <= CHARACTERS for string in self.stop)):
            raise ValueError(f"stop: expected at most {STRINGS} strings of 1 to {CHARACTERS} characters")
        if self.json_schema and self.regex:
            raise ValueError("json_schema, regex: expected one of them")
        if (length := len(self.json_schema or self.regex)) > GRAMMAR:
            raise ValueError(f"json_schema, regex: {length} characters, expected at most {GRAMMAR}")
        if len(self.logit_bias) > BIASES:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} tokens: expected at most {BIASES}")
        for token, bias in self.logit_bias:
            if not (0 <= token < 2**31 and abs(bias) <= MOST_BIAS):
                raise ValueError(
                    f"logit_bias=(({token}, {bias}), …): expected tokens and finite numbers up to {MOST_BIAS:g}"
                )

    @property
    def constrained(self) -> bool:
        """Whether the answer is held to a grammar."""
        return bool(self.json_schema or self.regex)

    def of_ids(self) -> Self:
        """Without what only text can have: strings that end it."""
        return dataclasses.replace(self, stop=())

    def check_no_text(self) -> None:
        """ValueError where something is asked for that only text can have."""
        if self.stop:
            raise ValueError(f"stop={self.stop}: ends text; Engine.answer, generate and stream make it")

    def check_drawn_in_batches(self) -> None:
        """ValueError where something is asked for that requests alone can have."""
        self.check_no_text()
        for name, value in _FOR_REQUESTS.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)}: for requests by Engine.answer and submit alone")


_FOR_REQUESTS = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_FOR_REQUESTS |= {"logit_bias": (), "alternatives": 0, "json_schema": "", "regex": "", "prompt_logprobs": False}


def truncate_logits(
    logits_BW: Float[Array, "B W"], top_k_B: Int[Array, "B"], top_p_B: Float[Array, "B"]
) -> Float[Array, "B W"]:
    """Set to -inf what top-k, then top-p, leave out. The most likely token always stays; ties at the edge stay too."""
    bits_BW = jax.lax.bitcast_convert_type(jnp.where(logits_BW == 0, 0.0, logits_BW), jnp.uint32)
    ordered_BW = jnp.where(bits_BW >> 31 == 1, ~bits_BW, bits_BW | jnp.uint32(1 << 31))  # as the logits are
    none_B = jnp.zeros(len(logits_BW), jnp.uint32)

    def best():
        return jnp.where(top_k_B > 0, _edge(ordered_BW, jnp.ones_like(logits_BW), top_k_B.astype(jnp.float32)), 0)

    kept_BW = ordered_BW >= jax.lax.cond(jnp.any(top_k_B > 0), best, lambda: none_B)[:, None]

    def likely():
        p_BW = jax.nn.softmax(jnp.where(kept_BW, logits_BW, -jnp.inf), axis=1)
        return jnp.where(top_p_B < 1, _edge(ordered_BW, p_BW, top_p_B), 0)

    kept_BW &= ordered_BW >= jax.lax.cond(jnp.any(top_p_B < 1), likely, lambda: none_B)[:, None]
    return jnp.where(kept_BW, logits_BW, -jnp.inf)


def _edge(x_BW: UInt[Array, "B W"], weights_BW: Float[Array, "B W"], least_B: Float[Array, "B"]) -> UInt[Array, "B"]:
    """Of each row the largest number that those not below it reach ``least`` with, together; 0 where all do not.

    Two bits at a time: sixteen passes over a row are sooner done than a sort of it."""

    def digit(n, edge_B):
        place = jnp.uint32(30) - 2 * n.astype(jnp.uint32)
        further = [edge_B + (jnp.uint32(value) << place) for value in (1, 2, 3)]
        reached = [jnp.sum(jnp.where(x_BW >= at_B[:, None], weights_BW, 0), axis=1) >= least_B for at_B in further]
        return edge_B + (sum(each.astype(jnp.uint32) for each in reached) << place)

    return jax.lax.fori_loop(0, 16, digit, jnp.zeros(len(x_BW), jnp.uint32))


def sample(
    logits_BW: Float[Array, "B W"],
    keys_B: jax.Array,
    temperature_B: Float[Array, "B"],
    top_p_B: Float[Array, "B"] | None = None,
    top_k_B: Int[Array, "B"] | None = None,
    min_p_B: Float[Array, "B"] | None = None,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draw a token per row with the row's own key, each row in its own way, as ``SamplingParams`` describes them.

    Noise is drawn and logits are cut only where a row asks for it; without top_p and top_k nothing is cut, and noise is
    drawn in any case. Returns the tokens and their log-probabilities under ``softmax(logits / temperature)``,
    before top-k and top-p: what a learner can compute again. Greedy reports temperature 1.
    """
    assert (top_p_B is None) == (top_k_B is None), "one without the other would be left out"
    width = logits_BW.shape[1]
    greedy_B = temperature_B == 0
    scaled_BW = logits_BW / jnp.where(greedy_B, 1.0, temperature_B)[:, None]
    same = lambda x_BW: x_BW  # noqa: E731

    def noisy(scaled_BW):
        kept_BW = scaled_BW
        if top_p_B is not None and top_k_B is not None:
            cut_B = ~greedy_B & ((top_p_B < 1) | ((top_k_B > 0) & (top_k_B < width)))
            cut = functools.partial(truncate_logits, top_k_B=top_k_B, top_p_B=top_p_B)
            kept_BW = jax.lax.cond(jnp.any(cut_B), cut, same, scaled_BW)
        if min_p_B is not None:
            least_B1 = jnp.max(scaled_BW, axis=1, keepdims=True) + jnp.log(min_p_B)[:, None]
            kept_BW = jnp.where(scaled_BW >= least_B1, kept_BW, -jnp.inf)
        noise_BW = jax.vmap(lambda key: jax.random.gumbel(key, (width,), scaled_BW.dtype))(keys_B)
        return jnp.where(greedy_B[:, None], scaled_BW, kept_BW + noise_BW)

    always = top_p_B is None
    tokens_B = first_maximum(noisy(scaled_BW) if always else jax.lax.cond(jnp.all(greedy_B), same, noisy, scaled_BW))
    logprobs_BW = jax.nn.log_softmax(scaled_BW, axis=1)
    return tokens_B, jnp.take_along_axis(logprobs_BW, tokens_B[:, None], axis=1)[:, 0]


def most_likely(logits_XW: Float[Array, "*X W"], count: int) -> tuple[Float[Array, "*X A"], Int[Array, "*X A"]]:
    """``jax.lax.top_k(logits, count)`` of numbers that are no NaN, the first of equals included.

    Looked for in those ``count`` parts of a row that have the largest maxima, which hold it: a GPU sorts what it is
    given."""
    *outer, width = logits_XW.shape
    parts = -(-width // PART)
    if parts <= count:
        best_XA, ids_XA = jax.lax.top_k(logits_XW, count)
        return best_XA, ids_XA
    padded_XW = jnp.pad(logits_XW, [(0, 0)] * len(outer) + [(0, parts * PART - width)], constant_values=-jnp.inf)
    logits_XPN = padded_XW.reshape(*outer, parts, PART)
    chosen_XA = jnp.sort(jax.lax.top_k(jnp.max(logits_XPN, axis=-1), count)[1], axis=-1)
    some_XAN = jnp.take_along_axis(logits_XPN, chosen_XA[..., None], axis=-2)
    ids_XAN = chosen_XA[..., None] * PART + jnp.arange(PART, dtype=jnp.int32)
    best_XA, places_XA = jax.lax.top_k(some_XAN.reshape(*outer, -1), count)
    return best_XA, jnp.take_along_axis(ids_XAN.reshape(*outer, -1), places_XA, axis=-1)


def first_maximum(x_BW: Float[Array, "B W"]) -> Int[Array, "B"]:
    """``argmax(x, 1)`` of numbers that are no NaN, by two plain reductions: XLA:CPU's one, over pairs of value and
    place, takes eight times as long."""
    width = x_BW.shape[1]
    largest_B1 = jnp.max(x_BW, axis=1, keepdims=True)
    return jnp.min(jnp.where(x_BW == largest_B1, jnp.arange(width, dtype=jnp.int32), width - 1), axis=1)
