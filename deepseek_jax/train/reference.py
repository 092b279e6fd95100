"""The policy that a KL term holds on to: a network of its own, beside the state that is trained."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.train.state import TrainState, float32_copy


class Reference:
    """The network that a run starts from, or with ``every`` a copy that becomes the policy every so many steps.

    A fixed one is never saved: its path and fingerprint stand in the checkpoint's meta. A moving one is saved.
    """

    def __init__(self, params: Any, router_bias: jax.Array | None, *, path: str, every: int = 0):
        if every < 0:
            raise ValueError(f"reference_every={every}: must be 0 (never) or more")
        self.params, self.router_bias = params, router_bias
        self.path, self.every = path, every
        self.meta: dict[str, Any] = {"every": every}
        if every:  # what it starts from is not its own
            self.arrays = float32_copy({"params": params, "router_bias": router_bias})
        else:
            self.meta |= {"path": path, "fingerprint": fingerprint((params, router_bias))}

    @property
    def arrays(self) -> dict[str, Any]:
        """What a checkpoint keeps of a moving one."""
        return {"params": self.params, "router_bias": self.router_bias}

    @arrays.setter
    def arrays(self, arrays: dict[str, Any]) -> None:
        self.params, self.router_bias = arrays["params"], arrays["router_bias"]

    def follow(self, state: TrainState, finite: jax.Array) -> None:
        """Become the policy after a step that it is due at, if that step was good; one that moves waits for it."""
        if self.every and int(state.step) % self.every == 0 and finite:
            self.arrays = float32_copy({"params": state.params, "router_bias": state.router_bias})


def fingerprint(arrays: Any) -> str:
    """A name for the numbers of a pytree, the same on every mesh and for float32 and bfloat16 copies.

    Each array gives two sums of its bfloat16 bits modulo 2³², one of them weighted by place: integers, which any order
    of summing leaves alone.
    """

    @jax.jit
    def sums(leaf):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
        place = sum(
            jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(31**axis) for axis in range(bits.ndim)
        )
        return jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    found = jax.tree_util.tree_flatten_with_path(arrays)[0]
    lines = [f"{jax.tree_util.keystr(path)} {leaf.shape} {[*map(int, sums(leaf))]}" for path, leaf in found]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
