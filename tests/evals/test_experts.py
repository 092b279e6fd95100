"""Which experts serve which kind of token, against a count over the network's own choices."""

import jax
import jax.numpy as jnp
import numpy as np
from model.tiny import V3, config, weights, whole
from small import tokenizer

from deepseek_jax.data.chat import encode_chat
from deepseek_jax.evals.experts import expert_shares, token_kinds
from deepseek_jax.model import parameters

TINY = config(V3)
SIZE = 12


def test_shares_count_the_tokens_of_a_kind():
    """Documents of any length, in a batch that does not come out even; the other tokens are context."""
    rng = np.random.default_rng(0)
    lengths = [5, 20, 1, 9, 12]
    documents = [(rng.integers(0, 40, n).tolist(), (rng.random(n) < 0.6).tolist()) for n in lengths]
    samples = {"some": documents, "none": [(documents[0][0], [False] * 5)]}
    params, bias = weights(TINY)
    found = expert_shares(whole(TINY, params, bias), samples, seq_len=SIZE, batch_size=2)

    @jax.jit
    def forward(params, bias, tokens):
        router = parameters.merge(TINY, params, bias)(tokens).router
        assert router is not None
        return router.experts_BSK

    counts = np.zeros((2, 8))
    for ids, mine in documents:
        row = np.zeros((1, SIZE), np.int32)
        row[0, : min(len(ids), SIZE)] = ids[:SIZE]
        chosen = np.asarray(forward(params, bias, jnp.asarray(row)))  # causal: what stands behind changes nothing
        for layer, place in np.ndindex(2, min(len(ids), SIZE)):
            for expert in chosen[layer, 0, place]:
                counts[layer, expert] += mine[place]
    assert (found["kinds"], found["layers"], found["experts"]) == (["some", "none"], 2, 8)
    np.testing.assert_allclose(found["share"][0], counts / counts.sum(axis=1, keepdims=True), rtol=1e-6)
    assert not np.any(found["share"][1])


def test_tokens_are_sorted_into_kinds():
    t = tokenizer()
    messages = [
        {"role": "user", "content": "7*8="},
        {"role": "assistant", "content": "<think>so 5</think>56"},
    ]
    ((chat, _),) = encode_chat(t, messages)
    kinds = token_kinds(t, {"code": ["x = 41"], "prose": ["no number"]}, [chat])
    text = {
        kind: ["".join(t.decode([i]) for i, mine in zip(*sample, strict=True) if mine) for sample in samples]
        for kind, samples in kinds.items()
    }
    assert text["code"] == ["x = "] and text["prose"] == ["no number"]
    assert text["digits"] == ["41", "", "78556"]
    assert text["thinking"] == ["so 5"]
