"""The one place where meshes are made: shapes that fit the devices, Auto axes, neighbours, and the current mesh."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from parallel.topology import needs_libtpu, run_apart

from deepseek_jax.parallel.mesh import AXES, MeshConfig, arranged, current_mesh, make_mesh


def test_data_takes_the_devices_that_the_other_axes_leave():
    assert jax.device_count() == 8  # emulated: see conftest.py
    assert dict(make_mesh().shape) == dict(pipe=1, data=8, fsdp=1, expert=1, context=1, tensor=1)
    assert dict(make_mesh(MeshConfig(expert=2, tensor=2)).shape)["data"] == 2
    assert dict(make_mesh(MeshConfig(fsdp=8)).shape) == dict(pipe=1, data=1, fsdp=8, expert=1, context=1, tensor=1)


def test_every_axis_is_auto_and_in_order():
    for mesh in (make_mesh(), make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])):
        assert mesh.axis_names == AXES == ("pipe", "data", "fsdp", "expert", "context", "tensor")
        assert set(mesh.axis_types) == {AxisType.Auto}


def test_some_of_the_devices():
    some = jax.devices()[2:6]
    mesh = make_mesh(MeshConfig(expert=2), some)
    assert mesh.devices.ravel().tolist() == some
    assert dict(mesh.shape) == dict(pipe=1, data=2, fsdp=1, expert=2, context=1, tensor=1)
    assert make_mesh(devices=jax.devices()[:1]).size == 1


@dataclasses.dataclass(frozen=True)
class Fake:
    """A device as far as its place tells; ``slice_index`` is there where jax knows it."""

    id: int
    process_index: int
    platform: str = "gpu"
    coords: tuple[int, ...] = (0, 0, 0)  # a GPU of a topology has them too
    device_kind: str = "NVIDIA H100"


@dataclasses.dataclass(frozen=True)
class FakeTPU(Fake):
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    slice_index: int = 0
    coords: tuple[int, ...] = (0, 0, 0)
    core_on_chip: int = 0


def nodes(count: int, each: int = 8) -> list[Fake]:
    return [Fake(node * each + i, node) for node in range(count) for i in range(each)]


def slices(count: int) -> list[FakeTPU]:
    """Of 2 × 2 × 2 chips, four to a host."""
    places = [(x, y, z) for z in range(2) for y in range(2) for x in range(2)]
    return [
        FakeTPU(n * 8 + i, n * 2 + i // 4, slice_index=n, coords=place)
        for n in range(count)
        for i, place in enumerate(places)
    ]


def placed(devices, attribute: str, **sizes: int) -> np.ndarray:
    array = arranged(tuple(sizes.get(axis, 1) for axis in AXES), devices)
    assert len(set(array.ravel().tolist())) == len(devices)
    return np.vectorize(lambda device: getattr(device, attribute))(array).squeeze()


@pytest.mark.parametrize("devices, attribute", [(nodes(4), "process_index"), (slices(4), "slice_index")])
def test_leading_axes_take_the_slices_and_nodes(devices, attribute):
    """The rest stays within one, and along an axis that is split between them each has a run of its own."""
    whole = np.arange(4)[:, None]
    np.testing.assert_array_equal(placed(devices, attribute, data=4, tensor=8), whole.repeat(8, 1))
    np.testing.assert_array_equal(placed(devices, attribute, expert=32), whole.repeat(8, 1).ravel())
    halves = placed(devices, attribute, data=2, expert=16)
    np.testing.assert_array_equal(halves, np.arange(4).reshape(2, 2).repeat(8, 1))
    # 3 does not divide 4 nodes: the next axis takes them all.
    np.testing.assert_array_equal(placed(nodes(4, 3), "process_index", data=3, fsdp=4), [[0, 1, 2, 3]] * 3)


def test_devices_come_in_any_order():
    shuffled = np.random.default_rng(0).permutation(np.array(nodes(2), object)).tolist()
    np.testing.assert_array_equal(
        placed(shuffled, "process_index", data=2, expert=8), np.arange(2)[:, None].repeat(8, 1)
    )


def torus(*shape: int, cores: int = 1, slices: int = 1) -> list[FakeTPU]:
    places = [
        (n, *np.unravel_index(i, shape), core)
        for n in range(slices)
        for i in range(math.prod(shape))
        for core in range(cores)
    ]
    return [
        FakeTPU(i, 0, slice_index=n, coords=tuple(map(int, chip)), core_on_chip=core)
        for i, (n, *chip, core) in enumerate(places)
    ]


def spans(devices, axis: str, **sizes: int) -> tuple[set[int], ...]:
    """How far the devices along an axis reach along each dimension of the torus, in each of their groups."""
    array = make_mesh(MeshConfig(**sizes, blocks=(axis,)), devices).devices  # pyright: ignore
    assert len({device.id for device in array.ravel()}) == len(devices)
    groups = np.moveaxis(array, AXES.index(axis), -1).reshape(-1, sizes[axis])
    coords = np.array([[device.coords for device in group] for group in groups])
    return tuple(set((column.max(axis=1) - column.min(axis=1) + 1).tolist()) for column in np.moveaxis(coords, -1, 0))


def test_an_axis_lies_in_blocks_of_the_torus():
    """As near to cubes as there are, within a slice, a chip's two devices side by side; every device once."""
    assert spans(torus(4, 4, 8), "expert", fsdp=16, expert=8) == ({2}, {2}, {2})
    assert spans(torus(4, 4, 8), "expert", fsdp=2, expert=8, context=8) == ({2}, {2}, {2})
    assert spans(torus(2, 2, 8), "expert", fsdp=2, expert=16) == ({2}, {2}, {4})
    assert spans(torus(2, 2, 4, cores=2), "expert", fsdp=4, expert=8) == ({1}, {2}, {2})
    assert spans(torus(2, 2, 2, slices=2), "expert", fsdp=4, expert=4) == ({1}, {2}, {2})


