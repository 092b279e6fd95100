"""Going on with a stage: what may change since its checkpoint, and what is refused by name."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import weights, whole
from small import SPEAKER, tokenizer
from train.cases import documents, pack

from deepseek_jax.checkpoint import reading
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.metrics import read_metrics
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.reference import Reference
from deepseek_jax.workflows.row_batches import LoaderBatches
from deepseek_jax.workflows.stage import train_stage
from deepseek_jax.workflows.stage_config import StageConfig
from deepseek_jax.workflows.stage_result import RESULT


class Rows:
    """The same eight rows, over and over."""

    def __next__(self):
        return pack([documents(seed, [9, 7]) for seed in range(8)])

    def state(self):
        return {}

    def restore(self, state):
        pass


CONFIG = StageConfig(
    optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=0, constant_until=0.0, cosine_until=1.0, tail_ratio=0.1),
    loop=LoopConfig(steps=4, log_every=1, checkpoint_every=2, tensorboard=False),
    mesh=MeshConfig(data=1),
)


def run(config: StageConfig, reference: Reference | None = None):
    params, bias = jax.tree.map(jnp.copy, weights(SPEAKER))  # they are used up
    devices = jax.devices()[: config.mesh.data]
    start = whole(SPEAKER, params, bias, tokenizer(), make_mesh(config.mesh, devices))
    start = dataclasses.replace(start, compute=config.compute)
    return train_stage(
        config,
        stage="toy",
        start=start,
        loss=LanguageModelLoss(chunk=8, mtp_weight=0.0),
        batches=LoaderBatches(Rows()),
        reference=reference,
    )


def held(shift: float = 0.0, path: str = "runs/before") -> Reference:
    params, bias = weights(SPEAKER)
    return Reference(params | {"embed": params["embed"] + shift}, bias, path=path)


def changed(config: StageConfig, **fields: Any) -> StageConfig:
    return dataclasses.replace(config, **fields)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> StageConfig:
    config = changed(CONFIG, run_dir=str(tmp_path_factory.mktemp("stage") / "run"))
    run(config, held())
    return config


def test_compute_mesh_and_more_steps_may_change_and_the_schedule_keeps_its_length(stopped):
    longer = dataclasses.replace(CONFIG.loop, steps=6, log_every=2, keep=3)
    other = ComputeConfig(dtype="bfloat16", remat="full")
    longer_config = changed(stopped, loop=longer, compute=other, mesh=MeshConfig(data=2))
    (Path(stopped.run_dir) / RESULT).write_text("{}")
    _, facts = run(longer_config, held())
    assert (facts["steps"], facts["steps_here"], facts["tokens_seen"]) == (6, 2, 6 * 8 * 16)
    assert facts["loss"] > 0 and facts["seconds"] > 0 and facts["peak_bytes_process"] > 1e7
    assert not (Path(stopped.run_dir) / RESULT).exists()  # it was of four steps
    history = json.loads((Path(stopped.run_dir) / "config.json").read_text())["history"]
    changes = {"loop.steps": [4, 6], "compute.dtype": ["float32", "bfloat16"], "mesh.data": [1, 2]}
    assert [entry["step"] for entry in history] == [4] and history[0]["changed"].items() >= changes.items()
    _, again = run(longer_config, held())  # it measures nothing anew
    assert again == facts | {"steps_here": 0}
    rates = {line["step"]: line["lr"] for line in read_metrics(stopped.run_dir)}
    cosine = lambda step: 1e-3 * (0.1 + 0.45 * (1 + np.cos(np.pi * min(step / 4, 1))))  # noqa: E731
    assert rates == pytest.approx({step: cosine(step - 1) for step in (1, 2, 3, 4, 6)}, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: changed(c, seed=3), "seed is 0 there and 3 here"),
        (
            lambda c: changed(c, optimizer=dataclasses.replace(c.optimizer, peak_lr=0.5)),
            r"optimizer.peak_lr is 0.001 there and 0.5 here",
        ),
        (
            lambda c: changed(c, loop=dataclasses.replace(c.loop, steps=3)),
            r"loop.steps is \d there and 3 here, which is",
        ),
    ],
)
def test_anything_else_is_refused_by_name(stopped, change, message):
    with pytest.raises(ValueError, match=f"holds a run with other settings: {message}.*may change run_dir, compute"):
        run(change(stopped), held())


def test_a_run_goes_on_where_its_folder_was_moved_to(tmp_path):
    there = changed(CONFIG, run_dir=str(tmp_path / "old" / "run"))
    run(there, held(path=f"{tmp_path}/old/before"))
    shutil.move(tmp_path / "old", tmp_path / "new")
    there = changed(there, run_dir=str(tmp_path / "new" / "run"))
    _, facts = run(there, held(path=f"{tmp_path}/new/before"))
    assert facts["steps_here"] == 0
    with pytest.raises(ValueError, match="reference.path is '.*/old/before' there and '.*/new/else' here"):
        run(there, held(path=f"{tmp_path}/new/else"))


def test_another_reference_is_refused(stopped):
    with pytest.raises(ValueError, match="settings: reference.fingerprint is '[0-9a-f]+' there and '[0-9a-f]+' here"):
        run(stopped, held(0.1))
    with pytest.raises(ValueError, match="reference.path is 'runs/before' there and '\\(absent\\)' here"):
        run(stopped)


def test_a_run_of_the_old_format_is_refused(stopped, monkeypatch):
    monkeypatch.setattr(reading, "FORMAT_VERSION", 3)
    with pytest.raises(ValueError, match="has format version 2; here 3 is needed: go on with the release"):
        run(changed(stopped, seed=3), held())  # said before what else differs
