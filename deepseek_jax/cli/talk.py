"""``generate`` and ``chat``: answers from a trained stage in the terminal."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from deepseek_jax.data.chat import encode_prompt, split_thinking
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.train.loop import CHECKPOINTS
from deepseek_jax.workflows.stage import load_trained

STAGES = ("grpo", "sft", "pretrain")


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """run: a folder that a stage or the demo wrote (of a demo, its last stage answers).

    temperature 0 is greedy; the same seed gives the same answers.
    """

    run: Annotated[str, tyro.conf.Positional]
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 128
    seed: int = 0

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
    __doc__ = _Sampling.__doc__
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to complete; give it several times for a batch."""
    chat: bool = False
    """The prompts are questions: ask them in the chat template."""


@dataclasses.dataclass(frozen=True)
class _Chat(_Sampling):
    __doc__ = _Sampling.__doc__


def find_run(run: str) -> Path:
    """The folder of the stage that answers. FileNotFoundError says where was looked."""
    folder = Path(run)
    for candidate in (folder, *(folder / stage for stage in STAGES)):
        if (candidate / CHECKPOINTS).is_dir():
            return candidate
    raise FileNotFoundError(
        f"{run} holds no {CHECKPOINTS}/, nor does any of {', '.join(STAGES)} in it: train one first"
    )


def _engine(run: str) -> Engine:
    trained = load_trained(find_run(run))
    return Engine.from_params(trained.config, trained.params, trained.router_bias, trained.tokenizer)


def run_generate(arguments: Sequence[str]) -> None:
    options = tyro.cli(_Generate, args=list(arguments), prog="deepseek-jax generate")
    if not options.prompt:
        raise ValueError("give at least one --prompt TEXT")
    engine = _engine(options.run)
    prompts = [_ask(engine, [("user", text)]) if options.chat else text for text in options.prompt]
    for prompt, completion in zip(options.prompt, engine.generate(prompts, options.params()), strict=True):
        print(completion.text if options.chat else prompt + completion.text)


def run_chat(arguments: Sequence[str]) -> None:
    """Read questions until an empty line or the end of input. Thinking is shown dimmed."""
    options = tyro.cli(_Chat, args=list(arguments), prog="deepseek-jax chat")
    console = Console()
    engine = _engine(options.run)
    console.print(f"{find_run(options.run)} · an empty line ends the talk", style="dim")
    turns: list[tuple[str, str]] = []
    while question := _read(console):
        turns.append(("user", question))
        prompt = _ask(engine, turns)
        if len(prompt) + options.max_tokens > engine.config.max_position_embeddings:
            console.print("the talk is too long for this model; starting anew", style="yellow")
            turns = turns[-1:]
            prompt = _ask(engine, turns)
        text = engine.generate([prompt], options.params())[0].text
        thinking, answer = split_thinking(text)
        if thinking:
            console.print(Text(thinking, style="dim"))
        console.print(Text(answer))
        turns.append(("assistant", text))


def _ask(engine: Engine, turns: Sequence[tuple[str, str]]) -> list[int]:
    return encode_prompt(engine.tokenizer, [{"role": role, "content": content} for role, content in turns])


def _read(console: Console) -> str:
    try:
        return console.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""
