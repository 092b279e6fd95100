"""Multiple choice: the letter of the option that was chosen."""

import re
from collections.abc import Mapping
from typing import Any

from deepseek_jax.rl.answers import final_answer, last_reply

# "The answer is (C).", "**Answer:** C": the rest of the line.
_TOLD = re.compile(r"(?i:answer|option|choice)[\s*]*(?::|=|\bis\b)[\s*:]*(.*)")
_MARKUP = re.compile(r"\\(?:text(?:bf)?|mathrm|mathbf|mbox|boxed)\b|[*${}]")
_LETTER = re.compile(r"\(([A-Z])\)|([A-Z])(?=[.):,]|$)")
_ANOTHER = re.compile(r"[.)]?\s*(?:[,/&]|or\b|and\b)\s*\(?[A-Z]\b")


def score(completion: str, row: Mapping[str, Any]) -> float | None:
    """1 if the option that the reply names is the row's `answer`, a letter; else 0.

    It is read from the last box or `####`, else from what follows the last "answer is" or "Answer:" (or option,
    choice), else from the whole reply, and has to stand first there: "C", "(C) Paris", "C: Paris". Two are none.
    """
    right = row["answer"]
    if right is None:
        return None
    return float(chosen(completion) == right.strip())


def chosen(completion: str) -> str | None:
    """The letter that a completion names, None where it names none or several."""
    said, marked = final_answer(last_reply(completion))
    if not marked and (told := _TOLD.findall(said)):
        said = told[-1]
    return read_letter(said)


def read_letter(text: str) -> str | None:
    """The option that `text` begins with; None where there is none, or another beside it."""
    plain = _MARKUP.sub("", text).strip()
    if len(plain) == 1 and plain.isascii():  # a small letter only where it is all
        plain = plain.upper()
    found = _LETTER.match(plain)
    if found is None or _ANOTHER.match(plain, found.end()):
        return None
    return found.group(1) or found.group(2)
