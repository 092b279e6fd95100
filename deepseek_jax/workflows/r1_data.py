"""What R1 in miniature learns from and is asked: a base's corpus, problems, requests and preferences.

The corpus is the demo's, in which no text has a word of ``rl/words.py``, with pages of questions and answers, as text
of today's web has them: some answers are thought about between R1-Zero's tags, in English, in Chinese or in both, and
some are not. So a base trained on it answers some problems some of the time, asked by ``ZERO_TEMPLATE``.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.data.special_tokens import END_THINK, THINK
from deepseek_jax.files import read_json_object, write_json, write_whole
from deepseek_jax.parallel.processes import first_host_alone
from deepseek_jax.rl import arithmetic
from deepseek_jax.rl.words import wait_words
from deepseek_jax.saying import doing, quietly
from deepseek_jax.typed import check_least, check_types
from deepseek_jax.workflows import r1_requests as requests
from deepseek_jax.workflows.corpus import CorpusConfig, Document, build_corpus
from deepseek_jax.workflows.stage_result import RESULT
from deepseek_jax.workflows.tokenizer import train_on_files

# As R1-Zero's: plain text, which a base reads as the beginning of a page. It is shorter, and so is the base's context.
ZERO_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ 'User: ' + message.content }}"
    "{% else %}{{ '\\nAssistant: ' + message.content + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)
# What is said before each step of a trace.
STEPS = {"en": ("ones ", ";tens ", ";sum "), "zh": ("个位", "，十位", "，合计")}


@dataclasses.dataclass(frozen=True)
class R1Data:
    """The miniature's data; real runs bring files of their own and skip this."""

    run_dir: str = "runs/r1/data"
    """Where it is written."""
    seed: int = 0
    """Of all that is drawn."""
    quiet: bool = False
    """Say nothing."""
    corpus: CorpusConfig = CorpusConfig()
    """Its text and problems; its seed is added."""
    pages: int = 8000
    """Pages with a problem that is asked and answered."""
    request_pages: int = 2000
    """Pages with another request."""
    plain_share: float = 0.5
    """Of the pages with a problem, those whose answer stands alone, without a thought."""
    requests_sft: int = 1000
    """Requests to fine-tune on, half of them answered poorly."""
    requests_train: int = 3000
    """Requests for reinforcement learning."""
    preferences: int = 600
    """Requests that each reward model learns from."""
    student_vocab_size: int = 400
    """Entries of the student's tokenizer."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "pages", "request_pages", "requests_sft", "requests_train", "preferences")
        if not 0 <= self.plain_share <= 1:
            raise ValueError(f"plain_share={self.plain_share}: must lie in [0, 1]")


def make_data(config: R1Data) -> dict[str, Any]:
    """Write all files, ``result.json`` with their counts last; of several processes the first does."""
    first_host_alone(lambda: _write(config))
    return read_json_object(Path(config.run_dir) / RESULT)


def _write(config: R1Data) -> None:
    folder, seed = Path(config.run_dir), config.corpus.seed + config.seed
    rngs = [np.random.default_rng([seed, 10 + part]) for part in range(5)]
    pages = [*_problem_pages(rngs[0], config), *_request_pages(rngs[1], config)]
    corpus = dataclasses.replace(config.corpus, seed=seed)
    with quietly(config.quiet), doing("writing a corpus and two tokenizers"):
        meta = build_corpus(folder, corpus, keep=lambda text: not wait_words(text), more=pages)
        texts = [folder / "documents" / "train.jsonl"]
        train_on_files(texts, corpus.vocab_size, folder)
        train_on_files(texts, config.student_vocab_size, folder / "student")
    write_whole(folder / "zero.jinja", ZERO_TEMPLATE)

    asked, told, judged = (
        requests.draw(rng, count)
        for rng, count in zip(rngs[2:], (config.requests_train, config.requests_sft, config.preferences), strict=True)
    )
    heldout = requests.all_requests(held_out=True)
    written = {
        "requests_train": [requests.row(request, with_answer=False) for request in asked],
        "requests_heldout": [requests.row(request, with_answer=True) for request in heldout],
        "requests_sft": [requests.chat(request, good=bool(at % 2)) for at, request in enumerate(told)],
        "helpful": requests.pairs(judged),
        "helpful_heldout": requests.pairs(heldout),
        "harmless": [label for request in judged for label in requests.labels(request)],
        "harmless_heldout": [label for request in heldout for label in requests.labels(request)],
    }
    counts = {name: _write_lines(folder / f"{name}.jsonl", rows) for name, rows in written.items()}
    write_json(folder / "config.json", {"stage": "data", "recipe": dataclasses.asdict(config)})
    write_json(folder / RESULT, {"train": meta["train"], "heldout": meta["heldout"], "rows": counts})


def worked(problem: arithmetic.Problem, languages: Iterable[str]) -> str:
    """The problem's trace with a word before each step, in the language that comes next."""
    steps = zip(problem.trace.split(","), languages, range(3), strict=False)
    return "".join(STEPS[language][at] + step for step, language, at in steps)


def _problem_pages(rng: np.random.Generator, config: R1Data) -> Iterator[Document]:
    stream = arithmetic.stream_problems(rng, config.corpus.kinds, held_out=False)
    for problem in islice(stream, config.pages):
        answer = problem.answer
        if rng.random() >= config.plain_share:
            page = rng.choice(["en", "zh", "both"])
            languages = rng.choice(list(STEPS), 3) if page == "both" else [page] * 3
            answer = f"{THINK}{worked(problem, languages)}{END_THINK}\n<answer>{answer}</answer>"
        yield _page(problem.prompt, answer)


def _request_pages(rng: np.random.Generator, config: R1Data) -> Iterator[Document]:
    for request in requests.draw(rng, config.request_pages):
        yield _page(request.prompt, (request.good if rng.integers(2) else request.poor)[1])


def _page(question: str, answer: str) -> Document:
    return {"text": f"User: {question}\nAssistant: {answer}", "kind": "page", "source": "generated"}


def _write_lines(path: Path, rows: Iterable[Any]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_whole(path, "".join(lines))
    return len(lines)
