"""The recipes at released scale have the paper's numbers (arXiv 2501.12948), which stand here once more."""

import numpy as np
import pytest

from deepseek_jax.train.optimizer import learning_rate
from deepseek_jax.workflows.distill import DistillConfig
from deepseek_jax.workflows.grpo import GRPOConfig
from deepseek_jax.workflows.r1 import R1Config, make_links
from deepseek_jax.workflows.recipe import find_recipe, load_recipe
from deepseek_jax.workflows.reward_model import RewardModelConfig
from deepseek_jax.workflows.sft import SFTConfig
from deepseek_jax.workflows.stage_config import StageConfig

# Updates, clipping, temperature, longest answer, rewards.
REINFORCED = {
    "r1/v3:zero": (8192, 0.2, 1.0, 32_768, {"accuracy", "tags"}),
    "r1/v3:zero_longer": (2208, 0.2, 1.0, 65_536, {"accuracy", "tags"}),
    "r1/v3:reasoning": (1600, 10.0, 1.0, 32_768, {"accuracy", "format", "language:en"}),
    "r1/v3:all_scenarios": (1296, 10.0, 0.7, 32_768, {"accuracy", "format", "language:en"}),
    "r1/v3:preferences": (
        400,
        10.0,
        0.7,
        32_768,
        {"accuracy", "format", "language:en", "model:runs/r1/helpful", "model:runs/r1/harmless"},
    ),
}
RATES = {"qwen_1_5b": 1e-4, "qwen_7b": 8e-5, "qwen_14b": 7e-5, "qwen_32b": 6e-5, "llama_8b": 5e-5, "llama_70b": 2e-5}
SAMPLES, TOKENS = 804_745, 5355.3


def rates(config: StageConfig, updates: int) -> list[float]:
    """The first and the last."""
    rate = learning_rate(config.optimizer, updates)
    return [np.asarray(rate(step)).item() for step in (0, updates)]


@pytest.mark.parametrize("name", REINFORCED)
def test_reinforcement_learning(name):
    config = load_recipe(name, GRPOConfig)
    updates, clip, temperature, longest, rewards = REINFORCED[name]
    rollout, loss = config.rollout, config.loss
    assert rollout.prompts * rollout.group == 8192 and rollout.group == 16
    assert rollout.prompts // config.minibatches == 32 and config.inner_epochs == 1
    assert config.loop.steps * config.minibatches == updates
    assert config.reference_every * config.minibatches == 400
    assert (loss.clip_low, loss.clip_high, loss.kl_weight) == (clip, clip, 0.001)
    assert (rollout.temperature, rollout.max_tokens) == (temperature, longest)
    assert {reward.partition("=")[0] for reward in config.reward} == rewards
    assert {reward.partition("=")[2] for reward in config.reward} == {"1.0"}  # equal weights
    assert rates(config, updates) == pytest.approx([3e-6, 3e-6])
    assert config.chat_template == ("r1_zero" if name == "r1/v3:zero" else "")


def test_r1_zero_and_stage_four_are_as_long_as_the_papers():
    assert REINFORCED["r1/v3:zero"][0] + REINFORCED["r1/v3:zero_longer"][0] == 10_400
    assert abs(REINFORCED["r1/v3:all_scenarios"][0] + REINFORCED["r1/v3:preferences"][0] - 1700) < 16  # whole rollouts


@pytest.mark.parametrize(
    ("name", "rate", "batch"),
    [
        ("r1/v3:cold_start", 5e-5, 128),
        ("r1/v3:sft", 5e-5, 128),
        *((f"r1/students:{n}", r, 64) for n, r in RATES.items()),
    ],
)
def test_fine_tuning(name, rate, batch):
    config = load_recipe(name, SFTConfig)
    assert (config.batch_size, config.data.seq_len) == (batch, 32_768)
    steps = config.loop.steps
    assert rates(config, steps) == pytest.approx([rate, rate / 10], rel=1e-3)
    if name != "r1/v3:cold_start":
        assert 2 <= steps * batch * 32_768 / (SAMPLES * TOKENS) <= 3  # passes


@pytest.mark.parametrize(("name", "judges"), [("helpful", "summary"), ("harmless", "all")])
def test_reward_models(name, judges):
    config = load_recipe(f"r1/v3:{name}", RewardModelConfig)
    assert (config.batch_size, config.optimizer.peak_lr, config.epochs, config.judges) == (256, 6e-6, 1, judges)
    assert config.data.seq_len == 2 * 8192  # both answers of a pair


@pytest.mark.parametrize("name", ["r1/v3", "r1/h200"])
def test_the_chains_stages_fit_together(name):
    config = load_recipe(name, R1Config)
    links = {link.name: link.config for link in make_links(config)} | {"base": config.pretrain}
    starts = {
        "zero": "base",
        "cold_start_samples": "zero_longer" if "zero_longer" in links else "zero",
        "cold_start": "base",
        "reasoning": "cold_start",
    }
    starts |= {"samples": "reasoning", "sft": "base", "helpful": "sft", "harmless": "sft", "all_scenarios": "sft"}
    assert {stage: links[stage].init_from for stage in starts} == {
        stage: links[before].run_dir for stage, before in starts.items()
    }
    if name == "r1/v3":
        assert links["zero_longer"].init_from == links["zero"].run_dir
        assert links["preferences"].init_from == links["all_scenarios"].run_dir
    else:
        assert not links.keys() & {"zero_longer", "preferences"}
    assert links["cold_start"].data.path == (f"{links['cold_start_samples'].run_dir}/kept.jsonl",)
    assert links["sft"].data.path[0] == f"{links['samples'].run_dir}/kept.jsonl"
    assert not links["samples"].keep.code and links["samples"].keep.language == "en"
    assert f"deepseek-jax r1 {name} --base" in find_recipe(name).read_text(encoding="utf-8")


def test_the_small_models_recipes_load():
    assert load_recipe("r1/smollm2:grpo", GRPOConfig).task.name == "countdown"
    distill = load_recipe("r1/smollm2:distill", DistillConfig)
    assert distill.student.init_from == "smollm2" and not distill.samples.init_from
