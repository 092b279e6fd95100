"""Run the command line and die by SIGKILL on the way: `python killed.py STAGE CALL ARGUMENTS...`.

In pretraining and SFT the end comes when the loop asks for its batch number CALL, whatever is being saved at that
moment; in GRPO within rollout number CALL, its answers sampled but not yet scored; in rejection sampling when answer
number CALL has come.
"""

import os
import signal
import sys
from typing import Any

from deepseek_jax.cli.main import main
from deepseek_jax.rl import sampler
from deepseek_jax.workflows import grpo, pretrain, questions, sft
from deepseek_jax.workflows.row_batches import LoaderBatches


def die_at_answer(number: int) -> None:
    ask, count = questions.Answers._ask, 0

    def counted(*args: Any) -> Any:
        nonlocal count
        for line in ask(*args):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            yield line

    setattr(questions.Answers, "_ask", counted)  # noqa: B010


def die_in(stage: str, call: int) -> None:
    module = {"pretrain": pretrain, "sft": sft, "grpo": grpo}[stage]
    owner, name = (sampler, "converse") if stage == "grpo" else (LoaderBatches, "next")
    train_stage, original = module.train_stage, getattr(owner, name)
    calls = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        made = original(*args, **options)
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    def watched(*args: Any, **options: Any) -> Any:
        setattr(owner, name, counted)
        try:
            return train_stage(*args, **options)
        finally:
            setattr(owner, name, original)

    setattr(module, "train_stage", watched)  # noqa: B010


if __name__ == "__main__":
    if sys.argv[1] == "rejection":
        die_at_answer(int(sys.argv[2]))
    else:
        die_in(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
