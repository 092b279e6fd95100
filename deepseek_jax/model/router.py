"""Which experts a token goes to, with which weights: the routers of V1, V2 and V3, and what training needs to know.

Everything here is float32: bf16 logits change which experts are chosen.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from deepseek_jax.config import ModelConfig
from deepseek_jax.parallel.context import over_runs
from deepseek_jax.parallel.sharding import ShardingRules, per_device
from deepseek_kernels import InStack, Target, router_hopper
from deepseek_kernels.kept import kept
from deepseek_kernels.registry import choose
from deepseek_kernels.weights import Weight

_FEW = 64  # tokens: a step of decoding's
# On a GPU few tokens' float32 products are too few tiles for its cores, and some kernels take twenty times as long as
# others: sums are cut into parts, as in ``hopper_few``.
_FEW_TILES, _PARTS = 2048, 16


@struct.dataclass
class Routing:
    """experts_TK: chosen experts, best first. weights_TK: their gate values. scores_TE: every expert's affinity."""

    experts_TK: jax.Array
    weights_TK: jax.Array
    scores_TE: jax.Array


@struct.dataclass
class RouterStats:
    """What a MoE layer returns beside its output; stacked over layers (L first) by the transformer.

    load_E: tokens sent to each expert. balance: ``Σ_i f_i P_i`` summed over sequences. experts_BSK: chosen experts.
    Padding is in neither load nor balance. dropped: choices (token, expert) that were not computed. device_balance,
    communication: V2's losses over devices, as ``balance``; None where none were asked for.
    """

    load_E: jax.Array
    balance: jax.Array
    experts_BSK: jax.Array
    dropped: jax.Array
    device_balance: jax.Array | None = None
    communication: jax.Array | None = None


def route(
    config: ModelConfig,
    x_TD: Float[Array, "T D"],
    w_DE: Weight,
    bias_E: Float[Array, "E"] | None,
    chosen_TK: Int[Array, "T K"] | None = None,
    target: Target | None = None,
) -> Routing:
    """Affinities ``s``, the top K experts, and their gate values.

    V1 and V2: ``s = softmax(x W)``; V3: ``s = sigmoid(x W)``. The choice is the top K of ``s`` (greedy), of the
    groups with the greatest member (group_limited_greedy, V2 section 2.2.2), or of ``s + bias`` in the groups whose
    two best sum highest (noaux_tc, V3 equation 16 and section 2.1.2). The bias decides who is chosen, never the
    weight: ``g = s`` of the chosen, divided by its sum with ``norm_topk_prob``, times ``routed_scaling_factor``.
    Ties go to the lower index.

    chosen_TK: experts to take instead, those that a sampler took for instance; -1 leaves the choice to the router.
    target: what kernels are chosen for.
    """
    target, bias_E = target or Target.here(), bias_E if config.topk_method == "noaux_tc" else None
    limited = config.topk_method != "greedy" and config.n_group != config.topk_group
    facts = {"tokens": len(x_TD), "weight": w_DE, "limited": limited}
    if choose("router", target, x_TD.dtype, **facts).name == "hopper":
        scores, best_TE = router_hopper.scores_and_best(x_TD, w_DE, bias_E, config.scoring)
        experts_TK = best_TE[:, : config.num_experts_per_tok]
    else:
        scores, experts_TK = _scores_and_best(config, x_TD, w_DE, bias_E, target)
    if chosen_TK is not None:
        experts_TK = jnp.where(chosen_TK >= 0, chosen_TK, experts_TK)
    # Kept with the rows that it sorted: chosen again from logits of another rounding, one choice would move all rows.
    experts_TK = kept(experts_TK)
    weights_TK = jnp.take_along_axis(scores, experts_TK, axis=1)
    if config.norm_topk_prob:
        weights_TK = weights_TK / (jnp.sum(weights_TK, axis=1, keepdims=True) + 1e-20)
    return Routing(experts_TK, weights_TK * config.routed_scaling_factor, scores)


