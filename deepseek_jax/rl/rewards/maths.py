r"""Mathematics, compared by value with math-verify. It runs in a worker, never in the trainer.

LaTeX that a model writes can make sympy spin or take all memory: here math-verify's alarms and a limit on memory end
that, and where neither does, the worker is killed. What is not right in time is wrong.
"""

import contextlib
import functools
import logging
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import math_verify  # pyright: ignore[reportMissingImports]
import sympy  # pyright: ignore[reportMissingImports]

from deepseek_jax.rl.answers import final_answer, last_reply

_SECONDS = 2  # of each step, which takes milliseconds
_MEMORY = 1 << 30  # beyond what the worker has
_LONGEST = 1000  # characters of an answer that is read as mathematics
_DIGITS = 12  # after the point

_WORDS = re.compile(r"\\(?:text(?:bf|it|rm|sf)?|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_IGNORED = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,;:> ]|\\?%|\\?\$|[\s~]")
_BASED = re.compile(r"([0-9A-F]+)_\{?(\d+)\}?")
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")
_SENTENCE = re.compile(r"(?<![A-Za-z])[A-Za-z]{2,30}(?: +[A-Za-z]{2}|:)")  # bounded, or the cost is quadratic

for _name in ("math_verify", "latex2sympy2_extended"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def score(completion: str, row: Mapping[str, Any]) -> float | None:
    r"""1 if the reply's answer is the row's `answer`, LaTeX or plain; else 0; None where the row has none.

    It stands in the last `\boxed{}`, else behind the last `####`, else in the whole reply, which may be a sentence.
    """
    right = row["answer"]
    if right is None:
        return None
    said, marked = final_answer(last_reply(completion))
    if not marked and "\\boxed" in said:  # which is never closed
        return 0.0
    return float(is_equal(right, said, sentence=not marked))


def is_equal(right: str, said: str, *, sentence: bool = False) -> bool:
    r"""Whether both are the same answer.

    By value: fractions, roots, intervals, sets in any order, points in theirs, matrices, equations; rounded decimals
    are not equal to what was rounded. By word, whatever its case, where what is right is `\text{}`. Units, currency and
    percent signs are not compared. What is over 1000 characters long is compared as text.

    sentence: `said` may be a sentence with the answer in it.
    """
    right, said = right.strip(), said.strip().replace("°", "^\\circ")
    if not said:
        return False
    plain_right, plain_said = _plain(right), _plain(said)
    if plain_right == plain_said:
        return True
    if (word := _as_word(right)) is not None:
        return word == _as_word(said, bare=True)
    if based := _BASED.fullmatch(plain_right):
        found = _BASED.fullmatch(plain_said)
        return found is not None and found.groups() == based.groups()
    words = sentence and _SENTENCE.search(said) is not None
    if len(said) > _LONGEST and not words:
        return False
    with _limited_memory():
        found = _parse(said[-_LONGEST:] if words else _boxed(said))
        return _verify(_parse_right(right), found) and (words or not _differ_in_case(right, said))


def _plain(text: str) -> str:
    return _IGNORED.sub("", _WORDS.sub(r"\1", text)).replace("dfrac", "frac").replace("tfrac", "frac").rstrip(".")


def _differ_in_case(right: str, said: str) -> bool:
    """Whether they have the same variables, but for capitals, which math-verify takes for the small ones."""
    ours, theirs = set(_LETTER.findall(right)), set(_LETTER.findall(said))
    return ours != theirs and {letter.lower() for letter in ours} == {letter.lower() for letter in theirs}


def _as_word(text: str, *, bare: bool = False) -> str | None:
    r"""The word that all of the text is, in small letters, or None. bare: without \text{} too."""
    inside, count = _WORDS.subn(r"\1", text)
    inside = inside.strip().strip("().").strip()
    return inside.casefold() if (count or bare) and re.fullmatch(r"[^\W\d_]+(?:[ '-]+[^\W\d_]+)*", inside) else None


def _boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


@functools.lru_cache(maxsize=256)  # all of a group are compared with the same
def _parse_right(right: str) -> list[Any]:
    return _parse(_boxed(right))


def _parse(text: str) -> list[Any]:
    configs = [math_verify.LatexExtractionConfig(boxed_match_priority=0), math_verify.ExprExtractionConfig()]
    found = math_verify.parse(text, configs, fallback_mode="no_fallback", parsing_timeout=_SECONDS)
    return [_with_unit(item) for item in found]


def _with_unit(item: Any) -> Any:
    """The same with i as the imaginary unit, which it is to math-verify in some places and a variable in others."""
    try:
        return item.subs({symbol: sympy.I for symbol in item.free_symbols if symbol.name == "i"})
    except Exception:  # sympy raises whatever it likes on what a model writes: left for math-verify to refuse
        return item


def _verify(right: list[Any], said: list[Any]) -> bool:
    return math_verify.verify(
        right, said, float_rounding=_DIGITS, allow_set_relation_comp=True, timeout_seconds=_SECONDS
    )


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """While it is open, more memory than a little is a MemoryError, which math-verify takes for 'not equal'."""
    if sys.platform != "linux":  # where such a limit is not kept
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
