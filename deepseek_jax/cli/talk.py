"""``generate`` and ``chat``: answers in the terminal, from a trained stage or a released model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console
from rich.text import Text

from deepseek_jax.checkpoint.model import CHECKPOINTS, is_released, load
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.data.chat import encode_prompt, prompt_opens_thinking, split_thinking
from deepseek_jax.data.tokenizer import THINK
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_kernels.target import Target

STAGES = ("grpo", "sft", "pretrain")


def _computed() -> ComputeConfig:
    """bfloat16, but for CPUs, which compute it slowly."""
    dtype = "float32" if Target.of(jax.devices()[0]).platform == "cpu" else "bfloat16"
    return ComputeConfig(dtype=dtype, param_dtype=dtype)


@dataclasses.dataclass(frozen=True)
class _Sampling:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """A folder that a stage or the demo wrote (of a demo, its last stage answers), or a released model's, with
    config.json, safetensors and tokenizer.json."""
    temperature: float = 0.0
    """0 always takes the likeliest token; the same seed gives the same answers."""
    top_p: float = 1.0
    """Leave out what lies beyond this share of the probability."""
    top_k: int = 0
    """Choose among this many of the likeliest tokens; 0 for all."""
    max_tokens: int = 128
    """Of an answer."""
    seed: int = 0
    step: int = 0
    """Of a run, a checkpoint other than the newest (0): the best one, for instance."""
    ema: bool = False
    """Of a run, the running mean of the parameters."""
    compute: ComputeConfig = dataclasses.field(default_factory=_computed)

    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            seed=self.seed,
        )


@dataclasses.dataclass(frozen=True)
class _Generate(_Sampling):
    """Complete texts, or answer questions (--chat)."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to complete; give it several times for a batch."""
    chat: bool = False
    """The prompts are questions: ask them in the chat template."""


@dataclasses.dataclass(frozen=True)
class _Chat(_Sampling):
    """Talk with a model until an empty line; its thinking is shown dimmed."""


def find_run(run: str) -> Path:
    """The folder of the stage that answers. FileNotFoundError says where was looked."""
    folder = Path(run)
    for candidate in (folder, *(folder / stage for stage in STAGES)):
        if (candidate / CHECKPOINTS).is_dir():
            return candidate
    raise FileNotFoundError(
        f"{run} holds no {CHECKPOINTS}/, nor does any of {', '.join(STAGES)} in it: train one first"
    )


def find_model(path: str) -> Path:
    """A released model's folder as it is, or a run's, see ``find_run``."""
    return Path(path) if is_released(path) else find_run(path)


def _engine(options: _Sampling) -> Engine:
    path = find_model(options.run)
    return Engine(load(path, compute=options.compute, step=options.step or None, ema=options.ema))


def run_generate(arguments: Sequence[str]) -> None:
    options = tyro.cli(_Generate, args=list(arguments), prog="deepseek-jax generate")
    if not options.prompt:
        raise ValueError("give at least one --prompt TEXT")
    engine = _engine(options)
    prompts, starts = list(options.prompt), options.prompt  # what is printed in front of each answer
    if options.chat:
        prompts, starts = zip(*(_ask(engine, [_turn("user", text)]) for text in options.prompt), strict=True)
    for start, completion in zip(starts, engine.generate(prompts, options.params()), strict=True):
        print(start + completion.text)


def run_chat(arguments: Sequence[str]) -> None:
    """Read questions until an empty line or the end of input. Thinking is shown dimmed."""
    options = tyro.cli(_Chat, args=list(arguments), prog="deepseek-jax chat")
    console = Console()
    engine = _engine(options)
    console.print(f"{find_model(options.run)} · an empty line ends the talk", style="dim")
    turns: list[dict[str, str]] = []
    while question := _read(console):
        turns.append(_turn("user", question))
        prompt, start = _ask(engine, turns)
        room = engine.config.max_position_embeddings - options.max_tokens
        if len(prompt) > room and len(turns) > 1:
            console.print("the talk is too long for this model; starting anew", style="yellow")
            turns = turns[-1:]
            prompt, start = _ask(engine, turns)
        if len(prompt) > room:
            console.print(
                f"{len(prompt)} tokens: beside an answer of --max-tokens {options.max_tokens} this model takes {room}",
                style="yellow",
            )
            turns = []
            continue
        text = start + engine.generate([prompt], options.params())[0].text
        thinking, answer = split_thinking(text)
        if thinking:
            console.print(Text(thinking, style="dim"))
        console.print(Text(answer))
        turns.append(_turn("assistant", text))


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _ask(engine: Engine, turns: Sequence[dict[str, str]]) -> tuple[list[int], str]:
    """The prompt's ids, and how the answer begins: with ``<think>`` where the prompt has opened it already."""
    tokenizer = engine.tokenizer
    return encode_prompt(tokenizer, turns), THINK if prompt_opens_thinking(tokenizer, turns) else ""


def _read(console: Console) -> str:
    try:
        return console.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""
