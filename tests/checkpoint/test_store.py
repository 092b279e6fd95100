"""Checkpoints come back as they were saved, on any mesh, and nothing that goes wrong loses a good one."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.checkpoint import CheckpointStore, DamagedCheckpointError, restore_params
from deepseek_jax.checkpoint import store as store_module


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class ToyState:
    step: jax.Array
    params: dict
    opt_state: tuple


META = {"model": {"width": 16, "layers": 2, "rope": {"base": 10000.0}, "dims": (1, 2)}, "stage": "pretrain"}


def mesh_of(*shape: int) -> Mesh:
    names = ("data", "tensor")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def make_state(value: float = 0.0, mesh: Mesh | None = None, spec: PartitionSpec | None = None) -> ToyState:
    mesh = mesh or mesh_of(1)
    place = NamedSharding(mesh, spec or PartitionSpec())
    whole = NamedSharding(mesh, PartitionSpec())
    grid = jnp.arange(8 * 16, dtype=jnp.float32).reshape(8, 16) + value
    return ToyState(
        step=jax.device_put(jnp.int32(value), whole),
        params={"w": jax.device_put(grid, place), "b": jax.device_put(grid[0].astype(jnp.bfloat16), whole)},
        opt_state=({"mu": jax.device_put(2 * grid, place)}, jax.device_put(jnp.float32(0.5), whole)),
    )


def abstract_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save_steps(directory: Path, *steps: int, **options) -> None:
    with CheckpointStore(directory, keep=options.pop("keep", 5), **options) as store:
        for step in steps:
            store.save(step, make_state(step), loader={"position": step}, meta=META)


def assert_same(found, wanted) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    ("saved_on", "saved_spec", "read_on", "read_spec"),
    [
        ((1,), PartitionSpec(), (1,), PartitionSpec()),
        ((8,), PartitionSpec("data"), (4, 2), PartitionSpec("tensor", "data")),
        ((2, 4), PartitionSpec("data", "tensor"), (1,), PartitionSpec()),
        ((1,), PartitionSpec(), (2, 4), PartitionSpec(None, ("data", "tensor"))),
    ],
)
def test_comes_back_on_another_mesh(tmp_path, saved_on, saved_spec, read_on, read_spec):
    with CheckpointStore(tmp_path / "checkpoints", keep=2) as store:
        state = make_state(3, mesh_of(*saved_on), saved_spec)
        store.save(3, state, loader={"position": 7, "seed": 1}, meta=META)
        store.wait()
        wanted = make_state(3, mesh_of(*read_on), read_spec)
        found, loader, meta = store.restore(abstract_of(wanted), meta=META)
    assert_same(found, wanted)
    assert loader == {"position": 7, "seed": 1}
    assert meta["stage"] == "pretrain" and meta["model"]["dims"] == [1, 2]


def test_the_next_steps_may_donate_what_is_being_saved(tmp_path):
    """On CPU a copy to the host is a view: unprotected, the steps below would write into the save."""
    many = {f"w{i}": jnp.full((256, 1024), float(i)) for i in range(16)}
    before = {name: np.array(array) for name, array in many.items()}
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1000.0, tree), donate_argnums=0)
    many = step(many)
    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(1, many, loader={}, meta={})
        for _ in range(20):
            many = step(many)
        jax.block_until_ready(many)
    found, _, _ = CheckpointStore(tmp_path, keep=1).restore(abstract_of(many))
    for name, array in before.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array + 1000.0)


def test_keeps_the_newest_and_the_best(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: float("nan"), 4: 0.5, 5: None, 6: 0.1}
    modes: list[tuple[Literal["max", "min"], int]] = [("max", 2), ("min", 6)]
    for mode, best in modes:
        with CheckpointStore(tmp_path / mode, keep=2, best_metric="eval/score", best_mode=mode) as store:
            for step, score in scores.items():
                metrics = None if score is None else {"eval/score": score, "eval/other": 1.0}
                store.save(step, make_state(step), loader={}, meta=META, metrics=metrics)
            store.wait()
            assert store.steps() == sorted({best, 5, 6})
    # A new process knows the best of the old one.
    with CheckpointStore(tmp_path / "max", keep=1, best_metric="eval/score") as store:
        store.save(7, make_state(7), loader={}, meta=META, metrics={"eval/score": 0.3}, block=True)
        assert store.steps() == [2, 7]
    with CheckpointStore(tmp_path / "last", keep=2) as store:
        for step in scores:
            store.save(step, make_state(step), loader={}, meta=META)
        store.wait()
        assert store.steps() == [5, 6] and store.latest_step() == 6


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.parent != folder)


def test_any_lost_or_short_file_is_noticed_and_the_step_before_is_used(tmp_path):
    save_steps(tmp_path / "whole", 1, 2)
    abstract = abstract_of(make_state(0))
    names = [path.relative_to(tmp_path / "whole") for path in files_of(tmp_path / "whole" / "2")]
    assert {name.parts[1] for name in names} == {"state", "loader", "meta"}
    for number, name in enumerate([*names, Path("2/inventory.json")]):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", directory)
        broken = directory / name
        content = broken.read_bytes()
        if number % 2 or not content:
            broken.unlink()
        else:
            broken.write_bytes(content[: len(content) // 2])
        store = CheckpointStore(directory, keep=2)
        with pytest.raises(DamagedCheckpointError, match=rf"{directory}/2 is damaged: .*{name.name}"):
            store.restore(abstract, step=2)
        with pytest.warns(UserWarning, match=rf"{directory}/2 is damaged.*; step 1 is used instead"):
            state, loader, _ = store.restore(abstract)
        assert int(state.step) == 1 and loader == {"position": 1}
        assert store.steps() == [1]
        assert len(list(directory.glob("2.damaged-*"))) == 1
    with CheckpointStore(directory, keep=2) as store:  # and the step can be saved again
        store.save(2, make_state(2), loader={}, meta=META, block=True)
        assert int(store.restore(abstract)[0].step) == 2


def test_a_flipped_bit_is_noticed(tmp_path):
    save_steps(tmp_path, 4)
    data = max(files_of(tmp_path / "4" / "state"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=f"every checkpoint in {tmp_path} is damaged"):
        CheckpointStore(tmp_path, keep=1).restore(abstract_of(make_state(0)))
    assert (tmp_path / "4").is_dir()  # the next run must not start from nothing either


def test_an_unfinished_save_is_not_a_checkpoint(tmp_path):
    save_steps(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    with CheckpointStore(tmp_path, keep=2) as store:
        assert store.steps() == [1]
        assert int(store.restore(abstract_of(make_state(0)))[0].step) == 1
        store.save(3, make_state(3), loader={}, meta=META, block=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]  # swept up


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_no_half_of_it(tmp_path, monkeypatch):
    """It is moved away under its whole name first; what is left of it goes with the next save."""
    with CheckpointStore(tmp_path, keep=1) as store:
        monkeypatch.setattr(store, "_delete", lambda: None)
        for step in (1, 2):
            store.save(step, make_state(step), loader={}, meta={}, block=True)
        assert store.steps() == [2] and (tmp_path / "deleted" / "1").is_dir()
    save_steps(tmp_path, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_nothing_there(tmp_path):
    store = CheckpointStore(tmp_path / "none", keep=1)
    assert store.latest_step() is None
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*none"):
        store.restore({})
    save_steps(tmp_path, 1, 3)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 2 .*\[1, 3\]"):
        CheckpointStore(tmp_path, keep=1).read_meta(2)
    assert CheckpointStore(tmp_path, keep=1).read_meta()["model"]["width"] == 16


def test_a_checkpoint_of_another_model_is_refused_by_its_fields(tmp_path):
    save_steps(tmp_path, 1)
    store = CheckpointStore(tmp_path, keep=1)
    other = META | {"model": {"width": 32, "rope": {"base": 1.0}, "dims": (1, 2), "experts": 4}}
    with pytest.raises(ValueError, match="of another model") as caught:
        store.restore(abstract_of(make_state(0)), meta=other)
    for part in ("width is 16 there and 32 here", "layers is 2 there", "experts is '(absent)' there", "rope"):
        assert part in str(caught.value)
    assert "dims" not in str(caught.value)


def test_arrays_that_do_not_fit_are_named(tmp_path):
    save_steps(tmp_path, 1)
    store = CheckpointStore(tmp_path, keep=1)
    wrong = abstract_of(make_state(0))
    wrong.params["w"] = jax.ShapeDtypeStruct((4, 16), jnp.float32)
    wrong.params["b"] = jax.ShapeDtypeStruct((16,), jnp.float32)
    wrong.params["extra"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    wrong.opt_state = wrong.opt_state[:1]
    with pytest.raises(ValueError, match="does not fit this state") as caught:
        store.restore(wrong)
    for part in (
        "params/w is float32[8, 16] there and float32[4, 16] here",
        "params/b is bfloat16[16] there and float32[16] here",
        "params/extra is missing there",
        "opt_state/1 is unknown here",
    ):
        assert part in str(caught.value)


def test_parameters_alone_for_inference(tmp_path):
    save_steps(tmp_path, 1, 2)
    mesh = mesh_of(8)
    place = NamedSharding(mesh, PartitionSpec("data"))
    abstract = {
        "params": {
            "w": jax.ShapeDtypeStruct((8, 16), jnp.bfloat16, sharding=place),  # another dtype is a request
            "b": jax.ShapeDtypeStruct((16,), jnp.bfloat16),
        }
    }
    tree, meta = restore_params(tmp_path, abstract)
    want = make_state(2).params
    assert tree["params"]["w"].sharding == place and tree["params"]["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(tree["params"]["w"]), np.asarray(want["w"].astype(jnp.bfloat16)))
    np.testing.assert_array_equal(np.asarray(tree["params"]["b"]), np.asarray(want["b"]))
    assert meta["stage"] == "pretrain"
    files_of(tmp_path / "2" / "state")[0].unlink()
    with pytest.warns(UserWarning, match="step 1 is used instead"):
        tree, _ = restore_params(tmp_path, abstract)
    np.testing.assert_array_equal(np.asarray(tree["params"]["b"]), np.asarray(make_state(1).params["b"]))
    assert (tmp_path / "2").is_dir()  # a reader moves nothing
    with pytest.raises(ValueError, match="params/none is missing there"):
        restore_params(tmp_path, {"params": {"none": jax.ShapeDtypeStruct((), jnp.float32)}}, step=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep must be at least 1, not 0"),
        ({"keep": 1, "directory": "s3://bucket/run"}, "local or mounted.*aws s3 sync"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CheckpointStore(**({"directory": tmp_path} | options))


@pytest.mark.parametrize("name", ["a[1]", "lr=[0.1,0.2]", "what?", "all*"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused_before_a_save(tmp_path, name):
    with (
        CheckpointStore(tmp_path / name / "checkpoints", keep=1) as store,
        pytest.raises(ValueError, match=r"path with any of \[ \* \? in it"),
    ):
        store.save(1, make_state(1), loader={}, meta={})
    assert not (tmp_path / name).exists()


def test_a_save_that_did_not_merge_is_an_error_and_a_good_one_can_be_read_there(tmp_path, monkeypatch):
    save_steps(tmp_path / "good", 1)
    (tmp_path / "good").rename(tmp_path / "moved[1]")
    abstract = {"params": {"b": jax.ShapeDtypeStruct((16,), jnp.float32)}}
    tree, _ = restore_params(tmp_path / "moved[1]", abstract)
    np.testing.assert_array_equal(np.asarray(tree["params"]["b"]), np.asarray(make_state(1).params["b"]))
    monkeypatch.setattr(store_module, "check_directory", lambda directory: None)
    store = CheckpointStore(tmp_path / "bad[1]", keep=1)
    with pytest.raises(RuntimeError, match=r"the checkpoint of step 1 in .*bad\[1\] is not whole: its state was not"):
        store.save(1, make_state(1), loader={}, meta={}, block=True)
    assert store.steps() == []


FULL_DISK = """
import resource, signal, sys
import jax, jax.numpy as jnp
from deepseek_jax.checkpoint import CheckpointStore

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write over the limit fails with EFBIG, as on a full disk
store = CheckpointStore(sys.argv[1], keep=2)
state = {"w": jax.random.normal(jax.random.key(0), (300_000,))}
store.save(1, state, loader={}, meta={}, block=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    store.save(2, state, loader={}, meta={})
    store.wait()
except OSError as error:
    print("OSError:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(store.steps())
store.save(3, state, loader={}, meta={})
store.close()
store.close()
print(store.steps())
"""


@pytest.mark.parametrize("limit", [100_000, 64])
def test_no_room_is_one_sentence_and_loses_nothing(tmp_path, limit):
    """The process must also end quietly: threads that were left open would write to standard error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said, after, later = done.stdout.splitlines()
    assert f"the checkpoint of step 2 does not fit in {tmp_path}; the checkpoint of step 1 is safe" in said
    assert after == "[1]"
    assert later == "[1, 3]"
    assert done.stderr == ""
    abstract = {"w": jax.ShapeDtypeStruct((300_000,), jnp.float32)}
    state, _, _ = CheckpointStore(tmp_path, keep=1).restore(abstract)
    np.testing.assert_array_equal(state["w"], jax.random.normal(jax.random.key(0), (300_000,)))
