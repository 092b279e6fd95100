"""The commands that run stages."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import tyro

from deepseek_jax.saying import terminal
from deepseek_jax.workflows.distill import DistillConfig, distill
from deepseek_jax.workflows.grpo import GRPOConfig, grpo
from deepseek_jax.workflows.ppo import PPOConfig, ppo
from deepseek_jax.workflows.pretrain import PretrainConfig, pretrain
from deepseek_jax.workflows.recipe import load_recipe
from deepseek_jax.workflows.rejection import KEPT, RejectionConfig, rejection
from deepseek_jax.workflows.reward_model import RewardModelConfig, reward_model
from deepseek_jax.workflows.sft import SFTConfig, sft

Config = TypeVar("Config")

# What the last line names of a stage's result, where it is there: the loss, then what was evaluated.
HEADLINE = ("loss", "reward", "bits_per_byte", "perplexity", "heldout_loss", "accuracy_greedy", "accuracy_sampled")
HEADLINE += ("agreement",)


def parse_recipe(
    command: str, kind: type[Config], arguments: Sequence[str], *, emptied: Mapping[str, Any] | None = None
) -> Config:
    """The recipe named first, or the stage's own defaults, with the overrides behind it.

    emptied: fields that may be given several times, and what they are before the first: tyro alone would add to the
    recipe's.
    """
    if not arguments or arguments[0].startswith("-"):
        return tyro.cli(kind, args=list(arguments), prog=f"deepseek-jax {command}")
    recipe, *overrides = arguments
    default: Any = load_recipe(recipe, kind)
    for field, empty in (emptied or {}).items():
        if any(override.partition("=")[0] == f"--{field.replace('_', '-')}" for override in overrides):
            default = dataclasses.replace(default, **{field: empty})
    return tyro.cli(kind, args=overrides, default=default, prog=f"deepseek-jax {command} {recipe}")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A result's lines: numbers of one thing, which a tree ends in, share one."""
    for name, value in tree.items():
        if not isinstance(value, Mapping):
            yield prefix + name, _shown(value)
        elif any(isinstance(inner, Mapping) for inner in value.values()):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _finish(run_dir: str, result: dict[str, Any]) -> None:
    if jax.process_index():
        return
    console = terminal()
    for name, value in _flat(result):
        console.print(f"{name:32} {value}", soft_wrap=True)
    named = [f"{name} {result[name]:.4g}" for name in HEADLINE if isinstance(result.get(name), float)]
    console.print(f"→ {run_dir}: {', '.join(named)}" if named else f"→ {run_dir}", soft_wrap=True)


def run_pretrain(arguments: Sequence[str]) -> None:
    config = parse_recipe("pretrain", PretrainConfig, arguments, emptied={"ignore_config": ()})
    _finish(config.run_dir, pretrain(config))


def run_sft(arguments: Sequence[str]) -> None:
    config = parse_recipe("sft", SFTConfig, arguments, emptied={"ignore_config": ()})
    _finish(config.run_dir, sft(config))


def run_grpo(arguments: Sequence[str]) -> None:
    config = parse_recipe("grpo", GRPOConfig, arguments, emptied={"reward": (), "ignore_config": ()})
    _finish(config.run_dir, grpo(config))


def run_ppo(arguments: Sequence[str]) -> None:
    config = parse_recipe("ppo", PPOConfig, arguments, emptied={"reward": (), "ignore_config": ()})
    _finish(config.run_dir, ppo(config))


def run_reward_model(arguments: Sequence[str]) -> None:
    config = parse_recipe("reward-model", RewardModelConfig, arguments, emptied={"ignore_config": ()})
    _finish(config.run_dir, reward_model(config))


def run_rejection(arguments: Sequence[str]) -> None:
    config = parse_recipe("rejection", RejectionConfig, arguments, emptied={"judge": (), "ignore_config": ()})
    _finish(f"{config.run_dir}/{KEPT}", rejection(config))


def run_distill(arguments: Sequence[str]) -> None:
    config = parse_recipe("distill", DistillConfig, arguments)
    _finish(f"{config.run_dir}/student", distill(config))


def run_corpus(arguments: Sequence[str]) -> None:
    from deepseek_jax.workflows.demo import CorpusStage, make_corpus  # no other stage needs the demo

    config = parse_recipe("corpus", CorpusStage, arguments)
    meta = make_corpus(config)
    _finish(config.folder, {name: meta[name] for name in ("train", "heldout", "source_files")})


def run_demo(arguments: Sequence[str]) -> None:
    from deepseek_jax.workflows.demo import DemoConfig, demo

    demo(tyro.cli(DemoConfig, args=list(arguments), prog="deepseek-jax demo"))
