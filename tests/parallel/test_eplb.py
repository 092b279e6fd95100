"""EPLB: DeepSeek's own example, what any placement keeps to, and the best number of copies by trying all."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.parallel.eplb import device_loads, place

# The example in the README of DeepSeek's repository.
LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    np.float64,
)


def test_deepseeks_example():
    assert place(LOADS, 16, devices=8, nodes=2, groups=4).tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_loads_of_devices_by_hand():
    placed = np.array([[0, 0, 1, 2, 0, 2]])
    np.testing.assert_allclose(device_loads(np.array([[6.0, 5.0, 2.0]]), placed, 3), [[4, 6, 3]])


@given(
    st.integers(0, 2**31),
    st.sampled_from([(16, 8, 1, 1), (16, 8, 4, 4), (24, 8, 2, 4), (24, 4, 2, 8), (32, 8, 4, 4), (16, 16, 1, 4)]),
)
def test_what_every_placement_keeps_to(seed, sizes):
    """All experts have a place, all load is borne, and what is of a group stands on one node."""
    places, devices, nodes, groups = sizes
    load = np.random.default_rng(seed).gamma(0.5, size=(3, 16))
    placed = place(load, places, devices=devices, nodes=nodes, groups=groups)
    assert placed.shape == (3, places) and all(set(row) == set(range(16)) for row in placed.tolist())
    loads = device_loads(load, placed, devices)
    np.testing.assert_allclose(loads.sum(axis=1), load.sum(axis=1))
    if nodes > 1:
        of_node = placed.reshape(3, nodes, -1) * groups // 16
        for layer in of_node:
            seen = [set(row) for row in layer.tolist()]
            assert all(len(row) == groups // nodes for row in seen) and len(set.union(*seen)) == groups


def test_copies_go_where_they_help_most():
    """The busiest copy of one device a place is as light as by any other numbers of copies."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        load = rng.gamma(0.7, size=(1, 4))
        busiest = device_loads(load, place(load, 8, devices=8), 8).max()
        counts = [c for c in itertools.product(range(1, 6), repeat=4) if sum(c) == 8]
        assert busiest == pytest.approx(min(np.max(load[0] / np.array(c)) for c in counts))


def test_uneven_loads_are_evened_out():
    """V3's shape, loads of a long tail: the busiest of 32 devices has 1.6 times the mean, then hardly more than it,
    less well where groups keep to nodes."""
    load = np.random.default_rng(0).lognormal(sigma=0.7, size=(4, 256))
    in_order = device_loads(load, np.tile(np.arange(256), (4, 1)), 32)
    assert np.all(in_order.max(axis=1) / in_order.mean(axis=1) > 1.6)
    for nodes, most in ((1, 1.02), (4, 1.12)):
        after = device_loads(load, place(load, 288, devices=32, nodes=nodes, groups=8), 32)
        assert np.all(after.max(axis=1) / after.mean(axis=1) < most)


@pytest.mark.parametrize(
    ("places", "options", "why"),
    [
        (16, {"devices": 8, "groups": 5}, "12 experts cannot be dealt to 5 groups, .*; to 4 they can"),
        (16, {"devices": 8, "nodes": 3, "groups": 4}, "4 groups cannot be dealt to 3 nodes"),
        (18, {"devices": 9, "nodes": 2, "groups": 4}, "9 devices cannot be dealt to 2 nodes"),
        (14, {"devices": 8}, "14 places for experts cannot be dealt to 8 devices, .*; 16 can"),
        (8, {"devices": 8}, "8 places are too few for 12 experts"),
        (16, {"devices": 0}, "16 places for experts cannot be dealt to 0 devices"),
    ],
)
def test_what_cannot_be_dealt_is_refused(places, options, why):
    with pytest.raises(ValueError, match=why):
        place(LOADS, places, **options)
