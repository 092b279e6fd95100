"""GRPO's options together, as a user gives them: a run that stops and goes on is the run that does not."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from model.tiny import whole
from small import ONE_DEVICE, SPEAKER
from workflows import rewarded

from deepseek_jax.checkpoint.model import load
from deepseek_jax.cli.main import main
from deepseek_jax.files import read_json_lines
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.train.metrics import read_metrics
from deepseek_jax.workflows import grpo, own_run
from deepseek_jax.workflows.grpo import GRPOConfig, _check_processes
from deepseek_jax.workflows.stage_config import check_start

OPTIONS = [*rewarded.OPTIONS, "--reward", "format=2", "--step.microbatches", "1"]
# GSPO on advantages of tokens, with dynamic sampling that is never content, and a reference that moves.
OPTIONS += ["--loss.ratio", "sequence", "--loss.tis-cap", "2", "--loss.kl-weight", "0.1", "--reference-every", "1"]
OPTIONS += ["--rollout.replay-routing", "--rollout.pack", "64", "--rollout.resample", "2", "--rollout.tolerance", "0.9"]
OPTIONS += ["--task.tools.use", "calculator", "--task.tools.no-told"]
OPTIONS += ["--rollout.overlong-buffer", "4", "--inner-epochs", "2", "--minibatches", "2"]
OPTIONS += ["--loop.checkpoint-every", "1", "--loop.log-every", "1", "--loop.keep", "4", "--loop.no-tensorboard"]
CLOCKS = ("time", "seconds", "tokens_per_second", "peak_bytes_process", "rollout_seconds", "reward_seconds")
CLOCKS += ("train_seconds", "samples_per_second", "rollout_tokens_per_second")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rewarded.write_inputs(tmp_path, [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(9)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_of_them_train_and_a_run_goes_on_to_the_bit(folder: Path):
    run = lambda: main(["grpo", *OPTIONS, "--run-dir", "run", "--loop.steps", "2"])  # noqa: E731

    def lines():
        return [{name: value for name, value in line.items() if name not in CLOCKS} for line in read_metrics("run")]

    assert run() == 0
    whole_run = lines()
    assert [line["step"] for line in whole_run] == [1, 2]
    assert [line["asked"] for line in whole_run] == [8, 8]  # four at first, then four more
    for line in whole_run:
        assert line["finite"] == 1 and line["grad_norm"] > 0 and line["kl_sampler"] < 1e-6
        assert line["signal_groups_trained"] >= line["signal_groups"] > 0 and line["reward_errors"] == 0
        assert -1 <= line["reward_overlong"] < 0 and line["tis_capped"] == line["tool_calls"] == 0
    before, after = (jax.tree.leaves(load(folder / name).params) for name in ("model", "run"))
    assert any(np.any(old != new) for old, new in zip(before, after, strict=True))
    (folder / "run" / "result.json").unlink()
    shutil.rmtree(folder / "run" / "checkpoints" / "2")
    assert run() == 0 and lines() == whole_run


def test_a_run_that_samples_ahead_goes_on_with_the_questions_that_it_had_not_trained_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """One that stopped after its first step had sampled for the second and third. Each question is used once."""
    monkeypatch.setattr(own_run, "make_mesh", lambda config: ONE_DEVICE)
    plain = [option for option in OPTIONS if option != "--rollout.replay-routing"]
    options = plain[: plain.index("--loss.kl-weight")] + plain[plain.index("--loop.checkpoint-every") :]
    run = lambda: main(["grpo", *options, "--rollout.staleness", "2", "--run-dir", "run", "--loop.steps", "4"])  # noqa: E731
    assert run() == 0
    lines, first = read_metrics("run"), read_json_lines(folder / "run" / "rollouts.jsonl")
    assert [line["staleness"] for line in lines] == [0, 1, 2, 2]
    assert lines[0]["kl_sampler"] < 1e-6 < lines[2]["kl_sampler"]  # the weights that the loss needs are not 1
    assert all(
        line["finite"] == 1 and 0 < line["train_seconds"] < 1 / line["samples_per_second"] * 16 for line in lines
    )
    (folder / "run" / "result.json").unlink()
    for step in "234":
        shutil.rmtree(folder / "run" / "checkpoints" / step, ignore_errors=True)
    assert run() == 0
    assert [line["staleness"] for line in read_metrics("run")] == [0, 0, 1, 2]  # none is older than this process
    again = read_json_lines(folder / "run" / "rollouts.jsonl")
    for name in ("step", "question", "prompt"):
        assert [line[name] for line in again] == [line[name] for line in first]
    assert len({line["question"] for line in first[:32]}) == 8  # of nine rows


def test_packed_rows_need_not_be_divided_by_their_parts():
    few, packed = RolloutConfig(prompts=2, group=2), RolloutConfig(prompts=2, group=2, pack=64)
    GRPOConfig(rollout=packed, minibatches=3)
    with pytest.raises(ValueError, match="minibatches=3 does not divide the 4 rows"):
        GRPOConfig(rollout=few, minibatches=3)
    with pytest.raises(ValueError, match=r"minibatches=5: more than the 4 answers of rollout\.prompts=2"):
        GRPOConfig(rollout=packed, minibatches=5)


def test_a_mesh_must_divide_the_rows_and_columns_that_rollouts_have():
    """Packed rows are made as many as it needs, and the widest rows are known before any is sampled."""
    start = whole(SPEAKER, None, None, mesh=make_mesh(MeshConfig(data=4, context=2)))
    few = RolloutConfig(prompts=3, group=2, max_prompt=10, max_tokens=6)
    check_start(GRPOConfig(rollout=dataclasses.replace(few, pack=16)), start)
    with pytest.raises(ValueError, match=r"data=4 does not divide the 6 rows of rollout\.prompts=3, rollout\.group=2"):
        check_start(GRPOConfig(rollout=few), start)
    check_start(GRPOConfig(rollout=dataclasses.replace(few, prompts=4)), start)
    with pytest.raises(ValueError, match="context=2 does not divide columns=17; the nearest is 16 or 18"):
        check_start(GRPOConfig(rollout=dataclasses.replace(few, prompts=4, max_tokens=7)), start)


def test_returns_without_a_critic_are_refused():
    with pytest.raises(ValueError, match=r"rollout\.advantage='return': without a critic \(deepseek-jax ppo has one\)"):
        GRPOConfig(rollout=RolloutConfig(advantage="return"))


def test_the_evaluation_has_the_tools_of_the_task_unless_it_names_others(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(grpo, "open_exam", lambda evaluation, **_: asked.append(evaluation.task))
    options = ["grpo", "--init-from", "none", "--task.path", "train.jsonl", "--task.tools.use", "calculator"]
    options += ["--task.tools.calls", "2", "--evaluation.task.path", "train.jsonl"]
    assert main(options) == 1  # there is no such model
    assert main([*options, "--evaluation.task.tools.use", "mine.py:steps"]) == 1
    assert [(task.path, task.tools.use, task.tools.calls) for task in asked] == [
        (("train.jsonl",), ("calculator",), 2),
        (("train.jsonl",), ("mine.py:steps",), 4),
    ]


def test_prompts_that_processes_cannot_share_are_refused_with_the_nearest(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"rollout\.prompts=3 .* 2 processes; the nearest is 2 or 4"):
        _check_processes(GRPOConfig(rollout=RolloutConfig(prompts=3)))
