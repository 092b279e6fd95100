"""Rejection sampling: which of many answers are kept to learn from, as R1 made the samples of its second fine-tuning
(arXiv 2501.12948, section 2.3.3): right ones that read well, and of those that say the same one."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.data.special_tokens import END_THINK, THINK
from deepseek_jax.rl.rewards.language import language
from deepseek_jax.rl.rewards.repetition import repetition
from deepseek_jax.typed import check_types

_ANSWER, _END_ANSWER = "<answer>", "</answer>"
# Why an answer is not kept; the first that holds is counted. `judged`: a row without a right answer, and the judge's
# score is too low, or it has none.
REASONS = ("cut_off", "wrong", "judged", "form", "language", "long", "repeated", "code", "paragraph", "duplicate")
REASONS += ("surplus",)


@dataclasses.dataclass(frozen=True)
class Readable:
    """Which answers read well, and how many of a question are kept. 0 is no limit."""

    per_prompt: int = 0
    """Answers to keep of a question, the first that are good."""
    thought: bool = True
    """Only answers that think: `<think>`, something, `</think>` and something."""
    language: str = "en"
    """What answers are written in, unless the row has a column `language`; "": anything. Languages are told by script,
    as by the reward of this name."""
    language_share: float = 0.9
    """The least share of the thought's words that are in it."""
    longest: int = 0
    """Tokens of an answer."""
    repeated: float = 0.5
    """The largest share of six words in a row that came before; 1: any."""
    code: bool = True
    """Thoughts may hold blocks of code (```)."""
    paragraph: int = 0
    """Characters of a thought's longest paragraph."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.language:
            language(self.language)
        for name in ("language_share", "repeated"):
            if getattr(self, name) > 1:
                raise ValueError(f"{type(self).__name__}.{name}={getattr(self, name)}: a share is at most 1")


@dataclasses.dataclass(frozen=True)
class Sampled:
    """An answer, and what is known of it. prompt: what was asked; the same text is the same question. correct, score:
    None where there is no right answer, and where no judge had something to say."""

    prompt: str
    text: str
    tokens: int
    ended: bool
    correct: bool | None
    score: float | None = None
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def as_reply(text: str) -> str | None:
    """An answer as a chat learns it: `<think>`, a thought, `</think>` and what is said then, which of R1-Zero's is what
    stands between `<answer>` and `</answer>`. A text without any of these tags is itself. None: tags that are nested,
    repeated or open, or nothing beside them."""
    text = text.strip()
    if not any(tag in text for tag in (THINK, END_THINK, _ANSWER, _END_ANSWER)):
        return text or None
    thought, ended, reply = text.removeprefix(THINK).partition(END_THINK)
    if not ended:
        thought, reply = "", text
    if _ANSWER in reply or _END_ANSWER in reply:
        before, _, rest = reply.partition(_ANSWER)
        inside, closed, _ = rest.partition(_END_ANSWER)
        white = before[: len(before) - len(before.lstrip())]
        reply = white + inside.strip() if closed and reply.count(_ANSWER) == reply.count(_END_ANSWER) == 1 else ""
    broken = any(tag in reply for tag in (THINK, END_THINK)) or THINK in thought
    if broken or not reply.strip() or (ended and not thought.strip()):
        return None
    return f"{THINK}{thought}{END_THINK}{reply}" if ended else reply


def choose(answers: Sequence[Sampled], keep: Readable, *, least: float | None = None) -> list[tuple[str | None, str]]:
    """Of each answer the reply to learn (None: not kept) and why it is not kept ("" where it is), one of REASONS.

    least: what the score of an answer to a question without a right one must reach; None: nothing is asked of it.
    """
    seen, kept = set[tuple[str, str]](), Counter[str]()
    found: list[tuple[str | None, str]] = []
    for answer in answers:
        reply = as_reply(answer.text)
        reason = _wrong(answer, least) or _unreadable(answer, reply, keep)
        if not reason and (answer.prompt, said := " ".join((reply or "").split())) in seen:
            reason = "duplicate"
        if not reason and keep.per_prompt and kept[answer.prompt] == keep.per_prompt:
            reason = "surplus"
        if not reason:
            seen.add((answer.prompt, said))
            kept[answer.prompt] += 1
        found.append((None if reason else reply, reason))
    return found


def _wrong(answer: Sampled, least: float | None) -> str:
    if not answer.ended:
        return "cut_off"
    if answer.correct is not None:
        return "" if answer.correct else "wrong"
    judged = least is None or (answer.score is not None and answer.score >= least)
    return "" if judged else "judged"


def _unreadable(answer: Sampled, reply: str | None, keep: Readable) -> str:
    """Why the answer does not read well; "" where it does."""
    if reply is None or (keep.thought and END_THINK not in reply):
        return "form"
    thought = reply.partition(END_THINK)[0].removeprefix(THINK)
    share = language(keep.language)(reply, answer.row) if keep.language else None
    if share is not None and share < keep.language_share:
        return "language"
    if keep.longest and answer.tokens > keep.longest:
        return "long"
    if -repetition()(reply, {}) > keep.repeated:
        return "repeated"
    if not keep.code and "```" in thought:
        return "code"
    if keep.paragraph and max(map(len, thought.split("\n\n"))) > keep.paragraph:
        return "paragraph"
    return ""


def counts(answers: Sequence[Sampled], chosen: Sequence[tuple[str | None, str]]) -> dict[str, Any]:
    """How many were kept, of how many questions, and how many were not by reason; the share of right ones where there
    is a right one; the mean length of what was kept."""
    kept = [answer for answer, (_, reason) in zip(answers, chosen, strict=True) if not reason]
    graded = [answer.correct for answer in answers if answer.correct is not None]
    reasons = Counter(reason for _, reason in chosen if reason)
    return {
        "questions": len({answer.prompt for answer in answers}),
        "answers": len(answers),
        "kept": len(kept),
        "questions_kept": len({answer.prompt for answer in kept}),
        "dropped": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
        **({"correct": sum(graded) / len(graded)} if graded else {}),
        **({"tokens_kept": sum(answer.tokens for answer in kept) / len(kept)} if kept else {}),
    }
