"""Answers as they were sampled, and as the rows of a batch."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from deepseek_jax.data.packing import best_fit
from deepseek_jax.inference.generate import Generated
from deepseek_jax.rl.asking import Answer, Question
from deepseek_jax.rl.tasks import Row
from deepseek_jax.rl.words import wait_words

_LEAST_WIDTH = 128  # shorter rows share one program
_ARRAYS = ("ids", "logprobs", "experts_TLK", "own")  # of a sample


@dataclasses.dataclass(frozen=True)
class Sample:
    """An answer as it was sampled: its tokens, the one that ended it included, with their log-probabilities; and, where
    asked for, the experts that were chosen for the tokens of prompt and answer (T L K).

    own: where tools were called, which of the tokens are the model's; what it was told is learnt as little as a prompt,
    and has log-probability 0. start: how the last turn begins. calls: how many, and what became of them.
    """

    question: Question
    answer: Answer
    ids: np.ndarray
    logprobs: np.ndarray
    experts_TLK: np.ndarray | None = None
    own: np.ndarray | None = None
    start: str = ""
    calls: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def to_json(self, number: int) -> dict[str, Any]:
        """For another process, where the question's row has this ``number``."""
        question, arrays = self.question, {name: getattr(self, name) for name in _ARRAYS}
        return {
            "question": [number, question.text, question.prompt, question.start],
            "answer": dataclasses.asdict(self.answer),
            "arrays": {name: [str(x.dtype), x.tolist()] for name, x in arrays.items() if x is not None},
            "start": self.start,
            "calls": dict(self.calls),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], rows: Sequence[Row]) -> Self:
        number, *asked = content["question"]
        answer = content["answer"] | {"turns": tuple(content["answer"]["turns"])}
        arrays = {name: np.array(values, dtype) for name, (dtype, values) in content["arrays"].items()}
        beside = {"start": content["start"], "calls": content["calls"]}
        return cls(Question(rows[number], *asked), Answer(**answer), **arrays, **beside)

    @property
    def length(self) -> int:
        """Of the model's own tokens."""
        return len(self.ids) if self.own is None else int(self.own.sum())

    @property
    def last_turn(self) -> int:
        """Where it begins."""
        return 0 if self.own is None else int(np.flatnonzero(~self.own)[-1]) + 1


@dataclasses.dataclass(frozen=True)
class About:
    """What processes tell each other of an answer: tokens of the prompt, of the answer, and of those the model's own;
    how often it waits to think again; whether it ended by itself; calls."""

    prompt: int
    answer: int
    own: int
    waits: int
    ended: bool
    calls: Mapping[str, int]

    @classmethod
    def of(cls, sample: Sample) -> Self:
        waits = wait_words(sample.answer.own_turns)
        sizes = len(sample.question.prompt), len(sample.ids), sample.length
        return cls(*sizes, waits, sample.answer.ended, dict(sample.calls))

    @property
    def tokens(self) -> int:
        return self.prompt + self.answer


def make_sample(out: Generated, row: int, question: Question, answer: Answer) -> Sample:
    """What the engine drew in this row."""
    length = int(out.lengths_B[row])
    experts_TLK = None
    if out.experts_LBTK is not None:
        seen = slice(len(question.prompt) + length)
        experts_TLK = np.moveaxis(np.asarray(out.experts_LBTK)[:, row, seen], 0, 1).astype(np.int16)
    ids, logprobs = (np.asarray(x[row, :length]) for x in (out.tokens_BN, out.logprobs_BN))
    return Sample(question, answer, ids, logprobs, experts_TLK, start=question.start)


