"""A talk in the terminal, whoever answers: lines and commands in, answers shown while they are made."""

import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from rich.console import Console

from deepseek_jax.checkpoint.finding import expanded
from deepseek_jax.cli.lines import Lines
from deepseek_jax.cli.thinking import Thinking
from deepseek_jax.saying import terminal

HELP = """/new            start anew
/system TEXT    what opens every talk from now on (without TEXT: nothing), and start anew
/save FILE      add the talk to FILE, a line of JSON as sft reads it
/help           this
Ctrl-C stops an answer; an empty line or Ctrl-D ends the talk."""
_CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10})  # no model writes escapes to a terminal
Turn = dict[str, str]


class TooLongError(ValueError):
    """The model has no room for all that was said."""


class Partner(Protocol):
    """Who answers."""

    def ask(self, turns: list[Turn]) -> Iterator[str]:
        """The answer in pieces, its thinking between marks. TooLongError, and ValueError for what else cannot be asked;
        OSError and ValueError between pieces."""
        ...

    def stop(self) -> None:
        """Ctrl-C was pressed, maybe in the middle of ``ask``."""
        ...


def turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


class Conversation:
    """What was said so far, and what is said to it."""

    def __init__(self, partner: Partner, name: str, *, system: str = "", single: bool = False) -> None:
        """name: what the first line calls whoever answers. single: each question is asked by itself."""
        self._partner, self._name, self._system, self._single = partner, name, system, single
        self._console: Console = terminal()
        self._said: list[Turn] = []

    def run(self) -> None:
        """Until an empty line, or the end of the input."""
        manner = "each question is asked by itself (--turns many: all together) · " if self._single else ""
        self._note(f"{self._name} · {manner}an empty line ends the talk, /help says more")
        lines = Lines("> ")
        while line := lines.read():
            command, _, rest = line.partition(" ")
            if command.startswith("/"):
                self._obey(command, rest.strip())
            else:
                self._answer(line)

    def _obey(self, command: str, rest: str) -> None:
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

    def _answer(self, question: str) -> None:
        """Say what is answered, as it comes, until Ctrl-C; what cannot be asked is said, and forgotten."""
        said, shown, wrong = "", Thinking(), ""
        with _ctrl_c(self._partner.stop) as pressed:
            try:
                for piece in self._ask(question):
                    said += piece
                    self._show(shown.push(piece))
                    if pressed:
                        break
            except (OSError, ValueError) as error:  # the template or the server refuses it, say, or is gone
                wrong = str(error)
        if said or pressed or not wrong:
            self._show(shown.finish())
            self._console.print()
        if pressed:
            self._note("(stopped)")
        elif wrong:
            self._warn(wrong)
        if said:
            self._said += [turn("user", question), turn("assistant", said)]

    def _ask(self, question: str) -> Iterator[str]:
        before = [] if self._single else self._said
        try:
            return self._partner.ask([*self._opening(), *before, turn("user", question)])
        except TooLongError:
            if not before:
                raise
        self._warn("the talk is too long for this model; starting anew")
        self._said = []
        return self._partner.ask([*self._opening(), turn("user", question)])

    def _opening(self) -> list[Turn]:
        return [turn("system", self._system)] if self._system else []

    def _show(self, parts: list[tuple[bool, str]]) -> None:
        for thinking, text in parts:
            style = "dim" if thinking else None
            text = text.translate(_CONTROLS)
            self._console.print(text, end="", style=style, soft_wrap=True)

    def _save(self, file: Path) -> None:
        size = 2 if self._single else len(self._said)
        chats = [self._opening() + self._said[at : at + size] for at in range(0, len(self._said), size or 1)]
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
def _ctrl_c(stop: Callable[[], None]) -> Iterator[list[int]]:
    """The Ctrl-Cs pressed: the first one is noted and calls ``stop``, a second one is as everywhere."""
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt
        stop()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
