"""Tokens that come to their experts on other devices: what one device computes, what is dropped, what is sent."""

import functools
import itertools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from model.tiny import V2, config
from parallel.topology import needs_libtpu, run_apart

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.parallel import rounds
from deepseek_jax.parallel.collectives import Collective, collectives
from deepseek_jax.parallel.dispatch import Dispatch, lay_out, reached
from deepseek_jax.parallel.exchange import exchange
from deepseek_jax.parallel.legal import check_layout
from deepseek_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import ShardingRules
from deepseek_kernels import InStack, Target, routed_experts

E, D, F, K = 8, 12, 10, 3
B, S = 8, 6
RULES = ShardingRules()


def experts(*operands: Any, **options: Any) -> jax.Array:
    return routed_experts(*operands[:-1], most=operands[-1], **options)


@functools.cache
def operands() -> Any:
    """Tokens, weights, choices, matrices, and what the sum is weighted by: all choose expert 0, none the last."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    odds = np.array([0.4, 0.2, 0.2, 0.1, 0.06, 0.04])
    others = [rng.choice(np.arange(1, E - 1), K - 1, replace=False, p=odds) for _ in range(B * S)]
    chosen = rng.permuted(np.insert(np.array(others), 0, 0, axis=1), axis=1).reshape(B, S, K)
    weights = jnp.asarray(rng.uniform(0.1, 1, (B, S, K)), jnp.float32)
    matrices = normal(E, D, 2, F), normal(E, F, D)
    return normal(B, S, D), weights, jnp.asarray(chosen, jnp.int32), *matrices, normal(B, S, D)


def run(dispatch: Dispatch = Dispatch(), chosen=None, rules: ShardingRules = RULES) -> Any:
    """((y, dropped), gradients by tokens, weights and matrices)."""
    x, weights, default, wi, wo, dy = operands()
    chosen = default if chosen is None else chosen

    def loss(x, weights, wi, wo):
        y, dropped = exchange(experts, x, weights, chosen, wi, wo, rules, dispatch)
        return jnp.sum(y * dy), (y, dropped)

    return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(x, weights, wi, wo)[::-1]


def on(**axes: Any) -> Any:
    return jax.set_mesh(make_mesh(MeshConfig(**axes), devices=jax.devices()[: math.prod(axes.values())]))


def assert_close(found: Any, expected: Any) -> None:
    def error(a, b):
        return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))

    errors = jax.tree.map(error, (found[0][0], found[1]), (expected[0][0], expected[1]))
    assert max(jax.tree.leaves(errors)) < 1e-5, errors


expected = functools.cache(run)
ROOM = 100.0
CASES = [
    ({"expert": 8}, Dispatch()),
    ({"expert": 2, "fsdp": 2, "context": 2}, Dispatch()),
    ({"expert": 8}, Dispatch("all_to_all", ROOM)),
    ({"expert": 2, "fsdp": 2, "tensor": 2}, Dispatch("all_to_all", ROOM)),
    ({"expert": 4, "data": 2}, Dispatch("all_to_all", ROOM, nodes=2)),
]


@pytest.mark.parametrize(("axes", "dispatch"), CASES, ids=str)
@pytest.mark.parametrize("least", [rounds.LEAST, 8], ids=["one round", "rounds"])
def test_with_room_for_all_a_mesh_changes_nothing(axes, dispatch, least, monkeypatch):
    """Uneven loads, an expert that all tokens choose and one that none does; values and gradients in float32. The
    second time expert 0's device has room for a part of its choices at a time."""
    if least == 8 and "data" not in axes and "context" not in axes:
        pytest.skip("twice is enough")
    monkeypatch.setattr(rounds, "LEAST", least)
    with on(**axes):
        found = run(dispatch)
    assert_close(found, expected())
    assert found[0][1] == 0


def test_whole_experts_are_gathered_over_an_axis_that_splits_them_too():
    rules = ShardingRules(experts=("expert", "fsdp"), experts_gathered=("fsdp",), expert_embed=())
    with on(expert=2, fsdp=2, tensor=2):
        assert_close(run(Dispatch("all_to_all", ROOM), rules=rules), expected())
    with on(expert=2, fsdp=4), pytest.raises(ValueError, match="experts_gathered=.'expert'.* the last of experts"):
        run(rules=ShardingRules(experts=("expert", "fsdp"), experts_gathered=("expert",), expert_embed=()))