def test_blocks_that_there_are_not():
    with pytest.raises(ValueError, match="only TPUs lie in a torus, not NVIDIA H100"):
        make_mesh(MeshConfig(expert=8, blocks=("expert",)), nodes(2))  # pyright: ignore
    with pytest.raises(ValueError, match="6 devices do not fill 2 × 2 × 2 chips"):
        make_mesh(MeshConfig(expert=6, blocks=("expert",)), torus(2, 2, 2)[1:7])  # pyright: ignore
    with pytest.raises(ValueError, match=r"blocks=\('experts',\): expected axes, each once, of pipe, data"):
        MeshConfig(blocks=("experts",))


def test_nodes_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="unequally many devices: 8, 3"):
        arranged((1, 11, 1, 1, 1, 1), nodes(2)[:11])


@needs_libtpu
def test_axes_lie_along_the_torus_of_a_real_topology():
    """The ring of 8 of v5p:8x8x8 goes along one dimension, each step one link; 32 take part of a second one."""
    run_apart("""
        from jax.experimental import topologies
        from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
        import numpy as np

        devices = topologies.get_topology_desc("v5p:8x8x8", "tpu").devices
        coords = lambda mesh: np.array([d.coords for d in mesh.devices.ravel()]).reshape(*mesh.devices.shape, 3)
        apart = lambda c, axis: np.abs(np.diff(c, axis=axis)).sum(-1)
        ring = coords(make_mesh(MeshConfig(fsdp=64, expert=8), devices))
        assert (apart(ring, 3) == 1).all()
        shared = coords(make_mesh(MeshConfig(fsdp=16, expert=32), devices))
        assert len(set(map(tuple, shared.reshape(-1, 3)))) == 512
        several = topologies.get_topology_desc("v5p:2x2x2", "tpu", num_slices=2).devices
        mesh = make_mesh(MeshConfig(fsdp=8, tensor=2), several)
        assert [d.slice_index for d in mesh.devices.ravel()] == [0] * 8 + [1] * 8
    """)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (MeshConfig(data=3), r"data 3 .*needs 3 devices, but there are 8"),
        (MeshConfig(data=4, fsdp=4), r"data 4 × fsdp 4 .*needs 16 devices, but there are 8"),
        (MeshConfig(expert=3), r"expert 3 .*needs 6 devices, but there are 8"),
        (MeshConfig(tensor=16), r"tensor 16 needs 16 devices, but there are 8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config, named):
    with pytest.raises(ValueError, match=named):
        make_mesh(config)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (dict(fsdp=0), "fsdp=0.*at least 1"),
        (dict(data=-1), "data=-1.*negative"),
        (dict(tensor=2.0), "tensor=2.0.*int"),
        (dict(expert="2"), "expert='2'.*int"),
    ],
)
def test_a_wrong_size_is_refused(values, named):
    with pytest.raises(ValueError, match=named):
        MeshConfig(**values)


def test_the_current_mesh_is_the_one_that_was_set_inside_jit_too():
    first, second = make_mesh(), make_mesh(MeshConfig(fsdp=2))
    seen = []
    look = jax.jit(lambda x: seen.append(current_mesh()) or x)
    assert current_mesh() is None
    for mesh in (first, second, first):
        with jax.set_mesh(mesh):
            assert current_mesh() == mesh.abstract_mesh
            look(0)
    assert seen == [first.abstract_mesh, second.abstract_mesh]  # part of jit's key: another one is another program
    assert current_mesh() is None
