"""Lines typed in a terminal: edited, and kept for the next time."""

import contextlib
import os
import sys
from pathlib import Path

_KEPT = 1000


class Lines:
    """Reads lines; with ``readline``, where there is one and a terminal, they can be edited and are remembered in
    ``$XDG_STATE_HOME/deepseek-jax/chat_history``."""

    def __init__(self, prompt: str) -> None:
        """prompt: shown before each line where a person types them."""
        self._readline = self._file = None
        self._prompt = prompt if sys.stdin.isatty() else ""
        if not self._prompt:
            return
        with contextlib.suppress(ImportError):  # not on every system
            import readline

            readline.set_history_length(_KEPT)
            self._readline = readline
        with contextlib.suppress(RuntimeError, OSError):  # no home directory, or none to write to
            folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "deepseek-jax"
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / "chat_history"
            file.touch(mode=0o600)
            self._file = file
            if self._readline is not None:
                self._readline.read_history_file(file)

    def read(self) -> str:
        """The next line without white space around it, "" at the end of input."""
        try:
            line = input(self._prompt).strip()
        except EOFError:
            print(end="\n" if self._prompt else "")
            return ""
        if self._readline is not None and self._file is not None:
            with contextlib.suppress(OSError):
                self._readline.write_history_file(self._file)
        return line
