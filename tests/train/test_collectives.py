"""How often a compiled step sums over its mesh: the head's gradient once, however many chunks it comes in."""

import re

import jax
import jax.numpy as jnp
import pytest
from model.tiny import weights
from train.cases import BATCH, TINY, S

from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import place_batch
from deepseek_jax.train.cross_entropy import score_targets
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.state import create_state
from deepseek_jax.train.step import StepConfig, make_step

MESH = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
CALLS = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")


def all_reduces(text: str | None) -> int:
    """All-reduces that one run of an HLO module does: those in a loop as often as it turns."""
    assert text
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = found[2]
            bodies[name] = []
            entry = name if found[1] else entry
        elif line.startswith(" "):
            bodies[name].append(line)

    def count(name: str) -> int:
        total = 0
        for line in bodies[name]:
            if re.search(r"\ball-reduce(-start)?\(", line):
                total += 1
            else:
                turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                assert turns or " while(" not in line
                total += (int(turns[1]) if turns else 1) * sum(map(count, CALLS.findall(line)))
        return total

    return count(entry)


def train_step(chunk: int) -> str | None:
    params, bias = weights(TINY)
    optimizer = make_optimizer(OptimizerConfig(), TINY, 10)
    state = create_state(TINY, optimizer, MESH, params=params, router_bias=bias)
    step = make_step(TINY, LanguageModelLoss(chunk=chunk), optimizer, StepConfig())
    return jax.jit(step).lower(state, place_batch(BATCH, MESH)).compile().as_text()


def scores(chunk: int) -> str | None:
    def total(hidden, w, targets):
        return jnp.sum(score_targets(hidden, w, targets, chunk=chunk).logprob_BS)

    placed = place_batch({"targets": BATCH["tokens"]}, MESH)["targets"]
    hidden, w = jax.ShapeDtypeStruct((8, S, 6), jnp.float32, sharding=placed.sharding), jnp.ones((6, 40))
    return jax.jit(jax.grad(total, argnums=(0, 1))).lower(hidden, w, placed).compile().as_text()


@pytest.mark.parametrize("program", [train_step, scores])
def test_more_chunks_are_not_more_sums_over_the_mesh(program):
    with jax.set_mesh(MESH):
        whole, chunked = all_reduces(program(S)), all_reduces(program(2))
    assert whole == chunked > 0
