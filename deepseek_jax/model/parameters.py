"""The pure half of a network: parameters as nested dicts of arrays, the form in which they are trained and saved.

``split`` takes a ``Transformer`` apart, ``merge`` puts it together; the rest makes parameters or says what they are.
"""

import functools
from typing import Any

import jax
from flax import nnx

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.layers import RouterBias
from deepseek_jax.model.stack import count_layers
from deepseek_jax.model.transformer import Transformer


def split(model: Transformer) -> tuple[dict[str, Any], jax.Array | None]:
    """Parameters and routing bias of a model as plain arrays."""
    _, params, bias = nnx.split(model, nnx.Param, RouterBias)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(bias).get("router_bias")


def merge(
    config: ModelConfig,
    params: dict[str, Any],
    router_bias: jax.Array | None,
    compute: ComputeConfig = ComputeConfig(),
) -> Transformer:
    """The model with these arrays: the inverse of ``split``; traceable. ``unstack``'s are taken as well."""
    stacked = "layers" not in params
    graph, param_state, bias_state = _abstract(config, compute, stacked)
    param_state, bias_state = jax.tree.map(lambda leaf: leaf, (param_state, bias_state))
    if not stacked:
        params = params | {"layers": dict(enumerate(params["layers"]))}
    nnx.replace_by_pure_dict(param_state, params)
    if router_bias is not None:
        nnx.replace_by_pure_dict(bias_state, {"router_bias": router_bias})
    return nnx.merge(graph, param_state, bias_state)


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """The same parameters with the layers taken out of their stacks: ``layers``, a tuple in the network's order."""
    stacks = [params[name] for name in ("dense_layers", "moe_layers") if name in params]
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for stack in stacks for i in range(count_layers(stack))]
    rest = {name: tree for name, tree in params.items() if name not in ("dense_layers", "moe_layers")}
    return rest | {"layers": tuple(layers)}


def init(
    config: ModelConfig, seed: int | jax.Array = 0, compute: ComputeConfig = ComputeConfig()
) -> tuple[dict[str, Any], jax.Array | None]:
    """Fresh parameters and a zero routing bias from an int or a key; traceable, so that ``jit`` can create them where
    they live."""
    return split(Transformer(config, compute=compute, rngs=nnx.Rngs(seed)))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """A tree like the parameters' with each one's logical axes; stacked layers have ``layers`` in front."""

    def axes(path, variable):
        named = variable.get_metadata("axes")
        return ("layers", *named) if len(named) < len(variable.shape) else named

    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    named = jax.tree_util.tree_map_with_path(axes, _abstract(config, ComputeConfig())[1], is_leaf=is_variable)
    return nnx.to_pure_dict(named)


def abstract_arrays(config: ModelConfig, compute: ComputeConfig = ComputeConfig()) -> tuple[dict[str, Any], Any]:
    """``split``'s result with shapes and dtypes in place of arrays; builds nothing."""
    _, params, bias = _abstract(config, compute)
    shapes = functools.partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return shapes(nnx.to_pure_dict(params)), shapes(nnx.to_pure_dict(bias)).get("router_bias")


@functools.cache
def _abstract(config: ModelConfig, compute: ComputeConfig, stacked: bool = True):
    model = nnx.eval_shape(lambda: Transformer(config, compute=compute, rngs=nnx.Rngs(0), stacked=stacked))
    return nnx.split(model, nnx.Param, RouterBias)
