"""A step that the device is at, and what it has brought."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax
import numpy as np

from deepseek_jax.inference.decoding import Decoded
from deepseek_jax.inference.plans import DecodePlan, Piece, Request
from deepseek_jax.inference.scores import Scores

Rowed = list[tuple[Piece, int]]  # pieces of prompts, each with its row of their scores
Scored = list[tuple[Rowed, Future[Scores]]]


class Brought(NamedTuple):
    """On the host: what ``UnderWay`` has come to."""

    plans: Sequence[DecodePlan]
    scored: list[tuple[Rowed, Scores]]
    decoded: Decoded | None

    def nan(self, rows: int) -> list[Request]:
        """Those with a log-probability that is none: so it is where any score was NaN, or infinite. rows: of a lane."""
        found = [
            piece.request
            for pieces, scores in self.scored
            for piece, row in pieces
            if piece.scores is not None and np.isnan(scores.logprobs_BS[row, : piece.count]).any()
        ]
        if self.decoded is not None:
            nan_B = np.any(np.isnan(self.decoded.logprobs_BN), axis=1)
            for lane, plan in enumerate(self.plans):
                found += [request for i, request in enumerate(plan.decoded, lane * rows) if nan_B[i]]
        return list(dict.fromkeys(found))

    def keep_scores(self) -> None:
        """Of prompts, until all of theirs are there."""
        for pieces, found in self.scored:
            for piece, row in pieces:
                if piece.scores is not None:
                    piece.scores.add(found, row, piece.count, piece.request.sampling.alternatives)


class UnderWay(NamedTuple):
    """scored: of what is read in before it. decoded: None where there is nobody."""

    plans: Sequence[DecodePlan]
    scored: Scored
    decoded: Future[Decoded] | None

    def fetch(self) -> Brought:
        """Wait for it; an answer's alternatives only where anybody asks for them."""
        decoded = None
        if self.decoded is not None:
            decoded = dataclasses.replace(self.decoded.result(), state_BK=None)
            if not any(request.sampling.alternatives for plan in self.plans for request in plan.decoded):
                decoded = dataclasses.replace(decoded, likely_BNA=None, likely_logprobs_BNA=None)
        scored = [(pieces, jax.device_get(found.result())) for pieces, found in self.scored]
        return Brought(self.plans, scored, jax.device_get(decoded))
