"""What a train step adds up over chips, compiled for TPUs that are not here: run by ``topology.run_apart``."""

import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from model.tiny import V3, config

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import ShardingRules, named_sharding
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.state import abstract_state
from deepseek_jax.train.step import StepConfig, make_step

# Widths that the chip's kernels take, each its own; a dense layer and three MoE layers.
MODEL = config(
    V3,
    vocab_size=1536,
    hidden_size=512,
    num_hidden_layers=4,
    intermediate_size=768,
    num_attention_heads=8,
    q_lora_rank=384,
    kv_lora_rank=256,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    moe_intermediate_size=640,
    num_nextn_predict_layers=0,
)
ROWS, COLUMNS, CHUNK = 8, 512, 128


def step_text(sizes: dict[str, Any], rules: dict[str, Any], topology: str = "v5p:2x2x2", **step: Any) -> str:
    mesh = make_mesh(MeshConfig(**sizes), topologies.get_topology_desc(topology, "tpu").devices)
    rules_of = ShardingRules(**rules)
    compute = ComputeConfig(dtype="bfloat16", remat="full", rules=rules_of).on(mesh)
    optimizer = make_optimizer(OptimizerConfig(), MODEL, 10)
    state = abstract_state(MODEL, optimizer, mesh, compute=compute)
    place = named_sharding(mesh, ("batch", "sequence"), (ROWS, COLUMNS), rules_of)
    integers = ("tokens", "segment_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.int32, sharding=place) for name in integers}
    batch["loss_mask"] = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32, sharding=place)
    made = make_step(MODEL, LanguageModelLoss(chunk=CHUNK), optimizer, StepConfig(**step), compute=compute)
    with jax.set_mesh(mesh):
        return jax.jit(made, donate_argnums=0).lower(state, batch).compile().as_text() or ""


def reduced(text: str) -> dict[str, int]:
    """Bytes of what is added up over chips, by kind and dtype, loops once; an all-reduce that hands each chip a part
    is a reduce-scatter, which the chip's compiler writes as a fusion."""
    found: dict[str, int] = {}
    computation = ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            computation = line
        if match := re.search(r"= (.*?) (all-reduce|reduce-scatter)(?:-start)?\(", line):
            kind = "reduce-scatter" if "all-reduce-scatter" in computation else match[2]
            for dtype, sizes in re.findall(r"(bf16|f32)\[([\d,]*)\]", match[1]):
                size = math.prod(int(size) for size in sizes.split(",") if size) * (2 if dtype == "bf16" else 4)
                found[f"{kind} {dtype}"] = found.get(f"{kind} {dtype}", 0) + size
    return found


def main(*cases: tuple[dict[str, int], dict[str, Any], dict[str, Any]]) -> None:
    """Print what is ``reduced`` in the step of each (mesh, rules, fields of StepConfig), a line of JSON a case."""
    for sizes, rules, step in cases:
        print(json.dumps(reduced(step_text(sizes, rules, **step))))
