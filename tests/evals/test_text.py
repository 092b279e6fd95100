"""Bits per byte against a plain softmax over every row, and against a model that knows nothing."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.data.packing import pack_stream
from deepseek_jax.data.special_tokens import EOS
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.evals.text import HeldOut, Score, row_loss, score_text
from deepseek_jax.model import parameters
from deepseek_jax.parallel import processes
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.workflows.stage_config import StageConfig
from deepseek_jax.workflows.stage_result import finish, write_json

TEXTS = ["def add(a, b):\n    return a + b\n", "12+34=46\n", "größer als ünïcode ½\n" * 2]
SIZE = 16
PARAMS, BIAS = weights(SPEAKER)
MODEL = whole(SPEAKER, PARAMS, BIAS)


def rows_of(texts=TEXTS):
    t = tokenizer()
    return list(pack_stream([[t.bos_id, *t.encode(text), t.eos_id] for text in texts], SIZE, pad_id=t.pad_id))


@functools.cache
def forward():
    return jax.jit(
        lambda p, b, tokens, segments: parameters.merge(SPEAKER, p, b)(tokens, segment_ids_BS=segments).logits
    )


def by_hand(rows):
    """Nats and number of targets, row by row and token by token; a row is one document but for its padding."""
    nats, count = 0.0, 0
    for row in rows:
        segments = (row["segment_ids"] > 0).astype(np.int32)
        logits = forward()(PARAMS, BIAS, jnp.asarray(row["tokens"])[None], jnp.asarray(segments)[None])
        logits = np.asarray(logits[0], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for t in range(1, SIZE):
            if row["loss_mask"][t] and segments[t] == segments[t - 1]:
                nats, count = nats - logprobs[t - 1, row["tokens"][t]], count + 1
    return nats, count


def test_row_loss_equals_a_loop_over_tokens():
    """Seven rows in batches of four: the last is filled up with nothing."""
    rows = rows_of()
    assert len(rows) % 4
    nats, targets = row_loss(MODEL, rows, batch_size=4, chunk=5)
    expected = by_hand(rows)
    assert targets == expected[1]
    assert nats == pytest.approx(expected[0], rel=1e-5)


def test_isolated_rows_do_not_see_the_document_before():
    rows = rows_of(["a" * 5, "b" * 5])[:1]
    joined, isolated = (row_loss(MODEL, rows, batch_size=1, isolate=isolate) for isolate in (False, True))
    assert joined[1] == isolated[1] and abs(joined[0] - isolated[0]) > 1e-3


def test_a_perplexity_past_all_numbers_is_infinite():
    score = Score(documents=1, bytes=1, tokens=2, targets=1, nats=800.0)
    assert score.perplexity == math.inf and math.isfinite(score.bits_per_byte)


def test_what_is_not_finite_is_null_in_a_result_and_said(tmp_path, capsys):
    config, found = StageConfig(run_dir=str(tmp_path)), {"perplexity": math.inf, "heldout": {"files": {"a": math.nan}}}
    assert finish(config, {"steps_here": 1}, lambda: found)["perplexity"] is None
    assert (tmp_path / "result.json").read_text().count("null") == 2
    assert "result.json: perplexity, heldout.files.a: not finite, so null" in capsys.readouterr().err


def test_names_that_are_no_utf8_can_be_written(tmp_path):
    """They come as halves of surrogate pairs, which neither JSON files nor TensorBoard take."""
    (tmp_path / "caf\udce9.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b", "kind": "\\udce9"}')
    parts = HeldOut([tmp_path]).documents
    assert list(parts) == [("b.jsonl", "\ufffd"), ("caf\ufffd.txt", None)]
    write_json(tmp_path / "result.json", {"caf\udce9": 1})


def test_score_of_a_model_that_knows_nothing():
    """Every token costs log2 W bits; the bytes shrink with the tokens that are no targets."""
    params = PARAMS | {"head": {"w": jnp.zeros_like(PARAMS["head"]["w"])}}
    found = score_text(whole(SPEAKER, params, BIAS, tokenizer()), TEXTS, seq_len=SIZE, batch_size=4).bits_per_byte
    tokens = sum(len(tokenizer().encode(text)) + 2 for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert found == pytest.approx(math.log2(SPEAKER.vocab_size) * tokens / size, rel=1e-5)


def test_a_tokenizer_without_a_beginning_of_sentence(tmp_path):
    tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    model = whole(SPEAKER, PARAMS, BIAS, Tokenizer.from_folder(tmp_path))
    assert 0 < score_text(model, TEXTS, seq_len=SIZE, batch_size=4).bits_per_byte < 100


def test_rows_without_targets_count_for_nothing():
    rows = rows_of()
    empty = {name: np.zeros_like(value) for name, value in rows[0].items()}
    plain = row_loss(MODEL, rows[:4], batch_size=4)
    filled = row_loss(MODEL, [*rows[:4], *[empty] * 5], batch_size=4)
    assert filled == plain


def test_no_token_is_dropped_where_a_model_is_measured():
    """Training may drop what finds no room on the way to its experts; what it is measured by depends on no mesh."""
    mesh = make_mesh(MeshConfig(expert=4), devices=jax.devices()[:4])
    crowded = dataclasses.replace(MODEL.compute, dispatch="all_to_all", dispatch_capacity=0.1)
    nats, targets = row_loss(dataclasses.replace(MODEL, compute=crowded, mesh=mesh), rows_of(), batch_size=4)
    expected = row_loss(MODEL, rows_of(), batch_size=4)
    assert targets == expected[1] and nats == pytest.approx(expected[0], rel=1e-6)


def test_every_process_measures_the_same_rows(monkeypatch):
    """All of several processes have all the rows: their batches are not to be put one behind the other."""
    rows = rows_of()
    alone = row_loss(MODEL, rows, batch_size=4)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "gather", lambda value: [value, value])
    assert row_loss(MODEL, rows, batch_size=4) == alone
