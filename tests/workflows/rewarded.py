"""What GRPO and PPO train on from the command line: a small model, questions, and a reward of steps from a file."""

import json
from pathlib import Path

from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax import save_hf

OPTIONS = ["--init-from", "model", "--task.path", "train.jsonl", "--task.prompt", "question"]
OPTIONS += ["--reward", "mine.py:steps"]
OPTIONS += ["--rollout.prompts", "4", "--rollout.group", "4", "--rollout.max-tokens", "8"]
STEPS = """
def steps(completion, row):
    half = len(completion) // 2
    return [(half, completion[:half].count("a")), (len(completion), len(set(completion)) / 8)]
"""


def write_inputs(folder: Path, rows: list[dict[str, str]]) -> None:
    """The files that the options name."""
    save_hf(whole(SPEAKER, *weights(SPEAKER)).network(), folder / "model", dtype="float32")
    tokenizer().save(folder / "model")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(STEPS)
