"""What a model takes in memory to answer with, by how its matrices are kept, and on how many cards of which size."""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from deepseek_jax.checkpoint.hf_names import HFTensor, hf_tensors
from deepseek_jax.checkpoint.integers import Integers
from deepseek_jax.config import ModelConfig
from deepseek_kernels.integers import GROUP

KINDS = {"bfloat16": "bfloat16", "FP8": "float8_e4m3", "INT8": "int8", "INT4": "int4"}
LEFT = 0.9  # of a card's memory, for weights and cache: programs, activations and what lies in between take some


class Card(NamedTuple):
    """gigabytes: 10⁹ bytes, as the name has it. bandwidth: by the data sheet, 10⁹ bytes a second."""

    gigabytes: int
    name: str
    bandwidth: int


CARDS = (
    Card(24, "RTX 4090", 1008),
    Card(32, "RTX 5090", 1792),
    Card(48, "L40S", 864),
    Card(80, "H100 SXM", 3350),
    Card(96, "RTX PRO 6000", 1792),
    Card(141, "H200", 4800),
    Card(192, "B200", 8000),
)


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes of a model's weights and of a bfloat16 cache, and of both those that a step reads.

    weights: with the scales, and what stays bfloat16 as such. cache: of ``rows`` of ``context`` tokens. read: by a step
    that answers ``rows`` whose tokens choose their experts evenly and by themselves."""

    weights: int
    cache: int
    read: int

    def cards(self, card: Card) -> int:
        """How many of them hold it, split evenly: no fewer can."""
        return math.ceil((self.weights + self.cache) / (LEFT * card.gigabytes * 1e9))

    def steps(self, card: Card) -> float:
        """Steps a second that the bandwidth of so many allows at most, if nothing else took any time."""
        return self.cards(card) * card.bandwidth * 1e9 / self.read


def footprint(config: ModelConfig, kind: str, *, context: int, rows: int = 1, group: int = GROUP) -> Footprint:
    """Of the main model, the MTP module left out. kind: one of ``KINDS``, whose matrices are what ``convert
    --quantize`` writes."""
    config = dataclasses.replace(config, num_nextn_predict_layers=0)
    weights, read = 0, 0.0
    touched = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** rows if config.n_routed_experts else 1.0
    for tensor, size in _sizes(config, kind, group):
        weights += size
        if tensor.path == ("embed",) and not config.tie_word_embeddings:
            continue  # a row of it for each token
        read += size * (touched if ".experts." in tensor.name else 1.0)
    cache = 2 * rows * context * config.cache_numbers_per_token_layer * config.num_hidden_layers
    return Footprint(weights, cache, round(read) + cache)


def _sizes(config: ModelConfig, kind: str, group: int) -> Iterator[tuple[HFTensor, int]]:
    """Each tensor and its bytes."""
    integers = Integers.named(KINDS[kind], group)
    for tensor in hf_tensors(config):
        numbers = math.prod(tensor.shape)
        if integers is not None and integers.takes(tensor):
            size = numbers * integers.bits // 8 + 2 * math.prod(integers.shapes(tensor)[1])
        elif kind == "FP8" and tensor.quantised:
            size = numbers + 4 * math.prod(tensor.scale_shape)
        else:
            size = numbers * (4 if tensor.path == ("router_bias",) else 2)
        yield tensor, size


def table(config: ModelConfig, *, context: int, rows: int = 1) -> list[list[str]]:
    """Headings, then weights, cache, and for each size of card how many hold both, with the tokens a second of all rows
    that their bandwidth bounds; a column for each kind."""
    found = [footprint(config, kind, context=context, rows=rows) for kind in KINDS]
    lines = [["", *KINDS]]
    lines.append(["weights", *(_gigabytes(its.weights) for its in found)])
    lines.append([f"cache of {rows:,} × {context:,}", *(_gigabytes(its.cache) for its in found)])
    for card in CARDS:
        cells = (f"{its.cards(card):,}: {_few(rows * its.steps(card))}/s" for its in found)
        lines.append([f"{card.gigabytes} GB {card.name}, {card.bandwidth:,} GB/s", *cells])
    return lines


def markdown(lines: list[list[str]]) -> str:
    """As a table of a document."""
    first, *rest = (f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)
    return "\n".join([first, "|" + "---|" * len(lines[0]), *rest])


def _gigabytes(size: int) -> str:
    """Of 10⁹ bytes, with three digits that count."""
    return f"{size / 1e9:,.{2 if size < 1e10 else 1 if size < 1e11 else 0}f} GB"


def _few(rate: float) -> str:
    return f"{rate:,.{1 if rate < 10 else 0}f}"
