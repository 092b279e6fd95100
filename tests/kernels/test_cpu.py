"""The C kernels as every kind of processor compiles them, against numpy in float64; ARM's under an emulator.

A small program around ``cpu.c`` is built once per kind and called with one handler's operands. What XLA calls is tested
in ``test_grouped_matmul.py``, ``test_routed_experts.py`` and ``test_cpu_attention.py``, for this processor alone.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_kernels import cpu

ARM = "aarch64-linux-gnu-gcc", "-static"
KINDS = {"this": ("gcc", "-march=native"), "plain": ("gcc",), "arm": ARM}
if platform.machine() == "x86_64":
    KINDS |= {"avx2": ("gcc", "-mavx2", "-mfma"), "avx512": ("gcc", "-march=skylake-avx512")}
EXPECTED = {"plain": "4 6", "avx2": "8 6", "avx512": "16 12", "arm": "4 12"}


def runs(kind: str) -> bool:
    if kind == "arm":
        return bool(shutil.which(ARM[0]) and shutil.which("qemu-aarch64"))
    flags = Path("/proc/cpuinfo").read_text().split()
    return {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512vl"}}.get(kind, set()) <= set(flags)


@pytest.fixture(scope="module", params=KINDS)
def kernels(request, tmp_path_factory):
    """A function that calls a handler of one kind's program."""
    kind = request.param
    if not runs(kind):
        pytest.skip(f"{kind}: neither this processor nor a compiler and emulator for it")
    program = str(tmp_path_factory.mktemp("cpu") / kind)
    include = f"-I{jax.ffi.include_dir()}", f"-I{cpu.SOURCE.parent}"
    driver = str(Path(__file__).with_name("cpu_driver.c"))
    warnings = "-Wall", "-Wextra", "-Werror"
    subprocess.run([*KINDS[kind], "-O1", "-std=gnu11", *warnings, *include, "-o", program, driver, "-lm"], check=True)
    command = ["qemu-aarch64", program] if kind == "arm" else [program]
    tile = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert tile == EXPECTED.get(kind, tile)

    def call(target, shapes, *operands):
        said = [np.int64(len(operands)).tobytes()]
        for operand in operands:
            said += [np.asarray([operand.ndim, *operand.shape], np.int64).tobytes(), operand.tobytes()]
        said += [np.asarray([len(shapes), *(n for shape in shapes for n in (len(shape), *shape))], np.int64).tobytes()]
        done = subprocess.run([*command, target], input=b"".join(said), check=True, capture_output=True)
        ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])
        assert len(done.stdout) == 4 * ends[-1]
        found = np.split(np.frombuffer(done.stdout, np.float32), ends[:-1])
        return [part.reshape(shape) for part, shape in zip(found, shapes, strict=True)]

    return call


def close(found, right):
    # Measured below 5e-7 of the norm.
    assert np.linalg.norm(found - right) <= 2e-6 * np.linalg.norm(right)


@pytest.mark.parametrize("width, hidden", [(64, 64), (33, 45), (1, 3)])
def test_grouped_products(kernels, width, hidden):
    """Groups of no rows, of one, few, of many; widths of whole tiles and not; rows of no group give zero."""
    rng = np.random.default_rng(0)
    sizes = np.asarray([0, 1, 14, 0, 203], np.int32)
    x, dy = (rng.standard_normal((sizes.sum() + 3, n)).astype(np.float32) for n in (width, hidden))
    w = rng.standard_normal((5, width, hidden)).astype(np.float32)
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for e, end in enumerate(np.cumsum(sizes)):
        mine = slice(end - sizes[e], end)
        y[mine], dx[mine], dw[e] = x[mine] @ w[e], dy[mine] @ w[e].T, x[mine].T.astype(float) @ dy[mine]
    close(kernels("grouped_forward", [y.shape], x, w, sizes)[0], y)
    close(kernels("grouped_dx", [x.shape], dy, w, sizes)[0], dx)
    close(kernels("grouped_dw", [w.shape], x, dy, sizes)[0], dw)


@pytest.mark.parametrize("width, hidden", [(32, 16), (33, 21)])
def test_experts(kernels, width, hidden):
    """Choices outside 0…E-1 add nothing, forward and backward."""
    rng = np.random.default_rng(0)
    tokens, top, experts = 70, 3, 4
    shapes = (tokens, width), (tokens, top), (experts, width, 2, hidden), (experts, hidden, width), (tokens, width)
    x, weights, wi, wo, dy = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    chosen = rng.integers(-1, experts + 1, (tokens, top)).astype(np.int32)
    chosen[chosen == 2], chosen[5] = 1 << 30, -1  # an expert without tokens, a token without experts
    y, dx, dweights, dwi, dwo = right = [np.zeros(shape) for shape in (shapes[0], *shapes[:4])]
    for t, k in np.argwhere((chosen >= 0) & (chosen < experts)):
        e, weight = chosen[t, k], weights[t, k]
        gate, up = x[t] @ wi[e, :, 0], x[t] @ wi[e, :, 1]
        s = 1 / (1 + np.exp(-gate.astype(float)))
        y[t] += weight * (gate * s * up) @ wo[e]
        dh = wo[e] @ dy[t]
        dweights[t, k] = gate * s * up @ dh
        dwo[e] += weight * np.outer(gate * s * up, dy[t])
        dgate, dup = weight * dh * up * s * (1 + gate * (1 - s)), weight * dh * gate * s
        dwi[e] += np.stack([np.outer(x[t], dgate), np.outer(x[t], dup)], axis=1)
        dx[t] += wi[e, :, 0] @ dgate + wi[e, :, 1] @ dup
    choices, operands = tokens * top, (x, weights, chosen, wi, wo)
    found, gate_up, _ = kernels("experts_forward", [x.shape, (choices, 2 * hidden), (choices, width)], *operands)
    room = choices, 3 * (width + hidden)
    found = [found, *kernels("experts_backward", [*shapes[:4], room], *operands, gate_up, dy)[:-1]]
    for one, other in zip(found, right, strict=True):
        close(one, other)
    assert not found[0][5].any() and not found[1][5].any() and not found[3][2].any()


