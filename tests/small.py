"""A tokenizer of about 300 tokens and a network whose vocabulary holds it."""

import functools

import jax
import jax.numpy as jnp
from model.tiny import V3, config, weights

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.tokenizer_training import train_tokenizer
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train.state import TrainState

SPEAKER = config(V3, num_hidden_layers=2, vocab_size=300, max_position_embeddings=64)
ONE_DEVICE = make_mesh(devices=jax.devices()[:1])


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(["def add(a, b):\n    return a + b\n", "12+34=46, 7*8=56\n"], 300)


def state(step: int = 0) -> TrainState:
    """What sampling needs of a training state."""
    params, bias = weights(SPEAKER)
    return TrainState(step=jnp.int32(step), params=params, opt_state=None, router_bias=bias)
