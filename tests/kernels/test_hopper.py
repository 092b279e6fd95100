"""The Hopper kernels against the definition: on such a GPU with ``TEST_ON=cuda``, else in Mosaic GPU's interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_kernels import (
    Columns,
    InStack,
    Target,
    grouped_matmul,
    hopper,
    hopper_by_head,
    hopper_few,
    hopper_gate,
    product,
    routed_experts,
)
from deepseek_kernels.norm import rms_norm
from deepseek_kernels.router_hopper import scores_and_best

TARGET = Target("cuda", "9.0", 0 if jax.default_backend() == "gpu" else 2)  # two blocks in the interpreter


@functools.cache
def compiled(aligned):
    def run(x, w, sizes, dy):
        matmul = functools.partial(grouped_matmul, aligned=aligned, target=TARGET, implementation="hopper")
        y, pullback = jax.vjp(lambda x, w: matmul(x, w, sizes), x, w)
        return y, *pullback(dy)

    return jax.jit(run)


def draw(rows, groups, width, hidden):
    rng = np.random.default_rng(0)
    shapes = ((rows, width), (groups, width, hidden), (rows, hidden))
    return [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]


# 320 and 448 are 2.5 and 3.5 tiles of rows of dw, 1.25 and 1.75 of columns, and more steps than are in flight.
@pytest.mark.parametrize(("width", "hidden"), [(256, 256), (320, 448), (448, 320)])
@pytest.mark.parametrize(
    ("rows", "sizes", "aligned"),
    [
        (640, [128, 0, 384, 128], 128),  # full
        (640, [0, 256, 0, 128], 128),  # rows of no group at the end
        (256, [0, 0, 0, 0], 256),
        (300, [1, 0, 200, 90], 1),  # spread over tiles first
    ],
)
def test_value_and_gradients_equal_the_definition(hopper_gpu, width, hidden, rows, sizes, aligned):
    x, w, dy = draw(rows, len(sizes), width, hidden)
    results = compiled(aligned)(x, w, np.array(sizes, np.int32), dy)
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw, ends = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape), np.cumsum(sizes)
    for e, size in enumerate(sizes):
        mine = slice(ends[e] - size, ends[e])
        y[mine], dx[mine], dw[e] = x[mine] @ w[e], dy[mine] @ w[e].T, x[mine].T @ dy[mine]
    for name, value, right in zip(("y", "dx", "dw"), results, (y, dx, dw), strict=True):
        assert value.dtype == jnp.bfloat16
        value = np.asarray(value, np.float64)
        # Summed in float32 and rounded once: half a unit in bfloat16's last place is at most 2⁻⁸ of a number.
        np.testing.assert_allclose(value, right, rtol=1.01 * 2**-8, atol=1e-4, err_msg=name)
        np.testing.assert_array_equal(value[right == 0], 0)


@pytest.mark.parametrize(("width", "hidden"), [(256, 256), (320, 448)])
def test_a_float32_master_gets_an_unrounded_gradient(hopper_gpu, width, hidden):
    sizes = [128, 0, 384, 128]
    x, w, dy = draw(640, len(sizes), width, hidden)
    y, dx, dw = compiled(128)(x, w.astype(jnp.float32), np.array(sizes, np.int32), dy)
    rounded = compiled(128)(x, w, np.array(sizes, np.int32), dy)
    np.testing.assert_array_equal(y, rounded[0])
    np.testing.assert_array_equal(dx, rounded[1])
    assert dw.dtype == jnp.float32
    x, dy = (np.asarray(a, np.float64) for a in (x, dy))
    ends = np.cumsum(sizes)
    for e, size in enumerate(sizes):
        mine = slice(ends[e] - size, ends[e])
        # Sums of up to 384 products of size 1 in float32: bfloat16 would be off by 2⁻⁹ of about 20.
        np.testing.assert_allclose(dw[e], x[mine].T @ dy[mine], rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("block", "sizes", "rows"), [(16, [16, 0, 32, 16], 96), (32, [0, 64, 0, 32], 96), (16, [0] * 4, 32)]
)
def test_few_rows_read_a_layer_where_it_lies(hopper_gpu, block, sizes, rows):
    x, w, dy = draw(rows, len(sizes), 320, 448)
    matmul = functools.partial(grouped_matmul, aligned=block, target=TARGET, implementation="hopper")

    @jax.jit
    def run(x, stack, sizes, dy):
        y, pullback = jax.vjp(lambda x, stack: matmul(x, InStack(stack, jnp.int32(1)), sizes), x, stack)
        return y, *pullback(dy)

    y, dx, dstack = run(x, jnp.stack([0 * w, w, jnp.inf * w]), np.array(sizes, np.int32), dy)
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    start = 0
    for e, size in enumerate(sizes):
        mine = slice(start, start := start + size)
        np.testing.assert_allclose(np.asarray(y[mine], np.float64), x[mine] @ w[e], rtol=1.01 * 2**-8, atol=1e-4)
        np.testing.assert_allclose(np.asarray(dx[mine], np.float64), dy[mine] @ w[e].T, rtol=1.01 * 2**-8, atol=1e-4)
        right = x[mine].T @ dy[mine]
        np.testing.assert_allclose(np.asarray(dstack[1, e], np.float64), right, rtol=1.01 * 2**-8, atol=1e-4)
    assert not np.any(y[start:]) and not np.any(dx[start:])


@pytest.mark.parametrize("rows", [1, 20, 64, 100, 200])
def test_one_matrix_for_few_rows_is_split_over_its_sums(hopper_gpu, rows):
    """In three parts in the interpreter, of one and two steps; columns that end within a tile."""
    target = Target("cuda", "9.0", TARGET.cores and 12)
    x, w, _ = draw(rows, 3, 320, 448)
    run = functools.partial(product, "btd,dhf->bthf", target=target, implementation="hopper")
    y = jax.jit(run)(x[None], InStack(w.reshape(3, 320, 2, 224), jnp.int32(1)))
    assert y.shape == (1, rows, 2, 224) and y.dtype == jnp.bfloat16
    right = np.asarray(x, np.float64) @ np.asarray(w[1], np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64).reshape(right.shape), right, rtol=1.01 * 2**-8, atol=1e-4)
    np.testing.assert_array_equal(jax.jit(run)(x[None], w[1].reshape(320, 2, 224)), y)


@pytest.mark.parametrize("rows", [1, 8, 20, 64, 100, 200])
def test_each_head_has_a_matrix(hopper_gpu, rows):
    """Absorbed MLA's two products with the halves of ``kv_b``, read where they lie in a stack of layers."""
    rng, C, H, N, V = np.random.default_rng(0), 256, 3, 64, 128
    w = jnp.asarray(rng.standard_normal((C, H, N + V)), jnp.bfloat16)
    stack = InStack(jnp.stack([jnp.inf * w, w]), jnp.int32(1))
    halves = ("bshn,chn->bshc", Columns(stack, 0, N), N), ("bshc,chv->bshv", Columns(stack, N, N + V), C)
    for equation, half, width in halves:
        x = jnp.asarray(rng.standard_normal((rows, 1, H, width)), jnp.bfloat16)
        run = functools.partial(product, equation, target=TARGET, implementation="hopper_by_head")
        y = jax.jit(run)(x, half)
        whole = Columns(w, half.start, half.stop)
        right = np.einsum(equation, *(np.asarray(a, np.float64) for a in (x, whole.astype(jnp.bfloat16))))
        assert y.shape == right.shape and y.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(y, np.float64), right, rtol=1.01 * 2**-8, atol=1e-4)
        np.testing.assert_array_equal(jax.jit(run)(x, whole), y)


