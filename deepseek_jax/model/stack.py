"""Layers of a kind in a stack: taken out one after another, read where they lie, computed again or kept."""

from typing import Any

import jax
from flax import nnx

from deepseek_jax.parallel.layer_weights import weight_of_layer
from deepseek_jax.parallel.sharding import ShardingRules
from deepseek_kernels import BlockScaled, InStack
from deepseek_kernels.kept import KEPT


def weights_of_layer(state: Any, rules: ShardingRules) -> Any:
    """A layer's variables, whose gradients lie where the optimizer's state does (``weight_of_layer``)."""
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    weight = lambda leaf: leaf.replace(weight_of_layer(leaf[...], leaf.get_metadata("axes"), rules))  # noqa: E731
    return jax.tree.map(weight, state, is_leaf=is_variable)


def in_stack(stacks: Any, layer: Any) -> Any:
    """Each weight as (stack, layer), for the products to read."""
    is_weight = lambda leaf: isinstance(leaf, BlockScaled)  # noqa: E731
    return jax.tree.map(lambda stack: InStack(stack, layer), stacks, is_leaf=is_weight)


def stacks_of(tree: Any) -> Any:
    """The stacks of a tree of ``InStack``."""
    return jax.tree.map(lambda leaf: leaf.stack, tree, is_leaf=lambda leaf: isinstance(leaf, InStack))


def layers_between(layers: Any, low: int, high: int, size: int) -> Any:
    """The layers low…high-1 of a stack of ``size``."""
    if (low, high) == (0, size):
        return layers
    graph, state = nnx.split(layers)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[low:high], state))


def rematerialised(function, remat: str, *, looped: bool):
    """``full`` keeps nothing of a layer for the backward pass, ``kernels`` what the kernels of attention and experts
    gave, ``dots`` these and its matrix products, ``none`` everything.

    looped: it is the body of a loop, whose backward pass is another one; elsewhere XLA would find that what is computed
    again equals what it has, and keep that.
    """
    if remat == "none":
        return function
    policies = jax.checkpoint_policies
    policy = {"full": None, "kernels": policies.save_only_these_names(KEPT)}.get(remat)
    if remat == "dots":
        policy = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KEPT)
        )
    return jax.checkpoint(function, policy=policy, prevent_cse=not looped)


def count_layers(stack: Any) -> int:
    """Of a stack."""
    return len(jax.tree.leaves(stack)[0])
