"""A head of scores in place of the vocabulary's: what it computes, where it begins, what refuses it, and its files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint.hf_cases import assert_same
from model.tiny import QWEN, V3, config, relative_error, weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax import Engine, load_hf, save_hf
from deepseek_jax.cli.inspect import describe
from deepseek_jax.config import ModelConfig
from deepseek_jax.evals.text import score_text
from deepseek_jax.model.costs import count_parameters, forward_flops
from deepseek_jax.model.parameters import init, logical_axes, merge
from deepseek_jax.model.scores import with_scores

TOKENS = jnp.arange(14, dtype=jnp.int32).reshape(2, 7)
SCORING = {
    name: config(fields, num_labels=3, num_nextn_predict_layers=0, tie_word_embeddings=False)
    for name, fields in (("v3", V3), ("dense", QWEN))
}


@pytest.mark.parametrize("name", SCORING)
def test_scores_are_the_hidden_states_times_the_head(name):
    params, bias = weights(SCORING[name])
    out = merge(SCORING[name], params, bias)(TOKENS)
    assert out.logits is None and out.scores is not None and out.scores.dtype == jnp.float32
    wanted = np.asarray(out.hidden, np.float64) @ np.asarray(params["score"]["w"], np.float64)
    assert relative_error(out.scores, wanted) < 1e-6
    assert logical_axes(SCORING[name])["score"]["w"] == ("embed", None) and "head" not in params


def test_any_language_model_gets_a_head_that_begins_at_zero():
    for fields in (V3, QWEN):
        speaks = config(fields)
        params, bias = weights(speaks)
        scoring, body, body_bias = with_scores(speaks, params, bias, 2)
        assert jax.tree.map(jnp.shape, body) == jax.tree.map(jnp.shape, weights(scoring)[0])
        out = merge(scoring, body, body_bias)(TOKENS)
        assert out.scores is not None and out.scores.shape == (2, 7, 2) and not out.scores.any()
        np.testing.assert_array_equal(out.hidden, merge(speaks, params, bias)(TOKENS, head=False).hidden)
        assert with_scores(scoring, body, body_bias, 2)[1] is body
        with pytest.raises(ValueError, match="num_labels=2: 1 wanted"):
            with_scores(scoring, body, body_bias, 1)


def test_costs_count_the_head_that_is_there():
    speaks = config(QWEN, tie_word_embeddings=False)
    scoring = dataclasses.replace(speaks, num_labels=1)
    D, W = speaks.hidden_size, speaks.vocab_size
    total = {tiny: count_parameters(tiny)["parameters_total"] for tiny in (speaks, scoring)}
    assert total[speaks] - total[scoring] == D * W - D
    assert forward_flops(speaks) - forward_flops(scoring) == 2 * (D * W - D)
    assert "1 scores (num_labels)" in describe(scoring)["head"] and "head" not in describe(speaks)
    assert init(scoring)[0]["score"]["w"].any()


@pytest.mark.parametrize("name", SCORING)
def test_files_are_those_of_a_classifier(name, tmp_path):
    network = merge(SCORING[name], *weights(SCORING[name]))
    save_hf(network, tmp_path / "saved", dtype="float32")
    content = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert content["architectures"][0].endswith("ForSequenceClassification") and len(content["id2label"]) == 3
    again = load_hf(tmp_path / "saved", dtype="float32")
    assert again.config == SCORING[name].canonical()
    assert_same(again, network)
    left = {key: value for key, value in content.items() if key not in ("id2label", "label2id")}
    assert ModelConfig.from_hf(left).num_labels == 2  # transformers leaves two out
    assert ModelConfig.from_hf(content | {"tie_word_embeddings": True}).num_labels == 3
    with pytest.raises(ValueError, match="num_labels=0: a classifier"):
        ModelConfig.from_hf(left | {"num_labels": 0})


def test_nothing_takes_it_for_a_language_model():
    for name in ("num_nextn_predict_layers", "tie_word_embeddings"):
        with pytest.raises(ValueError, match=f"{name}=.*num_labels=1 leaves no head"):
            config(V3, num_labels=1, **{"num_nextn_predict_layers": 0, name: type(getattr(ModelConfig, name))(1)})
    scoring, params, bias = with_scores(SPEAKER, *weights(SPEAKER), 1)
    model = whole(scoring, params, bias, tokenizer())
    for use in (
        lambda: Engine(model),
        lambda: model.network().head_weight(),
        lambda: score_text(model, ["a"], seq_len=8, batch_size=1),
    ):
        with pytest.raises(ValueError, match="num_labels=1: this is a model that scores text"):
            use()
