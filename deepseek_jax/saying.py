"""What work says to whoever waits for it, on standard error: what it is doing, and how long that took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.text import Text

_SHORT = 1.0  # seconds: what takes less is not told
_EVERY = 10.0  # seconds between lines where there is no terminal

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


def terminal(*, stderr: bool = False) -> Console:
    """Prints text as it stands: neither `[/INST]` in a prompt nor `:key:` in a path is markup."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


@contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """Within it nothing is said, if ``quiet``."""
    token = _quiet.set(quiet)
    try:
        yield
    finally:
        _quiet.reset(token)


def say(text: str) -> None:
    """A line."""
    if not _quiet.get():
        terminal(stderr=True).print(text, soft_wrap=True)


@contextmanager
def doing(what: str) -> Iterator[Callable[[str], None]]:
    """Say "packing …" while it lasts and "packing: 3.2 s" at its end; yields a function that says how far it is.

    >>> with doing("packing") as tell:  # doctest: +SKIP
    ...     tell("1,200 documents")
    """
    began = time.monotonic()
    if _quiet.get():
        yield lambda text: None
        return
    console = terminal(stderr=True)
    if console.is_terminal:
        with console.status(Text(f"{what} …")) as status:
            yield lambda text: status.update(Text(f"{what} … {text}"))
    else:
        say(f"{what} …")
        yield _now_and_then(lambda text: say(f"{what} … {text}"))
    if (seconds := time.monotonic() - began) >= _SHORT:
        say(f"{what}: {seconds:.1f} s")


def _now_and_then(tell: Callable[[str], None]) -> Callable[[str], None]:
    last = time.monotonic()

    def told(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _EVERY:
            last = time.monotonic()
            tell(text)

    return told
