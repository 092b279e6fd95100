"""Where transformers and the released code part: what we do, shown against both."""

import importlib
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import V2, V3, config

from deepseek_jax import ModelConfig, RopeScaling, load_hf
from deepseek_jax.model.mla import LATENT_EPS
from deepseek_jax.model.rope import rotary_tables
from deepseek_jax.model.router import limit_to_groups
from deepseek_kernels.block_fp8 import FP8, dequantise

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from parity.drawn import redraw  # noqa: E402


def cosine_at_zero(mscale: dict[str, float]) -> tuple[float, float, float]:
    """(ours, theirs, theirs from the config.json that we write): the amplitude of the rotary tables for these fields of
    rope_scaling, factor 40."""
    module = importlib.import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")
    scaling = RopeScaling("yarn", factor=40.0, original_max_position_embeddings=64)
    fields = config(V3, rope_scaling=scaling).to_hf()
    fields.pop("rope_scaling", None)
    rope = dict(rope_type="yarn", type="yarn", rope_theta=10000.0, factor=40.0, original_max_position_embeddings=64)
    ours = ModelConfig.from_hf(fields | {"rope_parameters": rope | mscale})

    def theirs(fields: dict[str, Any]) -> float:
        rotary = module.DeepseekV3RotaryEmbedding(transformers.DeepseekV3Config(**fields))
        return float(rotary(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.long))[0][0, 0, 0])

    cos, _ = rotary_tables(ours, jnp.zeros((1, 1), jnp.int32))
    return float(cos[0, 0, 0, 0]), theirs(fields | {"rope_parameters": rope | mscale}), theirs(ours.to_hf())


def temperature(mscale: float) -> float:
    return 0.1 * mscale * math.log(40.0) + 1.0


def test_yarn_with_both_mscales_is_the_same():
    for both in ({"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 1.0, "mscale_all_dim": 0.707}):
        ours, theirs, written = cosine_at_zero(both)
        assert ours == pytest.approx(theirs, rel=1e-6) == written


@pytest.mark.parametrize(
    ("given", "released"),
    [({"mscale": 0.707}, temperature(0.707)), ({"mscale_all_dim": 0.707}, temperature(1.0) / temperature(0.707))],
)
def test_yarn_with_one_mscale_follows_the_released_code(given, released):
    """The released modelling code takes an absent mscale as 1 and an absent mscale_all_dim as 0; transformers drops
    the one that is there. No released model has just one; a checkpoint that does was made for the released code. What
    we write makes transformers follow it."""
    ours, theirs, written = cosine_at_zero(given)
    assert ours == pytest.approx(released, rel=1e-6) == written
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
        ModelConfig.from_hf(config(V2).to_hf() | {"norm_topk_prob": True})


@pytest.mark.parametrize(("kind", "base"), [("DeepseekV2", V2), ("DeepseekV3", V3)])
def test_the_latents_norms_have_an_eps_of_their_own(kind, base, tmp_path):
    """The released code gives the norms of the latents no eps, so its default holds whatever ``rms_norm_eps`` says;
    transformers keeps that, and so do we. Servers that read ``rms_norm_eps`` there too get the same from released
    models, whose files say 1e-6; from a file that says otherwise (0.1 here) they make another network."""
    fields = config(base, rms_norm_eps=0.1, num_nextn_predict_layers=0).to_hf()
    cls = getattr(transformers, f"{kind}ForCausalLM")
    cls(getattr(transformers, f"{kind}Config")(**fields)).float().save_pretrained(tmp_path)
    redraw(tmp_path)
    peer = cls.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    norms = {name: module for name, module in peer.named_modules() if hasattr(module, "variance_epsilon")}
    latents = [norms.pop(name) for name in list(norms) if name.endswith("_a_layernorm")]
    assert {norm.variance_epsilon for norm in latents} == {LATENT_EPS} == {1e-6}
    assert {norm.variance_epsilon for norm in norms.values()} == {0.1}

    tokens = np.random.default_rng(0).integers(3, fields["vocab_size"], (2, 20)).astype(np.int32)
    ours = np.asarray(load_hf(tmp_path, dtype="float32")(jnp.asarray(tokens)).logits)
    with torch.no_grad():
        theirs = peer(torch.tensor(tokens).long()).logits.numpy()
        for norm in latents:
            norm.variance_epsilon = 0.1
        servers = peer(torch.tensor(tokens).long()).logits.numpy()
    assert np.abs(ours - theirs).max() <= 1e-4
    assert np.abs(ours - servers).max() > 0.01


def test_the_last_fp8_blocks_are_smaller_not_all_alike():
    """The released kernels count blocks of 128 from the first row on. Where transformers multiplies FP8 out (without a
    GPU), it divides the rows by the scales' instead: two scales for 160 rows then meet at row 80, not 128, and V3's own
    kv_a_proj_with_mqa (576 rows, 5 scales) is refused."""
    theirs = importlib.import_module("transformers.integrations.finegrained_fp8").Fp8Dequantize(None)

    def scale_of_rows(rows: int, scales: list[float]) -> tuple[list[float], list[float]]:
        """(ours, theirs): what a matrix of ones becomes, by rows."""
        ours = dequantise(jnp.ones((rows, 128), FP8), jnp.asarray(scales)[:, None], jnp.float32)
        stored = {"weight": torch.ones(rows, 128).to(torch.float8_e4m3fn)}
        wide = theirs.convert(stored | {"weight_scale_inv": torch.tensor(scales)[:, None]})["weight"]
        return ours[:, 0].tolist(), wide[:, 0].tolist()

    assert scale_of_rows(256, [1.0, 2.0]) == ([1.0] * 128 + [2.0] * 128,) * 2
    assert scale_of_rows(160, [1.0, 2.0]) == ([1.0] * 128 + [2.0] * 32, [1.0] * 80 + [2.0] * 80)
    with pytest.raises(ValueError, match=r"\(576, 128\) not divisible by scale grid \(5, 1\)"):
        scale_of_rows(576, [1.0] * 5)
