"""Experts in more places than there are experts, the busiest ones several times: what inference makes of a placement
(``eplb``)."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from deepseek_jax.files import read_json_object
from deepseek_jax.parallel.exchange import weight_spec
from deepseek_jax.parallel.mesh import current_mesh
from deepseek_jax.parallel.sharding import ShardingRules, constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placed:
    """Experts' matrices (P …), one for each place; expert e stands in the first ``count_E[e]`` of ``places_EC[e]``."""

    weight: Any
    places_EC: Any
    count_E: Any

    def __getitem__(self, index: Any) -> "Placed":
        """``[...]``, as an array has it."""
        assert index is Ellipsis, index
        return self

    def choose(self, experts_BSK: Int[Array, "B S K"]) -> Int[Array, "B S K"]:
        """The place that does each expert's work: its copies take turns along rows and along the batch."""
        B, S, _ = experts_BSK.shape
        turn_BS = jnp.arange(B, dtype=jnp.int32)[:, None] + jnp.arange(S, dtype=jnp.int32)
        return self.places_EC[experts_BSK, turn_BS[..., None] % self.count_E[experts_BSK]]


def place_experts(
    wi_ED2F: Any, wo_EFD: Any, expert_P: Int[np.ndarray, "P"], experts: int, rules: ShardingRules
) -> tuple[Placed, Any]:
    """Both matrices with the expert ``expert_P[p]`` in place p, where the mesh splits places as it did experts.

    Experts are sent to the devices by and by, one of each at a time: so many are all that is there beside both forms.
    """
    found = [np.flatnonzero(expert_P == expert) for expert in range(experts)]
    count_E = np.array([len(places) for places in found], np.int32)
    places_EC = np.array([np.resize(places, count_E.max()) for places in found], np.int32)
    lie, embed, width = rules.experts, rules.expert_embed, rules.expert_mlp
    axes = (lie, embed, None, width), (lie, width, embed)
    wi, wo = (_sent(w, expert_P, axes=of_w, rules=rules) for w, of_w in zip((wi_ED2F, wo_EFD), axes, strict=True))
    return Placed(wi, *_whole(places_EC, count_E, rules=rules)), wo


def read_placement(path: str | Path, dense_layers: int) -> list[list[int]]:
    """Of each MoE layer the expert in each place, from what ``deepseek-jax place`` has written."""
    rows = read_json_object(Path(path)).get("physical_to_logical_map")
    if not isinstance(rows, list):
        raise ValueError(f"{path} has no physical_to_logical_map: expected a file that deepseek-jax place has written")
    return rows[dense_layers:]


def as_places(placement: Sequence[Sequence[int]]) -> Int[np.ndarray, "L P"]:
    """As an array. ValueError where layers have unequal numbers of places."""
    sizes = sorted({np.size(row) for row in placement})
    if len(sizes) > 1:
        raise ValueError(f"a placement with layers of {sizes} places: expected as many in each")
    return np.array(placement, np.int32).reshape(len(placement), -1)


def check_places(expert_LP: Int[np.ndarray, "L P"], layers: int, experts: int, ways: int) -> None:
    """ValueError for a placement that is not this network's, or whose places such a mesh does not divide."""
    rows, places = expert_LP.shape
    if rows != layers:
        raise ValueError(f"a placement of {rows} layers, and the model has {layers} with experts")
    for layer, expert_P in enumerate(expert_LP):
        if sorted({*expert_P.tolist()}) != [*range(experts)]:
            raise ValueError(f"the placement of MoE layer {layer}: expected each of 0…{experts - 1} in a place or more")
    if places % ways:
        nearest = places - places % ways + ways
        raise ValueError(f"{places} places are not split over {ways} devices; the nearest is {nearest}")


@functools.partial(jax.jit, static_argnames="rules")
def _whole(places_EC, count_E, *, rules):
    return constrain(places_EC, rules, None, None), constrain(count_E, rules, None)


@functools.partial(jax.jit, static_argnames=("axes", "rules"))
def _sent(w, expert_P, *, axes, rules):
    group, spec = rules.experts, weight_spec(w, *axes)

    def local(w, expert_P):
        own = jax.tree.leaves(w)[0].shape[0]

        def take(j, found):
            def taken(there, x):
                every = jax.lax.all_gather(jax.lax.dynamic_index_in_dim(x, j, keepdims=False), group)
                here = (expert_P % own == j).reshape(-1, *[1] * (x.ndim - 1))
                return jnp.where(here, every[expert_P // own], there)

            return jax.tree.map(taken, found, w)

        zeros = jax.tree.map(lambda x: jnp.zeros((len(expert_P), *x.shape[1:]), x.dtype), w)
        return jax.lax.fori_loop(0, own, take, zeros)

    if (mesh := current_mesh()) is None or all(mesh.shape[name] == 1 for name in group):
        return jax.tree.map(lambda x: x[expert_P], w)
    specs = {"in_specs": (spec, PartitionSpec(group)), "out_specs": spec}
    return jax.shard_map(local, **specs, check_vma=False)(w, expert_P)
