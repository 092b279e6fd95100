"""Answers while they are made: what events bring, and the text of it."""

import dataclasses

from deepseek_jax.data.streaming import EndingText
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.events import Event
from deepseek_jax.inference.prompt_scores import PromptScores


@dataclasses.dataclass(frozen=True)
class Completion:
    """text: decoded with the thinking marks, without what ended it: a stop id, or a stop string and what stands behind.

    token_ids: those of the text and, where there was one, the stop id, or all of the stop string; logprobs: theirs.
    finish_reason: ``stop``, ``length``, or ``error`` where it could not be gone on with. alternatives, prompt: see
    ``Event``.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    alternatives: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    prompt: PromptScores | None = None


class Answer:
    """What has come of an answer. It may end before who makes it knows: with a stop string.

    streamed: make its text token by token even where no string could end it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), *, streamed: bool = False):
        self._tokenizer = tokenizer
        self._stream = EndingText(tokenizer, stop) if stop or streamed else None
        self._text, self._ids, self._logprobs = "", list[int](), list[float]()
        self._alternatives = list[list[tuple[int, float]]]()
        self._prompt: PromptScores | None = None
        self.finish_reason = ""

    def add(self, event: Event) -> Completion:
        """-> what the event brings, its text where that is streamed; nothing behind the end."""
        if self.finish_reason:
            return Completion("", [], [], self.finish_reason)
        self._prompt = self._prompt or event.prompt
        text, count, self.finish_reason = "", len(event.token_ids), event.finish_reason
        if self._stream is not None:
            ids = event.token_ids[:-1] if event.finish_reason == "stop" else event.token_ids
            text, offsets, found = self._stream.push(ids, ended=bool(event.finish_reason))
            if found:
                count, self.finish_reason = len(offsets), "stop"
        ids, logprobs, alternatives = event.token_ids[:count], event.logprobs[:count], event.alternatives[:count]
        self._text += text
        self._ids += ids
        self._logprobs += logprobs
        self._alternatives += alternatives
        return Completion(text, ids, logprobs, self.finish_reason, alternatives, event.prompt)

    def completion(self) -> Completion:
        """The whole of what has come."""
        text = self._text
        if self._stream is None:
            said = self._ids[:-1] if self.finish_reason == "stop" else self._ids
            text = self._tokenizer.decode(said, skip_special_tokens=False)
        return Completion(text, self._ids, self._logprobs, self.finish_reason, self._alternatives, self._prompt)
