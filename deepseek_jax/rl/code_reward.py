"""Code graded by its tests, run in the sandbox.

A row's tests are either Python, `assert`s as text or a list of them (HumanEval, MBPP), run behind the code in the same
process; or pairs `{"input", "output"}` (Codeforces, LiveCodeBench), also as `{"inputs", "outputs"}` (APPS, TACO), for
each of which the program is run and says the same words to standard output as expected, white space aside. A column may
hold them as JSON text. The reward is 1 where all of them pass, else 0.

Leaving early, with whatever exit code, passes no tests: they have passed where a word has come back that is new in each
run. A program that attacks `assert`s on purpose (a value that equals everything, a search through the frames for the
word) can deceive them, since it shares their process; it has nothing to gain from pairs.
"""

import dataclasses
import functools
import json
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from deepseek_jax.data.special_tokens import END_THINK, THINK
from deepseek_jax.rl.sandbox import Sandbox
from deepseek_jax.rl.tasks import Row, column

SECONDS = 6.0  # of CPU for each run, as LiveCodeBench has it, unless the row has a `time_limit`
_ALL_SECONDS = 60.0  # by the clock, for all the runs of one answer
_FENCE = re.compile(r"^[ \t]*```([^\n`]*)$", re.MULTILINE)
# The parts are read to the end before the first of them runs, and none of them finds its own text.
_HARNESS = """
import json, os, sys, traceback, types
def main():
    parts, word = json.load(sys.stdin)
    write, end, said = os.write, os._exit, os.dup(1)
    module = sys.modules["solution"] = types.ModuleType("solution")
    try:
        for part in parts:
            exec(compile(part, "<code>", "exec"), module.__dict__)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        end(1)
    write(said, word.encode())
    end(0)  # whatever threads there are
main()
"""


class Pair(NamedTuple):
    """What a program reads, and what it must say to that."""

    input: str
    output: str


class UnitTests(NamedTuple):
    """asserts: Python to run behind the code, behind `before` and it. pairs: or what to read and to say."""

    asserts: str = ""
    pairs: Sequence[Pair] = ()
    before: str = ""
    seconds: float = SECONDS


def extract_code(completion: str) -> str:
    """The last fenced block of what stands behind the last `</think>`, or all of that where nothing is fenced.

    A block that is not closed goes on to the end. Nothing where the thinking never ends.
    """
    _, end, reply = completion.rpartition(END_THINK)
    if not end and THINK in reply:
        return ""
    code, start = reply, None
    for fence in _FENCE.finditer(reply):
        if start is None or fence[1].strip():  # one that names a language opens a block, whatever was open
            start = fence.end()
            code = reply[start:]
        else:
            code, start = reply[start : fence.start()], None
    return code.strip("\n")


def read_tests(row: Row, name: str = "tests") -> UnitTests | None:
    """The tests in a column, None where it is empty. ValueError says what is wrong with them."""
    given: Any = column(row, name)
    seconds = row.get("time_limit") or SECONDS
    if not isinstance(seconds, int | float) or not 0 < seconds <= 3600:
        raise ValueError(f'"time_limit" is {seconds!r}; it must be seconds')
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f'"{name}" is no JSON: {error}') from error
    match given:
        case None | "" | []:
            return None
        case {"inputs": [*inputs], "outputs": [*outputs], **rest} if not rest and len(inputs) == len(outputs):
            given = [{"input": said, "output": expected} for said, expected in zip(inputs, outputs, strict=True)]
    if isinstance(given, str):
        return UnitTests(asserts=given, seconds=seconds)
    if isinstance(given, list) and all(isinstance(item, str) for item in given):
        return UnitTests(asserts="\n".join(given), seconds=seconds)
    if not isinstance(given, list) or not all(_is_pair(item) for item in given):
        raise ValueError(
            f'"{name}" must be Python text, a list of it, or a list of {{"input": text, "output": text}} for programs'
        )
    return UnitTests(pairs=[Pair(item["input"], item["output"]) for item in given], seconds=seconds)


def _is_pair(item: Any) -> bool:
    """LiveCodeBench's pairs for functions have the same keys, and another `testtype`."""
    program = isinstance(item, dict) and item.get("testtype", "stdin") == "stdin"
    return program and all(isinstance(item.get(name), str) for name in Pair._fields)


def passes(sandbox: Sandbox, code: str, tests: UnitTests) -> bool:
    """Whether the code passes all the tests; the first that it does not is the last that is run."""
    limits = dataclasses.replace(sandbox.limits, cpu_seconds=tests.seconds, seconds=2 * tests.seconds + 2)
    if not tests.pairs:
        word = secrets.token_hex(16)
        ran = sandbox.run(_HARNESS, json.dumps([[tests.before, code, tests.asserts], word]), limits=limits)
        return ran.ended == "exit" and ran.stdout.endswith(word)
    end = time.monotonic() + _ALL_SECONDS
    for given, expected in tests.pairs:
        ran = sandbox.run(code, given, limits=limits)
        if (ran.ended, ran.code) != ("exit", 0) or ran.stdout.split() != expected.split() or time.monotonic() > end:
            return False
    return True


class CodeReward:
    """The reward: 1 where a completion's code passes its row's tests, else 0, and None for a row that has none.

    threads: how many calls at a time are worth making, as each waits for a program. ValueError where there is no
    sandbox.
    """

    def __init__(self, read: Callable[[Row], UnitTests | None]):
        self._read, self._sandbox = read, shared_sandbox()
        self.threads = self._sandbox.count

    def __call__(self, completion: str, row: Row) -> float | None:
        tests, code = self._read(row), extract_code(completion)
        return None if tests is None else float(bool(code) and passes(self._sandbox, code, tests))


def code_reward(tests: str = "tests") -> CodeReward:
    """The reward `code`, for rows with tests in the column of that name; see ``read_tests``."""
    return CodeReward(functools.partial(read_tests, name=tests))


@functools.cache
def shared_sandbox() -> Sandbox:
    """The process's own: all rewards wait in one queue."""
    return Sandbox()
