"""PPO as a user runs it: policy and critic learn, and a run that is killed becomes the run that was not."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from small import SPEAKER
from workflows import rewarded
from workflows.miniature import TESTS

from deepseek_jax import load
from deepseek_jax.checkpoint.reading import restore_params
from deepseek_jax.cli.main import main
from deepseek_jax.model import parameters
from deepseek_jax.model.scores import scoring
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.train.metrics import read_metrics
from deepseek_jax.workflows.ppo import PPOConfig
from deepseek_jax.workflows.recipe import load_recipe

STEPS = 4
OPTIONS = [*rewarded.OPTIONS]
OPTIONS += ["--critic.kl-reward", "0.01", "--critic.gae-lambda", "0.9", "--minibatches", "2"]
OPTIONS += ["--optimizer.peak-lr", "1e-2", "--critic.optimizer.peak-lr", "1e-2", "--critic.optimizer.warmup-steps", "0"]
OPTIONS += [
    "--loop.steps",
    str(STEPS),
    "--loop.checkpoint-every",
    "2",
    "--loop.log-every",
    "1",
    "--loop.no-tensorboard",
]
CLOCKS = ("time", "seconds", "per_second", "peak_bytes_process")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    rewarded.write_inputs(folder, [{"question": f"{n}+1?"} for n in range(9)])
    return folder


def lines(run: Path):
    return [{name: value for name, value in line.items() if not name.endswith(CLOCKS)} for line in read_metrics(run)]


def arrays(run: Path):
    """Policy and critic of the newest checkpoint."""
    critic, bias = parameters.abstract_arrays(scoring(SPEAKER, 1))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        {"critic": {"params": critic, "router_bias": bias}},
    )
    return load(run).params, restore_params(run / "checkpoints", wanted)[0]["critic"]


def test_a_run_that_is_killed_becomes_the_run_that_was_not(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["ppo", *OPTIONS, "--run-dir", "whole"]) == 0
    killed = [sys.executable, str(TESTS / "workflows" / "killed.py"), "grpo", str(STEPS), "ppo", *OPTIONS]
    sources = os.pathsep.join([str(TESTS.parent), str(TESTS.parent / "kernels")])
    done = subprocess.run([*killed, "--run-dir", "killed"], env=os.environ | {"PYTHONPATH": sources}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert main(["ppo", *OPTIONS, "--run-dir", "killed"]) == 0
    found = lines(Path("whole"))
    assert lines(Path("killed")) == found and [line["step"] for line in found] == [1, 2, 3, 4]
    jax.tree.map(np.testing.assert_array_equal, arrays(Path("killed")), arrays(Path("whole")))
    for line in found:
        assert line["finite"] == 1 and line["grad_norm"] > 0 and line["value_grad_norm"] > 0
    assert found[0]["value"] == 0 and abs(found[-1]["value"]) > 0  # the critic begins without a preference
    policy, critic = arrays(Path("whole"))
    before = load("model").params
    assert np.any(policy["embed"] != before["embed"]) and np.any(critic["params"]["embed"] != policy["embed"])
    result = json.loads(Path("whole", "result.json").read_text())
    floats = sum(leaf.size for leaf in jax.tree.leaves((policy, critic["params"])))
    assert 12 * floats <= result["state_bytes"] < 12 * floats + 1000  # parameters and two moments of each


def test_a_critic_learns_from_groups_of_equal_rewards(folder, monkeypatch):
    """All answers to all questions earn the same, for more steps than GRPO's patience: the run goes on and learns."""
    monkeypatch.chdir(folder)
    (folder / "equal.py").write_text("def score(completion, row): return 0.5\n")
    options = [option.replace("mine.py:steps", "equal.py:score") for option in OPTIONS]
    options[options.index("--loop.steps") + 1] = "21"
    assert main(["ppo", *options, "--run-dir", "equal"]) == 0
    found = read_metrics(Path("equal"))
    assert len(found) == 21 and not any(line["signal_groups"] for line in found)
    assert found[0]["value"] == 0 < found[-1]["value"] and all(line["grad_norm"] > 0 for line in found)
    assert load_recipe("demo/ppo", PPOConfig).rollout.patience == 0


def test_advantages_of_groups_are_refused():
    assert PPOConfig().rollout.advantage == "return"
    with pytest.raises(ValueError, match="rollout.advantage='std': must be 'return'"):
        PPOConfig(rollout=RolloutConfig())
    with pytest.raises(ValueError, match="reference_every=3"):
        PPOConfig(reference_every=3)
    kept = PPOConfig(critic=dataclasses.replace(PPOConfig().critic, kl_reward=0.1), reference_every=3)
    assert kept.has_reference and kept.keeps_old and not PPOConfig().keeps_old