@pytest.mark.parametrize("rows", [1, 7, 16, 33, 160])
def test_few_rows_and_bfloat16(kernels, rows):
    """By AMX's tiles where this processor has them, by vectors elsewhere: products are those of float32 in both, and a
    row's numbers do not depend on what stands beside it."""
    rng = np.random.default_rng(rows)
    for target, shape in (("few_along", (2, 64, 160)), ("few_along", (2, 608, 32)), ("few_across", (2, 96, 64))):
        across = target == "few_across"
        w = (rng.standard_normal(shape).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
        x = rng.standard_normal((rows, shape[2 if across else 1])).astype(np.float32)
        layer = np.asarray(1, np.int32)
        right = x.astype(float) @ (w[1].T if across else w[1])
        (found,) = kernels(target, [right.shape], x, w, layer)
        close(found, right)
        (alone,) = kernels(target, [right[-1:].shape], x[-1:], w, layer)
        np.testing.assert_array_equal(found[-1:], alone)


@pytest.mark.parametrize("widths", [(32, 16, 32), (5, 3, 9), (16, 0, 16)], ids=str)
@pytest.mark.parametrize("form", ["mla", "grouped"])
def test_attention(kernels, form, widths):
    """Positions, segments and lengths of every sort, queries that see nothing, strips and panels that are not whole."""
    N, R, V = widths
    B, S, T, H, G, scale = 3, 45, 70, 4, 4 if form == "mla" else 2, np.float32(0.3)
    rng = np.random.default_rng(0)
    q, dout, kv = (
        rng.standard_normal(s).astype(np.float32) for s in ((B, S, H, N + R), (B, S, H, V), (B, T, G, N + V))
    )
    k, v = np.split(kv, [N], axis=3)
    rest = v.copy()
    if form == "mla":
        rest = rng.standard_normal((B, T, R)).astype(np.float32)
        k = np.concatenate([k, np.broadcast_to(rest[:, :, None], (B, T, G, R))], axis=3)
    else:
        k = rng.standard_normal((B, T, G, N + R)).astype(np.float32)
    q_positions, k_positions = np.stack([np.arange(S) + 25] * B), np.stack([np.arange(T)] * B)
    q_positions[1], k_positions[1] = rng.integers(0, 40, S), rng.permutation(T)
    q_segments, k_segments = np.zeros((B, S)), np.zeros((B, T))
    q_segments[0], k_segments[0] = np.arange(S) // 11 + 2, np.arange(T) // 11  # the last query strip's keys end early
    q_segments[1, 3] = -7
    lengths = np.asarray([69, T, 0])
    described = [a.astype(np.int32) for a in (q_positions, k_positions, q_segments, k_segments, lengths)]
    mask = (k_positions[:, None] <= q_positions[:, :, None]) & (q_segments[:, :, None] == k_segments[:, None])
    mask = (mask & (np.arange(T) < lengths[:, None, None]))[:, None]
    empty = ~mask.any(axis=3)[:, 0]
    assert empty[2].all() and empty[1, 3] and not empty.all()

    k64, v64 = (np.repeat(a.astype(float), H // G, axis=2) for a in (k, v))
    p = np.exp(np.where(mask, np.einsum("bshk,bthk->bhst", q, k64) * scale, -np.inf))
    log_sum = np.log(np.maximum(p.sum(axis=3), 1e-300))
    p /= np.maximum(p.sum(axis=3, keepdims=True), 1e-300)
    out = np.einsum("bhst,bthv->bshv", p, v64)
    dp = np.einsum("bshv,bthv->bhst", dout, v64)
    ds = p * (dp - (p * dp).sum(axis=3, keepdims=True)) * scale
    dq = np.einsum("bhst,bthk->bshk", ds, k64)
    dk, dv = np.einsum("bhst,bshk->bthk", ds, q), np.einsum("bhst,bshv->bthv", p, dout)
    dk, dv = (a.reshape(B, T, G, H // G, -1).sum(axis=3) for a in (dk, dv))

    keys = kv if form == "mla" else k
    operands = (q, keys, rest, *described, scale)
    found, sums = kernels("attention_forward", [dout.shape, (B, S, H)], *operands)
    close(found, out)
    assert not found[empty].any() and np.all(sums[empty] == -np.inf)
    close(sums[~empty], np.moveaxis(log_sum, 1, 2)[~empty])
    shapes = [q.shape, keys.shape, (*keys.shape[:3], R) if form == "mla" else rest.shape]
    found_dq, dkeys, drest = kernels("attention_backward", shapes, *operands, found, sums, dout)
    close(found_dq, dq)
    assert not found_dq[empty].any()
    close(dkeys, np.concatenate([dk[..., :N], dv], axis=3) if form == "mla" else dk)
    close(drest, dk[..., N:] if form == "mla" else dv)


def test_what_cc_names_has_the_last_word(monkeypatch, tmp_path):
    """Its flags stand behind ours, and another compiler is another library."""
    seen = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: seen.append(command) or Path(command[-3]).touch())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = set()
    for compiler in ("gcc", "wrapper gcc -mno-avx512f"):
        monkeypatch.setenv("CC", compiler)
        names |= {cpu._built().name, cpu._built().name}
    assert len(names) == len(seen) == 2
    assert seen[1][:2] == ["wrapper", "gcc"] and seen[1].index("-march=native") < seen[1].index("-mno-avx512f")
