"""Topologies by name, and what collectives take on their links, against the arithmetic of rings and lines."""

import types

import numpy as np
import pytest

from deepseek_jax.parallel.chips import CHIPS
from deepseek_jax.parallel.topology import Links, Topology

V5P, TPU7X, H100 = (CHIPS[name] for name in ("v5p", "tpu7x", "h100"))


def links(text: str, shape: tuple[int, ...], names: tuple[str, ...], cores: int = 1) -> Links:
    """A mesh in the order of coordinates, the last of them the fastest."""
    topology = Topology.parse(text)
    if topology.chip.torus:
        places = [(s, at) for s in range(topology.slices) for at in np.ndindex(topology.shape) for _ in range(cores)]
        devices = [types.SimpleNamespace(coords=(*at, 0, 0), slice_index=s) for s, at in places]
    else:
        devices = [types.SimpleNamespace(process_index=i // 8) for i in range(topology.shape[0])]
    mesh = types.SimpleNamespace(devices=np.array(devices, object).reshape(shape), axis_names=names)
    return Links(topology, mesh)  # pyright: ignore[reportArgumentType]


def test_names():
    assert Topology.parse("v6e:16x16x2slices") == Topology("v6e", (16, 16), 2)
    assert str(Topology.parse("v5p:8x8x16")) == "v5p:8x8x16" and Topology.parse("h200:2048").platform == "cuda"
    for wrong, why in {
        "v9:2x2": "one of v5e",
        "v5p:8x8": "3 dimensions",
        "v5p": "as v5p:8x8x16",
        "h100:12": "whole nodes of 8",
        "h100:16x2slices": "whole nodes",
        "v6e:16x16x0slices": "expected CHIP:SHAPE",
    }.items():
        with pytest.raises(ValueError, match=why):
            Topology.parse(wrong)


def test_rings_and_lines_of_a_torus():
    """Along z a ring of 8 has two links; half of it is a line with one; both dimensions carry parts of a gather."""
    its = links("v5p:4x4x8", (4, 4, 8), ("x", "y", "z"))
    ring, half, plane = list(range(8)), list(range(4)), [i * 8 for i in range(16)]
    near = lambda found, size, rate: np.testing.assert_allclose(found, size / rate, rtol=1e-6)  # noqa: E731
    near(its.seconds("all-gather", 800, [ring]), 700, 2 * V5P.link)
    near(its.seconds("all-reduce", 800, [ring]), 1400, 2 * V5P.link)
    near(its.seconds("all-gather", 800, [half]), 600, V5P.link)
    near(its.seconds("all-gather", 1600, [plane]), 1500, 4 * V5P.link)
    # An eighth of what a device has goes n/4 hops on average, half each way: n/8 of it over each link of a ring.
    near(its.seconds("all-to-all", 800, [ring]), 800, V5P.link)
    near(its.seconds("all-to-all", 800, [[0, 1]]), 400, V5P.link)
    near(its.seconds("collective-permute", 800, [(0, 7)]), 800, V5P.link)
    near(its.seconds("collective-permute", 800, [(0, 4)]), 3200, V5P.link)
    assert its.axes([ring]) == ("z",) and its.axes([plane]) == ("x", "y") and not its.crosses([ring])


def test_two_devices_share_a_chips_links():
    its = links("tpu7x:4x4x4", (64, 2), ("chip", "core"), cores=2)
    ring = [i * 2 for i in range(4)]  # of one core each; the others' ring uses the same links
    np.testing.assert_allclose(its.seconds("all-gather", 800, [ring]), 600 * 2 / (2 * TPU7X.link), rtol=1e-6)
    both = list(range(8))
    np.testing.assert_allclose(its.seconds("all-gather", 800, [both]), 600 / (2 * TPU7X.link), rtol=1e-6)


def test_between_nodes_each_device_carries_its_part():
    """A gather over 2 nodes of 8: half comes over the slow links, in eighths, and is then passed on."""
    its = links("h100:16", (16,), ("data",))
    everyone = list(range(16))
    between, within = 1600 / 2 / 8 / H100.slow, 1600 * 7 / 8 / H100.link
    np.testing.assert_allclose(its.seconds("all-gather", 1600, [everyone]), between + within, rtol=1e-6)
    np.testing.assert_allclose(its.seconds("all-to-all", 1600, [[0, 8]]), 800 / H100.slow, rtol=1e-6)
    np.testing.assert_allclose(its.seconds("all-reduce", 1600, [[0, 1]]), 1600 / H100.link, rtol=1e-6)
    assert its.crosses([[0, 8]]) and not its.crosses([[0, 7], [8, 15]])
