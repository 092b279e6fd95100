"""``deepseek-jax compile``, as a user calls it: programs for chips that are not here."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from parallel.topology import needs_libtpu, run_apart

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.costs import count_parameters
from deepseek_jax.parallel.compilers import CUDA, LIBTPU, found
from deepseek_jax.parallel.hlo import Module, shape_bytes
from deepseek_jax.parallel.legal import check_layout
from deepseek_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import ShardingRules
from deepseek_jax.parallel.topology import Topology
from deepseek_jax.train.step import StepConfig
from deepseek_jax.workflows.abstract import device_bytes, gradients
from deepseek_jax.workflows.compile import _refused, _too_much, compile_for
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_jax.workflows.recipe import load_recipe
from deepseek_jax.workflows.scheduled import plain
from deepseek_jax.workflows.stage_step import abstract_step

# float32 needs no kernels, which take the compiler's time; one layer of each kind, no MTP.
RECIPE = '''
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.workflows.pretrain import PretrainConfig, PretrainData

def config():
    """A tiny V2-Lite."""
    model = ModelConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=3, intermediate_size=512, num_attention_heads=2,
        q_lora_rank=0, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32,
        n_routed_experts=8, n_shared_experts=1, moe_intermediate_size=128, num_experts_per_tok=2,
        first_k_dense_replace=1, num_nextn_predict_layers=0, max_position_embeddings=256,
    )
    return PretrainConfig(
        model=model,
        compute=ComputeConfig(dtype="float32", remat="full", dispatch="all_to_all", dispatch_capacity=1.5),
        mesh=MeshConfig(expert=4),
        batch_size=8,
        data=PretrainData(seq_len=128),
        loss=LanguageModelLoss(chunk=64),
    )
'''
TOKENS, WIDTH, LAYERS, EXPERTS, TOP, PARTS = 8 * 128 // 4, 256, 2, 8, 2, 4


def told(tmp_path: Path, *arguments: str, recipe: str = "", limit: float = 540) -> subprocess.CompletedProcess[str]:
    tiny = tmp_path / "tiny.py"
    tiny.write_text(RECIPE, encoding="utf-8")
    command = [sys.executable, "-m", "deepseek_jax.cli.main", "compile", recipe or str(tiny), *arguments]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, capture_output=True, text=True, timeout=limit, env=os.environ | {"PYTHONPATH": path})


@needs_libtpu
def test_what_is_given_away_is_counted_once():
    """Arguments and results are of 64 MB each, and half of it lies between them; a result has an argument's place."""
    program = """
        import jax, jax.numpy as jnp
        from jax.experimental import topologies
        from deepseek_jax.workflows.compile import _peak
        device = topologies.get_topology_desc("v5p:2x2x1", "tpu").devices[0]
        x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))

        def step(state, x):
            h = jnp.tanh(state @ x)
            return state + h @ x.T, jnp.sum(h)

        for given in (), (0,):
            print(_peak(jax.jit(step, donate_argnums=given).lower(x, x).compile(), "tpu") / 2**26)
    """
    kept, given = map(float, run_apart(program).split())
    assert kept == pytest.approx(3.5, abs=0.1) and given == pytest.approx(2.5, abs=0.1)