@pytest.mark.parametrize(
    ("tokens", "scoring", "dtype"), [(1, "softmax", "bfloat16"), (3, "sigmoid", "float32"), (71, "softmax", "float32")]
)
def test_a_router_scores_and_sorts_its_experts(hopper_gpu, tokens, scoring, dtype):
    """And its gradients; equal experts stay in order, the bias decides alone who is before whom."""
    rng, E, D = np.random.default_rng(0), 64, 256
    x = jnp.asarray(rng.standard_normal((tokens, D)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((D, E)) / 16, dtype).at[:, 40].set(0).at[:, 20].set(0)
    bias = jnp.asarray(rng.standard_normal(E), jnp.float32).at[40].set(0.5).at[20].set(0.5)
    weight = InStack(jnp.stack([jnp.nan * w, w]), jnp.int32(1))
    probe = jnp.asarray(rng.random((tokens, E)), jnp.float32)

    def run(x, w, bias):
        scores, best = scores_and_best(x, w, bias, scoring)
        return jnp.sum(scores * probe), (scores, best)

    def plain(x, w):
        logits = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32), precision="highest")
        scores = jax.nn.sigmoid(logits) if scoring == "sigmoid" else jax.nn.softmax(logits)
        return jnp.sum(scores * probe), scores

    both = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True, allow_int=True)
    (_, (scores, best)), (dx, dw) = jax.jit(both(run))(x, weight, bias)
    (_, right), expected = jax.jit(both(plain))(x, w)
    np.testing.assert_allclose(scores, right, rtol=1e-5)
    np.testing.assert_array_equal(best, np.argsort(-(np.asarray(scores) + bias), axis=1, kind="stable"))
    for found, gradient in zip((dx, dw.stack[1]), expected, strict=True):
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (found, gradient)), rtol=2**-7, atol=1e-5)
    np.testing.assert_array_equal(jax.jit(run)(x, w, None)[1][0], scores)


