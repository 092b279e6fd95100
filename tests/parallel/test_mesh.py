"""The one place where meshes are made: shapes that fit the devices, Auto axes, and the current mesh."""

import jax
import pytest
from jax.sharding import AxisType

from deepseek_jax.parallel.mesh import AXES, MeshConfig, current_mesh, make_mesh


def test_data_takes_the_devices_that_the_other_axes_leave():
    assert jax.device_count() == 8  # emulated: see conftest.py
    assert dict(make_mesh().shape) == dict(data=8, fsdp=1, expert=1, context=1, tensor=1)
    assert dict(make_mesh(MeshConfig(expert=2, tensor=2)).shape)["data"] == 2
    assert dict(make_mesh(MeshConfig(fsdp=8)).shape) == dict(data=1, fsdp=8, expert=1, context=1, tensor=1)


def test_every_axis_is_auto_and_in_order():
    for mesh in (make_mesh(), make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])):
        assert mesh.axis_names == AXES == ("data", "fsdp", "expert", "context", "tensor")
        assert set(mesh.axis_types) == {AxisType.Auto}


def test_some_of_the_devices():
    some = jax.devices()[2:6]
    mesh = make_mesh(MeshConfig(expert=2), some)
    assert mesh.devices.ravel().tolist() == some
    assert dict(mesh.shape) == dict(data=2, fsdp=1, expert=2, context=1, tensor=1)
    assert make_mesh(devices=jax.devices()[:1]).size == 1


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
