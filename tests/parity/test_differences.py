"""Where transformers and the released code part: what we do, shown against both."""

import importlib
import math

import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import V2, V3, config

from deepseek_jax import ModelConfig, RopeScaling
from deepseek_jax.hf_config import to_hf
from deepseek_jax.model.rope import rotary_tables
from deepseek_jax.model.router import limit_to_groups

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def cosine_at_zero(mscale: dict[str, float]) -> tuple[float, float]:
    """(ours, theirs): the amplitude of the rotary tables for these fields of rope_scaling, factor 40."""
    module = importlib.import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")
    fields = to_hf(config(V3, rope_scaling=RopeScaling("yarn", factor=40.0, original_max_position_embeddings=64)))
    fields.pop("rope_scaling", None)
    rope = dict(rope_type="yarn", type="yarn", rope_theta=10000.0, factor=40.0, original_max_position_embeddings=64)
    ours = ModelConfig.from_hf(fields | {"rope_parameters": rope | mscale})
    theirs = transformers.DeepseekV3Config(**fields | {"rope_parameters": rope | mscale})
    cos, _ = module.DeepseekV3RotaryEmbedding(theirs)(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.long))
    return float(rotary_tables(ours, jnp.zeros((1, 1), jnp.int32))[0][0, 0, 0, 0]), float(cos[0, 0, 0])


def temperature(mscale: float) -> float:
    return 0.1 * mscale * math.log(40.0) + 1.0


def test_yarn_with_both_mscales_is_the_same():
    for both in ({"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 1.0, "mscale_all_dim": 0.707}):
        ours, theirs = cosine_at_zero(both)
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(
    ("given", "released"),
    [({"mscale": 0.707}, temperature(0.707)), ({"mscale_all_dim": 0.707}, temperature(1.0) / temperature(0.707))],
)
def test_yarn_with_one_mscale_follows_the_released_code(given, released):
    """The released modelling code takes an absent mscale as 1 and an absent mscale_all_dim as 0; transformers drops
    the one that is there. No released model has just one; a checkpoint that does was made for the released code."""
    ours, theirs = cosine_at_zero(given)
    assert ours == pytest.approx(released, rel=1e-6)
    assert theirs == pytest.approx(temperature(1.0), rel=1e-6)
    assert abs(ours - theirs) > 0.05


def test_groups_are_masked_with_minus_infinity():
    """V2 in transformers and R1's own code mask with 0. Softmax scores are positive, so V2 chooses the same experts
    either way; with V3's bias a kept score can be negative, and 0 would let experts of other groups in."""
    rng = np.random.default_rng(0)
    for base, low, differs in ((V2, 0.0, False), (V3, -1.0, True)):
        cfg = config(base)
        scores = rng.uniform(low, 1.0 + low, (2000, cfg.n_routed_experts)).astype(np.float32)
        kept = np.asarray(limit_to_groups(cfg, jnp.asarray(scores), best=2 if base is V3 else 1))
        ours = np.argsort(-kept, axis=1, kind="stable")[:, : cfg.num_experts_per_tok]
        zero = np.argsort(-np.where(np.isinf(kept), 0, scores), axis=1, kind="stable")[:, : cfg.num_experts_per_tok]
        assert (ours != zero).any() == differs
        assert np.isfinite(np.take_along_axis(kept, ours, axis=1)).all()


def test_v2_with_normalised_weights_is_refused():
    """transformers reads norm_topk_prob and ignores it; codes for V2 disagree on scaling after normalising."""
    with pytest.raises(ValueError, match="norm_topk_prob"):
        ModelConfig.from_hf(to_hf(config(V2)) | {"norm_topk_prob": True})