@pytest.mark.parametrize(("rows", "width", "dtype"), [(1, 128, "bfloat16"), (3, 2048, "float32")])
def test_a_norm_of_few_rows(hopper_gpu, rows, width, dtype):
    """And its gradients, with a gain of its own dtype out of a stack."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((rows, 1, width)), jnp.bfloat16) for _ in range(2))
    gain = jnp.asarray(rng.standard_normal(width), dtype)

    def both(x, gain, implementation):
        norm = functools.partial(rms_norm, eps=1e-3, target=TARGET, implementation=implementation)
        y, pullback = jax.vjp(norm, x, gain)
        return y, *pullback(dy)

    both = jax.jit(both, static_argnums=2)
    y, dx, dgain = both(x, InStack(jnp.stack([jnp.nan * gain, gain]), jnp.int32(1)), "hopper")
    for found, right in zip((y, dx, dgain.stack[1]), both(x, gain, "plain"), strict=True):
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (found, right)), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(("tokens", "F"), [(1, 320), (7, 320), (50, 384)])
def test_experts_of_layers_equal_the_definition(hopper_gpu, tokens, F):
    """Of few rows, and of many, with the gate in their product; and their gradients. A choice of no expert adds
    nothing."""
    rng, E, K, D = np.random.default_rng(0), 4, 3, 256
    chosen = np.stack([rng.permutation(E)[:K] for _ in range(tokens)]).astype(np.int32)
    chosen[::3, 1], chosen[2::3, 0] = -1, E
    shapes = (tokens, D), (2, E, D, 2, F), (2, E, F, D), (tokens, D)
    x, wi, wo, dy = (jnp.asarray(rng.standard_normal(shape) / 16, jnp.bfloat16) for shape in shapes)
    weights = jnp.asarray(rng.random((tokens, K)), jnp.float32)

    def both(grouped, x, weights, wi, wo):
        def run(x, weights, wi, wo):
            matrices = (InStack(stack, jnp.int32(1)) for stack in (wi, wo))
            return routed_experts(x, weights, jnp.asarray(chosen), *matrices, target=TARGET, grouped=grouped)

        y, pullback = jax.vjp(run, x, weights, wi, wo)
        return y, *pullback(dy)

    (y, *found), (_, *right) = (
        jax.jit(functools.partial(both, how))(x, weights, wi, wo) for how in ("hopper", "blocks")
    )
    for value, expected in zip([y, *found], [by_choices(x, weights, chosen, wi[1], wo[1]), *right], strict=True):
        expected = np.asarray(expected, np.float64)
        assert np.linalg.norm(np.asarray(value, np.float64) - expected) <= 2**-8 * np.linalg.norm(expected)


def by_choices(x, weights, chosen, wi, wo):
    """The experts' sums in float64."""
    x, weights, wi, wo = (np.asarray(a, np.float64) for a in (x, weights, wi, wo))
    y = np.zeros(x.shape)
    for t, k in zip(*np.nonzero((chosen >= 0) & (chosen < len(wi))), strict=True):
        gate, up = (x[t] @ wi[chosen[t, k], :, i] for i in range(2))
        y[t] += weights[t, k] * (gate / (1 + np.exp(-gate)) * up) @ wo[chosen[t, k]]
    return y


@pytest.mark.parametrize("width", [256, 320])
def test_a_product_with_its_gate_equals_the_definition(hopper_gpu, width):
    """More steps than are in flight, tiles of no group; gates of all sizes, infinite exponentials among them."""
    rng, F, group = np.random.default_rng(0), 256, np.array([1, 3, 0, 0, 3], np.int32)
    x = jnp.asarray(rng.standard_normal((len(group) * hopper.ROWS, width)), jnp.bfloat16).at[::5].multiply(16)
    w = jnp.asarray(rng.standard_normal((3, width, 2 * F)), jnp.bfloat16)
    y = np.asarray(hopper.gated_product(x, w, group, cores=TARGET.cores), np.float64)
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    for i, e in enumerate(group):
        mine = slice(i * hopper.ROWS, (i + 1) * hopper.ROWS)
        if e == len(w):
            assert not np.any(y[mine])
            continue
        gate, up = np.split(x[mine] @ w[e], 2, axis=1)
        right = gate / (1 + np.exp(np.minimum(-gate, 700))) * up
        np.testing.assert_allclose(y[mine], right, rtol=1.01 * 2**-8, atol=1e-3)


def test_the_default_where_it_can_run():
    x, w, _ = draw(256, 2, 256, 320)
    sizes = jnp.array([128, 128], jnp.int32)
    by_default = functools.partial(grouped_matmul, aligned=128, target=TARGET)
    assert "dot_general" not in str(jax.make_jaxpr(by_default)(x, w, sizes))
    for width in (96, 192):
        assert "dot_general" in str(jax.make_jaxpr(by_default)(x[:, :width], w[:, :width], sizes))


