"""The walk through a schedule, on programs whose seconds can be added up by hand."""

import types

import numpy as np
import pytest

from deepseek_jax.parallel.roofline import estimate, short
from deepseek_jax.parallel.topology import Links, Topology

PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=2

%product (a: bf16[1024,1024], b: bf16[1024,1024]) -> bf16[1024,1024] {
  %a = bf16[1024,1024]{1,0} parameter(0)
  %b = bf16[1024,1024]{1,0} parameter(1)
  ROOT %c = bf16[1024,1024]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%sliced (stack: f32[64,1024,1024], place: s32[]) -> f32[1,1024,1024] {
  %stack = f32[64,1024,1024]{2,1,0} parameter(0)
  %place = s32[] parameter(1)
  ROOT %layer = f32[1,1024,1024]{2,1,0} dynamic-slice(%stack, %place, %place, %place), dynamic_slice_sizes={1,1024,1024}
}

ENTRY %main (x: bf16[1024,1024], s: f32[64,1024,1024], i: s32[]) -> bf16[1024,1024] {
  %x = bf16[1024,1024]{1,0} parameter(0)
  %s = f32[64,1024,1024]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %start = (bf16[1024,1024]{1,0}, bf16[2048,1024]{1,0}) all-gather-start(%x), replica_groups={{0,1}}, dimensions={0}, \
metadata={op_name="jit(f)/apart/all_gather"}
  %y = bf16[1024,1024]{1,0:S(1)} fusion(%x, %x), kind=kOutput, calls=%product
  %done = bf16[2048,1024]{1,0} all-gather-done(%start)
  %z = bf16[2048,1024]{1,0} all-gather(%y), replica_groups={{0,1}}, dimensions={0}, metadata={op_name="jit(f)/now"}
  %layer.1 = f32[1,1024,1024]{2,1,0} fusion(%s, %i), kind=kLoop, calls=%sliced
  ROOT %out = bf16[1024,1024]{1,0} fusion(%y, %y), kind=kOutput, calls=%product
}
"""
MEBI = 2**20


@pytest.fixture
def links() -> Links:
    devices = [types.SimpleNamespace(coords=(0, 0, place), slice_index=None) for place in range(2)]
    mesh = types.SimpleNamespace(devices=np.array(devices, object), axis_names=("data",))
    return Links(Topology.parse("v5p:1x1x2"), mesh)  # pyright: ignore[reportArgumentType]


def test_only_what_the_schedule_sets_apart_overlaps(links):
    """A gather behind a product costs what is left of it; the other all of it. Of a stack one layer is read."""
    chip, found = links.topology.chip, estimate(PROGRAM, links)
    gather = 2 * MEBI / chip.link  # a device gets the other's half
    first = max(2 * 2**30 / chip.flops, 2 * 2 * MEBI / chip.bandwidth)  # its result stays in the chip's own memory
    second = max(2 * 2**30 / chip.flops, 2 * MEBI / chip.bandwidth)
    sliced = 2 * 4 * MEBI / chip.bandwidth
    np.testing.assert_allclose(found.compute, first + second + sliced, rtol=1e-4)
    np.testing.assert_allclose(found.exposed, (gather - first) + gather, rtol=1e-4)
    np.testing.assert_allclose(found.seconds, found.compute + found.exposed, rtol=1e-6)
    assert found.flops == 2 * 2 * 2**30
    now, apart = found.traffic
    assert (now.scope, now.asynchronous, apart.scope, apart.asynchronous) == ("now", False, "apart/all_gather", True)
    assert now.sent == apart.sent == 2 * MEBI and now.axes == ("data",) and now.exposed > apart.exposed


FUSED = """HloModule jit_f, is_scheduled=true, num_partitions=2

%relaid (input: bf16[64,1024,1024]) -> bf16[64,1024,1024] {
  %input = bf16[64,1024,1024]{2,1,0:T(16,128)} parameter(0)
  ROOT %copy = bf16[64,1024,1024]{2,1,0:T(8,128)} copy(%input)
}

%read (stack: bf16[64,1024,1024], place: s32[]) -> f32[1,1024,1024] {
  %stack = bf16[64,1024,1024]{2,1,0:T(16,128)} parameter(0)
  %place = s32[] parameter(1)
  %again = bf16[64,1024,1024]{2,1,0:T(8,128)} fusion(%stack), kind=kLoop, calls=%relaid
  %layer = bf16[1,1024,1024]{2,1,0:T(8,128)} dynamic-slice(%again, %place, %place, %place), \
dynamic_slice_sizes={1,1024,1024}
  ROOT %wide = f32[1,1024,1024]{2,1,0:T(8,128)} convert(%layer)
}

%within (stack: bf16[64,1024,1024], place: s32[]) -> f32[1,1024,1024] {
  %stack.1 = bf16[64,1024,1024]{2,1,0:T(16,128)} parameter(0)
  %place.1 = s32[] parameter(1)
  ROOT %outer = f32[1,1024,1024]{2,1,0:T(8,128)} fusion(%stack.1, %place.1), kind=kLoop, calls=%read
}

%written (stack: bf16[64,1024,1024], layer: bf16[1,1024,1024], place: s32[]) -> bf16[64,1024,1024] {
  %stack.2 = bf16[64,1024,1024]{2,1,0:T(16,128)} parameter(0)
  %layer.2 = bf16[1,1024,1024]{2,1,0:T(8,128)} parameter(1)
  %place.2 = s32[] parameter(2)
  %again.2 = bf16[64,1024,1024]{2,1,0:T(8,128)} fusion(%stack.2), kind=kLoop, calls=%relaid
  ROOT %update = bf16[64,1024,1024]{2,1,0:T(16,128)} \
dynamic-update-slice(%again.2, %layer.2, %place.2, %place.2, %place.2)
}

ENTRY %main (s: bf16[64,1024,1024], l: bf16[1,1024,1024], i: s32[]) -> bf16[64,1024,1024] {
  %s = bf16[64,1024,1024]{2,1,0:T(16,128)} parameter(0)
  %l = bf16[1,1024,1024]{2,1,0:T(8,128)} parameter(1)
  %i = s32[] parameter(2)
  %one = f32[1,1024,1024]{2,1,0:T(8,128)} fusion(%s, %i), kind=kLoop, calls=%within
  ROOT %new = bf16[64,1024,1024]{2,1,0:T(16,128)} fusion(%s, %l, %i), kind=kLoop, calls=%written
}
"""


def test_of_a_stack_laid_out_anew_within_a_fusion_one_layer_counts(links):
    """A TPU's fusions hold others, and copies into another tiling that are never made but for the part that is used."""
    layer = 2 * MEBI
    read, numbers = layer + 2 * layer, 2 * 4  # as float32; which layer it is, twice
    assert estimate(FUSED, links).memory_bytes == read + 2 * layer + numbers


GROUPED = """HloModule jit_f, is_scheduled=true

ENTRY %main (x: bf16[2560,512], w: bf16[8,512,256]) -> bf16[2560,256] {
  %x = bf16[2560,512]{1,0} parameter(0)
  %w = bf16[8,512,256]{2,1,0} parameter(1)
  ROOT %y = bf16[2560,256]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/experts/jit(gmm)/pallas_call"}, \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"671088640"}}}
}
"""


def test_tiles_of_no_group_take_no_time(links):
    whole = 2 * 2560 * 512 * 256
    assert estimate(GROUPED, links).flops == whole
    some = estimate(GROUPED, links, grouped_rows=lambda rows, groups: {(2560, 8): 2048.0}[rows, groups])
    assert some.flops == whole * 0.8
    assert estimate(GROUPED, links, grouped_rows=lambda rows, groups: 2 * rows).flops == whole


def test_a_fusion_that_runs_apart_moves_what_it_writes(links):
    """As XLA for GPUs puts a layer into its stack."""
    put = """HloModule jit_g, is_scheduled=true

%put (stack: f32[64,1024,1024], layer: f32[1,1024,1024], place: s32[]) -> f32[64,1024,1024] {
  %stack = f32[64,1024,1024]{2,1,0} parameter(0)
  %layer = f32[1,1024,1024]{2,1,0} parameter(1)
  %place = s32[] parameter(2)
  ROOT %out = f32[64,1024,1024]{2,1,0} dynamic-update-slice(%stack, %layer, %place, %place, %place)
}

ENTRY %main (s: f32[64,1024,1024], x: f32[1,1024,1024], i: s32[]) -> f32[64,1024,1024] {
  %s = f32[64,1024,1024]{2,1,0} parameter(0)
  %x = f32[1,1024,1024]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %start = ((f32[64,1024,1024]{2,1,0}, f32[1,1024,1024]{2,1,0}, s32[]), f32[64,1024,1024]{2,1,0}) \
fusion-start(%s, %x, %i), kind=kLoop, calls=%put
  ROOT %done = f32[64,1024,1024]{2,1,0} fusion-done(%start)
}
"""
    found = estimate(put, links)
    np.testing.assert_allclose(found.seconds, 2 * 4 * MEBI / links.topology.chip.bandwidth, rtol=1e-6)


def test_scopes_are_told_shortly():
    assert short("jit(step)/jvp()/while/body/closed_call/mlp/experts/shard_map/all_to_all") == "mlp/experts/all_to_all"
    assert short("jit(step)/transpose(jvp())/while/body/closed_call/checkpoint/mlp/mul") == "backward mlp/mul"
    again = "jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/attention/mul"
    assert short(again) == "again attention/mul"
    assert short("jit(step)/jvp()/(jvp()/mlp/mul:jvp()/attention/mul:x)") == "mlp/mul and 2 more"
