"""Logits that an answer's own tokens, and the one who asks, have a say in."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class Wishes:
    """Of rows: penalties as in ``SamplingParams``, biases_BX for the tokens ids_BX, -1 where there are none, and of
    constrained rows the tokens that they may draw, see ``Rows``."""

    repetition_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array
    ids_BX: jax.Array
    biases_BX: jax.Array
    constrained_B: jax.Array
    allowed_BV: jax.Array

    def any(self) -> jax.Array:
        """Whether a row asks for anything."""
        return self.any_choice() | self.any_penalty()

    def any_choice(self) -> jax.Array:
        """Whether a row asks for a bias, or may not draw every token."""
        return jnp.any(self.ids_BX >= 0) | jnp.any(self.constrained_B > 0)

    def any_penalty(self) -> jax.Array:
        """Whether a row asks for one."""
        return jnp.any((self.repetition_B != 1) | (self.presence_B != 0) | (self.frequency_B != 0))


def beside(x: Array, count: int) -> Array:
    """Each row ``count`` times, beside each other."""
    return x if count == 1 else jnp.repeat(x, count, axis=0, total_repeat_length=count * len(x))


def adjusted(
    logits_BW: Float[Array, "B W"], wishes: Wishes, said_BT: Int[Array, "_ T"], prompt_B: Int[Array, "B"], known_B
) -> Float[Array, "B W"]:
    """``l + bias``, or -inf for what a constrained row may not draw; then of tokens that stand in prompt or answer
    ``l / repetition`` where it is positive, else ``l · repetition`` (CTRL, section 4.1); then ``l - frequency · n -
    presence · [n > 0]`` with n times that the token stands in the answer.

    said_BT: the row's first ``known_B`` tokens, of which the first ``prompt_B`` are the prompt's; where there are fewer
    rows of them, each is that of several beside each other. Nothing is computed where no row asks.
    """
    rows_B1, width = jnp.arange(len(logits_BW))[:, None], logits_BW.shape[1]

    def biased(logits_BW):
        ids_BX = jnp.where(wishes.ids_BX < 0, width, wishes.ids_BX)
        bits_BW = (wishes.allowed_BV[:, :, None] >> jnp.arange(32)).reshape(len(logits_BW), -1)[:, :width] & 1
        logits_BW = jnp.where(bits_BW, logits_BW, -jnp.inf)
        return logits_BW.at[rows_B1, ids_BX].add(wishes.biases_BX, mode="drop")

    def penalised(logits_BW):
        place_T = jnp.arange(said_BT.shape[1])
        ids_BT = beside(said_BT, len(logits_BW) // len(said_BT))
        times = lambda counted_BT: jnp.zeros_like(logits_BW).at[rows_B1, ids_BT].add(counted_BT)  # noqa: E731
        known_BT = place_T < known_B[:, None]
        all_BW = times(known_BT.astype(jnp.float32))
        answer_BW = times((known_BT & (place_T >= prompt_B[:, None])).astype(jnp.float32))
        repetition_B1 = wishes.repetition_B[:, None]
        weighed_BW = jnp.where(logits_BW > 0, logits_BW / repetition_B1, logits_BW * repetition_B1)
        logits_BW = jnp.where(all_BW > 0, weighed_BW, logits_BW)
        return logits_BW - wishes.frequency_B[:, None] * answer_BW - wishes.presence_B[:, None] * (answer_BW > 0)

    same = lambda logits_BW: logits_BW  # noqa: E731
    logits_BW = jax.lax.cond(wishes.any_choice(), biased, same, logits_BW)
    return jax.lax.cond(wishes.any_penalty(), penalised, same, logits_BW)
