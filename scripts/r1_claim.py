"""R1's claim: a small model distilled from a large one is better than the same model trained by reinforcement learning
alone (arXiv 2501.12948, section 4.1). After `make r1`: python scripts/r1_claim.py runs/r1 --seeds 0 1 2

For each seed, in RUN/claim/seed_N: a fresh student is pretrained; a copy of it is distilled from RUN's samples; others
are trained by R1-Zero's recipe alone, with about TIMES as much arithmetic as the distilled one took. That is its
training (3 forward passes per token), and the teacher's answers, kept or not (a forward pass of the teacher per token,
prompts included). Reinforcement learning takes a forward pass per sampled token and 3 to learn it; prompts count as
sampled. Padding, evaluation and what made teacher and base are not counted. All is done once: the same command goes on.
Prints accuracy on the held-out problems, sampled at temperature 1, ± one standard error.
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
from deepseek_jax.workflows.chain import Link, run_chain
from deepseek_jax.workflows.grpo import GRPOConfig, grpo
from deepseek_jax.workflows.pretrain import pretrain
from deepseek_jax.workflows.r1 import R1Config, make_links
from deepseek_jax.workflows.recipe import load_recipe
from deepseek_jax.workflows.sft import sft
from deepseek_jax.workflows.task_eval import Exam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("--recipe", default="r1/miniature")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--times", type=float, nargs="+", default=[1.0, 4.0], help="how much arithmetic")
    options = parser.parse_args()
    recipe = dataclasses.replace(load_recipe(options.recipe, R1Config), run_dir=str(options.run))
    links = {link.name: link.config for link in make_links(recipe)}
    heads = ["seed", "before", "distilled", "TFLOP", *(f"alone, {times:g} ×" for times in options.times)]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
    for seed in options.seeds:
        print(f"| {seed} | " + " | ".join(compared(options.run, links, seed, options.times)) + " |", flush=True)


def compared(run: Path, links: dict[str, Any], seed: int, times: list[float]) -> list[str]:
    """The cells of a seed's row."""
    folder = run / "claim" / f"seed_{seed}"
    base = dataclasses.replace(links["student_base"], run_dir=str(folder / "base"), seed=seed)
    student = dataclasses.replace(
        links["student"], run_dir=str(folder / "distilled"), init_from=base.run_dir, seed=seed
    )
    run_chain([Link("base", pretrain, base), Link("distilled", sft, student)], lambda *said: None)
    model = ModelConfig.from_dict(read_json_object(folder / "distilled" / "config.json")["model"])
    budget = 3.0 * _tokens(folder / "distilled") * forward_flops(model) + sampling_flops(run)
    per_step = 4.0 * _tokens(run / "zero") / links["zero"].loop.steps * forward_flops(model)
    zero = dataclasses.replace(links["zero"], init_from=base.run_dir, seed=seed)
    before, after = (load(each.run_dir, compute=zero.compute) for each in (base, student))
    cells = [shown(before.asked_by(zero.chat_template), student), shown(after, student), f"{budget / 1e12:.2f}"]
    for each in times:
        loop = dataclasses.replace(zero.loop, steps=math.ceil(each * budget / per_step))
        alone: GRPOConfig = dataclasses.replace(zero, run_dir=str(folder / f"alone_{each:g}"), loop=loop)
        run_chain([Link("alone", grpo, alone)], lambda *said: None)
        spent = 4.0 * _tokens(Path(alone.run_dir)) * forward_flops(model) / budget
        right = shown(load(alone.run_dir, compute=zero.compute), student)
        cells.append(f"{right} ({loop.steps} steps, {spent:.1f} ×)")
    return cells


def sampling_flops(run: Path) -> float:
    """Of the teacher's answers."""
    teacher = ModelConfig.from_dict(read_json_object(run / "reasoning" / "config.json")["model"])
    (answers,) = (run / "samples").glob("rows-*.jsonl")
    asked = lambda prompt: len(prompt) + 3  # noqa: E731  # a token each digit and sign; BOS, User, Assistant
    tokens = sum(line["tokens"] + asked(line["prompt"]) for line in read_json_lines(answers))
    return float(tokens) * forward_flops(teacher)


def _tokens(run: Path) -> float:
    """Learnt so far, without padding."""
    return float(read_metrics(run)[-1]["tokens_seen"])


def shown(model: Any, student: Any) -> str:
    exam = Exam(dataclasses.replace(student.evaluation, count=0), seed=0)
    share, error = accuracy(exam.answers(Engine(model), "sampled"))
    return f"{100 * share:.1f} ± {100 * error:.1f}"


if __name__ == "__main__":
    main()
