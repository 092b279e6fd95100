"""Answers as they were sampled, and as the rows of a batch."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from deepseek_jax.inference.generate import Generated
from deepseek_jax.rl.asking import Answer, Question

_LEAST_WIDTH = 128  # shorter rows share one program


@dataclasses.dataclass(frozen=True)
class Sample:
    """An answer as it was sampled: its tokens, the one that ended it included, with their log-probabilities; and, where
    asked for, the experts that were chosen for the tokens of prompt and answer (T L K)."""

    question: Question
    answer: Answer
    ids: np.ndarray
    logprobs: np.ndarray
    experts_TLK: np.ndarray | None = None


def make_sample(out: Generated, row: int, question: Question, answer: Answer) -> Sample:
    """What the engine drew in this row."""
    length = int(out.lengths_B[row])
    experts_TLK = None
    if out.experts_LBTK is not None:
        seen = slice(len(question.prompt) + length)
        experts_TLK = np.moveaxis(np.asarray(out.experts_LBTK)[:, row, seen], 0, 1).astype(np.int16)
    ids, logprobs = (np.asarray(x[row, :length]) for x in (out.tokens_BN, out.logprobs_BN))
    return Sample(question, answer, ids, logprobs, experts_TLK)


def rollout_batch(samples: Sequence[Sample], *, pad_id: int, most: int) -> dict[str, np.ndarray]:
    """Each row a prompt, its answer as sampled and padding; ``loss_mask`` is 1 on the answer, its stop token included.

    The width S is that of the longest row, rounded up to a power of two from 128 on, at most ``most``: other lengths
    compile few programs. ``experts`` (B S L K), where samples have them, is -1 where none was chosen.
    """
    longest = max(len(sample.question.prompt) + len(sample.ids) for sample in samples)
    shape = len(samples), min(max(_LEAST_WIDTH, 1 << (longest - 1).bit_length()), most)
    batch = {
        "tokens": np.full(shape, pad_id, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, np.float32),
        "sampler_logprobs": np.zeros(shape, np.float32),
        "truncated": np.array([[not sample.answer.ended] for sample in samples], np.float32),
    }
    if samples[0].experts_TLK is not None:
        batch["experts"] = np.full((*shape, *samples[0].experts_TLK.shape[1:]), -1, np.int16)
    for row, sample in enumerate(samples):
        begin, end = len(sample.question.prompt), len(sample.question.prompt) + len(sample.ids)
        batch["tokens"][row, :begin] = sample.question.prompt
        batch["tokens"][row, begin:end] = sample.ids
        batch["segment_ids"][row, :end] = 1
        batch["positions"][row, :end] = np.arange(end)
        batch["loss_mask"][row, begin:end] = 1
        batch["sampler_logprobs"][row, begin:end] = sample.logprobs
        if sample.experts_TLK is not None:
            batch["experts"][row, :end] = sample.experts_TLK
    return batch