def _scores_and_best(config, x_TD, w_DE, bias_E, target):
    many = x_TD.dtype == jnp.bfloat16 and len(x_TD) > _FEW_TILES
    if target.platform == "cuda" and many and isinstance(w_DE, InStack):
        logits: jax.Array = _in_terms(x_TD, w_DE.astype(jnp.promote_types(w_DE.dtype, jnp.bfloat16)))
    else:
        logits = _logits(x_TD.astype(jnp.float32), w_DE.astype(jnp.float32))
    scores = jax.nn.sigmoid(logits) if config.scoring == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    # One comparison decides, but no gradient flows through it.
    choice = jax.lax.stop_gradient(scores)
    if config.topk_method == "noaux_tc":
        assert bias_E is not None
        choice = limit_to_groups(config, choice + bias_E, best=2)
    elif config.topk_method == "group_limited_greedy":
        choice = limit_to_groups(config, choice, best=1)
    return scores, best_experts(choice, config.num_experts_per_tok)


def _logits(x_TD, w_DE):
    # A GPU would take TF32 for this product and a TPU bf16.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    plain = functools.partial(product, "td,de->te")
    (tokens, depth), experts = x_TD.shape, w_DE.shape[1]
    if tokens > _FEW_TILES:
        return plain(x_TD, w_DE)

    def in_parts(x_TD, w_DE):
        # A single row as one of eight, as in ``product``: XLA:GPU writes its terms to memory before it adds them up.
        x_TD, parts = jnp.pad(x_TD, ((0, 7 * (tokens == 1)), (0, 0))), math.gcd(depth, _PARTS)
        x_TPD, w_PDE = x_TD.reshape(len(x_TD), parts, -1), w_DE.reshape(parts, -1, experts)
        sums_PTE = jax.lax.optimization_barrier(product("tpd,pde->pte", x_TPD, w_PDE))  # else XLA makes one of them
        return jnp.sum(sums_PTE, axis=0)[:tokens]

    return jax.lax.platform_dependent(x_TD, w_DE, cuda=in_parts, default=plain)


@jax.custom_vjp
def _in_terms(x_TD, w_DE):
    """Logits of many bfloat16 tokens by tensor cores, which have no float32: a weight is the sum of three terms in
    bfloat16, whose products with the tokens are exact in float32, and so the tokens are read as they are, once, without
    a copy in float32. For layers in stacks, as prompts are read: what is scored for training has ``_logits``' numbers,
    as training has, and so have gradients."""
    terms = [w_DE] if w_DE.dtype == jnp.bfloat16 else _terms(w_DE.astype(jnp.float32))
    sums_TG = jnp.einsum("td,dg->tg", x_TD, jnp.concatenate(terms, axis=1), preferred_element_type=jnp.float32)
    return functools.reduce(jnp.add, reversed(jnp.split(sums_TG, len(terms), axis=1)))  # what is small first


def _in_float32(x_TD, w_DE):
    return _logits(x_TD.astype(jnp.float32), w_DE.astype(jnp.float32))


_in_terms.defvjp(lambda x_TD, w_DE: jax.vjp(_in_float32, x_TD, w_DE), lambda pullback, d_TE: pullback(d_TE))


def _terms(w: Float[Array, "..."]) -> list[jax.Array]:
    """Three in bfloat16 whose sum is w: a float32 number has 24 bits, three times 8."""
    first = jax.lax.reduce_precision(w, 8, 7)  # XLA would take a cast and its reverse for nothing
    second = jax.lax.reduce_precision(w - first, 8, 7)
    return [term.astype(jnp.bfloat16) for term in (first, second, w - first - second)]


