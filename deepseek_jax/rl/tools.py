"""Functions that a model may call while it answers: told in the system message, called in killable processes.

A call ends the model's turn; its result is the next message, and the model goes on:

    … <tool>calculator: 12 * 34</tool>
    <result>408</result>

This is plain text, which any tokenizer writes and any chat template passes on, and which a small model can learn; the
result comes as a user's message, the one role that every template has.
"""

import ast
import dataclasses
import math
import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

from deepseek_jax.rl.workers import Outcome, WorkerPool
from deepseek_jax.typed import check_least, check_types

_OWN = {"calculator": Path(__file__).with_name("calculator.py")}
_FILE = re.compile(r"(.+\.py):([^:/]+)")
# What ends a turn; the last call of a text that holds several.
_CALL = re.compile(r"<tool>((?:(?!<tool>).)*)</tool>\s*\Z", re.DOTALL)
_LINE = re.compile(r" \(\S+\.py:\d+\)\Z")  # of the tool's source, which is no matter of the model's
_NAMED = re.compile(r"\s*([\w.-]+)\s*:(.*)\Z", re.DOTALL)

Failure = Literal["", "unknown", "malformed", "error", "timeout", "crash"]
# As metrics call them.
FAILURES = {
    "unknown": "unknown",
    "malformed": "malformed",
    "error": "errors",
    "timeout": "timeouts",
    "crash": "crashes",
}


@dataclasses.dataclass(frozen=True)
class ToolsConfig:
    """What a model may call while it answers: `<tool>NAME: INPUT</tool>` ends its turn, `<result>…</result>` is the
    next message, and it goes on. Calls and results count towards max_tokens."""

    use: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """calculator, or file.py:function, from text to text; give it several times for more. None: one turn."""
    calls: int = 4
    """In an answer, at most; one with more counts as cut off."""
    seconds: float = 5.0
    """What a call may take before its process is killed."""
    result_tokens: int = 128
    """Of a result, at most: the rest is cut off, which the model is told."""
    told: bool = True
    """Say in the system message which tools there are, by the first lines of their docstrings, and how to call them."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "calls", "result_tokens")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds={self.seconds}: expected seconds that a call may take")


class Call(NamedTuple):
    """What a turn ended with: a tool's name and its input; or ``name`` "", where it named none."""

    name: str
    text: str


class Result(NamedTuple):
    """What the model is told, and why it is no result, if it is none."""

    text: str
    failure: Failure = ""


def read_call(text: str) -> Call | None:
    """The call that a turn ends with."""
    found = _CALL.search(text)
    if found is None:
        return None
    named = _NAMED.match(found.group(1))
    return Call("", found.group(1).strip()) if named is None else Call(named.group(1), named.group(2).strip())


class Tools:
    """The tools of a configuration, in processes of their own. ValueError: one that there is not, or no function."""

    def __init__(self, config: ToolsConfig):
        self.config = config
        sources = [_source(name) for name in config.use]
        self.names = [function for _, function in sources]
        if not sources or len(set(self.names)) < len(self.names):
            raise ValueError(f"task.tools.use={config.use}: expected at least one, none of the same name twice")
        functions = [(str(file), function, 1) for file, function in sources]
        self._pool = WorkerPool(functions, count=min(4, os.cpu_count() or 1), time_limit=config.seconds)
        weakref.finalize(self, self._pool.close)  # the processes end with the task, or with the program
        self.told = _told(sources) if config.told else ""

    def call(self, calls: Sequence[Call]) -> list[Result]:
        """The result of each; whatever goes wrong is told to the model as text."""
        known = [(self.names.index(call.name), call.text) for call in calls if call.name in self.names]
        outcomes = iter(self._pool.call(known))
        return [_result(next(outcomes)) if call.name in self.names else self._no_tool(call) for call in calls]

    def _no_tool(self, call: Call) -> Result:
        if not call.name:
            return Result("error: expected <tool>NAME: INPUT</tool>", "malformed")
        return Result(f"error: there is no tool {call.name}; there is {', '.join(self.names)}", "unknown")


def _result(outcome: Outcome) -> Result:
    assert outcome.failure != "unjudged", "that is a reward model's"
    if outcome.failure:
        return Result(f"error: {_LINE.sub('', outcome.text)}", outcome.failure)
    if isinstance(outcome.value, str | int | float):
        return Result(str(outcome.value))
    return Result(f"error: it returned no text, but {outcome.value!r:.80}", "error")


def _source(name: str) -> tuple[Path, str]:
    """The file and the function. ValueError for a name that is no tool's, and for a missing file."""
    if name in _OWN:
        return _OWN[name], name
    found = _FILE.fullmatch(name)
    if found is None:
        raise ValueError(f"task.tools.use={name!r}: expected {', '.join(_OWN)} or file.py:function")
    if not Path(found.group(1)).is_file():
        raise ValueError(f"task.tools.use={name!r}: there is no file {found.group(1)}")
    return Path(found.group(1)).resolve(), found.group(2)


def _told(sources: Sequence[tuple[Path, str]]) -> str:
    lines = [f"- {function}: {_first_line(file, function)}".removesuffix(": ") for file, function in sources]
    return "\n".join(
        (
            "You may call tools. A call ends your turn: <tool>NAME: INPUT</tool>. The next message has what came of "
            "it, <result>OUTPUT</result>, and you go on. Tools:",
            *lines,
        )
    )


def _first_line(file: Path, function: str) -> str:
    """Of the function's docstring: read, not run, as the user's code runs in other processes alone."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""
