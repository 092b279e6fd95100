"""A fact planted in a long text and asked for at its end: how far back a model still finds something."""

import dataclasses
import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.data.text import read_documents
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.evals.haystack import FACT, KEYS, VALUES, sentences
from deepseek_jax.files import write_json
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.parallel.processes import gather, own_part
from deepseek_jax.saying import say
from deepseek_jax.typed import check_least, check_types

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Needle:
    """A planted fact, asked for at each length and depth; nothing without lengths."""

    lengths: tuple[int, ...] = ()
    """Tokens of text, question and answer together. More than the model's max_position_embeddings are asked all the
    same: how it does there is then what is measured."""
    depths: tuple[int, ...] = tuple(range(0, 101, 10))
    """Where the fact stands, in per cent of the text before the question."""
    samples: int = 10
    """Texts of each length and depth."""
    others: int = 3
    """Facts about other keys, planted anywhere: to name any value is then not enough."""
    path: tuple[str, ...] = ()
    """Files whose sentences are the text, as --data takes them; by default sentences are made up of a few words."""
    fact: str = FACT
    """What is planted, made of {key} and {value}; the question is what stands before {value}."""
    seed: int = 0
    """Of texts, keys and values."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "samples")
        if self.others < 0 or self.others >= len(KEYS):
            raise ValueError(
                f"Needle.others={self.others}: must lie in 0…{len(KEYS) - 1}, the other keys that there are"
            )
        if not self.depths or not all(0 <= depth <= 100 for depth in self.depths):
            raise ValueError(f"Needle.depths={self.depths}: must be per cents, from 0 to 100")
        before = self.fact.partition("{value}")[0]
        if "{key}" not in before or before == self.fact:
            raise ValueError(f"Needle.fact={self.fact!r}: must have {{key}}, and {{value}} behind it")


class Asked(NamedTuple):
    """prompt: ids up to the question's end. value: what should come next."""

    prompt: list[int]
    value: str
    value_ids: list[int]


def plant(tokenizer: Tokenizer, needle: Needle, length: int, depth: int, rng: np.random.Generator) -> Asked:
    """A text of ``length`` tokens, short of it by less than a sentence, with the fact at its depth and the question.

    ValueError where the facts and the question alone are longer.
    """

    def encoded(text: str) -> list[int]:
        return tokenizer.encode(f" {text}")

    keys = rng.choice(KEYS, needle.others + 1, replace=False)
    values = rng.choice(VALUES, needle.others + 1, replace=False)
    fact, *others = (encoded(needle.fact.format(key=k, value=v)) for k, v in zip(keys, values, strict=True))
    question = encoded(needle.fact.partition("{value}")[0].format(key=keys[0]).rstrip())
    value_ids = encoded(values[0])
    room = length - len(tokenizer.bos_ids) - sum(map(len, (fact, *others, question, value_ids)))
    if room < 0:
        raise ValueError(f"Needle.lengths: {length} tokens do not hold {needle.others + 1} facts and the question")
    text: list[list[int]] = []
    for sentence in _filler(needle.path, rng):
        room -= len(ids := encoded(sentence))
        if room < 0:
            break
        text.append(ids)
    for other in others:
        text.insert(int(rng.integers(len(text) + 1)), other)
    ends = np.array([0, *accumulate(map(len, text))])
    text.insert(int(np.argmin(abs(ends - depth / 100 * ends[-1]))), fact)
    return Asked([*tokenizer.bos_ids, *(i for ids in (*text, question) for i in ids)], str(values[0]), value_ids)


def _filler(path: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    if not path:
        yield from sentences(rng)
        return
    own = [part for text in read_documents(path) for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]
    if not own:
        raise ValueError(f"Needle.path={list(path)}: there is no text in it")
    start = int(rng.integers(len(own)))
    while True:
        yield from own[start:]
        start = 0


def find_needles(model: Model, needle: Needle, *, batch_size: int) -> dict[str, Any]:
    """{"lengths", "depths", "samples", "found": for each length and depth the share of values named greedily}."""
    longest = max(needle.lengths)
    if longest > (most := model.config.max_position_embeddings):
        say(f"lengths of up to {longest:,} tokens, where the model's max_position_embeddings is {most:,}")
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, max_position_embeddings=longest))
    engine, found = Engine(model), []
    for length in needle.lengths:
        rng = np.random.default_rng([needle.seed, length])
        cells = [depth for depth in needle.depths for _ in range(needle.samples)]
        asked = [plant(model.text, needle, length, depth, rng) for depth in cells]
        right: list[bool] = []
        for start in range(0, len(asked), batch_size):
            part = own_part(asked[start : start + batch_size])
            sampling = [SamplingParams(temperature=0.0, max_tokens=len(each.value_ids)) for each in part]
            said = engine.generate([each.prompt for each in part], sampling)
            named = [answer.text.strip() == each.value for answer, each in zip(said, part, strict=True)]
            right += [each for process in gather(named) for each in process]
        found.append(np.reshape(right, (len(needle.depths), needle.samples)).mean(axis=1).tolist())
    return {"lengths": [*needle.lengths], "depths": [*needle.depths], "samples": needle.samples, "found": found}


def rows_of(found: dict[str, Any]) -> list[str]:
    """The table of what ``find_needles`` found, in per cent: a line for each length, a column for each depth."""
    head = f"{'tokens':>8}  " + " ".join(f"{f'{depth} %':>5}" for depth in found["depths"]) + "    all"
    return [head] + [
        f"{length:>8,}  " + " ".join(f"{100 * share:5.0f}" for share in shares) + f"  {100 * np.mean(shares):5.1f}"
        for length, shares in zip(found["lengths"], found["found"], strict=True)
    ]


def write_found(found: dict[str, Any], folder: Path) -> None:
    """``needle.json``, and ``needle.png`` with a field for each length and depth; without matplotlib no picture, which
    is said."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "needle.json", found)
    path = folder / "needle.png"
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no %s: it takes matplotlib (pip install matplotlib); needle.json has the numbers", path)
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths, depths, shares = found["lengths"], found["depths"], 100 * np.array(found["found"]).T
    figure = Figure(figsize=(2.2 + 0.7 * len(lengths), 1.6 + 0.3 * len(depths)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(shares, vmin=0, vmax=100, aspect="auto", cmap="RdYlGn")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize="small")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth of the fact")
    axes.set_title("found, %", fontsize="medium")
    figure.savefig(path, dpi=150)
