"""What the text of a compiled program says of its collectives, of programs whose collectives are known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel.collectives import Collective, collectives, groups_of, sent_between_slices
from deepseek_jax.parallel.hlo import Instruction, Module
from deepseek_kernels import compile_tpu

LAYERS, WIDTH, ROWS = 5, 512, 64


def program(devices, dtype: str) -> str | None:
    """The HLO of the gradient of a scan whose layers use every kind of collective, on a mesh data 2 × expert 4."""
    mesh = jax.make_mesh((2, 4), ("data", "expert"), (AxisType.Auto,) * 2, devices=devices)

    def layer(x, w):
        with jax.named_scope("gathered"):
            y = jnp.tanh(x @ jax.lax.all_gather(w, "expert", tiled=True))
        with jax.named_scope("exchanged"):
            y = jax.lax.all_to_all(y, "expert", 0, 0, tiled=True)
        with jax.named_scope("scattered"):
            y = jax.lax.psum_scatter(jnp.concatenate([y] * 4), "expert", tiled=True)
        with jax.named_scope("passed"):
            return x + jax.lax.ppermute(y, "data", [(0, 1), (1, 0)]), None

    def local(x, ws):
        return jax.lax.psum(jax.lax.scan(layer, x, ws)[0].sum(), ("data", "expert"))

    rows, split = P(("data", "expert")), P(None, "expert")
    function = jax.shard_map(local, mesh=mesh, in_specs=(rows, split), out_specs=P(), check_vma=False)
    shaped = lambda shape, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    arguments = shaped((8 * ROWS, WIDTH), rows), shaped((LAYERS, WIDTH, WIDTH), split)
    return jax.jit(jax.grad(function, 1)).lower(*arguments).compile().as_text()


def of_tpu() -> str:
    """The same for v5p, by a process of its own, which libtpu needs."""
    if not compile_tpu.available():
        pytest.skip("it needs libtpu: python -m deepseek_kernels.compile_tpu --install")
    path = [str(Path(__file__).parent), str(compile_tpu.FOLDER), *sys.path]
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    own |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    own |= {"PYTHONPATH": os.pathsep.join(path), "JAX_ENABLE_COMPILATION_CACHE": "0"}
    code = "import json; from jax.experimental import topologies; from test_collectives import program;"
    code += "print(json.dumps(program(topologies.get_topology_desc('v5p:2x2x2', 'tpu').devices, 'bfloat16')))"
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=["cpu", "tpu"])
def found(request) -> tuple[list[Collective], int]:
    """With the bytes of a number: XLA:CPU widens bfloat16, a TPU multiplies in it."""
    if request.param == "tpu":
        return collectives(of_tpu()), 2
    text = program(jax.devices(), "float32")
    assert text
    return collectives(text), 4


def test_each_collective_is_found_with_its_bytes_and_group(found):
    """Forward and backward: the transpose of a gather is a scatter, that of an exchange one, of the sum a gather."""
    found, itemsize = found
    tokens, matrix = ROWS * WIDTH * itemsize, WIDTH * WIDTH * itemsize
    expected = {
        ("gathered", "all-gather"): (matrix, 4, 1),
        ("gathered", "reduce-scatter"): (matrix, 4, 1),
        ("exchanged", "all-to-all"): (tokens, 4, 2),
        ("scattered", "reduce-scatter"): (4 * tokens, 4, 1),
        ("scattered", "all-gather"): (4 * tokens, 4, 1),
        ("passed", "collective-permute"): (tokens, 2, 2),
    }
    for (scope, kind), (size, group, count) in expected.items():
        of = [one for one in found if scope in one.scope and one.kind == kind]
        assert [(one.shape_bytes, one.group_size, one.times) for one in of] == [(size, group, LAYERS)] * count, scope
    sums = [one for one in found if one.kind == "all-reduce" and one.shape_bytes > 8]
    assert [(one.shape_bytes, one.group_size, one.times) for one in sums] == [(LAYERS * matrix // 4, 2, 1)]
    inner = next(one for one in found if "gathered" in one.scope)
    assert set(inner.groups) == {(0, 1, 2, 3), (4, 5, 6, 7)} and set(sums[0].groups) == {(i, i + 4) for i in range(4)}


def test_what_leaves_a_device():
    """Of four devices: a gather and an exchange send three quarters, a sum twice that, a permutation all."""
    one = Collective("all-gather", 4000, 4, ((0, 1, 2, 3),), 1, False, "")
    sent = lambda kind: Collective(kind, *list(vars(one).values())[1:]).sent_bytes  # noqa: E731
    kinds = "all-gather", "reduce-scatter", "all-to-all", "all-reduce", "collective-permute"
    assert [sent(kind) for kind in kinds] == [3000, 3000, 3000, 6000, 4000]


GPU = """HloModule jit_f, is_scheduled=true, num_partitions=4