def test_train_step_for_four_v5p(tmp_path):
    """It fits, and of experts nothing moves: the exchange sends a copy of each token to each device with any of its
    experts, there and back, forward, again and backward; what else is sent is not of the experts' size."""
    if not (LIBTPU.exists() or found("libtpu")):
        pytest.skip("it needs libtpu: python -m deepseek_kernels.compile_tpu --install")
    done = told(tmp_path, "--topology", "v5p:2x2x1", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["fits"] and result["verdict"].startswith("fits: ") and result["devices"] == 4
    memory, estimate = result["memory"], result["estimate"]
    assert memory["optimiser state"] == pytest.approx(2 * memory["parameters"], rel=0.01)
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert 0 < estimate["compute"] <= estimate["seconds"] <= estimate["compute"] + estimate["exposed"] + 1e-9
    assert 0 < result["mfu"] < 1
    reached = 1 - (1 - 1 / PARTS) ** TOP
    rows = math.ceil(1.5 * TOKENS * reached)
    exchange = PARTS * rows * WIDTH * 4 * (PARTS - 1) / PARTS
    moved = [one for one in estimate["traffic"] if one["kind"] == "all-to-all" and one["axes"] == ["expert"]]
    # There and back, forward and backward; again the way there alone, where the compiler sees that no more is needed.
    times = sum(one["sent"] for one in moved if "experts" in one["scope"]) / (LAYERS * exchange)
    assert 4 <= times <= 6.2, (times, moved)
    matrix = EXPERTS // PARTS * WIDTH * 128 * 4
    gathers = [one for one in estimate["traffic"] if one["kind"] == "all-gather" and "experts" in one["scope"]]
    assert all(one["sent"] / one["times"] < matrix for one in gathers), gathers
    # Stopped at its schedule the program is the same, but for what is copied as machine code is made.
    stopped = json.loads(told(tmp_path, "--topology", "v5p:2x2x1", "--json", "--until", "scheduled").stdout)
    sent = lambda told: sorted((one["scope"], one["kind"], one["times"], one["sent"]) for one in told["traffic"])  # noqa: E731
    assert stopped["fits"] and sent(stopped["estimate"]) == sent(estimate)
    assert stopped["estimate"]["seconds"] == pytest.approx(estimate["seconds"], rel=0.01)
    assert stopped["memory"]["total"] == pytest.approx(memory["total"], rel=0.25)


def test_elements_of_tuples_are_written_out():
    """As libtpu of jax 0.11 dumps them; a loop of 3 turns by which a product is counted."""
    dumped = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], (f32[2], f32[3]), f32[8,8])) -> (s32[], (f32[2], f32[3]), f32[8,8]) {
  %p = (s32[]{:T(128)}, (f32[2]{0}, f32[3]{0}), /*index=2*/f32[8,8]{1,0:T(8,128)}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%p#0, %one)
  %y = f32[8,8]{1,0:T(8,128)} dot(%p#2, %p#2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[]{:T(128)}, (f32[2]{0}, f32[3]{0}), f32[8,8]{1,0:T(8,128)}) tuple(%next, %p#1, %y)
}

%test (p.1: (s32[], (f32[2], f32[3]), f32[8,8])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, (f32[2]{0}, f32[3]{0}), f32[8,8]{1,0:T(8,128)}) parameter(0)
  %three = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%p.1#0, %three), direction=LT
}

ENTRY %main (x: f32[8,8], z: (f32[2], f32[3])) -> f32[8,8] {
  %x = f32[8,8]{1,0:T(8,128)} parameter(0)
  %z = (f32[2]{0}, f32[3]{0}) parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %all = (s32[]{:T(128)}, (f32[2]{0}, f32[3]{0}), f32[8,8]{1,0:T(8,128)}) tuple(%zero, %z, %x)
  %loop = (s32[]{:T(128)}, (f32[2]{0}, f32[3]{0}), f32[8,8]{1,0:T(8,128)}) while(%all), condition=%test, body=%body
  ROOT %out = f32[8,8]{1,0:T(8,128)} copy(%loop#2), metadata={op_name="not %elsewhere#2"}
}
"""
    module = Module(plain(dumped))
    assert module.times() == {"%body": 3, "%test": 3, "%main": 1}
    body = module.computations["%body"]
    assert body["%y"].operands == ("%p.element.2",) * 2 and body["%p.element.2"].opcode == "get-tuple-element"
    assert shape_bytes(body["%p.element.1"].shape) == 4 * 5 and shape_bytes(body["%p.element.2"].shape) == 4 * 64
    assert "not %elsewhere#2" in plain(dumped) and plain(plain(dumped)) == plain(dumped)


def test_a_refusal_before_machine_code(tmp_path):
    if not (LIBTPU.exists() or found("libtpu")):
        pytest.skip("it needs libtpu: python -m deepseek_kernels.compile_tpu --install")
    done = told(tmp_path, "--topology", "v5p:2x2x1", "--json", "--until", "scheduled", "--batch-size", "400000")
    result = json.loads(done.stdout)
    assert result["verdict"].startswith("does not fit: ") and result["memory"]["total"] > 3 * result["available"]


@pytest.mark.timeout(1200)
def test_v3_at_full_depth_fits_1024_v5p(tmp_path):
    """At true widths, experts exchanged by all_to_all: what moves is copies of tokens, and each device's own 32 experts
    over fsdp, gathered twice, and gate and up's gradients scattered; all to the byte. Up to the schedule, which takes
    half a minute of a core and 2 GB; its machine code would take a quarter of an hour and 20 GB."""
    if not (LIBTPU.exists() or found("libtpu")):
        pytest.skip("it needs libtpu: python -m deepseek_kernels.compile_tpu --install")
    options = ("--topology", "v5p:8x8x16", "--json", "--until", "scheduled")
    done = told(tmp_path, *options, recipe="pods/v3:v5p", limit=1100)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["fits"], result["verdict"]
    microbatches, layers, width, experts, top = 2, 58, 7168, 32, 8
    tokens = 16_384 * 4096 // microbatches // 1024
    reached = 4 / 8 * (1 - (1 - 8 / (4 * 8)) ** top)  # of eight groups four are drawn, a device has one of them
    rows = 8 * math.ceil(1.25 * tokens * reached)
    # Rows there and back, forward and backward, and there again; of each copy 2 × 8 float32, weights and experts.
    row, facts = rows * 7 // 8 * width * 2, rows * 7 // 8 * 2 * top * 4
    inner = experts * 2 * width * 2048 * 2 * 127 / 128  # gate and up; half as much on the way out
    sent: dict[str, float] = {}
    for one in result["estimate"]["traffic"]:
        if "mlp/experts/" in one["scope"]:
            kind = f"{one['kind']} {' '.join(one['axes'])}"
            sent[kind] = sent.get(kind, 0) + one["sent"] / microbatches
    # MTP's layer, in no loop, goes back again too, and has gate and up gathered a third time. Sums whose scatter the
    # compiler takes apart, all of MTP's among them, have no scope.
    assert sent == {
        "all-to-all expert": pytest.approx((layers + 1) * (5 * row + 3 * facts) + row, rel=1e-6),
        "all-gather fsdp": pytest.approx((layers + 1) * 3 * inner + inner, rel=1e-6),
        "reduce-scatter fsdp": pytest.approx(layers * inner, rel=1e-6),
    }


def test_rows_that_the_machine_cannot_split_are_named():
    recipe = PretrainConfig(batch_size=8, step=StepConfig(microbatches=2))
    mesh = make_mesh(MeshConfig(data=8))
    with pytest.raises(ValueError, match="data=8 does not divide the 4 rows of batch_size=8, step.micro.*=2; .* 8"):
        abstract_step(recipe, recipe.model, recipe.loss, mesh, 64)


def test_v3_is_not_trained_on_256_v6e(tmp_path):
    """Refused from shapes, before hours of compiling: 12 bytes a parameter leave no room for gradients."""
    if not (LIBTPU.exists() or found("libtpu")):
        pytest.skip("it needs libtpu: python -m deepseek_kernels.compile_tpu --install")
    done = told(tmp_path, "--topology", "v6e:16x16", recipe="pods/v3:v6e")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "does not fit: at least" in done.stdout and "not compiled" in done.stdout
    count = count_parameters(load_recipe("models/deepseek_v3", ModelConfig))["parameters_total"]
    evenly = 12 * count / 256 / 2**30
    assert f"12 bytes of each of {count / 1e9:.1f} B parameters, {evenly:.1f} GiB a device" in done.stdout, done.stdout


def test_least_memory_of_a_step():
    """The state, and gradients in what the layers get: half of float32's bytes in bfloat16."""
    memory = {"parameters": 4, "optimiser state": 8, "batch": 1, "gradients": 4}
    assert not _too_much(memory, "bfloat16", 15) and not _too_much(memory, "float32", 17)
    assert _too_much(memory, "bfloat16", 14) == memory | {"gradients": 2, "total": 15}
    assert _too_much(memory, "float32", 16) == memory | {"total": 17}


def test_decoding_on_two_gpus(tmp_path):
    """The command's tables, where jax's CUDA plugin is there without a GPU."""
    if not (CUDA.exists() or found("jax_plugins.xla_cuda12")):
        pytest.skip("it needs jax's CUDA plugin, which the command names")
    mesh = ("--mesh.expert", "2", "--compute.dtype", "float32")
    done = told(tmp_path, "--topology", "h100:2", "--work", "decode", "--columns", "64", *mesh)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in ("2: expert 2", "cache", "of 76.0 GiB", "estimated time", "fits: "):
        assert line in done.stdout, (line, done.stdout)


def test_gradients_lie_where_the_optimizers_state_does(tmp_path):
    """With ZeRO-1 over four devices each has a quarter of them, and of the moments, beside all parameters."""
    (tmp_path / "tiny.py").write_text(RECIPE, encoding="utf-8")
    recipe, mesh = load_recipe(str(tmp_path / "tiny.py"), PretrainConfig), make_mesh(MeshConfig(data=4, fsdp=2))
    for rules, share in ((ShardingRules(), 1), (ShardingRules(state=("data",)), 4)):
        recipe = dataclasses.replace(recipe, compute=dataclasses.replace(recipe.compute, rules=rules))
        state = abstract_step(recipe, recipe.model, recipe.loss, mesh, 128).state
        whole, found = device_bytes(state.params), device_bytes(gradients(recipe, state, mesh))
        assert found == pytest.approx(whole / share, rel=0.01)
        assert device_bytes(state) - whole == pytest.approx(2 * found, rel=0.01)


MACHINES = {"v5p": 1024, "tpu7x": 256, "v6e": 256, "v6e_4_slices": 1024, "gpus_256": 256, "gpus_2048": 2048}


@pytest.mark.parametrize("machine", MACHINES)
def test_recipes_are_legal_on_their_machines(machine):
    """Also their later stages, of longer rows."""
    names = [f"pods/v3:{field.name}" for field in dataclasses.fields(type(recipes()))]
    names = [name for name in names if name.removesuffix("_32k").removesuffix("_128k").endswith(f":{machine}")]
    for name in (*names, *(("extension/v3:to_32k", "extension/v3:to_128k") if machine == "v5p" else ())):
        recipe = load_recipe(name, PretrainConfig)
        sizes = {axis: getattr(recipe.mesh, axis) for axis in AXES}
        sizes["data"] = sizes["data"] or 1
        assert math.prod(sizes.values()) == MACHINES[machine], name
        rows, columns = recipe.batch_size // recipe.step.microbatches, recipe.data.seq_len
        check_layout(recipe.model, recipe.compute, sizes, rows=rows, columns=columns)


def recipes() -> Any:
    return load_recipe("pods/v3", object)


def test_what_a_user_gets_wrong(tmp_path):
    done = told(tmp_path, "--topology", "v5p:2x2")
    assert done.returncode == 1 and "v5p has 3 dimensions" in done.stderr
    with pytest.raises(ValueError, match="until=scheduled with topology=h100:8: a TPU's"):
        compile_for(PretrainConfig(), Topology.parse("h100:8"), until="scheduled")


def test_a_refusal_is_told_in_numbers():
    """The two ways in which a TPU's compiler says that memory is too small."""
    state = {"parameters": 4 * 2**30, "optimiser state": 8 * 2**30, "gradients": 4 * 2**30}
    short = _refused(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (132.05G) exceeds "
        "available HBM (95.74G).",
        state,
    )
    assert short["memory"]["total"] == pytest.approx(132.05 * 2**30)
    assert short["memory"]["activations, temporaries"] == pytest.approx((132.05 - 16) * 2**30)
    assert short["available"] == pytest.approx(95.74 * 2**30)
    assert "available" not in _refused("RESOURCE_EXHAUSTED: vmem", state)
    long = _refused(
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 120.50G of "
        "95.74G hbm. Exceeded hbm capacity by 24.76G.\n\nLargest program allocations in hbm:\n\n  1. Size: 22.50G\n"
        '     Operator: op_name="jit(step)/jvp()/mlp/experts/shard_map/all_gather" source_file="x.py"\n'
        "     Shape: bf16[256,7168,4096]{2,1,0}\n",
        state,
    )
    assert long["memory"]["total"] == pytest.approx(120.5 * 2**30)
    assert long["available"] == short["available"]
    assert long["memory"]["activations, temporaries"] == pytest.approx((120.5 - 16) * 2**30)
    assert long["largest"] == ((int(22.5 * 2**30), "mlp/experts/all_gather"),)
