"""Every family against transformers on random weights: logits, gradients, greedy tokens, files both ways.

`make parity` installs torch and transformers at the pinned versions and runs this folder. The weights are drawn large
enough (0.2 and more) that routing, rotary positions and norms all matter, and the routing bias changes choices.
"""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from parity import deepseek_v1  # noqa: E402
from parity.drawn import draw, redraw  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from small import tokenizer  # noqa: E402

from deepseek_jax import load_hf, save_hf  # noqa: E402
from deepseek_jax.compute import ComputeConfig  # noqa: E402
from deepseek_jax.config import ModelConfig  # noqa: E402
from deepseek_jax.inference.cache import Cache  # noqa: E402
from deepseek_jax.model import parameters, transformer  # noqa: E402

COMMON: dict[str, Any] = dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, max_position_embeddings=256)
MLA: dict[str, Any] = COMMON | dict(
    intermediate_size=48,
    moe_intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    n_routed_experts=16,
    num_experts_per_tok=4,
    first_k_dense_replace=1,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=40.0, original_max_position_embeddings=16, beta_fast=4)
YARN |= dict(beta_slow=1, mscale=0.707, mscale_all_dim=0.707)
V2 = MLA | dict(n_shared_experts=2, topk_method="group_limited_greedy", n_group=4, topk_group=2, norm_topk_prob=False)
GQA: dict[str, Any] = COMMON | dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=16)

# DeepSeekMoE-16B's config.json with small numbers.
V1: dict[str, Any] = COMMON | dict(
    model_type="deepseek",
    architectures=["DeepseekForCausalLM"],
    intermediate_size=48,
    moe_intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_routed_experts=16,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    norm_topk_prob=False,
    scoring_func="softmax",
    aux_loss_alpha=0.001,
    seq_aux=True,
    rope_theta=10000.0,
    rope_scaling=None,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=False,
)

GOLDEN = Path(__file__).parents[1] / "checkpoint" / "golden_models.json"

