"""Which experts serve which kind of token."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.model import parameters


def expert_shares(
    model: Model,
    samples: Mapping[str, Sequence[tuple[Sequence[int], Sequence[bool]]]],
    *,
    seq_len: int,
    batch_size: int = 8,
) -> dict[str, Any]:
    """For each kind of token, each MoE layer's load as fractions over its experts.

    samples: per kind, token ids of a document (cut at ``seq_len``) and which of them are of that kind; the others
    are context. Returns ``{"kinds", "layers", "experts", "share": [kind][layer][expert]}``.
    """

    config = model.config

    @jax.jit
    def experts(params, router_bias, tokens_BS, segment_ids_BS):
        network = parameters.merge(config, params, router_bias, model.compute.exact)
        out = network(tokens_BS, segment_ids_BS=segment_ids_BS, head=False)
        assert out.router is not None
        return out.router.experts_BSK

    share = []
    for documents in samples.values():
        load_LE = np.zeros((config.num_moe_layers, config.n_routed_experts))
        for start in range(0, len(documents), batch_size):
            part = documents[start : start + batch_size]
            tokens, segments, counts = (np.zeros((batch_size, seq_len), np.int32) for _ in range(3))
            for row, (ids, mine) in enumerate(part):
                size = min(len(ids), seq_len)
                tokens[row, :size], segments[row, :size], counts[row, :size] = ids[:size], 1, mine[:size]
            with jax.set_mesh(model.mesh):
                chosen_LBSK = np.asarray(experts(model.params, model.router_bias, tokens, segments))
            for layer, chosen_BSK in enumerate(chosen_LBSK):
                load_LE[layer] += np.bincount(chosen_BSK[counts > 0].ravel(), minlength=config.n_routed_experts)
        share.append((load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1)).tolist())
    return {
        "kinds": list(samples),
        "layers": config.num_moe_layers,
        "experts": config.n_routed_experts,
        "share": share,
    }


def token_kinds(
    tokenizer: Tokenizer, documents: Mapping[str, Sequence[str]], chats: Sequence[Sequence[int]]
) -> dict[str, list[tuple[list[int], list[bool]]]]:
    """Samples for ``expert_shares``: the tokens of code and prose, digits wherever they stand, and thinking.

    documents: texts of the kinds ``code`` and ``prose``. chats: token ids of answered chats, whose tokens between
    ``<think>`` and ``</think>`` are thinking.
    """
    digits = {tokenizer.token_id(digit) for digit in "0123456789"}
    samples: dict[str, list[tuple[list[int], list[bool]]]] = {}
    encoded = {
        kind: [[*tokenizer.bos_ids, *tokenizer.encode(text)] for text in texts] for kind, texts in documents.items()
    }
    for kind, texts in encoded.items():
        samples[kind] = [(ids, [token not in digits for token in ids]) for ids in texts]
    everything = [ids for texts in encoded.values() for ids in texts] + [list(ids) for ids in chats]
    samples["digits"] = [(ids, [token in digits for token in ids]) for ids in everything]
    samples["thinking"] = [(list(ids), _inside(ids, tokenizer.think_id, tokenizer.end_think_id)) for ids in chats]
    return samples


def _inside(ids: Sequence[int], opening: int, closing: int) -> list[bool]:
    inside, marks = False, []
    for token in ids:
        inside = (inside or token == opening) and token != closing
        marks.append(inside and token != opening)
    return marks