def copies_by_hand(choices, parts, own, rows):
    """For each part the tokens that it gets, in order, up to ``rows`` of them; (those, how many choices are lost)."""
    found, lost = [], 0
    for part in range(parts):
        mine = [[part * own <= e < (part + 1) * own for e in row] for row in choices]
        tokens = [t for t, row in enumerate(mine) if any(row)]
        found.append(tokens[:rows])
        lost += sum(sum(mine[t]) for t in tokens[rows:])
    return found, lost


@pytest.mark.parametrize(("parts", "rows"), [(2, 20), (2, 40), (8, 3), (8, 40)])
def test_copies_lie_where_a_loop_puts_them(parts, rows):
    choices = np.random.default_rng(parts).integers(-2, E + 2, (40, K))  # some are no expert's
    laid = jax.jit(lay_out, static_argnums=(1, 2, 3))(jnp.asarray(choices), parts, E // parts, rows)
    copies, dropped = jax.device_get(laid)
    tokens, lost = copies_by_hand(choices, parts, E // parts, rows)
    assert dropped == lost and (lost > 0) == (rows < 40)
    width = copies.slot_TK.shape[1]
    for part, row in itertools.product(range(parts), range(rows)):
        slot = part * rows + row
        if row < len(tokens[part]):
            assert copies.choice_P[slot] // width == tokens[part][row]
            assert np.argwhere(copies.slot_TK == slot).tolist() == [[tokens[part][row], copies.choice_P[slot] % width]]
        else:
            assert copies.choice_P[slot] == 40 * width and not np.any(copies.slot_TK == slot)
    assert np.sum(copies.slot_TK < parts * rows) == sum(map(len, tokens))


def survivors(chosen, ways, dispatch):
    """The choices that reach their expert, -1 for others: device by device, hop by hop, with loops."""
    own, inside = E // ways, ways // dispatch.nodes
    count = chosen.shape[0] * chosen.shape[1] // ways
    kept, per_device = np.full(chosen.reshape(-1, K).shape, -1), chosen.reshape(ways, count, K)
    by_node = dispatch.rows(count, K, dispatch.nodes) if dispatch.nodes > 1 else count
    rows = dispatch.rows(count * dispatch.nodes, K, ways)
    for node, place in itertools.product(range(dispatch.nodes), range(inside)):
        here = []  # (device, token, choices) that come to this device of the node
        for device in range(ways):
            if device % inside == place:
                tokens = copies_by_hand(per_device[device], dispatch.nodes, inside * own, by_node)[0][node]
                here += [(device, t, per_device[device][t]) for t in tokens]
        local = [[e - node * inside * own for e in choices] for *_, choices in here]
        for part, tokens in enumerate(copies_by_hand(local, inside, own, rows)[0]):
            for device, t, choices in (here[i] for i in tokens):
                mine = choices // own == node * inside + part
                kept[device * count + t] = np.where(mine, choices, kept[device * count + t])
    return kept.reshape(chosen.shape)


@pytest.mark.parametrize(
    "dispatch", [Dispatch("all_to_all", 0.8), Dispatch("all_to_all", 0.8, nodes=2, groups=4, chosen_groups=2)], ids=str
)
def test_what_finds_no_room_is_dropped_and_counted(dispatch):
    """As many as loops count; the rest is what one device computes without those choices, gradients too."""
    chosen = np.asarray(operands()[2])
    with on(expert=4, data=2):
        found = run(dispatch)
    kept = np.concatenate([survivors(half, 4, dispatch) for half in np.split(chosen, 2)])
    lost = np.sum(kept < 0)
    assert found[0][1] == lost and 5 < lost < chosen.size // 2
    assert_close(found, run(chosen=jnp.asarray(kept, jnp.int32)))


@pytest.mark.parametrize(("parts", "groups", "chosen"), [(2, 1, 1), (8, 8, 4), (64, 8, 4), (4, 8, 4)])
def test_the_share_of_tokens_that_reach_a_part(parts, groups, chosen, top=8):
    """Against drawing them: experts one by one from all that the chosen groups have."""
    rng, draws, size = np.random.default_rng(0), 20_000, 64
    group = np.argsort(rng.random((draws, groups)), axis=1)[:, :chosen]
    own = np.take_along_axis(group, rng.integers(0, chosen, (draws, top)), axis=1)
    expert = own * (size // groups) + rng.integers(0, size // groups, (draws, top))
    share = np.mean(np.any(expert // (size // parts) == 0, axis=1))
    assert reached(top, parts, groups, chosen) == pytest.approx(share, abs=0.015)
    if groups == 1:
        assert reached(top, parts) == 1 - (1 - 1 / parts) ** top


def test_layers_of_a_stack_and_a_mesh_of_the_batch_alone():
    """What decoding reads where it lies is not sliced; without an axis for experts nothing is exchanged."""
    x, weights, chosen, wi, wo, _ = operands()
    stacks = [InStack(jnp.stack([0 * w, w]), jnp.int32(1)) for w in (wi, wo)]
    seen = []

    def spy(*operands):
        seen.append(type(operands[3]))
        return experts(*operands)

    mesh = make_mesh(MeshConfig(expert=4, tensor=2))
    given = jax.device_put((x, weights, chosen, *stacks), NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        y, _ = jax.jit(functools.partial(exchange, spy, rules=RULES))(*given)
    assert seen == [InStack]
    np.testing.assert_allclose(y, expected()[0][0], rtol=1e-4, atol=1e-5)
    with on(data=8):
        program = jax.jit(functools.partial(exchange, experts, rules=RULES, dispatch=Dispatch("all_to_all")))
        assert collectives(program.lower(x, weights, chosen, wi, wo).compile().as_text() or "") == []


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (dict(dispatch="ring"), "dispatch"),
        (dict(dispatch_capacity=0.0), "dispatch_capacity=0.0: must be above 0"),
        (dict(dispatch_nodes=0), "dispatch_nodes=0"),
        (dict(dispatch_nodes=2), "dispatch_nodes=2: dispatch='gather' has no hops"),
    ],
)
def test_fields_that_make_no_sense_are_refused(values, named):
    with pytest.raises(ValueError, match=named):
        ComputeConfig(**values)


def test_puts_are_refused_where_no_gpu_can_do_them():
    with on(expert=2), pytest.raises(ValueError, match="dispatch='puts': it needs Hopper GPUs, not cpu.*all_to_all"):
        run(Dispatch("puts"))


def test_layouts_that_cannot_be_are_refused():
    with on(expert=4), pytest.raises(ValueError, match="dispatch_nodes=3 .* 4 devices.* 1, 2 or 4"):
        run(Dispatch("all_to_all", nodes=3))
    sizes, compute = dict.fromkeys(AXES, 1) | {"expert": 4}, ComputeConfig(dispatch="all_to_all", dispatch_nodes=3)
    with pytest.raises(ValueError, match="dispatch_nodes=3 .* 4 devices of expert: 1, 2 or 4 do"):
        check_layout(config(V2), compute, sizes)
    compute = ComputeConfig(rules=ShardingRules(experts_gathered=("fsdp",)))
    with pytest.raises(ValueError, match="experts_gathered=.'fsdp',.: must be the last of experts=.'expert'"):
        check_layout(config(V2), compute, sizes)
    x, weights, chosen, wi, wo, _ = operands()
    rules = ShardingRules(experts=("tensor",), expert_mlp=())
    with on(tensor=2), pytest.raises(ValueError, match="all_to_all.*tensor"):
        exchange(experts, x, weights, chosen, wi, wo, rules, Dispatch("all_to_all"))


# What is sent, by the compiled program, of four devices.

ROWS, WIDE, HIDDEN, MANY, TOP = 128, 1024, 256, 8, 6


def program(devices, axes: dict[str, Any], dispatch: Dispatch, dtype: str) -> str:
    """The HLO of value and gradients of a layer's experts."""
    mesh = make_mesh(MeshConfig(**axes), devices)
    rows = (ROWS * 4, 1)
    shapes = {(*rows, WIDE): dtype, (*rows, TOP): "float32"}
    place = lambda shape, dtype, *names: jax.ShapeDtypeStruct(  # noqa: E731
        shape, dtype, sharding=NamedSharding(mesh, RULES.spec(names))
    )
    tokens = [place(shape, kind, "batch", None, None) for shape, kind in shapes.items()]
    chosen = place((*rows, TOP), "int32", "batch", None, None)
    wi = place((MANY, WIDE, 2, HIDDEN), dtype, "experts", "expert_embed", None, "expert_mlp")
    wo = place((MANY, HIDDEN, WIDE), dtype, "experts", "expert_mlp", "expert_embed")

    def loss(x, weights, wi, wo, chosen):
        by_kernels = functools.partial(experts, target=Target.of(devices[0]))
        y, dropped = exchange(by_kernels, x, weights, chosen, wi, wo, RULES, dispatch)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), dropped

    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
        return step.lower(*tokens, wi, wo, chosen).compile().as_text() or ""


PROGRAMS = {
    "gather": ({"expert": 4}, Dispatch()),
    "all_to_all": ({"expert": 4}, Dispatch("all_to_all", 1.0)),
    "two hops": ({"expert": 4}, Dispatch("all_to_all", 1.0, nodes=2)),
    "fsdp": ({"expert": 2, "fsdp": 2}, Dispatch()),
}


PLATFORMS = ["cpu", pytest.param("tpu", marks=[needs_libtpu, pytest.mark.slow])]


@functools.cache
def of_tpu() -> dict[str, str]:
    """All of them for v5p but the slowest, in bfloat16, by one process of its own."""
    out = run_apart(  # 50 s of a processor
        """
        import json
        from jax.experimental import topologies
        from parallel.test_dispatch import PROGRAMS, program
        devices = topologies.get_topology_desc("v5p:2x2x1", "tpu").devices
        names = [name for name in PROGRAMS if name != "two hops"]
        print(json.dumps({name: program(devices, *PROGRAMS[name], "bfloat16") for name in names}))
        """,
        limit=280,
    )
    return json.loads(out.splitlines()[-1])


def found_in(platform: str, name: str) -> tuple[list[Collective], int]:
    """The collectives that move as much as half of one device's tokens, and the bytes of a number."""
    itemsize = 2 if platform == "tpu" else 4
    text = of_tpu()[name] if platform == "tpu" else program(jax.devices()[:4], *PROGRAMS[name], "float32")
    large = [one for one in collectives(text) if one.shape_bytes >= ROWS * WIDE * itemsize // 2]
    return [one for one in large if one.group_size > 1], itemsize


@pytest.mark.parametrize("platform", PLATFORMS)
def test_gathered_tokens_are_all_that_is_sent(platform):
    """Forward they are gathered and their sums scattered; backward the same of the gradients. No expert moves."""
    found, itemsize = found_in(platform, "gather")
    size = 4 * ROWS * WIDE * itemsize
    kinds = ["all-gather"] * 2 + ["reduce-scatter"] * 2
    assert sorted((one.kind, one.shape_bytes, one.group_size) for one in found) == [(kind, size, 4) for kind in kinds]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_copies_are_all_that_is_sent(platform):
    """(n - 1)(1 - (1 - 1/n)^K) tokens' worth: tokens, and sums, and of both the gradients."""
    found, itemsize = found_in(platform, "all_to_all")
    sent = 3 * math.ceil(ROWS * (1 - (1 - 1 / 4) ** TOP)) * WIDE * itemsize
    assert [(one.kind, one.sent_bytes) for one in found] == [("all-to-all", sent)] * 4


def test_two_hops_send_a_token_to_another_node_once():
    """Two nodes of two devices: between nodes (1 - 1/2^K) tokens' worth, for both devices there; then inside."""
    found, itemsize = found_in("cpu", "two hops")
    between = math.ceil(ROWS * (1 - (1 - 1 / 2) ** TOP)) * WIDE * itemsize
    inside = math.ceil(2 * ROWS * (1 - (1 - 1 / 4) ** TOP)) * WIDE * itemsize
    groups: dict[Any, int] = {((0, 2), (1, 3)): between, ((0, 1), (2, 3)): inside}
    assert sorted(one.sent_bytes for one in found) == sorted([between, inside] * 4)
    assert all(one.kind == "all-to-all" and groups[tuple(sorted(one.groups))] == one.sent_bytes for one in found)


@needs_libtpu
@pytest.mark.slow
def test_parts_of_a_width_are_gathered_and_their_gradients_scattered():
    """A device's own experts, over fsdp alone, in bfloat16 both ways: no gradient is summed whole."""
    found, itemsize = found_in("tpu", "fsdp")
    tokens, wo = 2 * ROWS * WIDE * itemsize, MANY // 2 * HIDDEN * WIDE * itemsize
    sizes = [(kind, size, 2) for kind in ("all-gather", "reduce-scatter") for size in (tokens, tokens, wo, 2 * wo)]
    assert sorted((one.kind, one.shape_bytes, one.group_size) for one in found) == sorted(sizes)