def rollout_batch(
    samples: Sequence[Sample],
    advantages: Sequence[float | np.ndarray],
    *,
    pad_id: int,
    most: int,
    pack: int = 0,
    multiple: int = 1,
    minibatches: int = 1,
    first: int = 0,
    longest: int = 0,
    fullest: int = 0,
    by_token: bool = False,
) -> dict[str, np.ndarray]:
    """Each row a prompt, its answer as sampled and padding; ``loss_mask`` is 1 on what the model said of it, its
    stop tokens included.

    The width S is that of the longest row, rounded up to a power of two from 128 on, at most ``most``: other lengths
    compile few programs. ``experts`` (B S L K), where samples have them, is -1 where none was chosen.

    Args:
      advantages: of each sample, or of each of its tokens.
      pack: the width of rows that hold several samples, a segment each, and every sample must fit; what they need, see
        ``GRPOLoss``. 0: no such.
      minibatches: parts of the batch with an update each, see ``split_rows``: packed, they have the samples that they
        have in rows of their own.
      multiple: what the number of a part's packed rows is a multiple of; rows behind the last are padding.
      first: the number of the first sample among all processes'.
      longest, fullest, by_token: what other processes have in their parts of the batch, which are of one shape: tokens
        of a row, packed rows of a part (see ``packed_rows``), and advantages of tokens.
    """
    lengths = [len(sample.question.prompt) + len(sample.ids) for sample in samples]
    longest = max(longest, *lengths)
    width = pack or min(max(_LEAST_WIDTH, 1 << (longest - 1).bit_length()), most)
    assert longest <= width
    rows = [[index] for index in range(len(samples))]
    if pack:
        rows = _packed(lengths, width, multiple, minibatches, first, fullest)
    shape = len(rows), width
    tokens = pack or by_token or any(np.ndim(advantage) for advantage in advantages)
    batch = {
        "tokens": np.full(shape, pad_id, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, np.float32),
        "sampler_logprobs": np.zeros(shape, np.float32),
        "advantages": np.zeros(shape if tokens else (shape[0], 1), np.float32),
        "truncated": np.zeros(shape if pack else (shape[0], 1), np.float32),
    }
    if pack:
        batch["answer_tokens"] = np.zeros(shape, np.float32)
    if samples[0].experts_TLK is not None:
        batch["experts"] = np.full((*shape, *samples[0].experts_TLK.shape[1:]), -1, np.int16)
    for row, indices in enumerate(rows):
        start = 0
        for segment, index in enumerate(indices, start=1):
            _place(batch, row, start, segment, samples[index], advantages[index])
            start += lengths[index]
    return batch


def _place(
    batch: dict[str, np.ndarray], row: int, start: int, segment: int, sample: Sample, advantage: float | np.ndarray
) -> None:
    begin, end = (start + length for length in np.cumsum([len(sample.question.prompt), len(sample.ids)]))
    whole, answer = slice(start, end), slice(begin, end)
    own = np.arange(begin, end) if sample.own is None else begin + np.flatnonzero(sample.own)
    batch["tokens"][row, start:begin], batch["tokens"][row, answer] = sample.question.prompt, sample.ids
    batch["segment_ids"][row, whole] = segment
    batch["positions"][row, whole] = np.arange(end - start)
    batch["loss_mask"][row, own] = 1
    batch["sampler_logprobs"][row, answer] = sample.logprobs
    for name, value in (("advantages", advantage), ("truncated", not sample.answer.ended)):
        value = value if np.ndim(value) == 0 or sample.own is None else np.asarray(value)[sample.own]
        batch[name][row, own if batch[name].shape[1] > 1 else 0] = value
    if "answer_tokens" in batch:
        batch["answer_tokens"][row, own] = len(own)
    if sample.experts_TLK is not None:
        batch["experts"][row, whole] = sample.experts_TLK


def packed_rows(lengths: Sequence[int], width: int, minibatches: int) -> int:
    """How many rows samples of these lengths need in the part of a batch that needs the most."""
    return max(len(best_fit(lengths[part::minibatches], width)) for part in range(minibatches))


def _packed(
    lengths: Sequence[int], width: int, multiple: int, minibatches: int, first: int, fullest: int
) -> list[list[int]]:
    """The samples of each row. Row r is of minibatch r mod ``minibatches``, as ``split_rows`` has it, and so is sample
    r of all: each part is packed apart, or one row could hold the samples of all, and updates would be of padding
    alone."""
    begins = [(part - first) % minibatches for part in range(minibatches)]
    parts = [best_fit(lengths[begin::minibatches], width) for begin in begins]
    count = _round_up(max(fullest, *map(len, parts)), multiple)
    rows: list[list[int]] = [[] for _ in range(count * minibatches)]
    for part, (begin, own) in enumerate(zip(begins, parts, strict=True)):
        for row, indices in enumerate(own):
            rows[row * minibatches + part] = [index * minibatches + begin for index in indices]
    return rows


def _round_up(rows: int, multiple: int) -> int:
    """The next multiple, of which there are four from one power of two to the next: few programs are compiled."""
    units = -(-rows // multiple)
    step = 1 << max(0, units.bit_length() - 3)
    return -(-units // step) * step * multiple
