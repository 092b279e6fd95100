"""``deepseek-jax``: one command per stage, each taking a recipe and overrides of any of its fields."""

import difflib
import importlib
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

from deepseek_jax.cli import program
from deepseek_jax.parallel import peers

USAGE = """usage: deepseek-jax COMMAND [ARGUMENTS]      deepseek-jax COMMAND --help      deepseek-jax --version

from raw text to answers
  demo                   pretraining, SFT and GRPO in miniature, with a report (runs/demo/)
  r1 [RECIPE]            R1-Zero, R1's four stages and a distilled student (r1/miniature: runs/r1/)
  corpus [RECIPE]        text, problems and tokenizer of the demo
  tokenizer train FILES  a tokenizer of one's own; tokenizer inspect DIR shows one
  puzzles OUT.jsonl      logic puzzles for grpo, generated
  curate OUT.jsonl       rows by pass rate, without what they share with evaluation sets
  pretrain [RECIPE]      pretraining on documents
  sft [RECIPE]           supervised fine-tuning on chats
  grpo [RECIPE]          reinforcement learning with rule rewards
  ppo [RECIPE]           the same with a critic, as a comparison
  reward-model [RECIPE]  a model that scores answers, from pairs of a better and a worse one
  rejection [RECIPE]     a model's right and readable answers, as chats for sft
  distill [RECIPE]       a teacher's answers, taught to a student with a tokenizer of its own
  report RUN             write RUN/report.html again and print its numbers
  compare RUN RUN ...    several runs side by side: a table and compare.html

using a model
  generate PATH --prompt complete a prompt
  chat PATH|--url URL    talk to it in the terminal, or to a running server
  serve PATH             answer over HTTP as OpenAI does, until Ctrl-C
  eval PATH --data FILES bits per byte and perplexity of text
  convert PATH DST       write it as released ones are: safetensors, tokenizer, chat template
  inspect PATH|RECIPE    parameters, cache and arithmetic per token
  place RUN --devices N  which device should hold which experts, for the loads that a run has logged
  bench                  train and decode speed of the demo's model beside transformers
  compile RECIPE --topology v5p:8x8x16   does it fit there, and how fast would it be: no such machine needed
  bench RECIPE --work train|prefill|decode   speed, memory and longest kernels of a recipe's model
  bench serve URL        time to the first token, between tokens and tokens a second of any server of OpenAI's kind

RECIPE is a name such as demo/pretrain or a Python file with a function config(), or a stage of such a one, as
r1/miniature:zero; without one a stage has its defaults and says what is missing. RUN is a folder that a stage or the
demo wrote; PATH is a RUN or a released model's folder, and so is what sft and grpo start from (--init-from PATH). Every
field of a recipe can be set: --optimizer.peak-lr 3e-4 --loop.steps 100.

Several processes, each with devices of its own, work as one: those of srun, mpirun, a TPU pod or our JobSet find each
other; others are told before COMMAND, --coordinator HOST:PORT --processes N --process 0 ... N-1, or by environment,
DEEPSEEK_JAX_COORDINATOR, _PROCESSES and _PROCESS. DEEPSEEK_JAX_DISTRIBUTED=0: this one works alone; 1: it must find
others. docs/many-hosts.md tells the rest."""

PEERS = {"--coordinator": peers.COORDINATOR, "--processes": peers.PROCESSES, "--process": peers.PROCESS}

COMMANDS = {
    "demo": "stages",
    "corpus": "stages",
    "pretrain": "stages",
    "sft": "stages",
    "grpo": "stages",
    "ppo": "stages",
    "r1": "r1",
    "reward-model": "stages",
    "rejection": "stages",
    "distill": "stages",
    "report": "report",
    "compare": "report",
    "tokenizer": "tokenizer",
    "puzzles": "puzzles",
    "curate": "curate",
    "generate": "talk",
    "chat": "chat",
    "serve": "serve",
    "eval": "evaluate",
    "convert": "convert",
    "inspect": "inspect",
    "place": "place",
    "bench": "bench",
    "compile": "compile",
}
# What needs no devices, so no other process either: on one host of many too.
ALONE = ("corpus", "report", "compare", "tokenizer", "puzzles", "curate", "convert", "inspect", "place", "compile")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. A user's mistake is one line on standard error and status 1.

    arguments: by default the program's, whose process is prepared and, if interrupted, ended as ``program`` says.
    """
    if as_program := arguments is None:
        program.begin()
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt as stop:
        from deepseek_jax.train.preemption import Preempted

        print(f"\n{str(stop) or 'interrupted'}", file=sys.stderr)
        if as_program and not isinstance(stop, Preempted):  # where all is saved, other hosts wait for a proper end
            program.leave()
        return program.INTERRUPTED


def _run(arguments: list[str]) -> int:
    while arguments and (option := arguments[0].partition("="))[0] in PEERS:
        name, given, value = option
        os.environ[PEERS[name]] = value if given else arguments[1] if len(arguments) > 1 else ""
        arguments = arguments[1 if given else 2 :]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    command, *rest = arguments
    if command in ("--version", "version"):
        print(_version())
        return 0
    if command not in COMMANDS:
        likely = "".join(f" did you mean {name}?" for name in difflib.get_close_matches(command, COMMANDS, n=1))
        print(f"deepseek-jax: no command {command!r};{likely} there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"deepseek_jax.cli.{COMMANDS[command]}")
        from deepseek_jax.cli import choices

        program.interruptible()
        _keep_compiled_programs()
        if command not in ALONE and not {"-h", "--help"} & {*rest}:
            _join()
        with choices.registry:
            getattr(module, f"run_{command.replace('-', '_')}")(rest)
        sys.stdout.flush()  # an answer that cannot be written is an error
    except Exception as error:
        from deepseek_jax.parallel.hosts import leave_soon

        several = leave_soon()
        known = isinstance(error, ValueError | OSError | ArithmeticError | RuntimeError)
        if not known or os.environ.get("DEEPSEEK_JAX_TRACEBACK") == "1":
            raise
        print(f"deepseek-jax {command}: {error}", file=sys.stderr)
        if several:
            again = "" if isinstance(error, ValueError) else "; the same command on all goes on from where it was saved"
            print(f"(if another process of this run ended first, what it said last tells why{again})", file=sys.stderr)
        print("(DEEPSEEK_JAX_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    return 0


def _join() -> None:
    from deepseek_jax.parallel.hosts import join_hosts
    from deepseek_jax.saying import say

    if (found := join_hosts()) is not None and not found.index:
        say(f"joined the other processes, by {found.by}" + (f": {found.processes}" if found.processes else ""))


def _version() -> str:
    ours, *others = (f"{name} {metadata.version(name)}" for name in ("deepseek-jax", "jax", "flax", "orbax-checkpoint"))
    return f"{ours} ({', '.join(others)}, Python {platform.python_version()})"


def _keep_compiled_programs() -> None:
    """Programs compiled once are read from disk by later runs; JAX_COMPILATION_CACHE_DIR says where, if set."""
    import jax

    from deepseek_kernels.cache import cache_folder

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


if __name__ == "__main__":
    sys.exit(main())
