"""Attention of every kind: MLA's over keys and values, MLA's over its cached entries, and grouped heads'.

Which keys a query sees is described (``Visible``), never drawn. Each function computes
``out[s] = Σ_t softmax_t(q[s]·k[t] · scale) v[t]`` over the visible t, in one of the registry's implementations; scores,
softmax and sums are float32, the result has the values' dtype, and a query that sees no key gets zeros.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_kernels import (
    attention_blockwise,
    attention_cpu,
    attention_cudnn,
    attention_hopper,
    attention_packed,
    attention_splash,
    cpu_few,
    decode_hopper,
    decode_tpu,
)
from deepseek_kernels.cached import Entries, FP8Entries, side_by_side
from deepseek_kernels.kept import kept
from deepseek_kernels.registry import choose
from deepseek_kernels.target import Target, devices
from deepseek_kernels.visible import Visible
from deepseek_kernels.weights import InStack, stack_and_layer


def mla_attention(
    q_BSHK: Float[Array, "B S H K"],
    kv_BTHW: Float[Array, "B T H W"],
    pe_BTR: Float[Array, "B T R"],
    visible: Visible,
    scale: float,
    *,
    target: Target | None = None,
    implementation: str = "auto",
) -> Float[Array, "B S H V"]:
    """MLA in training and prefill: a head's key is its own part beside the rotated part that all heads share.

    ``kv`` holds ``[k_nope | v]`` of each head, so with K = N + R its width is W = N + V. Differentiable in all three.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that cannot run on the target.
    """
    (B, S, H, K), T, R, W = q_BSHK.shape, kv_BTHW.shape[1], pe_BTR.shape[-1], kv_BTHW.shape[-1]
    if kv_BTHW.shape[:3] != (B, T, H) or pe_BTR.shape != (B, T, R) or not R <= K < R + W:
        raise ValueError(
            f"q {q_BSHK.shape}, kv {kv_BTHW.shape}, pe {pe_BTR.shape}: "
            "expected (B, S, H, N+R), (B, T, H, N+V), (B, T, R)"
        )
    visible.check(B, S, T)
    target = target or Target.here()
    name = _choose("mla_attention", (q_BSHK, kv_BTHW, pe_BTR), K, W - K + R, visible, target, implementation)
    if name == "c":
        out_BSHV: jax.Array = _c(q_BSHK, kv_BTHW, pe_BTR, visible, scale)
        return out_BSHV
    if name == "hopper":
        return attention_hopper.attend(q_BSHK, kv_BTHW, pe_BTR, visible, scale)
    nope_BTHN, v_BTHV = jnp.split(kv_BTHW, [K - R], axis=-1)
    # Through float32, which costs nothing, so that the gradient of what all heads share is summed in it.
    pe_BTHR = jnp.broadcast_to(pe_BTR.astype(jnp.float32)[:, :, None], (B, T, H, R)).astype(pe_BTR.dtype)
    k_BTHK = jnp.concatenate([nope_BTHN, pe_BTHR], axis=-1)
    return _attend(name, q_BSHK, k_BTHK, v_BTHV, visible, scale, target)


def gqa_attention(
    q_BSHN: Float[Array, "B S H N"],
    k_BTGN: Float[Array, "B T G N"],
    v_BTGV: Float[Array, "B T G V"],
    visible: Visible,
    scale: float,
    *,
    target: Target | None = None,
    implementation: str = "auto",
) -> Float[Array, "B S H V"]:
    """Grouped-query attention: query head h reads head ``h // (H/G)`` of keys and values. Differentiable in q, k and v.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that cannot run on the target.
    """
    (B, S, H, N), (T, G, V) = q_BSHN.shape, v_BTGV.shape[1:]
    if k_BTGN.shape != (B, T, G, N) or v_BTGV.shape[0] != B or H % G:
        raise ValueError(
            f"q {q_BSHN.shape}, k {k_BTGN.shape}, v {v_BTGV.shape}: expected (B, S, H, N), (B, T, G, N), (B, T, G, V) "
            "with H a multiple of G"
        )
    visible.check(B, S, T)
    target = target or Target.here()
    name = _choose("gqa_attention", (q_BSHN, k_BTGN, v_BTGV), N, V, visible, target, implementation, H // G)
    if name == "hopper":
        return attention_hopper.grouped(q_BSHN, k_BTGN, v_BTGV, visible, scale)
    return _attend(name, q_BSHN, k_BTGN, v_BTGV, visible, scale, target)


def mla_decode(
    q_BSHW: Float[Array, "B S H W"],
    cache: Entries,
    visible: Visible,
    scale: float,
    *,
    values: int,
    target: Target | None = None,
    implementation: str = "auto",
) -> Float[Array, "B S H C"]:
    """Absorbed MLA: every head attends to the cached entries ``[c | k_rope]`` themselves, whose first C = ``values``
    numbers are the values too: ``out[s] = Σ_t softmax_t(q[s]·entry[t] · scale) entry[t, :C]`` over the visible t.

    cache: entries (B, T, W); or, where ``visible.pages_BJ`` is given, pages (P, N, W) of N tokens, of which row b has
    ``pages[b]``, and T is J·N. Either as an array of q's dtype, on a CPU of bfloat16 too, as ``FP8Entries``, or as a
    layer of a stack of those (``InStack``), which the Hopper and TPU kernels read where it lies. ``write_entries`` puts
    new tokens into each. ``visible.lengths_B`` and ``q_positions_BS`` say how many tokens a row has and where its S
    queries stand among them: one, or several of which each sees those before it, as drafts that are verified do. What
    stands behind a row's length is multiplied by zero, so all pages must hold finite numbers, as zeros are; which pages
    the table names there does not matter.

    All of this is taken by every implementation, but for what its ``refuses`` says: on Hopper pages of a multiple of 64
    tokens, on TPUs of 64 or a multiple of 128. The portable ones gather pages and dequantise, a copy that the log
    names; there arrays have a gradient, in kernels nothing has.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that cannot run on the target.
    """
    (B, _, _, W), rows, pages_BJ = q_BSHW.shape, cache.shape[0], visible.pages_BJ
    fp8 = isinstance(cache.stack if isinstance(cache, InStack) else cache, FP8Entries)
    latent = (cache.stack if isinstance(cache, InStack) else cache).values.shape[-1] if fp8 else values
    if cache.shape[-1] != W or (pages_BJ is None and rows != B) or not 0 < values <= W or latent != values:
        raise ValueError(
            f"q {q_BSHW.shape}, cache {cache.shape}{f' with {latent} in FP8' if fp8 else ''}, values={values}: "
            f"expected (B, S, H, W), {'(B, T, W)' if pages_BJ is None else '(P, N, W)'}, {'those' if fp8 else '1…W'}"
        )
    target, facts = target or Target.here(), _facts_of_cache(q_BSHW, cache, visible)
    other = fp8 or (target.platform == "cpu" and cache.dtype == jnp.bfloat16)
    name = _named("mla_decode", (q_BSHW,) if other else (q_BSHW, cache), W, values, target, implementation, **facts)
    if name == "c":
        return _c_paged(q_BSHW, cache, visible, scale, groups=1, values=values, first=0)
    if name in ("hopper", "tpu"):
        if not isinstance(cache, InStack):
            cache = InStack(jax.tree.map(lambda leaf: leaf[None], cache), 0)
        operands = q_BSHW, cache.stack, cache.layer, visible, scale
        if name == "tpu":
            return decode_tpu.attend(*operands, values=values, chip=target.chip)
        return decode_hopper.attend(*operands, values=values, cores=target.cores)
    entry_BT1W = side_by_side(cache, pages_BJ, q_BSHW.dtype)[:, :, None]
    visible = dataclasses.replace(visible, pages_BJ=None)
    # The rotated keys ride along as values and are dropped: cheaper than a copy of the cache without them.
    return _attend(name, q_BSHW, entry_BT1W, entry_BT1W, visible, scale, target)[..., :values]


def gqa_decode(
    q_BSHN: Float[Array, "B S H N"],
    cache: jax.Array | InStack,
    visible: Visible,
    scale: float,
    *,
    groups: int,
    target: Target | None = None,
    implementation: str = "auto",
) -> Float[Array, "B S H N"]:
    """Grouped-query attention over what a cache keeps of each token, ``[k of G groups | v of G groups]``: an array
    (B, T, 2·G·N), pages with ``visible.pages_BJ``, or a layer of a stack of either, as ``mla_decode`` has them.

    implementation: ``c``, which reads it where it lies; ``rows`` or one of ``gqa_attention``'s, of a copy.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that cannot run on the target.
    """
    H, N = q_BSHN.shape[2:]
    if cache.shape[-1] != 2 * groups * N or H % groups:
        raise ValueError(f"q {q_BSHN.shape}, cache {cache.shape}: expected entries of 2·{groups}·N, H a multiple of it")
    target, facts = target or Target.here(), _facts_of_cache(q_BSHN, cache, visible)
    named = implementation if implementation in ("auto", "c") else "rows"
    name = choose("gqa_decode", target, q_BSHN.dtype, implementation=named, key_width=N, value_width=N, **facts).name
    if name == "c" and cache.dtype in cpu_few.DTYPES:
        return _c_paged(q_BSHN, cache, visible, scale, groups=groups, values=N, first=groups * N)
    rows_BTW = side_by_side(cache, visible.pages_BJ, q_BSHN.dtype)
    k_BTGN, v_BTGN = jnp.moveaxis(rows_BTW.reshape(*rows_BTW.shape[:2], 2, groups, N), 2, 0)
    visible = dataclasses.replace(visible, pages_BJ=None)
    how = "auto" if implementation in ("c", "rows") else implementation
    return gqa_attention(q_BSHN, k_BTGN, v_BTGN, visible, scale, target=target, implementation=how)


def _facts_of_cache(q, cache, visible: Visible) -> dict[str, Any]:
    """Of queries over entries in rows or pages. ValueError where they do not fit."""
    (B, S), T, pages_BJ = q.shape[:2], cache.shape[1], visible.pages_BJ
    if pages_BJ is not None:
        if pages_BJ.ndim != 2 or len(pages_BJ) != B:
            raise ValueError(f"visible.pages_BJ {pages_BJ.shape}: expected ({B}, J)")
        T *= pages_BJ.shape[1]
    visible.check(B, S, T, paged=True)
    fp8 = isinstance(cache.stack if isinstance(cache, InStack) else cache, FP8Entries)
    page = 0 if pages_BJ is None else cache.shape[1]
    return {"queries": S, "keys": T, "by_column": visible.by_column, "page": page, "fp8": fp8, "devices": devices()}


def _c_paged(q, cache, visible: Visible, scale, **options: Any) -> Any:
    (B, S), (stack, layer) = q.shape[:2], stack_and_layer(cache)
    table_BJ = jnp.arange(B)[:, None] if visible.pages_BJ is None else visible.pages_BJ
    limits_BS = visible.limits(B, S, table_BJ.shape[1] * cache.shape[1])
    return cpu_few.attend(q, stack, layer, table_BJ, limits_BS, scale, **options)


def attention_reference(q_BSHK, k_BTGK, v_BTGV, visible, scale):
    """The definition, S × T scores and all, with autodiff's own gradient."""
    (B, S, H, K), (T, G, V) = q_BSHK.shape, v_BTGV.shape[1:]
    q_BSGMK = q_BSHK.reshape(B, S, G, H // G, K)
    scores = jnp.einsum("bsgmk,btgk->bgmst", q_BSGMK, k_BTGK, preferred_element_type=jnp.float32) * scale
    mask = visible.mask(B, S, T)[:, None, None]
    p = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1), 0)
    return jnp.einsum("bgmst,btgv->bsgmv", p, v_BTGV.astype(jnp.float32)).reshape(B, S, H, V).astype(v_BTGV.dtype)


