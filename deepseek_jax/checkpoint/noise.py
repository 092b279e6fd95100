"""One error, one message: the threads of Orbax and tensorstore also print the errors that they raise."""

import functools
import logging
import os
import sys


@functools.cache
def silence_repeats() -> None:
    """Drop those prints, from now on. The errors themselves are raised in the main thread as ever."""
    logging.getLogger("absl").addFilter(_not_from_orbax)
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs", /) -> None:
        # After a first failure tensorstore answers the event loop of the other arrays, which is gone by then.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname
