"""AdamW with clipping and the learning-rate shape of V3 (section 4.2)."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import parameters
from deepseek_jax.typed import check_types


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. Defaults are V3's: its 14.8T tokens are constant to 10T, cosine to 14.3T, then two steps.

    ``constant_until=1`` is a constant rate; ``constant_until=0, cosine_until=1`` a plain cosine.
    """

    peak_lr: float = 2.2e-4
    """The highest learning rate."""
    warmup_steps: int | None = None
    """Updates over which the rate rises to it; by default V3's 2000, but at most a tenth of the run."""
    constant_until: float = 10.0 / 14.8
    """The part of the run up to which the rate stays there; 1: to the end."""
    cosine_until: float = 14.3 / 14.8
    """The part of the run at which its cosine has reached end_ratio."""
    end_ratio: float = 0.1
    """Of peak_lr, after the cosine."""
    tail_from: float = 14.633 / 14.8
    """The part of the run from which the rate is tail_ratio; not with a constant rate."""
    tail_ratio: float = 7.3e-6 / 2.2e-4
    """Of peak_lr, at the end."""
    b1: float = 0.9
    """Decay of Adam's first moment."""
    b2: float = 0.95
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Of matrices; norm gains and biases do not decay."""
    clip_norm: float = 1.0
    """The largest global norm that a gradient keeps."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """What Adam's moments are kept in; V3 has bfloat16 (section 3.3.2). Arithmetic is float32 either way."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("peak_lr", "clip_norm", "eps"):
            if not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        for name in ("b1", "b2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must lie in [0, 1)")
        if not 0 <= self.constant_until <= self.cosine_until <= 1:
            raise ValueError(
                f"constant_until={self.constant_until} and cosine_until={self.cosine_until}: expected "
                "0 ≤ constant_until ≤ cosine_until ≤ 1"
            )


def warmup_updates(config: OptimizerConfig, steps: int) -> int:
    """The updates that a run of ``steps`` warms up for."""
    return min(2000, steps // 10) if config.warmup_steps is None else config.warmup_steps


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate at each update of a run of ``steps`` updates."""
    warmup = warmup_updates(config, steps)

    def rate(step):
        done = step / max(steps, 1)
        warm = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        span = max(config.cosine_until - config.constant_until, 1e-9)
        fall = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((done - config.constant_until) / span, 0, 1)))
        ratio = config.end_ratio + (1 - config.end_ratio) * fall
        ratio = jnp.where((done >= config.tail_from) & (config.constant_until < 1), config.tail_ratio, ratio)
        return config.peak_lr * warm * ratio

    return rate


class Guarded(optax.GradientTransformationExtraArgs):
    """An optimizer whose update takes ``finite`` and, where that is false, gives its state back as it was."""


def guarded(optimizer: optax.GradientTransformation) -> Guarded:
    """Any optimizer as a guarded one."""
    if isinstance(optimizer, Guarded):
        return optimizer

    def update(updates, state, params=None, *, finite: jax.Array | bool = True, **extra):
        updates, new = optax.with_extra_args_support(optimizer).update(updates, state, params, **extra)
        return updates, keep_if(finite, new, state)

    return Guarded(optimizer.init, update)


def keep_if(finite: jax.Array | bool, new: Any, old: Any) -> Any:
    """``new`` where ``finite`` holds, else ``old``; trees of one structure."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def make_optimizer(config: OptimizerConfig, model: ModelConfig, steps: int) -> Guarded:
    """Clip by global norm, then AdamW. Matrices decay; norm gains and biases do not."""
    clip, moments = optax.clip_by_global_norm(config.clip_norm), _adam(config)
    decay = optax.add_decayed_weights(config.weight_decay, _decays(model))
    scale = guarded(optax.scale_by_learning_rate(learning_rate(config, steps)))
    return Guarded(*optax.chain(clip, optax.chain(moments, decay, scale)))


def _adam(config: OptimizerConfig) -> Guarded:
    """Adam's moments and direction, as in ``optax.scale_by_adam``.

    The direction comes from the moments kept. On a CPU that stands behind a barrier: XLA would fuse it with the old
    ones and have to copy those before it writes over them. On accelerators moments and parameters are then written by
    one kernel, which reads each number once; the barrier would make it two.
    """
    as_float32 = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float32))
    as_kept = functools.partial(jax.tree.map, lambda leaf: leaf.astype(config.moments_dtype))

    def init(params):
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, config.moments_dtype), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, zeros))

    def update(updates, state, params=None, *, finite: jax.Array | bool = True, **extra):
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, as_float32(state.mu), config.b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, as_float32(state.nu), config.b2, 2)
        new = optax.ScaleByAdamState(count, as_kept(mu), as_kept(nu))
        kept = keep_if(finite, new, state)
        new = jax.lax.platform_dependent(kept, cpu=jax.lax.optimization_barrier, default=lambda moments: moments)
        mean = optax.tree.bias_correction(as_float32(new.mu), config.b1, count)
        square = optax.tree.bias_correction(as_float32(new.nu), config.b2, count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.eps), mean, square), new

    return Guarded(init, update)


def _decays(model: ModelConfig) -> Any:
    axes = parameters.logical_axes(model)
    matrix = lambda path, _: path[-1].key not in ("gain", "b") and not path[-1].key.endswith("bias")  # noqa: E731
    return jax.tree_util.tree_map_with_path(matrix, axes, is_leaf=lambda x: isinstance(x, tuple))
