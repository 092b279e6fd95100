"""The tests of contest problems in the forms in which data sets hold them, as ``UnitTests``.

A column holds, also as JSON text: pairs `[{"input", "output"}]`; or `{"input": [...], "output": [...]}`, and the same
with `inputs` and `outputs`; or LiveCodeBench's hidden tests, JSON packed with pickle, zlib and base64, which are read
without pickle: nothing in them is executed. Pairs of `testtype` "functional" call a method, their input a line of
JSON for each argument.
"""

import base64
import binascii
import json
import pickletools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.rl.code_reward import SECONDS, Pair, UnitTests
from deepseek_jax.rl.tasks import Row, column

_MOST = 1 << 30  # bytes that hidden tests unpack to
_STRINGS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_AROUND = ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP")
# What solutions to functions take for given.
_BEFORE = "import bisect, collections, functools, heapq, itertools, math, re, string\n" + "\n".join(
    f"from {module} import *" for module in ("typing", "collections", "functools", "heapq", "itertools", "math")
)
_CHECK = """
def _plain(value):
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
for _given, _expected in json.loads({pairs!r}):
    _value = (Solution() if "Solution" in globals() else __import__("solution"))
    _value = getattr(_value, {name!r})(*[json.loads(line) for line in _given.splitlines() if line.strip()])
    assert _plain(_value) == json.loads(_expected), _given[:200]
"""


def read_contest_tests(row: Row, names: Sequence[str]) -> UnitTests | None:
    """The tests of all these columns; None where there are none. ValueError says what is wrong with them.

    `time_limit` is in seconds, also as {"seconds", "nanos"}; a row whose answers need a checker of its own is refused.
    """
    if row.get("generated_checker"):
        raise ValueError('its answers are judged by a program ("generated_checker"), which is not run here')
    seconds = _seconds(row.get("time_limit"))
    pairs = [pair for name in names for pair in _pairs(column(row, name), name)]
    if not pairs:
        return None
    kinds = {pair.get("testtype") or "stdin" for pair in pairs}
    made = list({Pair(pair["input"], pair["output"]): None for pair in pairs})  # examples are often among the hidden
    if kinds == {"stdin"}:
        return UnitTests(pairs=made, seconds=seconds)
    if kinds == {"functional"}:
        check = _CHECK.format(pairs=json.dumps(made), name=_function(row))
        return UnitTests(asserts=f"import json\n{check}", before=_BEFORE, seconds=seconds)
    raise ValueError(f"its tests are of kinds {', '.join(map(str, sorted(kinds)))}; expected stdin or functional alone")


def _seconds(value: Any) -> float:
    if isinstance(value, Mapping):
        value = (value.get("seconds") or 0) + (value.get("nanos") or 0) / 1e9
    seconds = value or SECONDS
    if not isinstance(seconds, int | float) or not 0 < seconds <= 3600:
        raise ValueError(f'"time_limit" is {value!r}; it must be seconds')
    return float(seconds)


def _pairs(given: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(given, str) and given.strip():
        try:
            given = json.loads(given if given.lstrip()[:1] in ("[", "{") else _unpacked(given))
        except ValueError as error:
            raise ValueError(f'"{name}" is neither JSON nor packed tests: {error}') from error
    if not given:
        return []
    if isinstance(given, Mapping):
        inputs, outputs = (given.get(key, given.get(f"{key}s")) for key in ("input", "output"))
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise ValueError(f'"{name}" must have as many inputs as outputs')
        given = [{"input": said, "output": expected} for said, expected in zip(inputs, outputs, strict=True)]
    if not isinstance(given, list) or not all(_is_pair(item) for item in given):
        raise ValueError(f'"{name}" must be a list of {{"input": text, "output": text}}')
    return given


def _is_pair(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(name), str) for name in Pair._fields)


def _unpacked(text: str) -> str:
    """The one text that a pickle holds. ValueError for anything else in it."""
    try:
        data = base64.b64decode(text, validate=True)
        unpacking = zlib.decompressobj()
        data = unpacking.decompress(data, _MOST)
        if unpacking.unconsumed_tail:
            raise ValueError(f"more than {_MOST} bytes")
        codes = [(code.name, argument) for code, argument, _ in pickletools.genops(data)]
    except (binascii.Error, zlib.error) as error:
        raise ValueError(str(error)) from error
    texts = [argument for name, argument in codes if name in _STRINGS]
    if len(texts) != 1 or not all(name in (*_STRINGS, *_AROUND) for name, _ in codes):
        raise ValueError("a pickle of something else than text")
    return str(texts[0])


def _function(row: Row) -> str:
    """The method's name: `func_name` of `metadata`, an object or JSON text of one."""
    given = row.get("metadata")
    given = json.loads(given) if isinstance(given, str) else given
    name = given.get("func_name") if isinstance(given, Mapping) else None
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f'its tests call a function, and "metadata" names none: {given!r:.80}')
    return name
