"""One train step for every loss: accumulate over microbatches, clip, update, move the routing bias, guard."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model import parameters, transformer
from deepseek_jax.parallel.layer_weights import Rounded
from deepseek_jax.parallel.sharding import placed, placed_as_state, split_by, split_rows
from deepseek_jax.train.optimizer import guarded, keep_if
from deepseek_jax.train.state import TrainState
from deepseek_jax.typed import check_least, check_types

Batch = dict[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


_IN_FLOAT32 = ("router", "gain", "b")  # names of parameters, beside biases


@runtime_checkable
class Loss(Protocol):
    """A loss that is a sum over rows once its normalisers are known."""

    def normalisers(self, batch: Batch) -> dict[str, jax.Array]: ...

    def __call__(
        self, model: transformer.Transformer, batch: Batch, norm: dict[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]: ...


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step does beside its loss."""

    microbatches: int = 1
    """Parts of a batch whose gradients are added up: less memory."""
    bias_update_speed: float = 0.001
    """How far a step moves the routing bias: V3's γ."""
    bias_frozen_from: int = 0
    """The step from which the bias stays; 0: never."""
    ema_decay: float = 0.0
    """Of the parameters' running mean; 0: none is kept."""
    gradient_sums: Literal["bfloat16", "float32"] = "bfloat16"
    """What gradients of matrices are added up in over the devices of a mesh, where compute.dtype is bfloat16: half the
    bytes. Each device adds up its own tokens in float32 before, and microbatches are added up in float32."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "microbatches")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: must lie in [0, 1)")


def make_step(
    config: ModelConfig,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    options: StepConfig,
    *,
    compute: ComputeConfig = ComputeConfig(),
    epochs: int = 1,
    minibatches: int = 1,
) -> Step:
    """The pure function ``(state, batch) -> (state, metrics)``; jit it with the state donated.

    A batch is split into ``minibatches``, and gone through ``epochs`` times: as many updates of the parameters, in one
    step; metrics are their mean, ``finite`` their least, what was ``dropped`` their sum. An update whose loss or
    gradient is not finite leaves parameters, moments, bias and running mean as they were and reports ``finite`` 0.
    """
    if epochs < 1 or minibatches < 1:
        raise ValueError(f"epochs={epochs}, minibatches={minibatches}: must be at least 1")
    optimizer = guarded(optimizer)
    build = functools.partial(parameters.merge, config, compute=compute)
    axes, rules = parameters.logical_axes(config), compute.rules
    as_parameters = functools.partial(placed, axes_tree=axes, rules=rules)
    as_state = functools.partial(placed_as_state, axes_tree=axes, rules=rules)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        if epochs * minibatches == 1:
            state, metrics = update(state, batch)
        else:
            missing = [name for name in getattr(loss, "several_updates_need", ()) if name not in batch]
            if missing:
                raise ValueError(f"{epochs * minibatches} updates per batch need {', '.join(missing)} in the batch")
            parts = split_rows(batch, minibatches, compute.rules, "minibatches")
            epoch = lambda state, _: jax.lax.scan(update, state, parts)  # noqa: E731
            state, every = jax.lax.scan(epoch, state, length=epochs)
            over = {"finite": jnp.min, "dropped": jnp.sum, "dropped_sum": jnp.sum}
            metrics = {name: over.get(name, jnp.mean)(value, axis=(0, 1)) for name, value in every.items()}
        return dataclasses.replace(state, step=state.step + 1), metrics

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        split = functools.partial(split_rows, parts=options.microbatches, rules=rules, name="step.microbatches")
        norm, params = loss.normalisers(batch), _multiplied(state.params, axes, options, compute)
        part = functools.partial(_gradient, build, loss, state, norm, params, as_state)
        gradients, value, parts = part(batch) if options.microbatches == 1 else _accumulated(part, split(batch))
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
        with jax.named_scope("optimizer"):
            params = as_state(state.params)
            updates, opt_state = optimizer.update(gradients, state.opt_state, params, finite=finite)
            params = keep_if(finite, optax.apply_updates(params, updates), params)
        load_LE, dropped_L = parts.pop("load", None), parts.pop("dropped", None)
        moved = _moved_bias(state, load_LE, options), _averaged(state.ema, params, options.ema_decay)
        router_bias, ema = keep_if(finite, moved, (state.router_bias, state.ema))
        params = as_parameters(params)
        new = dataclasses.replace(state, params=params, opt_state=opt_state, router_bias=router_bias, ema=ema)
        metrics = {"loss": value, **parts, "grad_norm": grad_norm, "finite": finite.astype(jnp.float32)}
        return new, metrics | _router_metrics(load_LE, dropped_L, router_bias)

    return step


def _router_metrics(
    load_LE: jax.Array | None, dropped_L: jax.Array | None, router_bias: jax.Array | None
) -> dict[str, jax.Array]:
    metrics = {} if load_LE is None else load_metrics(load_LE)
    if dropped_L is not None:  # choices (token, expert) of a step
        metrics |= {"dropped": dropped_L, "dropped_sum": jnp.sum(dropped_L)}
    if router_bias is not None:
        metrics["bias_range"] = jnp.mean(jnp.max(router_bias, 1) - jnp.min(router_bias, 1))
    return metrics


def load_metrics(load_LE: Float[Array, "L E"]) -> dict[str, jax.Array]:
    """Each layer's load as fractions, and MaxVio = (max load - mean load) / mean load, averaged over layers."""
    mean_L1 = jnp.maximum(jnp.mean(load_LE, axis=1, keepdims=True), 1e-9)
    return {
        "load": load_LE / (mean_L1 * load_LE.shape[1]),
        "max_vio": jnp.mean(jnp.max(load_LE / mean_L1, axis=1) - 1.0),
    }


