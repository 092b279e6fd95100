"""``chat``: a talk in the terminal with a model, or with a running server."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Literal

import tyro

from deepseek_jax.cli.conversation import Conversation, TooLongError, Turn
from deepseek_jax.cli.talk import Answering, Drawing, ask
from deepseek_jax.cli.talk_remote import Remote
from deepseek_jax.data.turns import SINGLE, known_turns
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.parallel.processes import require_one_process


@dataclasses.dataclass(frozen=True)
class _Chat(Answering):
    """Talk with a model; its thinking is shown dimmed. An empty line or Ctrl-D ends the talk, Ctrl-C stops an answer;
    /help names what else can be typed. With a running server instead of PATH: --url URL (--url URL --help)."""

    system: str = ""
    """A text that opens every talk."""
    turns: Literal["auto", "single", "many"] = "auto"
    """single: each question is asked by itself; many: with all that was said before; auto: single where the model was
    taught nothing else."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _RemoteChat(Drawing):
    """Talk with the model of a running server of OpenAI's kind, as with one of a folder."""

    url: str
    """http://HOST:PORT, with or without /v1."""
    api_key: str = ""
    """By default $OPENAI_API_KEY, which others cannot read in the list of processes."""
    model: str = ""
    """Which of the server's models; by default its first."""
    max_tokens: int = 0
    """Of an answer; 0: as many as the server gives."""
    system: str = ""
    """A text that opens every talk."""
    turns: Literal["single", "many"] = "many"
    """single: each question is asked by itself; many: with all that was said before."""


def run_chat(arguments: Sequence[str]) -> None:
    if any(argument.partition("=")[0] == "--url" for argument in arguments):
        _over_http(tyro.cli(_RemoteChat, args=list(arguments), prog="deepseek-jax chat"))
        return
    options = tyro.cli(_Chat, args=list(arguments), prog="deepseek-jax chat")
    require_one_process("a talk (generate --chat answers prompts on many)")
    engine = options.engine()
    turns = known_turns(engine.tokenizer) if options.turns == "auto" else options.turns
    partner = _Local(engine, options.params())
    Conversation(partner, str(options.folder), system=options.system, single=turns == SINGLE).run()


def _over_http(options: _RemoteChat) -> None:
    drawn = {name: getattr(options, name) for name in ("temperature", "top_p", "seed")}
    drawn |= {name: value for name in ("top_k", "max_tokens") if (value := getattr(options, name))}  # 0: not said
    partner = Remote(options.url, options.api_key or os.environ.get("OPENAI_API_KEY", ""), drawn, options.model)
    name = f"{partner.model} at {options.url}"
    Conversation(partner, name, system=options.system, single=options.turns == SINGLE).run()


class _Local:
    """A model of this process."""

    def __init__(self, engine: Engine, sampling: SamplingParams) -> None:
        self._engine, self._sampling = engine, sampling

    def ask(self, turns: list[Turn]) -> Iterator[str]:
        prompt, start = ask(self._engine, turns)
        limit, most = self._engine.config.max_position_embeddings, self._sampling.max_tokens
        if len(prompt) + most > limit:
            raise TooLongError(
                f"{len(prompt)} tokens: beside an answer of --max-tokens {most} this model takes {max(limit - most, 0)}"
            )
        return self._pieces(prompt, start)

    def stop(self) -> None:
        """The next piece is the last, and is not far."""

    def _pieces(self, prompt: list[int], start: str) -> Iterator[str]:
        yield start
        for piece in self._engine.stream(prompt, self._sampling):
            yield piece.text
