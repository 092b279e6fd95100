"""Checkpoints elsewhere than in the run's folder: where a file there says, and on a bucket."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint.bucket import served

from deepseek_jax.checkpoint import CheckpointStore, restore_params
from deepseek_jax.checkpoint.finding import checkpoint_steps, find_model
from deepseek_jax.checkpoint.places import check_directory, point_to, resolved
from deepseek_jax.data.files import find_files
from deepseek_jax.train.loop_config import LoopConfig

STATE = {"step": np.int32(0), "params": {"w": np.arange(12.0, dtype=np.float32).reshape(3, 4)}}


def state(step):
    return {"step": jnp.int32(step), "params": {"w": jnp.asarray(STATE["params"]["w"]) + step}}


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))


def save(place, *steps):
    with CheckpointStore(place, keep=2) as store:
        for step in steps:
            store.save(step, state(step), loader={"position": step}, meta={"stage": "x"}, block=True)
        assert store.steps() == list(steps)[-2:]


@pytest.fixture(scope="module")
def bucket():
    """The objects of gs://bucket, which is in memory here."""
    pytest.importorskip("gcsfs", reason="pip install gcsfs")
    with served() as (environment, objects), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield objects


def test_checkpoints_of_a_bucket_come_back(bucket, tmp_path):
    point_to(tmp_path / "checkpoints", "gs://bucket/a/checkpoints")
    save(tmp_path / "checkpoints", 1, 2, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert {name.split("/")[2] for name in bucket if name.startswith("a/")} == {"2", "3"}
    assert checkpoint_steps(tmp_path / "checkpoints") == [2, 3] and find_model(tmp_path) == tmp_path
    with CheckpointStore("gs://bucket/a/checkpoints", keep=2) as store:
        found, loader, meta = store.restore(abstract())
    assert int(found["step"]) == 3 and loader == {"position": 3} and meta["stage"] == "x"
    np.testing.assert_array_equal(found["params"]["w"], STATE["params"]["w"] + 3)
    wanted = {"params": {"w": jax.ShapeDtypeStruct((3, 4), jnp.float32)}}
    tree, _ = restore_params(tmp_path / "checkpoints", wanted, step=2)
    np.testing.assert_array_equal(tree["params"]["w"], STATE["params"]["w"] + 2)


def test_what_a_bucket_has_of_an_unfinished_or_damaged_checkpoint_is_passed_over(bucket):
    save("gs://bucket/b", 1, 2)
    lost = next(name for name in bucket if name.startswith("b/2/state/d/"))
    del bucket[lost]
    with CheckpointStore("gs://bucket/b", keep=2) as store:
        with pytest.warns(UserWarning, match="b/2 is damaged: state/d/.* is missing; step 1 is used instead"):
            found, _, _ = store.restore(abstract())
        assert int(found["step"]) == 1 and store.steps() == [1]
        store.save(2, state(20), loader={}, meta={}, block=True)  # comes to this step again
        assert int(store.restore(abstract())[0]["step"]) == 20


def test_a_file_names_another_folder(tmp_path):
    point_to(tmp_path / "run" / "checkpoints", str(tmp_path / "large"))
    save(tmp_path / "run" / "checkpoints", 1)
    assert checkpoint_steps(tmp_path / "large") == [1] and find_model(tmp_path / "run") == tmp_path / "run"
    for place in (tmp_path / "run" / "checkpoints", tmp_path / "large"):
        with pytest.raises(ValueError, match=r"loop.checkpoints='gs://bucket/run': .*large holds checkpoints of this"):
            point_to(place, "gs://bucket/run")
    point_to(tmp_path / "new" / "checkpoints", "gs://bucket/run")
    assert str(resolved(tmp_path / "new" / "checkpoints")) == "gs://bucket/run"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_directory("s3://bucket/run"), "not to s3://bucket/run.*aws s3 sync"),
        (lambda: check_directory("gs://bucket"), "expected gs://BUCKET/FOLDER|gcsfs"),
        (lambda: LoopConfig(steps=1, checkpoints="s3://bucket/run"), "checkpoints='s3://bucket/run': .*aws s3 sync"),
        (
            lambda: LoopConfig(steps=1, checkpoints="large"),
            "checkpoints='large': expected gs://BUCKET/FOLDER, or a path",
        ),
        (lambda: find_files("gs://bucket/rows.jsonl"), "gs://bucket/rows.jsonl: files are local or mounted"),
        (lambda: find_model("s3://bucket/model"), "s3://bucket/model: .* local or mounted, no URL"),
    ],
)
def test_a_url_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