def best_experts(choice_TE: Float[Array, "T E"], count: int) -> Int[Array, "T K"]:
    """The experts of the ``count`` highest numbers, best first, ties to the lower index.

    On a GPU, of few tokens, each expert's place is the number of those before it: two kernels, where XLA sorts.
    """
    tokens, experts = choice_TE.shape

    def by_comparing(choice_TE):
        one, other = choice_TE[:, :, None], choice_TE[:, None, :]
        lower = jnp.arange(experts) < jnp.arange(experts)[:, None]
        place_TE = jnp.sum((other > one) | ((other == one) & lower), axis=2, dtype=jnp.int32)
        is_kth_TKE = place_TE[:, None, :] == jnp.arange(count, dtype=jnp.int32)[:, None]
        return jnp.sum(jnp.where(is_kth_TKE, jnp.arange(experts, dtype=jnp.int32), 0), axis=2)

    by_sorting = lambda choice_TE: jax.lax.top_k(choice_TE, count)[1]  # noqa: E731
    if tokens > _FEW:
        return by_sorting(choice_TE)
    return jax.lax.platform_dependent(choice_TE, cuda=by_comparing, default=by_sorting)


def limit_to_groups(config: ModelConfig, choice_TE: Float[Array, "T E"], *, best: int) -> Float[Array, "T E"]:
    """Set to -inf all experts outside the ``topk_group`` groups whose ``best`` highest members sum highest."""
    if config.n_group == config.topk_group:
        return choice_TE
    grouped = choice_TE.reshape(choice_TE.shape[0], config.n_group, -1)
    score_TG = jnp.sum(jax.lax.top_k(grouped, best)[0], axis=-1)
    kept_TG = jnp.any(jax.lax.top_k(score_TG, config.topk_group)[1][:, :, None] == jnp.arange(config.n_group), axis=1)
    return jnp.where(kept_TG[:, :, None], grouped, -jnp.inf).reshape(choice_TE.shape)


def router_stats(
    config: ModelConfig,
    experts_BSK: Int[Array, "B S K"],
    scores_BSE: Float[Array, "B S E"],
    segment_ids_BS: Int[Array, "B S"],
    rules: ShardingRules = ShardingRules(),
    devices: int = 1,
) -> RouterStats:
    """Load of each expert, and the balance loss ``Σ_i f_i P_i`` of each sequence, summed over the sequences.

    ``f_i = E / (K T) · #{t : i chosen}``, ``P_i = mean_t s'_{i,t}`` over the T tokens of a sequence. V3 (equations
    17–20) counts the top K of the raw affinities, without bias and groups, and normalises ``s' = s / Σ s``; V1 and V2
    count the experts chosen. A sequence is a segment of a packed row, a run of one id; segment 0 is padding.

    It is summed token by token, ``Σ_t Σ_i s'_{i,t} f_i``: counts are added up along the row, exactly, and every token
    looks up its own sequence's. Sums scattered into sequences would collide on a GPU, in another order every time.

    devices: over 1, V2's losses over so many groups of neighbouring experts as well (V2 section 2.2.3):
    ``Σ_d f'_d P'_d`` with ``f'_d`` the mean of the group's ``f_i`` and ``P'_d`` the sum of its ``P_i``, and
    ``Σ_d f''_d P'_d`` with ``f''_d = D / (M T) · #{t : an expert of d chosen}``, a token going to M devices at most.
    """
    experts, top = config.n_routed_experts, config.num_experts_per_tok
    real_BS1 = (segment_ids_BS > 0)[:, :, None]
    chosen_BSE = _one_hot_sum(experts_BSK, experts) * real_BS1
    counted_BSE = chosen_BSE
    if config.topk_method == "noaux_tc":
        tokens, raw_BSE = ("batch", "sequence", None), jax.lax.stop_gradient(scores_BSE)
        best_BSK = per_device(lambda raw_BSE: jax.lax.top_k(raw_BSE, top)[1], rules, (raw_BSE,), (tokens,), tokens)
        counted_BSE = _one_hot_sum(best_BSK, experts) * real_BS1
    share_BSE = scores_BSE / (jnp.sum(scores_BSE, axis=-1, keepdims=True) + 1e-20) * real_BS1
    f_BSE, length_BS = over_runs(_sums_of_runs, counted_BSE, segment_ids_BS, rules)
    scale_BS = experts / top / length_BS**2
    stats = RouterStats(
        load_E=jnp.sum(chosen_BSE, axis=(0, 1)),
        balance=jnp.sum(scale_BS * jnp.sum(share_BSE * f_BSE, axis=-1)),
        experts_BSK=experts_BSK,
        dropped=jnp.float32(0),
    )
    if devices == 1:
        return stats
    by_device = lambda x_BSE: x_BSE.reshape(*x_BSE.shape[:2], devices, device_size(config, devices))  # noqa: E731
    share_BSD = jnp.sum(by_device(share_BSE), axis=-1)
    sent_BSD, _ = over_runs(_sums_of_runs, jnp.max(by_device(chosen_BSE), axis=-1), segment_ids_BS, rules)
    sent_scale_BS = devices / most_devices(config, devices) / length_BS**2
    return dataclasses.replace(
        stats,
        device_balance=jnp.sum(scale_BS * jnp.sum(share_BSD * jnp.mean(by_device(f_BSE), axis=-1), axis=-1)),
        communication=jnp.sum(sent_scale_BS * jnp.sum(share_BSD * sent_BSD, axis=-1)),
    )