def _multiplied(params: Any, axes_tree: Any, options: StepConfig, compute: ComputeConfig) -> Any:
    """The parameters as the layers get them. A gradient is rounded to its parameter's dtype before the mesh adds it up,
    so where that is to be in bfloat16 they are: all but those that are read in float32."""
    rules = compute.rules
    several = split_by((*rules.batch, *rules.sequence))
    if not several or "float32" in (options.gradient_sums, compute.dtype):
        return params
    matrix = lambda path: path[-1].key not in _IN_FLOAT32 and not path[-1].key.endswith("bias")  # noqa: E731

    def rounded(path, leaf, axes):
        if not matrix(path):
            return leaf
        if axes[0] == "layers":
            return Rounded(leaf, jnp.zeros(leaf.shape, compute.dtype))
        return placed([leaf.astype(compute.dtype)], [axes], rules)[0]

    return jax.tree_util.tree_map_with_path(rounded, params, axes_tree)


def _gradient(build, loss, state, norm, params, as_state, batch):
    """Of the loss of these rows: float32 or as it came from the mesh, where the optimizer's state lies; with the loss
    and its parts."""

    is_rounded = lambda leaf: isinstance(leaf, Rounded)  # noqa: E731
    trained = jax.tree.map(lambda leaf: leaf.gradient if is_rounded(leaf) else leaf, params, is_leaf=is_rounded)

    def value_and_parts(trained, rows):
        with_masters = lambda leaf, new: dataclasses.replace(leaf, gradient=new) if is_rounded(leaf) else new  # noqa: E731
        whole = jax.tree.map(with_masters, params, trained, is_leaf=is_rounded)
        return loss(build(whole, state.router_bias), rows, norm, state.step)

    (value, parts), gradients = jax.value_and_grad(value_and_parts, has_aux=True)(trained, batch)
    wide = lambda gradient, master: gradient.astype(master.dtype)  # noqa: E731
    return jax.tree.map(wide, as_state(gradients), state.params), value, parts


def _accumulated(part, stacked):
    """The sums of ``part`` over microbatches (M B …)."""
    shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], stacked))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
    add = lambda total, rows: (jax.tree.map(lambda sum, term: sum + term.astype(sum.dtype), total, part(rows)), None)  # noqa: E731
    return jax.lax.scan(add, zeros, stacked)[0]


def _moved_bias(state: TrainState, load_LE: jax.Array | None, options: StepConfig) -> jax.Array | None:
    """``b += γ sign(mean load - load)``: auxiliary-loss-free balancing (arXiv 2408.15664, V3 section 2.1.2)."""
    if state.router_bias is None or load_LE is None:
        return state.router_bias
    speed = jnp.float32(options.bias_update_speed)
    if options.bias_frozen_from:
        speed = jnp.where(state.step >= options.bias_frozen_from, 0.0, speed)
    error_LE = jnp.mean(load_LE, axis=1, keepdims=True) - load_LE
    # A loss without MTP returns no load for MTP's router, the last row, whose bias then rests.
    return state.router_bias.at[: len(load_LE)].add(speed * jnp.sign(error_LE))


def _averaged(ema, params, decay):
    if ema is None:
        return None
    return jax.tree.map(lambda mean, new: mean * decay + new.astype(mean.dtype) * (1 - decay), ema, params)
