"""One product with a weight, ``einsum(equation, x, w)``, and its gradients.

The weight comes as it is stored (see weights.py) and is brought to x's dtype inside. Its gradient leaves the product as
the float32 sum that it is and is rounded to the stored dtype alone: float32 masters lose nothing to bfloat16 compute.
"""

import functools
import math
import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_kernels import cpu, cpu_few, hopper_by_head, hopper_few
from deepseek_kernels.fp8_matmul import fp8_matmul
from deepseek_kernels.fp8_on_hopper import facts as fp8_facts
from deepseek_kernels.integers import in_integers
from deepseek_kernels.registry import choose
from deepseek_kernels.target import Target, devices
from deepseek_kernels.weights import (
    Columns,
    Weight,
    as_it_lies,
    block_scaled,
    stack_and_layer,
    stored_gradient,
)


def product(
    equation: str,
    x: Float[Array, "..."],
    w: Weight,
    *,
    dtype: Any = None,
    precision: Any = None,
    target: Target | None = None,
    implementation: str = "auto",
    fp8: str = "auto",
) -> Float[Array, "..."]:
    """``einsum(equation, x, w)`` in x's dtype with float32 sums, returned in ``dtype``, by default x's.

    ``"bsd,dhn->bshn"``, ``"bshv,hvd->bsd"``, ``"...d,df->...f"``, ``"bshn,chn->bshc"``: every letter of one operand
    alone stands in the result, none twice in one place; ``...`` stands for x's first axes.

    Args:
      w: an array of any dtype, a BlockScaled, an InStack or Columns. The first and stacks of the first have gradients.
      precision: of this product and of its gradients', as in ``jnp.einsum``.
      implementation: ``hopper`` and ``c_few``, kernels for few rows; ``hopper_by_head``, one where each head has a
        matrix; ``dot``; ``c``, a dot with the weight's gradient by a kernel.
      fp8: of a product with a matrix in FP8 or integers, in x's dtype and without a precision, see ``fp8_matmul``.

    Raises:
      ValueError: an equation that is not of this kind or does not fit the shapes, or an implementation that cannot run.
    """
    target, form, scaled = target or Target.here(), _parse(equation, x.shape, tuple(w.shape)), block_scaled(w)
    dtype = None if dtype is None else jnp.dtype(dtype)
    facts: dict[str, Any] = {"devices": devices()}
    as_x = precision is None and dtype in (None, x.dtype)
    if form.plain and as_x and as_it_lies(w, x.dtype):
        sizes = [math.prod(part) for part in (x.shape[: len(form.rows)], w.shape[: len(form.summed)], w.shape)]
        facts |= {"rows": sizes[0], "widths": (sizes[1], sizes[2] // max(sizes[1], 1))}
    elif form.by_head and as_x and as_it_lies(whole := _whole(w), x.dtype):
        sizes = math.prod(x.shape[: len(form.rows) - 1]), x.shape[-1], w.shape[form.w.index(form.new)]
        facts |= {"rows": sizes[0], "head_widths": sizes[1:], "columns": (_first(w), whole.shape[-1])}
    stored = jnp.dtype(getattr(w, "dtype", x.dtype))
    if form.one_matrix and (form.plain or form.transposed) and as_x and as_it_lies(w, stored):
        sizes = [math.prod(x.shape[: len(form.rows)]), math.prod(x.shape[len(form.rows) :])]
        facts["lying"] = sizes[0], (sizes[1], math.prod(w.shape) // max(sizes[1], 1)), stored
    in_fp8 = scaled is not None and form.plain and as_x and len(form.summed) == scaled.groups[0][0]
    facts["weight"] = None if in_fp8 else w  # a copy of it is said, once
    name = choose("product", target, x.dtype, implementation=implementation, **facts).name
    if in_fp8:
        rows = x.shape[: len(form.rows)]
        choice = choose("fp8_matmul", target, x.dtype, implementation=fp8, rows=math.prod(rows), **fp8_facts(w))
        if choice.name != "dequantised" or (in_integers(scaled) and devices() == 1):
            y = fp8_matmul(x.reshape(*rows, -1), w, target=target, implementation=choice.name)
            return y.reshape(*rows, *w.shape[len(form.summed) :])
    options = form, dtype, precision, name, target.cores
    alone = form.one_matrix and form.rows and math.prod(x.shape[: len(form.rows)]) == 1
    if alone and (name, target.platform, devices()) == ("dot", "cuda", 1):
        # Of a single row XLA:GPU makes no product of matrices: it may write a float32 copy of this one first.
        of_eight: Any = _product(jnp.pad(x, ((0, 7), *[(0, 0)] * (x.ndim - 1))), w, *options)
        return of_eight[:1]
    return _product(x, w, *options)


def weight_gradient(
    x: Float[Array, "*B D"],
    dy: Float[Array, "*B F"],
    *,
    precision: Any = None,
    target: Target | None = None,
    implementation: str = "auto",
) -> Float[Array, "D F"]:
    """``Σ xᵀ dy`` over all rows, in float32: the gradient of a matrix that they went through.

    The same as autodiff's, which writes ``(dyᵀ x)ᵀ``: with two or more row axes XLA:CPU then transposes ``dy`` and
    multiplies at 40 % of its speed. Float32 on a CPU takes the C kernel, which transposes nothing.

    Raises:
      ValueError: rows that do not agree, or an implementation that cannot run.
    """
    if x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(f"x {x.shape} and dy {dy.shape}: expected (…, D) and (…, F) with the same rows")
    dtype = jnp.promote_types(x.dtype, dy.dtype)
    facts = {"implementation": implementation, "devices": devices()}
    name = choose("product", target or Target.here(), dtype, **facts).name
    return _weight_gradient(x, dy, precision, name)


def _weight_gradient(x, dy, precision, name, dtype=jnp.float32, rows=None):
    if name == "c":
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        return cpu.call("grouped_dw", [(1, x.shape[1], dy.shape[1])], x, dy, jnp.array([len(x)], jnp.int32))[0][0]
    rows = tuple(range(x.ndim - 1 if rows is None else rows))
    return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), precision=precision, preferred_element_type=dtype)


class _Form(NamedTuple):
    """The letters of x, w and the result, and of w those that are summed and those that are new."""

    x: str
    w: str
    out: str
    summed: str
    new: str

    @property
    def rows(self) -> str:
        return self.x[: len(self.x) - len(self.summed)]

    @property
    def one_matrix(self) -> bool:
        """x's last letters are summed, the result's last are new, and both lie together in w, in either order."""
        return self.x == self.rows + self.summed and self.out == self.rows + self.new

    @property
    def plain(self) -> bool:
        return self.one_matrix and self.w == self.summed + self.new

    @property
    def transposed(self) -> bool:
        return self.one_matrix and self.w == self.new + self.summed

    @property
    def by_head(self) -> bool:
        """x's last letter but one stands in all three, in w's middle: a matrix, or its transpose, for each head."""
        x, w, out = self.x[-2:], self.w, self.out[-2:]
        same = len(w) == 3 and x[:1] == w[1] == out[:1] and self.x[:-2] == self.out[:-2] and len(self.new) == 1
        return same and x[1:] == self.summed and out[1:] == self.new


def _parse(equation: str, x_shape: tuple[int, ...], w_shape: tuple[int, ...]) -> _Form:
    where = f"product {equation!r} of x {x_shape} and w {w_shape}"
    operands, arrow, out = equation.replace(" ", "").partition("->")
    x, comma, w = operands.partition(",")
    if not arrow or not comma:
        raise ValueError(f"{where}: expected 'x letters,w letters->letters'")
    if x.startswith("...") and out.startswith("..."):
        spare = [letter for letter in string.ascii_uppercase if letter not in x + w + out]
        first = "".join(spare[: max(0, len(x_shape) - len(x) + 3)])
        x, out = first + x[3:], first + out[3:]
    if (len(x), len(w)) != (len(x_shape), len(w_shape)) or not (x + w + out).isalpha():
        raise ValueError(f"{where}: expected one letter for each axis")
    if any(len(set(letters)) < len(letters) for letters in (x, w, out)):
        raise ValueError(f"{where}: a letter stands twice in one place")
    if (set(x) ^ set(w)) - set(out) or set(out) - set(x + w):
        raise ValueError(f"{where}: the result must have every letter of one operand alone, and no other than theirs")
    sizes = dict(zip(x, x_shape, strict=True))
    if any(sizes.get(letter, size) != size for letter, size in zip(w, w_shape, strict=True)):
        raise ValueError(f"{where}: a letter has two sizes")
    summed = "".join(letter for letter in w if letter in x and letter not in out)
    return _Form(x, w, out, summed, "".join(letter for letter in w if letter not in x))


# On a mesh axes stay apart: merged, an axis split by the mesh behind one that is not would be gathered.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _product(x, w, form, dtype, precision, name, cores):
    if name == "hopper_by_head":
        stack, layer = stack_and_layer(_whole(w))
        columns, transposed = (_first(w), _first(w) + w.shape[-1]), form.w[2] == form.summed
        x_THD = x.reshape(-1, *x.shape[-2:])
        y = hopper_by_head.product_by_head(x_THD, stack, layer, columns, transposed=transposed, cores=cores)
        return y.reshape(*x.shape[:-1], -1)
    if name == "hopper":
        rows, (stack, layer) = x.shape[: len(form.rows)], stack_and_layer(w)
        x = x.reshape(math.prod(rows), -1)
        y = hopper_few.dense_product(x, stack.reshape(len(stack), x.shape[1], -1), layer, cores=cores)
        return y.reshape(*rows, *w.shape[len(form.summed) :])
    if name == "c_few":
        rows, (stack, layer) = x.shape[: len(form.rows)], stack_and_layer(w)
        x, across = x.reshape(math.prod(rows), -1), form.transposed
        widths = (-1, x.shape[1]) if across else (x.shape[1], -1)
        y = cpu_few.product(x, stack.reshape(len(stack), *widths), layer, across=across)
        return y.reshape(*rows, *(size for letter, size in zip(form.w, w.shape, strict=True) if letter in form.new))
    wide = None if dtype is None else jnp.promote_types(x.dtype, dtype)
    values = w.astype(x.dtype)
    if form.plain and devices() > 1:
        sides = tuple(range(len(form.rows), x.ndim)), tuple(range(len(form.summed)))
        y = jax.lax.dot_general(x, values, (sides, ((), ())), precision=precision, preferred_element_type=wide)
    elif form.plain:
        rows = x.shape[: len(form.rows)]
        x, matrix = x.reshape(*rows, -1), _matrix(values, len(form.summed))
        y = jax.lax.dot_general(
            x, matrix, (((x.ndim - 1,), (0,)), ((), ())), precision=precision, preferred_element_type=wide
        ).reshape(*rows, *values.shape[len(form.summed) :])
    else:
        y = jnp.einsum(f"{form.x},{form.w}->{form.out}", x, values, precision=precision, preferred_element_type=wide)
    return y if dtype is None else y.astype(dtype)


def _whole(w: Weight) -> Any:
    return w.weight if isinstance(w, Columns) else w


def _first(w: Weight) -> int:
    return w.start if isinstance(w, Columns) else 0


def _forward(x, w, form, dtype, precision, name, cores):
    return _product(x, w, form, dtype, precision, name, cores), (x, w)


def _backward(form, dtype, precision, name, cores, residuals, dy):
    x, w = residuals
    dy, values = dy.astype(x.dtype), w.astype(x.dtype)
    rows = x.shape[: len(form.rows)]
    if form.plain and devices() > 1:
        sides = tuple(range(len(form.rows), dy.ndim)), tuple(range(len(form.summed), values.ndim))
        dx = jax.lax.dot_general(dy, values, (sides, ((), ())), precision=precision)
    elif form.plain:
        flat, matrix = dy.reshape(*rows, -1), _matrix(values, len(form.summed))
        dx = jax.lax.dot_general(flat, matrix, (((flat.ndim - 1,), (1,)), ((), ())), precision=precision)
        dx = dx.reshape(x.shape)
    else:
        dx = jnp.einsum(f"{form.out},{form.w}->{form.x}", dy, values, precision=precision)

    # Rounded by the product itself: behind it, the devices of a mesh would add their products up in float32.
    kept = x.dtype if getattr(w, "dtype", None) == x.dtype else jnp.float32

    def gradient():
        if not form.plain and not form.transposed:
            return jnp.einsum(f"{form.x},{form.out}->{form.w}", x, dy, precision=precision, preferred_element_type=kept)
        x_rows, dy_rows = (x, dy) if devices() > 1 else (x.reshape(*rows, -1), dy.reshape(*rows, -1))
        first, second = (x_rows, dy_rows) if form.plain else (dy_rows, x_rows)
        return _weight_gradient(first, second, precision, name, kept, len(rows)).reshape(w.shape)

    return dx, stored_gradient(w, gradient)


def _matrix(values, summed):
    return values.reshape(math.prod(values.shape[:summed]), -1)


_product.defvjp(_forward, _backward)