def device_size(config: ModelConfig, devices: int) -> int:
    """Experts of each of so many devices, neighbours together. ValueError where they cannot have as many each."""
    if (count := config.n_routed_experts) % devices:
        nearest = min((some for some in range(2, count + 1) if count % some == 0), key=lambda some: abs(some - devices))
        raise ValueError(
            f"balance_devices={devices} does not divide n_routed_experts={count}: each device has as many experts; the "
            f"nearest is {nearest}"
        )
    return count // devices


def most_devices(config: ModelConfig, devices: int) -> int:
    """To how many of so many devices a token goes at most: V2's M. Experts lie on them in order, so with as many groups
    as devices it is ``topk_group``; groups of two devices each reach twice as many."""
    most = min(devices, config.num_experts_per_tok)
    if config.topk_method == "greedy":
        return most
    size, group = device_size(config, devices), config.n_routed_experts // config.n_group
    first = range(0, config.n_routed_experts, group)
    return min(most, config.topk_group * max((i + group - 1) // size - i // size + 1 for i in first))


def count_sequences(segment_ids_BS: Int[Array, "B S"]) -> Float[Array, ""]:
    """How many segments a packed batch holds, padding left out: what ``balance`` is averaged over."""
    first_BS = segment_ids_BS != jnp.pad(segment_ids_BS, ((0, 0), (1, 0)))[:, :-1]
    return jnp.sum(first_BS & (segment_ids_BS > 0)).astype(jnp.float32)


def _sums_of_runs(x_BSE, ids_BS) -> tuple[Float[Array, "B S E"], Float[Array, "B S"]]:
    first_BS, end_BS = segment_bounds(ids_BS)
    before_BSE = jnp.pad(jnp.cumsum(x_BSE, axis=1), ((0, 0), (1, 0), (0, 0)))
    at = lambda index_BS: jnp.take_along_axis(before_BSE, index_BS[:, :, None], axis=1)  # noqa: E731
    return at(end_BS) - at(first_BS), (end_BS - first_BS).astype(jnp.float32)


def _one_hot_sum(indices_BSK: Int[Array, "B S K"], size: int) -> Float[Array, "B S E"]:
    return jnp.sum(indices_BSK[..., None] == jnp.arange(size), axis=2).astype(jnp.float32)


def segment_bounds(segment_ids_BS: Int[Array, "B S"]) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """For each token the position of its segment's first token, and the one behind its last."""
    position_S = jnp.arange(segment_ids_BS.shape[1], dtype=jnp.int32)
    changes = segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1]
    edge = lambda first, last: jnp.pad(changes, ((0, 0), (first, last)), constant_values=True)  # noqa: E731
    first_BS = jax.lax.cummax(jnp.where(edge(1, 0), position_S, 0), axis=1)
    end_BS = jax.lax.cummin(jnp.where(edge(0, 1), position_S + 1, position_S[-1] + 1), axis=1, reverse=True)
    return first_BS, end_BS