%wrapped (p: f32[64,8]) -> f32[16,8] {
  %p = f32[64,8]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = f32[16,8]{1,0} reduce-scatter(%p), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
}

%body (t: (s32[], f32[64,8], f32[64,8])) -> (s32[], f32[64,8], f32[64,8]) {
  %t = (s32[], f32[64,8]{1,0}, f32[64,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[64,8]{1,0} get-tuple-element(%t), index=1
  %all-gather-start = (f32[64,8]{1,0}, f32[128,8]{1,0}) all-gather-start(%x), replica_groups=[2,2]<=[2,2]T(1,0), \
dimensions={0}, backend_config={"collective_backend_config":{"is_sync":false}}
  %async-start = ((f32[64,8]{1,0}), f32[16,8]{1,0}) async-start(%x), calls=%wrapped
  %y = f32[64,8]{1,0} negate(%x)
  %async-done = f32[16,8]{1,0} async-done(%async-start)
  %all-gather-done = f32[128,8]{1,0} all-gather-done(%all-gather-start)
  ROOT %out = (s32[], f32[64,8]{1,0}, f32[64,8]{1,0}) tuple(%next, %y, %x)
}

%condition (t: (s32[], f32[64,8], f32[64,8])) -> pred[] {
  %t.1 = (s32[], f32[64,8]{1,0}, f32[64,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: f32[64,8]) -> f32[64,8] {
  %x.1 = f32[64,8]{1,0} parameter(0)
  %one = s32[] constant(1)
  %all-reduce-start = f32[64,8]{1,0} all-reduce-start(%x.1), replica_groups={{0,1,2,3}}, to_apply=%add, \
backend_config={"collective_backend_config":{"is_sync":true}}
  %hidden = f32[64,8]{1,0} negate(%x.1)
  %all-reduce-done = f32[64,8]{1,0} all-reduce-done(%all-reduce-start)
  %t.2 = (s32[], f32[64,8]{1,0}, f32[64,8]{1,0}) tuple(%one, %all-reduce-done, %hidden)
  %loop = (s32[], f32[64,8]{1,0}, f32[64,8]{1,0}) while(%t.2), condition=%condition, body=%body
  ROOT %end = f32[64,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_starts_ends_and_loops_as_a_gpu_writes_them():
    """From 1 to 7 in steps of 2: three turns. What is marked synchronous hides behind nothing."""
    scattered, gathered, summed = collectives(GPU)
    assert scattered == Collective("reduce-scatter", 2048, 4, ((0, 1, 2, 3),), 3, True, "")
    assert gathered == Collective("all-gather", 4096, 2, ((0, 2), (1, 3)), 3, True, "")
    assert summed == Collective("all-reduce", 2048, 4, ((0, 1, 2, 3),), 1, False, "")
    assert not collectives(GPU.replace("%y = f32[64,8]{1,0} negate(%x)", "%y = f32[64,8]{1,0} bitcast(%x)"))[
        0
    ].asynchronous


def test_groups_in_each_of_xlas_forms():
    """Along the second axis of a mesh 2 × 4 whose devices are counted along the first."""
    expected = ((0, 2, 4, 6), (1, 3, 5, 7))
    groups = {
        "{{0,2,4,6},{1,3,5,7}}",
        "[2,4]<=[4,2]T(1,0)",
        "mesh['x'=4,'y'=2] {'x'}",
        "mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}",
    }
    for text in groups:
        one = Instruction("%x", "all-gather", "f32[8]", (), f", replica_groups={text}, dimensions={{0}}")
        assert groups_of(one, 8) == expected, text
    assert groups_of(Instruction("%x", "all-reduce", "f32[8]", (), ", replica_groups={}"), 2) == ((0, 1),)
    with pytest.raises(ValueError, match="unknown form"):
        groups_of(Instruction("%x", "all-reduce", "f32[8]", (), ", replica_groups=mesh['x'=4] {'x':(1)2}"), 4)


def test_what_leaves_a_slice_of_tpus():
    """Sent by MegaScale: of four slices a gather's part goes to three, of a scattered sum three parts of four go."""
    send = (
        "  %send.{n} = (f32[256]{{0}}, u32[], token[]) send(%x, %after), channel_id={n}, is_host_transfer=true, "
        'frontend_attributes={{_xla_megascale_target="{{1,2,3,4}}x{{0:255}}",_xla_megascale_transfer_type="{kind}"}}\n'
    )
    sends = "".join(
        send.format(n=n, kind=kind) for n, kind in enumerate(("ALL_GATHER", "REDUCE_SCATTER", "ALL_REDUCE"))
    )
    head = "ENTRY %main (x: f32[256]) -> f32[256] {\n  %x = f32[256]{0} parameter(0)\n  %after = token[] after-all()\n"
    module = Module(f"HloModule m\n\n{head}{sends}  ROOT %y = f32[256]{{0}} copy(%x)\n}}\n")
    assert sent_between_slices(module) == 1024 * (3 + 3 / 4 + 6 / 4)
