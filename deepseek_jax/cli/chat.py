"""``chat``: a talk in the terminal, each answer shown while it is made."""

import contextlib
import dataclasses
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from deepseek_jax.checkpoint.finding import expanded
from deepseek_jax.cli.lines import Lines
from deepseek_jax.cli.talk import Answering, ask, turn
from deepseek_jax.cli.thinking import Thinking
from deepseek_jax.data.turns import SINGLE, known_turns
from deepseek_jax.inference.engine import Engine
from deepseek_jax.parallel.processes import require_one_process
from deepseek_jax.saying import terminal

HELP = """/new            start anew
/system TEXT    what opens every talk from now on (without TEXT: nothing), and start anew
/save FILE      add the talk to FILE, a line of JSON as sft reads it
/help           this
Ctrl-C stops an answer; an empty line or Ctrl-D ends the talk."""
_CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10})  # no model writes escapes to a terminal


@dataclasses.dataclass(frozen=True)
class _Chat(Answering):
    """Talk with a model; its thinking is shown dimmed. An empty line or Ctrl-D ends the talk, Ctrl-C stops an answer;
    /help names what else can be typed."""

    system: str = ""
    """A text that opens every talk."""
    turns: Literal["auto", "single", "many"] = "auto"
    """single: each question is asked by itself; many: with all that was said before; auto: single where the model was
    taught nothing else."""


def run_chat(arguments: Sequence[str]) -> None:
    options = tyro.cli(_Chat, args=list(arguments), prog="deepseek-jax chat")
    require_one_process("a talk (generate --chat answers prompts on many)")
    console, lines, folder = terminal(), Lines("> "), options.folder
    talk = _Talk(options, options.engine(), console)
    console.print(
        f"{folder} · {talk.manner}an empty line ends the talk, /help says more",
        style="dim",
        soft_wrap=True,
    )
    while line := lines.read():
        command, _, rest = line.partition(" ")
        if command.startswith("/"):
            talk.obey(command, rest.strip())
        else:
            talk.answer(line)


class _Talk:
    """What was said so far, and what is said to it."""

    def __init__(self, options: _Chat, engine: Engine, console: Console) -> None:
        self._engine, self._console = engine, console
        self._sampling, self._system = options.params(), options.system
        turns = known_turns(engine.tokenizer) if options.turns == "auto" else options.turns
        self._single = turns == SINGLE
        self._said: list[dict[str, str]] = []

    @property
    def manner(self) -> str:
        return "each question is asked by itself (--turns many: all together) · " if self._single else ""

    def obey(self, command: str, rest: str) -> None:
        """Do what a line that begins with / says."""
        if command == "/save" and rest:
            self._save(expanded(rest))
        elif command in ("/new", "/system"):
            self._said = []
            self._system = rest if command == "/system" else self._system
            self._note("a new talk" + (f", opened by: {self._system}" if self._system else ""))
        elif command == "/help":
            self._note(HELP)
        else:
            self._warn(f"{command}: not known, or it lacks something")
            self._note(HELP)

    def answer(self, question: str) -> None:
        """Say what the model answers, as it comes; what cannot be asked is said, and forgotten."""
        asked = [*([] if self._single else self._said), turn("user", question)]
        try:
            prompt, start = self._ask(asked)
            if self._too_long(prompt) and len(asked) > 1:
                self._warn("the talk is too long for this model; starting anew")
                self._said, asked = [], asked[-1:]
                prompt, start = self._ask(asked)
        except ValueError as error:  # the template refuses it, say
            self._warn(str(error))
            return
        if self._too_long(prompt):
            limit, most = self._engine.config.max_position_embeddings, self._sampling.max_tokens
            self._warn(
                f"{len(prompt)} tokens: beside an answer of --max-tokens {most} this model takes {max(limit - most, 0)}"
            )
            return
        said = self._stream(prompt, start)
        if said:
            self._said += [turn("user", question), turn("assistant", said)]

    def _ask(self, asked: list[dict[str, str]]) -> tuple[list[int], str]:
        return ask(self._engine, ([turn("system", self._system)] if self._system else []) + asked)

    def _too_long(self, prompt: Sequence[int]) -> bool:
        return len(prompt) + self._sampling.max_tokens > self._engine.config.max_position_embeddings

    def _stream(self, prompt: list[int], start: str) -> str:
        """Show an answer while it is made, until Ctrl-C; returns what was said."""
        said, shown = start, Thinking()
        pieces = self._engine.stream(prompt, self._sampling)
        with _ctrl_c() as pressed:
            self._show(shown.push(start))
            for piece in pieces:
                said += piece.text
                self._show(shown.push(piece.text))
                if pressed:
                    break
        self._show(shown.finish())
        self._console.print()
        if pressed:
            self._note("(stopped)")
        return said

    def _show(self, parts: list[tuple[bool, str]]) -> None:
        for thinking, text in parts:
            style = "dim" if thinking else None
            text = text.translate(_CONTROLS)
            self._console.print(text, end="", style=style, soft_wrap=True)

    def _save(self, file: Path) -> None:
        opening = [turn("system", self._system)] if self._system else []
        size = 2 if self._single else len(self._said)
        chats = [opening + self._said[at : at + size] for at in range(0, len(self._said), size or 1)]
        try:
            with open(file, "a", encoding="utf-8") as out:
                out.writelines(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats)
        except OSError as error:
            self._warn(str(error))
        else:
            self._note(f"{len(chats)} chats → {file}" if len(chats) != 1 else f"→ {file}")

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", soft_wrap=True)

    def _warn(self, text: str) -> None:
        self._console.print(text, style="yellow", soft_wrap=True)


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """The Ctrl-Cs pressed: the first is only noted, a second one is as everywhere."""
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
