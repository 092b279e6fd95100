"""R1's claim: a small model distilled from a large one is better than the same model trained by reinforcement learning
alone (arXiv 2501.12948, section 4.1). python scripts/r1_claim.py RUN [RUN ...], each a finished run of r1/miniature.

For each RUN, whose student_base is the same for both, R1-Zero's recipe trains the student alone, into RUN/alone_TIMES,
with at least TIMES as much arithmetic as the distilled one took: its training (3 forward passes per token), and the
teacher's answers it was taught (1 forward pass of the teacher per token, prompts included, kept or not). Reinforcement
learning counts a forward pass for each sampled token and 3 to learn it. Padding, evaluation and the teacher's own
training are not counted. Prints accuracy on the held-out problems, sampled at temperature 1.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

from deepseek_jax.checkpoint.model import load
from deepseek_jax.config import ModelConfig
from deepseek_jax.evals.accuracy import accuracy
from deepseek_jax.files import read_json_lines, read_json_object
from deepseek_jax.inference.engine import Engine
from deepseek_jax.model.costs import forward_flops
from deepseek_jax.train.metrics import read_metrics
from deepseek_jax.workflows.grpo import grpo
from deepseek_jax.workflows.r1 import R1Config, make_links
from deepseek_jax.workflows.recipe import load_recipe
from deepseek_jax.workflows.task_eval import Exam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--recipe", default="r1/miniature")
    parser.add_argument("--times", type=float, nargs="+", default=[1.0, 4.0], help="how much arithmetic")
    options = parser.parse_args()
    print("| run | before | distilled | TFLOP | " + " | ".join(f"alone, {times:g}×" for times in options.times) + " |")
    print("|---" * (4 + len(options.times)) + "|")
    for run in map(Path, options.runs):
        recipe = load_recipe(options.recipe, R1Config)
        seed = read_json_object(run / "zero" / "config.json")["recipe"]["seed"] - recipe.zero.seed
        whole = dataclasses.replace(recipe, run_dir=str(run), seed=seed)
        links = {link.name: link.config for link in make_links(whole)}
        budget = distilled_flops(run)
        cells = [shown(run / "student_base", links, template=True), shown(run / "student", links)]
        cells.append(f"{budget / 1e12:.2f}")
        cells += [alone(run, links, times, budget) for times in options.times]
        print(f"| {run} | " + " | ".join(cells) + " |", flush=True)


def distilled_flops(run: Path) -> float:
    """Of the student's fine-tuning and of the teacher's answers."""
    teacher, asked = _model(run / "samples", "init_from"), read_json_lines(next((run / "samples").glob("rows-*.jsonl")))
    tokens = sum(line["tokens"] + _prompt_tokens(line["prompt"]) for line in asked)
    learnt = read_metrics(run / "student")[-1]["tokens_seen"]
    return 3.0 * learnt * forward_flops(_model(run / "student")) + tokens * forward_flops(teacher)


def _prompt_tokens(prompt: str) -> int:
    return len(prompt) + 3  # a digit and a sign are a token each; BOS, User, Assistant


def _model(run: Path, begins: str = "") -> ModelConfig:
    found = read_json_object(run / "config.json")
    return _model(Path(found["recipe"][begins])) if begins else ModelConfig.from_dict(found["model"])


def alone(run: Path, links: dict[str, Any], times: float, budget: float) -> str:
    """The student's accuracy after reinforcement learning alone, and how much arithmetic that was."""
    zero, model = links["zero"], _model(run / "student")
    per_step = read_metrics(run / "zero")[-1]["tokens_seen"] / zero.loop.steps * 4 * forward_flops(model)
    config = dataclasses.replace(
        zero,
        run_dir=str(run / f"alone_{times:g}"),
        init_from=str(run / "student_base"),
        loop=dataclasses.replace(zero.loop, steps=math.ceil(times * budget / per_step)),
    )
    grpo(config)
    spent = 4.0 * read_metrics(config.run_dir)[-1]["tokens_seen"] * forward_flops(model)
    return f"{shown(Path(config.run_dir), links)} ({config.loop.steps} steps, {spent / budget:.1f}×)"


def shown(run: Path, links: dict[str, Any], *, template: bool = False) -> str:
    model = load(run, compute=links["student"].compute)
    model = model.asked_by(links["zero"].chat_template) if template else model
    exam = Exam(dataclasses.replace(links["student"].evaluation, count=0), seed=0)
    share, error = accuracy(exam.answers(Engine(model), "sampled"))
    return f"{100 * share:.1f} ± {100 * error:.1f}"


if __name__ == "__main__":
    main()
