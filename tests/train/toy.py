"""A tiny run for the loop's tests, and a program that can be killed: `python toy.py RUN_DIR STEPS PAUSE`."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.train.loop import LoopConfig, run_loop
from deepseek_jax.train.reference import Reference

META = {"model": {"width": 8}, "stage": "toy"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class ToyState:
    step: jax.Array
    params: dict
    opt_state: jax.Array


def make_state() -> ToyState:
    return ToyState(jnp.int32(0), {"w": jnp.linspace(-1.0, 1.0, 8)}, jnp.zeros(8))


@functools.partial(jax.jit, donate_argnums=0)
def toy_step(state: ToyState, batch: jax.Array) -> tuple[ToyState, dict]:
    """Momentum on a chaotic map: one wrong bit in state or batch changes every later loss."""
    finite = jnp.isfinite(batch).all()
    key = jax.random.fold_in(jax.random.key(0), state.step)
    grad = jnp.sin(37.0 * state.params["w"]) + batch + 0.1 * jax.random.normal(key, (8,))
    momentum = jnp.where(finite, 0.9 * state.opt_state + grad, state.opt_state)
    w = jnp.where(finite, state.params["w"] - 0.1 * momentum, state.params["w"])
    metrics = {
        "loss": jnp.sum(w**2),
        "finite": finite.astype(jnp.int32),
        "tokens": jnp.int32(100),
        "load": w[:2],
    }
    return ToyState(state.step + 1, {"w": w}, momentum), metrics


class ToyBatches:
    """Batches that follow from one position, as `RowLoader`'s do; hooks run before their batch."""

    def __init__(self, hooks=None, bad=(), pause=0.0):
        self.position, self.hooks, self.bad, self.pause = 0, hooks or {}, bad, pause

    def next(self, state):
        self.position += 1
        time.sleep(self.pause)
        self.hooks.get(self.position, lambda: None)()
        batch = np.random.default_rng(self.position).normal(size=8).astype(np.float32)
        batch[0] = np.nan if self.position in self.bad else batch[0]
        return jnp.asarray(batch), {"position": self.position}

    def state(self):
        return {"position": self.position}

    def restore(self, state):
        self.position = state["position"]


def train(
    run_dir: Path,
    *,
    batches: Any = None,
    step_fn: Callable = toy_step,
    callbacks: Any = None,
    reference: Reference | None = None,
    **config: Any,
) -> ToyState:
    """Twelve steps with a checkpoint every four, unless `config` says otherwise."""
    defaults = {"steps": 12, "log_every": 1, "checkpoint_every": 4, "tensorboard": False}
    return run_loop(
        run_dir=run_dir,
        config=LoopConfig(**(defaults | config)),
        state=make_state(),
        step_fn=step_fn,
        batches=batches or ToyBatches(),
        meta=META,
        reference=reference,
        **(callbacks or {}),
    )


if __name__ == "__main__":
    train(
        Path(sys.argv[1]),
        steps=int(sys.argv[2]),
        batches=ToyBatches(pause=float(sys.argv[3])),
        tensorboard=True,
    )
