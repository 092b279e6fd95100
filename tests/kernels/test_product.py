"""``product`` against einsum in float64, in every form that the model has, with weights of every kind of storage."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_kernels import BlockScaled, Columns, InStack, Target, product, quantise, weight_gradient

SIZES = {"b": 2, "s": 3, "d": 8, "h": 4, "n": 5, "c": 6, "w": 7, "v": 5, "x": 2, "g": 4, "e": 3, "f": 6, "t": 9}
FORMS = [
    "bsd,df->bsf",
    "bsd,dhn->bshn",
    "bsd,dxgn->bsxgn",
    "bshv,hvd->bsd",  # two letters summed
    "bsd,wd->bsw",  # a tied head
    "bshn,chn->bshc",  # absorbed MLA: a matrix for each head
    "bshc,chv->bshv",
    "td,edgf->tegf",  # every expert on every token
    "tef,efd->ted",
    "d,df->f",
]


def draw(equation, seed=0):
    rng, (operands, out) = np.random.default_rng(seed), equation.split("->")
    shapes = ([SIZES[letter] for letter in letters] for letters in (*operands.split(","), out))
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def definition(equation, x, w, dy):
    """y, dx and dw in float64."""
    operands, out = equation.split("->")
    a, b = operands.split(",")
    x, w, dy = (np.asarray(value, np.float64) for value in (x, w, dy))
    return np.einsum(equation, x, w), np.einsum(f"{out},{b}->{a}", dy, w), np.einsum(f"{a},{out}->{b}", x, dy)


def run(equation, x, w, dy, **options):
    y, pullback = jax.vjp(lambda x, w: product(equation, x, w, **options), x, w)
    return y, *pullback(jnp.asarray(dy, y.dtype))


@pytest.mark.parametrize("implementation", ["c", "dot"])
@pytest.mark.parametrize("equation", FORMS)
def test_value_and_gradients_equal_einsum(equation, implementation):
    x, w, dy = draw(equation)
    for found, right in zip(
        run(equation, x, w, dy, implementation=implementation), definition(equation, x, w, dy), strict=True
    ):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("equation", ["bsd,df->bsf", "bsd,wd->bsw", "bshv,hvd->bsd"])
def test_a_single_row_of_a_gpu_is_one_of_eight(equation):
    x, w, dy = draw(equation)
    x, dy = x[:1, :1], dy[:1, :1]
    found = run(equation, x, w, dy, target=Target("cuda", "8.0"))
    for one, right in zip(found, definition(equation, x, w, dy), strict=True):
        np.testing.assert_allclose(one, right, rtol=0, atol=1e-5)
    assert "f32[8," in str(jax.make_jaxpr(lambda x: product(equation, x, w, target=Target("cuda", "8.0")))(x))


def test_dots_stand_for_the_first_axes():
    x, w, dy = draw("bsd,df->bsf")
    for found, right in zip(run("...d,df->...f", x, w, dy), run("bsd,df->bsf", x, w, dy), strict=True):
        np.testing.assert_array_equal(found, right)
    np.testing.assert_array_equal(product("...d,df->...f", x[0, 0], w), product("d,df->f", x[0, 0], w))


@pytest.mark.parametrize("equation", ["bsd,df->bsf", "bshn,chn->bshc"])
def test_a_float32_master_gets_an_unrounded_gradient(equation):
    x, w, dy = draw(equation)
    half = [jnp.asarray(a, jnp.bfloat16) for a in (x, w, dy)]
    y, dx, dw = run(equation, half[0], w, half[2])
    assert y.dtype == dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    right = definition(equation, *half)
    for found, wanted in ((y, right[0]), (dx, right[1])):
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=1.01 * 2**-8, atol=1e-5)
    np.testing.assert_allclose(dw, right[2], rtol=0, atol=1e-5)
    assert run(equation, *half)[2].dtype == jnp.bfloat16  # as stored


def test_bfloat16_sums_in_float32():
    """4096 ones: sums in bfloat16 would stay at 256."""
    x, w = jnp.ones((1, 4096), jnp.bfloat16), jnp.ones((4096, 1), jnp.float32)
    assert product("td,df->tf", x, w)[0, 0] == 4096


def test_logits_in_float32_and_their_gradients_in_the_compute_dtype():
    x, w, dy = draw("bsd,df->bsf")
    y, dx, dw = run("bsd,df->bsf", jnp.asarray(x, jnp.bfloat16), w, dy, dtype=jnp.float32)
    assert y.dtype == jnp.float32 and dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    text = str(jax.make_jaxpr(lambda *a: run("bsd,df->bsf", *a, dtype=jnp.float32))(x.astype(jnp.bfloat16), w, dy))
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3 and "f32[2,3,8] " not in text  # no operand was widened


def test_precision_is_that_of_all_three_products():
    x, w, dy = draw("bsd,df->bsf")
    text = str(jax.make_jaxpr(lambda *a: run("bsd,df->bsf", *a, precision="highest", implementation="dot"))(x, w, dy))
    assert text.count("Precision.HIGHEST") >= 3


@pytest.mark.parametrize("equation", ["bsd,dhn->bshn", "bshn,chn->bshc"])
def test_weights_are_taken_as_they_are_stored(equation):
    x, w, dy = draw(equation)
    y, dx, dw = run(equation, x, w, dy)
    stack = jnp.stack([0 * w, jnp.asarray(w), 2 * w])
    found, dx_found, dstack = jax.jit(lambda *a: run(equation, *a))(x, InStack(stack, jnp.int32(1)), dy)
    for mine, right in ((found, y), (dx_found, dx), (dstack.stack[1], dw)):
        np.testing.assert_allclose(mine, right, rtol=0, atol=1e-5)
    assert not np.any(dstack.stack[0]) and not np.any(dstack.stack[2])

    matrix = jnp.asarray(w).reshape(len(w), -1)
    values, scales = quantise(matrix)
    scaled = BlockScaled(values.reshape(w.shape), scales, ((1, 128), (2, 128)))
    right = run(equation, x, scaled.astype(jnp.float32), dy)[:2]
    for weight in (scaled, InStack(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), scaled), 1)):
        found, pullback = jax.vjp(lambda x, weight=weight: product(equation, x, weight), x)
        np.testing.assert_allclose(found, right[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(pullback(jnp.asarray(dy))[0], right[1], rtol=0, atol=1e-5)


def test_columns_of_a_weight():
    equation = "bshn,chn->bshc"
    x, w, dy = draw(equation)
    wide = jnp.pad(w, ((0, 0), (0, 0), (2, 3)), constant_values=9.0)
    found, dx, dwide = run(equation, x, Columns(wide, 2, 7), dy)
    for mine, right in zip((found, dx, dwide.weight[..., 2:7]), run(equation, x, w, dy), strict=True):
        np.testing.assert_allclose(mine, right, rtol=0, atol=1e-6)
    assert not np.any(dwide.weight[..., :2]) and not np.any(dwide.weight[..., 7:])


@pytest.mark.parametrize(
    ("equation", "said"),
    [
        ("bsd,df", "expected 'x letters,w letters->letters'"),
        ("bs,df->bsf", "one letter for each axis"),
        ("bsd,dd->bs", "stands twice"),
        ("bsd,df->bs", "every letter of one operand alone"),
        ("bsd,df->bsfq", "every letter of one operand alone"),
        ("bsf,dq->bsfdq", None),
        ("dsb,df->sbf", "a letter has two sizes"),
    ],
)
def test_equations_that_do_not_fit_are_named(equation, said):
    x, w = jnp.zeros((2, 3, 8)), jnp.zeros((8, 6))
    if said is None:
        assert product(equation, x, w).shape == (2, 3, 8, 8, 6)
        return
    with pytest.raises(ValueError, match=rf"product '{equation}' of x \(2, 3, 8\) and w \(8, 6\): .*{said}"):
        product(equation, x, w)


def test_weight_gradient_is_float32_and_refuses_other_rows():
    x, _, dy = draw("bsd,df->bsf")
    right = np.einsum("bsd,bsf->df", x, dy)
    for implementation in ("c", "dot"):
        np.testing.assert_allclose(weight_gradient(x, dy, implementation=implementation), right, atol=1e-5)
    half = weight_gradient(jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16))
    assert half.dtype == jnp.float32
    with pytest.raises(ValueError, match="the same rows"):
        inspect.unwrap(weight_gradient)(x, dy[1:])


def test_a_program_for_an_accelerator_has_no_cpu_kernel():
    x, w, dy = draw("bsd,df->bsf")
    for target in (Target("cuda", "9.0"), Target("tpu", "TPU v5p")):
        text = str(jax.make_jaxpr(lambda *a, target=target: run("bsd,df->bsf", *a, target=target))(x, w, dy))
        assert "ffi_call" not in text
    assert "ffi_call" in str(jax.make_jaxpr(lambda *a: run("bsd,df->bsf", *a, target=Target("cpu")))(x, w, dy))