def test_no_rows_at_all():
    x, w, dy = draw(0, 1, 256, 320)
    y, dx, dw = compiled(128)(x, w, jnp.zeros(1, jnp.int32), dy)
    assert y.shape == (0, 320) and dx.shape == (0, 256) and not np.any(dw)


@pytest.mark.parametrize(
    "kernel",
    [
        "product",
        "gated",
        "few",
        "dense",
        "by_head",
        "by_head_transposed",
        "transposed",
        "weight_gradient",
        "rounded_weight_gradient",
    ],
)
def test_kernels_are_lowered_for_cuda_without_a_gpu(kernel):
    """Any jax that the package allows takes them through Mosaic GPU's passes."""
    x, w, dy = draw(256, 2, 320, 448)
    groups, sizes = jnp.array([0, 1], jnp.int32), jnp.array([128, 128], jnp.int32)
    many = functools.partial(hopper.grouped_product, cores=0)
    dense = functools.partial(hopper_few.dense_product, cores=0)
    gradient = functools.partial(hopper.grouped_weight_gradient, cores=0)
    by_head = jax.jit(
        functools.partial(hopper_by_head.product_by_head, columns=(0, 128), cores=0), static_argnames="transposed"
    )
    heads = jnp.zeros((1, 3, 128), jnp.bfloat16), jnp.zeros((2, 128, 3, 192), jnp.bfloat16), jnp.int32(1)
    traced = {
        "by_head": by_head.trace(*heads, transposed=False),
        "by_head_transposed": by_head.trace(*heads, transposed=True),
        "product": jax.jit(many).trace(x, w, groups),
        "gated": jax.jit(functools.partial(hopper.gated_product, cores=0)).trace(x, w[:, :, :256], groups),
        "dense": jax.jit(dense).trace(x[:20], w, jnp.int32(1)),
        "few": jax.jit(functools.partial(hopper_few.grouped_product, cores=0)).trace(x[:32], w, groups),
        "transposed": jax.jit(functools.partial(many, transpose=True)).trace(dy, w, groups),
        "weight_gradient": jax.jit(gradient).trace(x, dy, sizes),
        "rounded_weight_gradient": jax.jit(functools.partial(gradient, dtype=jnp.bfloat16)).trace(x, dy, sizes),
    }[kernel]
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_what_it_cannot_take_is_named():
    x, w, _ = draw(128, 1, 256, 320)
    sizes = jnp.array([128], jnp.int32)
    hopper_matmul = functools.partial(grouped_matmul, implementation="hopper", target=TARGET)
    with pytest.raises(ValueError, match=r"implementation='hopper' of grouped_matmul cannot run.*not cuda 8\.0"):
        grouped_matmul(x, w, sizes, implementation="hopper", target=Target("cuda", "8.0"))
    for width in (96, 192, 250):
        with pytest.raises(ValueError, match=rf"multiples of 64, not \({width}, 320\)"):
            hopper_matmul(x[:, :width], w[:, :width], sizes)
    with pytest.raises(ValueError, match="it needs bfloat16, not float32"):
        hopper_matmul(x.astype(jnp.float32), w, sizes)


@pytest.mark.parametrize(("rows", "hidden"), [(64, 64), (192, 320)])
def test_the_gates_gradients_equal_the_definition(hopper_gpu, rows, hidden):
    """One tile, and more of them than are in flight; in float64."""
    rng = np.random.default_rng(0)
    gate_up, dh = rng.standard_normal((rows, 2, hidden)), rng.standard_normal((rows, hidden))
    weight = np.where(np.arange(rows) % 3, rng.standard_normal(rows), 0)
    operands = [jnp.asarray(a, jnp.bfloat16) for a in (gate_up, dh)]
    gate_up, dh = (np.asarray(a, np.float64) for a in operands)
    found, dweight = jax.jit(hopper_gate.gate_backward)(operands[0], jnp.asarray(weight, jnp.float32), operands[1])
    gate, up, s = gate_up[:, 0], gate_up[:, 1], 1 / (1 + np.exp(-gate_up[:, 0]))
    np.testing.assert_allclose(dweight, np.sum(dh * gate * s * up, axis=1), rtol=1e-5, atol=1e-5)
    dh = dh * np.asarray(weight, np.float32)[:, None]
    right = np.stack([dh * up * s * (1 + gate * (1 - s)), dh * gate * s], axis=1)
    np.testing.assert_allclose(np.asarray(found, np.float64), right, rtol=2**-8, atol=1e-6)
    assert not np.any(found[::3])
