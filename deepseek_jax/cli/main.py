"""``deepseek-jax``: one command per stage, each taking a recipe and overrides of any of its fields."""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = """usage: deepseek-jax COMMAND [ARGUMENTS]      deepseek-jax COMMAND --help

from raw text to answers
  demo                   all stages in miniature, with a report (runs/demo/)
  corpus [RECIPE]        text, problems and tokenizer of the demo
  pretrain [RECIPE]      pretraining on documents
  sft [RECIPE]           supervised fine-tuning on chats
  grpo [RECIPE]          reinforcement learning with rule rewards
  report RUN             write RUN/report.html again and print its numbers

using a model
  generate PATH --prompt complete a prompt
  chat PATH              talk to it in the terminal
  convert PATH DST       write it as released ones are: safetensors, tokenizer, chat template
  inspect PATH|RECIPE    parameters, cache and arithmetic per token
  bench                  train and decode speed of the demo's model beside transformers
  bench RECIPE --work train   speed, memory and longest kernels of a recipe's model

RECIPE is a name such as demo/pretrain or a Python file with a function config(); without one a stage has its defaults
and says what is missing. RUN is a folder that a stage or the demo wrote; PATH is a RUN or a released model's folder,
and so is what sft and grpo start from (--init-from PATH). Every field of a recipe can be set:
--optimizer.peak-lr 3e-4 --loop.steps 100."""

COMMANDS = {
    "demo": "stages",
    "corpus": "stages",
    "pretrain": "stages",
    "sft": "stages",
    "grpo": "stages",
    "report": "stages",
    "generate": "talk",
    "chat": "talk",
    "convert": "convert",
    "inspect": "inspect",
    "bench": "bench",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. A user's mistake is one line on standard error and status 1."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"deepseek-jax: no command {command!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    _keep_compiled_programs()
    try:
        from deepseek_jax.parallel.hosts import join_hosts

        join_hosts()
        module = importlib.import_module(f"deepseek_jax.cli.{COMMANDS[command]}")
        getattr(module, f"run_{command}")(rest)
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("DEEPSEEK_JAX_TRACEBACK") == "1":
            raise
        print(f"deepseek-jax {command}: {error}", file=sys.stderr)
        print("(DEEPSEEK_JAX_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _keep_compiled_programs() -> None:
    """Programs compiled once are read from disk by later runs; JAX_COMPILATION_CACHE_DIR says where, if set."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "deepseek-jax" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


if __name__ == "__main__":
    sys.exit(main())