# name: transformers' classes, fields. Between them every code path of the released models is on.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "v1": ("Deepseek", V1),
    "v3": (
        "DeepseekV3",
        MLA
        | dict(n_shared_experts=1, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5)
        | dict(rope_parameters=YARN, num_nextn_predict_layers=0, rms_norm_eps=1e-5),
    ),
    "v3_one_group_tied": (
        "DeepseekV3",
        MLA
        | dict(n_shared_experts=3, n_group=1, topk_group=1, num_nextn_predict_layers=0, tie_word_embeddings=True)
        | dict(first_k_dense_replace=2, attention_bias=True),
    ),
    "v2": (
        "DeepseekV2",
        V2 | dict(routed_scaling_factor=16.0, rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0)),
    ),
    "v2_lite": (
        "DeepseekV2",
        V2
        | dict(q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0)
        | dict(rope_parameters=YARN),
    ),
    "qwen2": ("Qwen2", GQA | dict(tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "llama": (
        "Llama",
        GQA | dict(head_dim=8, rope_parameters=LLAMA3, tie_word_embeddings=False),
    ),
}


def peer(name: str, what: str) -> Any:
    """Transformers' class ``Config`` or ``ForCausalLM`` of a family."""
    return getattr(deepseek_v1 if name == "v1" else transformers, FAMILIES[name][0] + what)


class Case:
    """A family's torch model, its folder, and a batch with padding behind the second row."""

    def __init__(self, name: str, folder: Path):
        fields = FAMILIES[name][1]
        config = peer(name, "Config")(**fields)
        config._attn_implementation = "eager"
        self.name, self.folder = name, folder
        self.model = peer(name, "ForCausalLM")(config).float().eval()
        self.model.save_pretrained(folder)
        if name == "v1":  # transformers says it in the fields of DeepSeek-OCR-2
            (folder / "config.json").write_text(json.dumps(fields))
        self.shapes = redraw(folder)
        self.model = self.reload(torch.float32)
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(3, COMMON["vocab_size"], (2, 40)).astype(np.int32)
        self.real = np.ones((2, 40), np.int32)
        self.real[1, 29:] = 0

    def reload(self, dtype: Any) -> Any:
        return type(self.model).from_pretrained(self.folder, dtype=dtype, attn_implementation="eager").eval()

    def logits(self, model: Any = None) -> Any:
        model = model or self.model
        return model(torch.tensor(self.tokens).long(), attention_mask=torch.tensor(self.real).long()).logits

    def ours(self, dtype: str = "float32") -> transformer.Transformer:
        return load_hf(self.folder, dtype=dtype)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def forward(model: transformer.Transformer, case: Case) -> np.ndarray:
    params, bias = parameters.split(model)

    @jax.jit
    def run(params, bias):
        return parameters.merge(model.config, params, bias)(
            jnp.asarray(case.tokens), segment_ids_BS=jnp.asarray(case.real)
        ).logits

    return np.asarray(run(params, bias))


def test_logits(case):
    wanted, real = case.logits().detach().numpy(), case.real.astype(bool)
    found = forward(case.ours(), case)
    scale = np.abs(wanted[real]).max()
    assert scale > 0.5, "weights too small to show anything"
    assert np.abs(found - wanted)[real].max() <= 1e-4


def test_bfloat16_is_as_near_to_the_truth_as_theirs(case):
    """Both computed in bfloat16, by the distance to float32 over 1,280 tokens. Where rounding flips a choice of
    experts, a token is far off in either; which tokens do is chance, so ours may be a tenth further than theirs."""
    tokens = np.random.default_rng(5).integers(3, COMMON["vocab_size"], (32, 40)).astype(np.int32)
    with torch.no_grad():
        truth = case.model(torch.tensor(tokens).long()).logits.numpy()
        theirs = case.reload(torch.bfloat16)(torch.tensor(tokens).long()).logits.float().numpy()
    model = case.ours("bfloat16")
    ours = np.asarray(jax.jit(lambda tokens: model(tokens).logits)(jnp.asarray(tokens)))
    mine, other = (np.linalg.norm(x - truth) / np.linalg.norm(truth) for x in (ours, theirs))
    print(f"{case.name}: bfloat16 ours {mine:.4f}, theirs {other:.4f}")
    assert mine <= 1.1 * other


def test_gradients_of_every_parameter(case, tmp_path):
    weight = np.random.default_rng(2).standard_normal((2, 40, COMMON["vocab_size"])).astype(np.float32)
    weight *= case.real[:, :, None]
    case.model.zero_grad()
    (case.logits() * torch.tensor(weight)).sum().backward()
    theirs = Case.__new__(Case)  # a model of the same kind whose weights are the gradients, saved by transformers
    theirs.model = type(case.model)(case.model.config).float()
    with torch.no_grad():
        for mine, other in zip(theirs.model.parameters(), case.model.parameters(), strict=True):
            mine.copy_(torch.zeros_like(other) if other.grad is None else other.grad)
    theirs.model.save_pretrained(tmp_path / "theirs")
    case.model.zero_grad()

    model = case.ours()
    params, bias = parameters.split(model)

    def loss(params):
        out = parameters.merge(model.config, params, bias)(
            jnp.asarray(case.tokens), segment_ids_BS=jnp.asarray(case.real)
        )
        return jnp.sum(out.logits * weight)

    gradients = jax.jit(jax.grad(loss))(params)
    save_hf(parameters.merge(model.config, gradients, bias), tmp_path / "ours", dtype="float32")
    found, wanted = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if "e_score_correction_bias" in name:
            continue  # no gradient reaches it
        error = np.linalg.norm(found[name] - value) / max(np.linalg.norm(value), 1e-6)
        assert error <= 1e-3, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("absorbed", [False, True], ids=["plain", "absorbed"])
def test_64_greedy_tokens_through_the_cache(case, absorbed):
    prompt = case.tokens[:, :12]
    ids = case.model.generate(
        torch.tensor(prompt).long(),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = case.ours()
    params, bias = parameters.split(model)

    @jax.jit
    def step(cache, tokens):
        size = tokens.shape[1]
        options: dict[str, Any] = {"positions_BS": cache.positions(size), "visible": cache.visible(size)}
        network = parameters.merge(model.config, parameters.unstack(params), bias)
        out = network(tokens, memories=cache.memories(), absorbed=absorbed, **options)
        assert out.logits is not None
        grown = cache.grown(out.memories, jnp.full(2, size))
        return grown, jnp.argmax(out.logits[:, -1:], axis=-1).astype(jnp.int32)

    cache, token = step(Cache.empty(model.config, ComputeConfig(), 2, 80), prompt)
    found = [token]
    for _ in range(63):
        cache, token = step(cache, token)
        found.append(token)
    np.testing.assert_array_equal(np.concatenate(found, axis=1), ids[:, 12:].numpy())


def test_written_files_load_there_and_come_back_to_the_byte(case, tmp_path):
    save_hf(case.ours(), tmp_path / "ours", dtype="float32")
    model, info = type(case.model).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    torch.testing.assert_close(case.logits(model.eval()), case.logits(), rtol=0, atol=0)
    first, second = load_file(case.folder / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    model.save_pretrained(tmp_path / "back")
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert all(again[name].tobytes() == second[name].tobytes() for name in second)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_the_same_from_the_config_we_write(name, tmp_path):
    """Field by field, from numbers that are not its defaults; those of tokens are the tokenizer's, and not written."""
    fields: dict[str, Any] = FAMILIES[name][1] | dict(initializer_range=0.01, rms_norm_eps=1e-4, rope_theta=5000.0)
    if "rope_parameters" in fields:
        fields["rope_parameters"] = fields["rope_parameters"] | dict(rope_theta=5000.0)
    had = peer(name, "Config")(**fields)
    written = ModelConfig.from_hf(fields if name == "v1" else had.to_diff_dict()).to_hf()
    (tmp_path / "config.json").write_text(json.dumps(written))
    wanted, found = had.to_dict(), peer(name, "Config").from_pretrained(tmp_path).to_dict()
    assert (written["model_type"], found.pop("architectures")) == (had.model_type, [FAMILIES[name][0] + "ForCausalLM"])
    for dropped in ("architectures", "aux_loss_alpha", "seq_aux"):  # the last two: V1's training
        wanted.pop(dropped, None)
    found["rope_parameters"].pop("type", None)  # the older name of rope_type
    assert {field: found[field] for field in wanted} == wanted


def test_mtp(tmp_path):
    """The module of depth 1 against transformers' own, which takes h after the final norm; and in the files exactly
    its tensors are unexpected to transformers."""
    MtpModel = importlib.import_module("transformers.modeling_layers").MtpModel

    config = transformers.DeepseekV3Config(**FAMILIES["v3"][1] | dict(num_nextn_predict_layers=1))
    config._attn_implementation = "eager"
    main = transformers.DeepseekV3ForCausalLM(config).float().eval()
    mtp = MtpModel(main, 1).float().eval()
    with torch.no_grad():
        for name, value in [*main.state_dict().items(), *mtp.state_dict().items()]:
            value.copy_(torch.tensor(draw(name, tuple(value.shape))))
    main.save_pretrained(tmp_path)
    prefix = f"model.layers.{config.num_hidden_layers}."
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {name: value for name, value in mtp_tensors(mtp, prefix).items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    ids = torch.tensor(np.random.default_rng(0).integers(3, 96, (2, 30)))
    positions = torch.arange(29)[None].expand(2, -1)
    with torch.no_grad():
        hidden = main.model(ids).last_hidden_state
        wanted = mtp.forward_layer(0, hidden[:, :-1], positions, None, input_ids=ids[:, 1:])
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted

    model = load_hf(tmp_path, dtype="float32")
    out = model(jnp.asarray(ids.numpy(), jnp.int32), mtp=True)
    assert out.mtp_hidden is not None
    found = model.logits(out.mtp_hidden)[:, :-1]
    with torch.no_grad():
        logits = wanted if wanted.shape[-1] == 96 else main.lm_head(wanted)
    assert np.abs(np.asarray(found) - logits.numpy()).max() <= 1e-4

    save_hf(model, tmp_path / "ours", dtype="float32")
    _, info = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert all(name.startswith(prefix) for name in info["unexpected_keys"])
    # V3 itself lists its layer 61 as known; a smaller model's is unexpected, or dropped by a pattern of the same kind.
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) >= set(tensors)


def mtp_tensors(mtp: Any, prefix: str) -> dict[str, np.ndarray]:
    """Transformers' MTP module under the released names: the experts one by one."""
    found = {}
    for name, value in mtp.state_dict().items():
        if not name.startswith("layers.0."):
            continue
        name, array = name.removeprefix("layers.0."), value.numpy()
        name = name.replace("post_norm.", "shared_head.norm.").replace("mtp_block.", "")
        if name.endswith("experts.gate_up_proj"):
            half = array.shape[1] // 2
            for expert, both in enumerate(array):
                at = f"{prefix}mlp.experts.{expert}."
                found[at + "gate_proj.weight"], found[at + "up_proj.weight"] = both[:half].copy(), both[half:].copy()
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(array):
                found[f"{prefix}mlp.experts.{expert}.down_proj.weight"] = down.copy()
        else:
            found[prefix + name] = array.copy()
    return found


@pytest.mark.parametrize("case", ["v1"], indirect=True)
def test_moe_16bs_file_is_the_text_model_of_ocr2_and_a_head(case, tmp_path):
    """V1 is not registered in transformers. Of what we write, transformers' own class lacks nothing and leaves over
    the head; the names' prefix ``model.`` is the one that it strips by itself."""
    save_hf(case.ours(), tmp_path / "ours", dtype="float32")
    model, info = deepseek_v1.ocr.DeepseekOcr2TextModel.from_pretrained(
        tmp_path / "ours", config=case.model.config, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert info["unexpected_keys"] == {"lm_head.weight"}
    head = torch.tensor(load_file(tmp_path / "ours" / "model.safetensors")["lm_head.weight"])
    out = model.eval()(torch.tensor(case.tokens).long(), attention_mask=torch.tensor(case.real).long())
    torch.testing.assert_close(out.last_hidden_state @ head.T, case.logits(), rtol=0, atol=0)


def test_golden_files_are_what_transformers_says(case):
    """tests/checkpoint/golden_models.json, from which `make test` shows parity without torch. REWRITE_GOLDEN=1 makes
    it anew."""
    logits = case.logits().detach().numpy()
    found = {
        "config": json.loads((case.folder / "config.json").read_text()),
        "shapes": case.shapes,
        "tokens": case.tokens.tolist(),
        "lengths": case.real.sum(axis=1).tolist(),
        "logits": [[float(f"{x:.7g}") for x in logits[row, -1 if row == 0 else 28]] for row in (0, 1)],
        "argmax": logits[0].argmax(axis=-1).tolist(),
    }
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if os.environ.get("REWRITE_GOLDEN") == "1":
        golden[case.name] = found
        GOLDEN.write_text(json.dumps(golden, separators=(",", ":"), sort_keys=True) + "\n")
    stored = golden[case.name]
    assert {**stored, "logits": None} == {**found, "logits": None}
    np.testing.assert_allclose(stored["logits"], found["logits"], atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "v3"])
def test_scores_are_those_of_a_classifier(name, tmp_path):
    """transformers' ForSequenceClassification: its files here, ours there, and the score of each last real token."""
    config = peer(name, "Config")(**FAMILIES[name][1] | dict(num_labels=1, pad_token_id=0, tie_word_embeddings=False))
    config._attn_implementation = "eager"
    kind = getattr(transformers, FAMILIES[name][0] + "ForSequenceClassification")
    kind(config).save_pretrained(tmp_path / "theirs")
    redraw(tmp_path / "theirs")
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, COMMON["vocab_size"], (2, 20)).astype(np.int32)
    tokens[1, 13:] = 0
    with torch.no_grad():
        model = kind.from_pretrained(tmp_path / "theirs", dtype=torch.float32, attn_implementation="eager").eval()
        mask = torch.tensor(tokens != 0).long()
        wanted = model(torch.tensor(tokens).long(), attention_mask=mask).logits.numpy()
    ours = load_hf(tmp_path / "theirs", dtype="float32")
    assert ours.config.num_labels == 1
    scores = jax.jit(lambda tokens: ours(tokens, segment_ids_BS=(tokens != 0).astype(jnp.int32)).scores)(tokens)
    found = np.asarray(scores)[[0, 1], [19, 12]]
    assert np.abs(wanted).max() > 0.1 and np.abs(found - wanted).max() <= 1e-4
    # In a batch, padded with the token that the tokenizer names; its folder's config.json says nothing of it.
    tokenizer().save(tmp_path / "text")
    (tmp_path / "text" / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1}')
    save_hf(ours, tmp_path / "ours", dtype="float32", tokenizer_from=tmp_path / "text")
    with torch.no_grad():
        again, told = kind.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
        assert not any(told.values()) and again.config.pad_token_id == tokenizer().pad_id == 2
        padded = torch.tensor(np.where(tokens == 0, 2, tokens)).long()
        np.testing.assert_allclose(again.eval()(padded, attention_mask=mask).logits, wanted, atol=1e-4)
