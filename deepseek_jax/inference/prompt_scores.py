"""Log-probabilities of a prompt's tokens on the host, piece by piece as it is read in."""

import dataclasses
from typing import Any

Likely = list[list[tuple[int, float]]]


@dataclasses.dataclass
class PromptScores:
    """Of each token of a prompt but the first, which nothing stands before: its log-probability by the network alone,
    and the most likely ones in its place, where alternatives are asked for: (token, log-probability), the most likely
    first."""

    logprobs: list[float] = dataclasses.field(default_factory=list)
    alternatives: Likely = dataclasses.field(default_factory=list)

    def add(self, found: Any, row: int, count: int, alternatives: int) -> None:
        """Those of ``count`` tokens more, of a row of ``Scores`` on the host."""
        self.logprobs += found.logprobs_BS[row, :count].tolist()
        self.alternatives += pairs(found.likely_BSA, found.likely_logprobs_BSA, row, count, alternatives)


def pairs(likely_BNA: Any, logprobs_BNA: Any, row: int, count: int, most: int) -> Likely:
    """Of a row's first ``count`` tokens ``most`` alternatives each; nothing where none are asked for."""
    if not most:
        return []
    ids, logprobs = (x[row, :count, :most].tolist() for x in (likely_BNA, logprobs_BNA))
    return [list(zip(*pair, strict=True)) for pair in zip(ids, logprobs, strict=True)]
