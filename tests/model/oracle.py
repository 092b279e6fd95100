"""The papers' equations in numpy, float64, one sequence at a time: what the model is compared with.

Nothing is batched, packed, stacked, masked or cached here: a sequence is an array (S D), and what is not
attended to is not computed. Parameters are the model's own nested dicts, as numpy arrays.
"""

import math
from typing import Any

import numpy as np

from deepseek_jax.config import ModelConfig, RopeScaling

Params = dict[str, Any]


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * gain


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def swiglu(wi: np.ndarray, wo: np.ndarray, x: np.ndarray) -> np.ndarray:
    """wi (D 2 F): gate, then up."""
    gate, up = x @ wi[:, 0], x @ wi[:, 1]
    return (gate / (1 + np.exp(-gate)) * up) @ wo


# Rotary positions


def mscale(factor: float, m: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1


def frequencies(dim: int, base: float, scaling: RopeScaling) -> list[float]:
    """Angle per position of each pair."""
    plain = [base ** (-2 * i / dim) for i in range(dim // 2)]
    original = scaling.original_max_position_embeddings
    if scaling.type == "yarn":
        corr = {n: dim * math.log(original / (2 * math.pi * n)) / (2 * math.log(base)) for n in yarn_turns(scaling)}
        fast, slow = yarn_turns(scaling)
        low, high = max(math.floor(corr[fast]), 0), min(math.ceil(corr[slow]), dim - 1)
        out = []
        for i, f in enumerate(plain):
            ramp = min(max((i - low) / (high - low or 0.001), 0), 1)
            out.append(f * (1 - ramp) + f / scaling.factor * ramp)
        return out
    if scaling.type == "llama3":
        out = []
        for f in plain:
            wavelength = 2 * math.pi / f
            if wavelength < original / scaling.high_freq_factor:
                out.append(f)
            elif wavelength > original / scaling.low_freq_factor:
                out.append(f / scaling.factor)
            else:
                span = scaling.high_freq_factor - scaling.low_freq_factor
                smooth = (original / wavelength - scaling.low_freq_factor) / span
                out.append((1 - smooth) * f / scaling.factor + smooth * f)
        return out
    return plain


def yarn_turns(scaling: RopeScaling) -> tuple[float, float]:
    return scaling.beta_fast, scaling.beta_slow


def rope(config: ModelConfig, x: np.ndarray, position: int) -> np.ndarray:
    """Turn the pairs of one vector; a pair is a complex number times ``e^{i angle}``."""
    scaling, half = config.rope_scaling, len(x) // 2
    amplitude = 1.0
    if scaling.type == "yarn":
        amplitude = mscale(scaling.factor, scaling.mscale) / mscale(scaling.factor, scaling.mscale_all_dim)
    out = np.empty_like(x)
    for i, f in enumerate(frequencies(len(x), config.rope_theta, scaling)):
        a, b = (2 * i, 2 * i + 1) if config.rope_interleave else (i, i + half)
        turned = complex(x[a], x[b]) * complex(math.cos(position * f), math.sin(position * f)) * amplitude
        out[a], out[b] = turned.real, turned.imag
    return out


# Attention


def mla(p: Params, config: ModelConfig, x: np.ndarray, positions: list[int]) -> np.ndarray:
    """V3 equations 1 to 11 over one causal sequence (S D)."""
    C, N = config.kv_lora_rank, config.qk_nope_head_dim
    scale = (N + config.qk_rope_head_dim) ** -0.5
    if config.rope_scaling.type == "yarn" and config.rope_scaling.mscale_all_dim:
        scale *= mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    c_q = x
    if config.q_lora_rank:
        c_q = rms_norm(x @ p["q_a"]["w"] + p["q_a"].get("b", 0), p["q_norm"]["gain"], 1e-6)
    compressed = x @ p["kv_a"]["w"] + p["kv_a"].get("b", 0)
    latent = rms_norm(compressed[:, :C], p["kv_norm"]["gain"], 1e-6)
    k_rope = [rope(config, row[C:], t) for row, t in zip(compressed, positions, strict=True)]
    y = np.zeros_like(x)
    for h in range(config.num_attention_heads):
        q, kv = c_q @ p["q_b"][:, h], latent @ p["kv_b"][:, h]
        for s, position in enumerate(positions):
            q_rope = rope(config, q[s, N:], position)
            scores = [q[s, :N] @ kv[t, :N] + q_rope @ k_rope[t] for t in range(s + 1)]
            y[s] += softmax(np.array(scores) * scale) @ kv[: s + 1, N:] @ p["o"][h]
    return y + p.get("o_bias", 0)


def gqa(p: Params, config: ModelConfig, x: np.ndarray, positions: list[int]) -> np.ndarray:
    """Query head h attends with key and value head ``h // (H / G)``."""
    share = config.num_attention_heads // config.num_key_value_heads
    y = np.zeros_like(x)
    for h in range(config.num_attention_heads):
        g = h // share
        q = x @ p["q"][:, h] + (p["q_bias"][h] if "q_bias" in p else 0)
        k = x @ p["kv"][:, 0, g] + (p["kv_bias"][0, g] if "kv_bias" in p else 0)
        v = x @ p["kv"][:, 1, g] + (p["kv_bias"][1, g] if "kv_bias" in p else 0)
        q = [rope(config, row, t) for row, t in zip(q, positions, strict=True)]
        k = [rope(config, row, t) for row, t in zip(k, positions, strict=True)]
        for s in range(len(x)):
            scores = np.array([q[s] @ k[t] for t in range(s + 1)]) * config.head_dim**-0.5
            y[s] += softmax(scores) @ v[: s + 1] @ p["o"][h]
    return y


# Experts


def best(values: np.ndarray, count: int) -> list[int]:
    """Indices of the greatest, greatest first; of equals the lower index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def affinities(config: ModelConfig, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """s (E) of one token."""
    return 1 / (1 + np.exp(-(x @ w))) if config.scoring == "sigmoid" else softmax(x @ w)


def choose(config: ModelConfig, s: np.ndarray, bias: np.ndarray | None) -> list[int]:
    """The experts of one token, best first."""
    chooser = s if bias is None or config.topk_method != "noaux_tc" else s + bias
    allowed = list(range(len(s)))
    if config.topk_method != "greedy":
        members = np.split(np.arange(len(s)), config.n_group)
        count = 2 if config.topk_method == "noaux_tc" else 1
        group_score = np.array([sum(sorted(chooser[m])[-count:]) for m in members])
        allowed = [i for g in best(group_score, config.topk_group) for i in members[g]]
    return sorted(allowed, key=lambda i: (-chooser[i], i))[: config.num_experts_per_tok]


def gates(config: ModelConfig, s: np.ndarray, chosen: list[int]) -> np.ndarray:
    g = s[chosen]
    return (g / (g.sum() + 1e-20) if config.norm_topk_prob else g) * config.routed_scaling_factor


def balance(config: ModelConfig, scores: np.ndarray, chosen: list[list[int]]) -> float:
    """``Σ_i f_i P_i`` of one sequence: scores (T E), and the experts chosen for each token."""
    tokens, experts = scores.shape
    total = 0.0
    for i in range(experts):
        if config.topk_method == "noaux_tc":  # V3: the raw affinities' own top K, groups and bias aside
            count = sum(i in best(s, config.num_experts_per_tok) for s in scores)
        else:
            count = sum(i in c for c in chosen)
        f = experts / (config.num_experts_per_tok * tokens) * count
        total += f * np.mean([s[i] / s.sum() for s in scores])
    return total


def device_losses(
    config: ModelConfig, scores: np.ndarray, chosen: list[list[int]], devices: int, most: int
) -> tuple[float, float]:
    """V2's device-level and communication balance losses of one sequence, equations 26 to 31 without their factors.
    most: devices that a token may be sent to."""
    tokens, experts = scores.shape
    here = np.split(np.arange(experts), devices)
    selects = chosen
    if config.topk_method == "noaux_tc":
        selects = [best(s, config.num_experts_per_tok) for s in scores]
    f = [experts / (config.num_experts_per_tok * tokens) * sum(i in c for c in selects) for i in range(experts)]
    p = [np.mean([s[i] / s.sum() for s in scores]) for i in range(experts)]
    level = communication = 0.0
    for mine in here:
        share = sum(p[i] for i in mine)
        level += sum(f[i] for i in mine) / len(mine) * share
        sent = sum(any(i in c for i in mine) for c in chosen)
        communication += devices / (most * tokens) * sent * share
    return level, communication


def dropped(
    experts: int,
    scores: np.ndarray,
    chosen: np.ndarray,
    spared: np.ndarray,
    real: np.ndarray,
    devices: int,
    capacity: float,
) -> list[tuple[int, int]]:
    """(token, k) of the choices that V2 drops: scores (T E), chosen (T K), spared and real (T)."""
    budget, gone = math.floor(capacity * real.sum() * chosen.shape[1] / devices), []
    for device in range(devices):
        mine = [(t, k) for t, k in np.ndindex(*chosen.shape) if real[t] and chosen[t, k] * devices // experts == device]
        may_go = sorted((p for p in mine if not spared[p[0]]), key=lambda p: (scores[p[0], chosen[p]], -p[0], -p[1]))
        gone += may_go[: max(0, len(mine) - budget)]
    return gone


def moe(p: Params, config: ModelConfig, x: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, Params]:
    """Output (S D), and load (E) and balance of the sequence."""
    y, scores, choices = np.zeros_like(x), [], []
    for t, token in enumerate(x):
        s = affinities(config, token, p["router"])
        chosen = choose(config, s, bias)
        for i, g in zip(chosen, gates(config, s, chosen), strict=True):
            y[t] += g * swiglu(p["wi"][i], p["wo"][i], token)
        if config.n_shared_experts:
            y[t] += swiglu(p["shared"]["wi"], p["shared"]["wo"], token)
        scores.append(s)
        choices.append(chosen)
    load = np.bincount(np.concatenate(choices), minlength=config.n_routed_experts)
    return y, {"load": load, "balance": balance(config, np.array(scores), choices)}


# The network


def block(p: Params, config: ModelConfig, x: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, Params | None]:
    attend = mla if config.attention == "mla" else gqa
    eps, positions = config.rms_norm_eps, list(range(len(x)))
    x = x + attend(p["attention"], config, rms_norm(x, p["attention_norm"]["gain"], eps), positions)
    normed = rms_norm(x, p["mlp_norm"]["gain"], eps)
    if "router" in p["mlp"]:
        y, stats = moe(p["mlp"], config, normed, bias)
    else:
        y, stats = swiglu(p["mlp"]["wi"], p["mlp"]["wo"], normed), None
    return x + y, stats


def mtp(p: Params, config: ModelConfig, hidden: np.ndarray, emb: np.ndarray, bias: np.ndarray | None):
    """Depth 1 over T-1 tokens: hidden[i] beside the embedding of the next token, embedding first."""
    eps = config.rms_norm_eps
    both = [
        np.concatenate([rms_norm(e, p["embed_norm"]["gain"], eps), rms_norm(h, p["hidden_norm"]["gain"], eps)])
        for h, e in zip(hidden[:-1], emb[1:], strict=True)
    ]
    x, stats = block(p["block"], config, np.stack(both) @ p["proj"]["w"], bias)
    return rms_norm(x, p["norm"]["gain"], eps), stats


def transformer(params: Params, bias: np.ndarray | None, config: ModelConfig, tokens: np.ndarray) -> Params:
    """logits, hidden, mtp_hidden (S-1 D) and the routers' loads and balances of one sequence of tokens."""
    emb = params["embed"][tokens]
    x, stats = emb, []
    for kind in ("dense_layers", "moe_layers"):
        stack = params.get(kind, {})
        for i in range(len(stack["attention_norm"]["gain"]) if stack else 0):
            one = _pick(stack, i)
            x, router = block(one, config, x, bias[len(stats)] if bias is not None and kind == "moe_layers" else None)
            stats += [router] if router else []
    hidden = rms_norm(x, params["norm"]["gain"], config.rms_norm_eps)
    out = {
        "hidden": hidden,
        "logits": hidden @ (params["head"]["w"] if "head" in params else params["embed"].T),
    }
    if "mtp" in params and len(tokens) > 1:
        out["mtp_hidden"], router = mtp(params["mtp"], config, hidden, emb, None if bias is None else bias[-1])
        stats += [router] if router else []
    return out | {"load": [s["load"] for s in stats], "balance": [s["balance"] for s in stats]}


def _pick(tree: Any, i: int) -> Any:
    return {name: _pick(sub, i) for name, sub in tree.items()} if isinstance(tree, dict) else tree[i]
