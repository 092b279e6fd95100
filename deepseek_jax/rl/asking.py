"""Rows as questions to a model, and what it said to them: the same for training and for evaluation."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from deepseek_jax.data.chat import encode_prompt
from deepseek_jax.data.conversations import Message
from deepseek_jax.data.special_tokens import THINK
from deepseek_jax.data.template import opens_thinking
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.generate import Generated
from deepseek_jax.rl.tasks import Row, Task


@dataclasses.dataclass(frozen=True)
class Question:
    """A row as it is asked.

    text: the last thing asked. prompt: ids, by the model's own template. start: how each answer begins: with `<think>`
    where the template has written that into the prompt.
    """

    row: Row
    text: str
    prompt: list[int]
    start: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was said, thinking included and the token that ended it left out; ended: by itself, not by the limit. turns:
    messages before it, of calls of tools and their results, where there were any."""

    text: str
    ended: bool
    turns: tuple[Message, ...] = ()

    @property
    def all_turns(self) -> str:
        """All that was said, results of calls among it: the text alone where nothing was called."""
        return "\n".join([*(turn["content"] for turn in self.turns), self.text])

    @property
    def own_turns(self) -> str:
        """What the model said of it."""
        return "\n".join([*(turn["content"] for turn in self.turns if turn["role"] == "assistant"), self.text])


def ask(task: Task, tokenizer: Tokenizer, row: Row) -> Question:
    """ValueError "FILE:LINE: what" for a row that cannot be asked."""
    messages = task.messages(row)
    prompt = encode_prompt(tokenizer, messages)
    end = tokenizer.decode(prompt[-8:], skip_special_tokens=False)
    return Question(row, messages[-1]["content"], prompt, THINK if opens_thinking(end) else "")


def read_answers(tokenizer: Tokenizer, questions: Sequence[Question], out: Generated) -> list[Answer]:
    """The answers to the questions that ``out`` begins with, as text."""
    answers = []
    for row, question in enumerate(questions):
        ended = bool(out.stopped_B[row])
        ids = np.asarray(out.tokens_BN[row, : int(out.lengths_B[row]) - ended]).tolist()
        answers.append(Answer(question.start + tokenizer.decode(ids, skip_special_tokens=False), ended))
    return answers
