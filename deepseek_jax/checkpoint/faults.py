"""How Orbax and tensorstore report what fails beneath them: once as an exception, and again on the screen."""

import errno
import functools
import logging
import os
import sys

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def no_room(error: BaseException | None) -> int | None:
    """The errno if a write failed for want of room. tensorstore raises ValueError with the system's words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return error.errno
        for number in _NO_ROOM:
            if os.strerror(number) in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None


@functools.cache
def silence_repeats() -> None:
    """Drop, from now on, what their threads print about errors that are raised in the main thread anyway."""
    logging.getLogger("absl").addFilter(_not_from_orbax)
    logging.getLogger("asyncio").addFilter(_not_for_want_of_room)
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs", /) -> None:
        # After a first failure tensorstore answers the event loop of the other arrays, which is gone by then.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


def _not_for_want_of_room(record: logging.LogRecord) -> bool:
    """asyncio reports a future whose error nobody fetched: the second array that did not fit."""
    return not (record.exc_info and no_room(record.exc_info[1]) is not None)
