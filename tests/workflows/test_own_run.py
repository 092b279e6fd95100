"""What every stage does around its own work: its folder, signals, silence, and where it starts from."""

import dataclasses
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from model.tiny import weights, whole
from small import ONE_DEVICE, SPEAKER, tokenizer
from workflows.test_stage import CONFIG, Rows

from deepseek_jax.saying import doing, say
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.run_lock import LOCK, run_lock
from deepseek_jax.workflows import own_run
from deepseek_jax.workflows.own_run import open_start, owns_run
from deepseek_jax.workflows.row_batches import LoaderBatches
from deepseek_jax.workflows.sft import SFTConfig
from deepseek_jax.workflows.stage import train_stage
from deepseek_jax.workflows.stage_config import StageConfig


@owns_run("run_dir")
def stage(config: StageConfig) -> str:
    with doing("packing") as tell:
        tell("3 documents")
        say(f"in {config.run_dir}")
    assert (Path(config.run_dir) / LOCK).exists()
    if config.seed == 9:
        os.kill(os.getpid(), signal.SIGTERM)
    return "result"


def test_a_stage_holds_its_folder_and_speaks_unless_quiet(tmp_path, capsys):
    config = StageConfig(run_dir=str(tmp_path / "run"))
    assert stage(config) == "result" and not (tmp_path / "run").exists()
    assert capsys.readouterr().err == f"packing …\nin {tmp_path}/run\n"
    assert stage(dataclasses.replace(config, quiet=True)) == "result" and capsys.readouterr().err == ""
    with run_lock(tmp_path / "run"), pytest.raises(ValueError, match="run: this process trains there already"):
        stage(config)


def test_of_the_processes_of_one_run_the_first_alone_takes_the_folder_and_speaks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(own_run.jax, "process_index", lambda: 1)
    with run_lock(tmp_path / "run"):
        assert stage(StageConfig(run_dir=str(tmp_path / "run"))) == "result"
    assert capsys.readouterr().err == ""


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="log_to='nowhere'"):
        stage(StageConfig(log_to=("nowhere",)))
    with pytest.raises(ValueError, match="run_dir is empty: give --run-dir"):
        stage(StageConfig(run_dir=""))
    with pytest.raises(ValueError, match=r"run_dir='runs/a\[1\]': checkpoints cannot be written"):
        StageConfig(run_dir="runs/a[1]")
    assert not list(tmp_path.iterdir())


def test_a_signal_outside_of_training_is_one_line_and_leaves_no_lock(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="SIGTERM: stopped; the same command goes on from what was saved"):
        stage(StageConfig(run_dir=str(tmp_path / "run"), seed=9))
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_does_not_read_what_it_started_from(tmp_path, monkeypatch):
    """And one that begins has its state alone in memory."""
    params, bias = jax.tree.map(jnp.copy, weights(SPEAKER))
    start = whole(SPEAKER, params, bias, tokenizer(), ONE_DEVICE)
    monkeypatch.setattr(own_run, "load", lambda path, **options: start)
    monkeypatch.setattr(own_run, "described", str)
    config = SFTConfig(run_dir=str(tmp_path), init_from="before", mesh=CONFIG.mesh)

    config = dataclasses.replace(config, loop=CONFIG.loop, optimizer=CONFIG.optimizer)

    def train(model):
        loss = LanguageModelLoss(chunk=8, mtp_weight=0.0)
        return train_stage(config, stage="toy", start=model, loss=loss, batches=LoaderBatches(Rows()))

    monkeypatch.setattr(own_run, "make_mesh", lambda config: ONE_DEVICE)
    assert open_start(config) is start
    trained, _ = train(start)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params)) and not bias.is_deleted()
    monkeypatch.setattr(own_run, "load", lambda path, **options: pytest.fail(f"{path} was read"))
    again, facts = train(open_start(config))
    assert facts["steps_here"] == 0
    same = jax.tree.map(lambda a, b: bool((a == b).all()), trained.params, again.params)
    assert all(jax.tree.leaves(same)) and again.text.fingerprint == trained.text.fingerprint
