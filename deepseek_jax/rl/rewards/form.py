"""Rule rewards as in DeepSeek-R1-Zero (arXiv 2501.12948): is the answer right, is the form kept.

Each is a pure function of the completion's text, `<think>` and `</think>` included, the end-of-sentence token
left out, and of what is right. It is 1 or 0, and its cost is linear in the length. Texts are compared, never parsed as
numbers: a digit of another script, a sign or a leading zero is a wrong answer.
"""

from deepseek_jax.data.special_tokens import END_THINK, THINK

# str.strip() alone would also remove spaces of other scripts and separators such as U+001C.
_WHITESPACE = " \t\r\n"
_ANSWER, _END_ANSWER = "<answer>", "</answer>"


def _split(completion: str) -> tuple[str, str] | None:
    """What stands before and after the only `</think>`; None if markers are nested, repeated or missing."""
    if completion.count(END_THINK) != 1 or completion.count(THINK) > 1:
        return None
    before, _, after = completion.partition(END_THINK)
    return None if THINK in after else (before, after)


def _is_blank(text: str) -> bool:
    return not any(character.isprintable() and not character.isspace() for character in text)


def accuracy_reward(completion: str, answer: str) -> float:
    """1 if `answer` is all that follows the only `</think>`, or all between `<answer>` and `</answer>` there, spaces
    and line ends around it aside; else 0."""
    parts = _split(completion)
    if parts is None:
        return 0.0
    reply = parts[1].strip(_WHITESPACE)
    if reply.startswith(_ANSWER) and reply.endswith(_END_ANSWER):
        reply = reply[len(_ANSWER) : -len(_END_ANSWER)].strip(_WHITESPACE)
    return float(reply == answer)


def format_reward(completion: str, row: object = None) -> float:
    """1 if the text is `<think>`, something, `</think>` and a one-line answer, right or wrong; else 0."""
    del row
    parts = _split(completion)
    if parts is None or not parts[0].startswith(THINK):
        return 0.0
    thinking, reply = parts[0].removeprefix(THINK), parts[1].strip(_WHITESPACE)
    return float(not _is_blank(thinking) and not _is_blank(reply) and len(reply.splitlines()) == 1)


def tags_reward(completion: str, row: object = None) -> float:
    """1 if the text is `<think>`, something, `</think>`, `<answer>`, something, `</answer>`, as R1-Zero's prompt asks;
    else 0. White space may stand around and between, each tag just once."""
    del row
    text = completion.strip(_WHITESPACE)
    if any(text.count(tag) != 1 for tag in (THINK, END_THINK, _ANSWER, _END_ANSWER)):
        return 0.0
    thinking, _, rest = text.removeprefix(THINK).partition(END_THINK)
    between, opened, reply = rest.removesuffix(_END_ANSWER).partition(_ANSWER)
    if not (text.startswith(THINK) and text.endswith(_END_ANSWER) and opened) or between.strip(_WHITESPACE):
        return 0.0
    return float(not _is_blank(thinking) and not _is_blank(reply))
