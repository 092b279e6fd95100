"""The program that calls a user's functions, in a process that may be killed. It imports the standard library alone.

    python -P user_worker.py '[["/path/mine.py", "score", 2], ...]'    (file, function, number of arguments)

It answers first {"ready": true} or {"error": text}, then each line [index, *arguments] of its standard input
with {"value": what it returned} or {"error": text}. All is JSON in ASCII, so no text can break a line. What the user's
code prints goes to standard error, and it finds its standard input empty.
"""

import functools
import importlib.util
import inspect
import json
import os
import queue
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any


@functools.cache
def _load_module(file: str) -> types.ModuleType:
    path = Path(file).resolve()
    name = f"user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses resolve annotations through it
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a program of the user's: whatever it raises is told with its line
        raise ValueError(f"{file}: {describe(error, file)}") from error
    return module


def load_function(file: str, function: str, *, arguments: int) -> Callable[..., Any]:
    """The function of a Python file, which may import what lies beside it. ValueError says what is wrong."""
    module = _load_module(file)
    found = getattr(module, function, None)
    if not callable(found):
        there = [name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"]
        raise ValueError(f"{file}: no function {function}; it has {', '.join(there) or 'none'}")
    try:
        signature = inspect.signature(found)
    except ValueError:  # some builtins have none
        return found
    if "completion" in [*signature.parameters][1:]:  # as other libraries have it: it would be given the row
        raise ValueError(f"{file}: {function}{signature} is called with the completion first, then its row")
    try:
        signature.bind(*range(arguments))
    except TypeError as error:
        raise ValueError(f"{file}: {function}{signature} is called with {arguments} arguments") from error
    return found


def describe(error: BaseException, file: str) -> str:
    """ "KeyError: 'unit' (mine.py:12)": the error and the last of the file's own lines that it passed."""
    path = str(Path(file).resolve())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{type(error).__name__}: {error.msg} ({Path(file).name}:{error.lineno})"
    text = f"{type(error).__name__}: {error}"[:500]
    return f"{text} ({Path(file).name}:{lines[-1]})" if lines else text


def _number(value: Any) -> float:
    """What JSON has no form for may be a number all the same, such as numpy's."""
    if not hasattr(value, "__float__"):
        raise TypeError(f"returned {value!r}, of type {type(value).__name__}, which JSON has no form for")
    return float(value)


def _read(requests: Any, incoming: queue.SimpleQueue[bytes]) -> None:
    """Ends the process, whatever it is doing, when the parent has gone."""
    for line in requests:
        incoming.put(line)
    os.killpg(os.getpid(), signal.SIGKILL)


def main() -> None:
    # The protocol takes its pipes before any code of the user's runs; 0 and 1 are left for that.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    incoming: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests, incoming), daemon=True).start()

    def reply(answer: dict[str, Any]) -> None:
        message = memoryview(json.dumps(answer, default=_number).encode() + b"\n")
        while message:
            message = message[os.write(replies, message) :]

    functions = json.loads(sys.argv[1])
    try:
        calls = [load_function(file, function, arguments=count) for file, function, count in functions]
    except ValueError as error:
        return reply({"error": str(error)})
    reply({"ready": True})
    while True:
        index, *arguments = json.loads(incoming.get())
        try:
            reply({"value": calls[index](*arguments)})
        except BaseException as error:  # sys.exit() too is an answer that failed
            reply({"error": describe(error, functions[index][0])})


if __name__ == "__main__":
    main()
