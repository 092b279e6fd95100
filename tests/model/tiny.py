"""Networks small enough for a test, with weights that hide nothing.

Every width is different, so that swapped axes do not fit; norms' gains differ from one, biases from zero, and
the routing bias is large enough to change which experts are chosen.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig, RopeScaling
from deepseek_jax.model import parameters
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_kernels import InStack

V3: dict[str, Any] = dict(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=3,
    intermediate_size=20,
    attention="mla",
    num_attention_heads=2,
    q_lora_rank=10,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    n_routed_experts=8,
    n_shared_experts=1,
    moe_intermediate_size=12,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
)
# DeepSeekMoE-16B: every head its own keys, softmax, plain top-k, two shared experts.
V1: dict[str, Any] = V3 | dict(
    attention="gqa",
    num_key_value_heads=2,
    head_dim=6,
    rope_interleave=False,
    n_shared_experts=2,
    scoring="softmax",
    topk_method="greedy",
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    num_nextn_predict_layers=0,
)
V2: dict[str, Any] = V3 | dict(
    scoring="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
    num_nextn_predict_layers=0,
)
# No query compression, biases, and YaRN with a temperature that also reaches the tables.
V2_LITE: dict[str, Any] = V2 | dict(
    q_lora_rank=0,
    attention_bias=True,
    rms_norm_eps=1e-3,
    rope_scaling=RopeScaling(
        "yarn",
        factor=40.0,
        original_max_position_embeddings=16,
        beta_fast=4.0,
        mscale=1.0,
        mscale_all_dim=0.707,
    ),
)
QWEN: dict[str, Any] = V1 | dict(
    num_attention_heads=4,
    attention_bias=True,
    n_routed_experts=0,
    first_k_dense_replace=3,
    tie_word_embeddings=True,
)


def config(base: dict[str, Any] = V3, **changes: Any) -> ModelConfig:
    return ModelConfig(**(base | changes))


@functools.cache
def weights(config: ModelConfig, seed: int = 0) -> tuple[dict[str, Any], jax.Array | None]:
    """Parameters and routing bias drawn with numpy: nothing to compile, and no scale that hides a mistake."""
    rng = np.random.default_rng(seed)
    params, bias = jax.eval_shape(lambda: parameters.init(config))

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        name = jax.tree_util.keystr(path)
        value = 1 + 0.3 * noise if "gain" in name else 0.35 * noise
        return jnp.asarray(value, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, params)
    return params, None if bias is None else jnp.asarray(0.3 * rng.standard_normal(bias.shape), jnp.float32)


def whole(config: ModelConfig, params: Any, bias: Any, tokenizer: Any = None, mesh: Any = None) -> Model:
    """These arrays as a model, by default on one device."""
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return Model(config, ComputeConfig().on(mesh), params, bias, tokenizer, mesh)


@struct.dataclass
class Columns:
    """A ``Memory`` of the simplest kind: S columns behind the first ``length``."""

    buffer_BTW: Any
    length: Any

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, columns: int) -> "Columns":
        return cls(jnp.zeros((batch, columns, config.cache_numbers_per_token_layer)), jnp.int32(0))

    def write(self, entry_BSW):
        if isinstance(self.buffer_BTW, InStack):  # a layer of those that are scanned, put back where it was
            layer, one = self.buffer_BTW.layer, lambda leaf: leaf.stack[leaf.layer]
            written, kept = Columns(one(self.buffer_BTW), one(self.length)).write(entry_BSW)
            put = lambda leaf, new: InStack(leaf.stack.at[layer].set(new), layer)  # noqa: E731
            return Columns(put(self.buffer_BTW, written.buffer_BTW), put(self.length, written.length)), kept
        buffer = jax.lax.dynamic_update_slice(self.buffer_BTW, entry_BSW, (0, self.length, 0))
        return Columns(buffer, self.length + entry_BSW.shape[1]), buffer


def layer(stack: dict[str, Any], index: int) -> dict[str, Any]:
    """One layer of a stack of them, in float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf[index], np.float64), stack)


def float64(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def relative_error(value: Any, expected: Any) -> float:
    """``‖value - expected‖ / ‖expected‖`` in float64."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    assert value.shape == expected.shape
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))
