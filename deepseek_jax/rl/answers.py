r"""The final answer of a completion, compared with the right one as text or as a number.

What counts is what stands behind the last `</think>` (all of a completion that has no markers; nothing where the
thinking never ends), within it the last `<answer>` if there is one, and in that the last `\boxed{...}`, else the rest
of the line behind the last `####`, else all.
The cost is linear in the length.
"""

import re
from decimal import Decimal

from deepseek_jax.data.special_tokens import END_THINK, THINK

_BOXED, _MARK = "\\boxed{", "####"
# ASCII digits, with or without commas between thousands; a sign behind a digit is an operation's.
_NUMBER = re.compile(r"(?:(?<![0-9])[-+])?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def final_answer(completion: str) -> tuple[str, bool]:
    """The answer's text and whether it was marked as such, by a box or `####`."""
    _, end, reply = completion.rpartition(END_THINK)
    if not end and THINK in reply:
        return "", False
    reply = _answered(reply)
    boxed = _last_boxed(reply)
    if boxed is not None:
        return boxed.strip(), True
    _, mark, rest = reply.rpartition(_MARK)
    return (rest.lstrip().partition("\n")[0].strip(), True) if mark else (reply.strip(), False)


def last_reply(completion: str) -> str:
    """What is said and not thought, as far as it is meant as the answer.

    Behind the last `</think>` up to a thought that opens again, and in that behind the last `<answer>` up to
    `</answer>`; nothing where the thinking never ends.
    """
    _, end, reply = completion.rpartition(END_THINK)
    if not end and THINK in reply:
        return ""
    return _answered(reply.partition(THINK)[0])


def _answered(reply: str) -> str:
    _, opened, inside = reply.rpartition("<answer>")
    return inside.partition("</answer>")[0] if opened else reply


def _last_boxed(text: str) -> str | None:
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    start, depth = start + len(_BOXED), 1
    for match in re.compile("[{}]").finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return text[start : match.start()]
    return None


def to_number(text: str) -> Decimal | None:
    """The number that `text` is, a dollar or percent sign and a full stop aside; None where it is something else."""
    found = _NUMBER.fullmatch(text.strip().removeprefix("$").removesuffix(".").removesuffix("%").strip())
    return Decimal(found.group().replace(",", "")) if found else None


def said(completion: str, answer: str) -> Decimal | str | None:
    """The final answer as `is_right` compares it with `answer`, so that two that say the same are equal: the last
    number where `answer` is one, else the text; None where there is none."""
    text, _ = final_answer(completion)
    if to_number(answer) is None:
        return text or None
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def is_right(completion: str, answer: str) -> bool:
    """Whether the final answer is `answer`.

    A number is compared by value with the last number of the final answer, so "so 1,072.0 clips." is 1072; any
    other text must be the final answer to the letter, white space around it aside.
    """
    number = to_number(answer)
    if number is None:
        return final_answer(completion)[0] == answer.strip()
    return said(completion, answer) == number