def _choose(operation, operands, key_width, value_width, visible, target, implementation, shared_by=1) -> str:
    facts = {"queries": operands[0].shape[1], "keys": operands[1].shape[1]}
    facts |= {name: getattr(visible, name) for name in ("in_row_order", "in_segments", "in_columns", "in_runs")}
    facts |= {"shared_by": shared_by, "devices": devices()}
    return _named(operation, operands, key_width, value_width, target, implementation, **facts)


def _named(operation, operands, key_width, value_width, target, implementation, **facts: Any) -> str:
    dtypes = {operand.dtype for operand in operands}
    if len(dtypes) > 1:
        raise ValueError(f"{operation} of {', '.join(sorted(map(str, dtypes)))}: expected one dtype")
    facts |= {"key_width": key_width, "value_width": value_width}
    return choose(operation, target, dtypes.pop(), implementation=implementation, **facts).name


def _attend(name, q_BSHK, k_BTGK, v_BTGV, visible, scale, target) -> Any:
    if name == "c":
        return _c(q_BSHK, k_BTGK, v_BTGV, visible, scale)
    if name == "cudnn":
        if not visible.in_row_order:
            return attention_packed.packed(q_BSHK, k_BTGK, v_BTGV, visible, scale)
        return attention_cudnn.causal(q_BSHK, k_BTGK, v_BTGV, scale)
    if name == "splash":
        return attention_splash.attend(q_BSHK, k_BTGK, v_BTGV, visible, scale, chip=target.chip)
    if name == "blockwise":
        return attention_blockwise.attend(q_BSHK, k_BTGK, v_BTGV, visible, scale)
    assert name == "reference", name
    return attention_reference(q_BSHK, k_BTGK, v_BTGV, visible, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _c(q_BSHK, keys, rest, visible, scale) -> Any:
    """The C kernel: of MLA's kv and pe, or of grouped keys and values."""
    return _c_forward(q_BSHK, keys, rest, visible, scale)[0]


def _c_forward(q_BSHK, keys, rest, visible, scale):
    out_BSHV, log_sum_BSH = map(kept, attention_cpu.forward(q_BSHK, keys, rest, visible, scale))
    return out_BSHV, (q_BSHK, keys, rest, visible, out_BSHV, log_sum_BSH)


def _c_backward(scale, residuals, dout_BSHV):
    q_BSHK, keys, rest, visible, out_BSHV, log_sum_BSH = residuals
    gradients = attention_cpu.backward(q_BSHK, keys, rest, visible, scale, out_BSHV, log_sum_BSH, dout_BSHV)
    return *gradients, None


_c.defvjp(_c_forward, _c_backward)
