"""The demo's corpus: real text that every machine has, and generated worked arithmetic.

Code and prose come from the source files of the running Python's standard library: long docstrings are taken
out as prose, what remains is code. Training and held-out text is split by file. Training documents show
held-in problems only, and a source file that spells out a held-out pair of operands is not trained on.
The same configuration and Python version give the same bytes.
"""

import ast
import dataclasses
import hashlib
import inspect
import json
import os
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from deepseek_jax.data.tokenizer import whole_text
from deepseek_jax.files import write_whole
from deepseek_jax.rl import arithmetic as rl
from deepseek_jax.typed import check_least, check_types

# Folders of tests, tables, vendored or deprecated code, and files made for one machine.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "distutils"}
_SKIPPED_FOLDERS |= {"encodings", "pydoc_data", "idlelib", "turtledemo", "__phello__", "__pycache__"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "_distutils_system_mod", "sitecustomize", "usercustomize")

# a+b, a-b or a*b with one or two digits each. The second operand is only looked at, so that "1-12-30" gives
# both pairs. It also finds dates and ranges: a file too many is dropped rather than one too few.
_OPERATION = re.compile(r"(?<![0-9])([0-9]{1,2})\s*[-+*]\s*(?=([0-9]{1,2})(?![0-9]))")

Document = dict[str, str]


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """What the corpus holds. Sizes are in bytes of UTF-8, before tokenizing."""

    seed: int = 0
    """Of the problems, and of the documents' order."""
    vocab_size: int = 512
    """Entries of the tokenizer that is trained on this corpus, special tokens included."""
    kinds: tuple[str, ...] = rl.KINDS
    """Kinds of arithmetic problem, an equal share each."""
    arithmetic_share: float = 0.5
    """Share of worked arithmetic in the bytes of train.jsonl; the rest is code and prose."""
    max_code_bytes: int = 1_000_000
    """About how much code and prose to take, held-out files included."""
    max_file_bytes: int = 24_000
    """Longer source files are left out, so that no file makes up much of the corpus."""
    held_out_file_share: float = 0.05
    """Share of source files kept apart to measure on."""
    min_prose_lines: int = 3
    """A docstring of at least so many lines is prose; a shorter one stays with its code."""
    problems_per_document: int = 8
    """Worked problems in one document of arithmetic."""
    sft_per_kind: int = 1024
    """Problems of each kind to fine-tune on."""
    train_per_kind: int = 2048
    """Problems of each kind for reinforcement learning."""
    heldout_per_kind: int = 256
    """Problems of each kind that no stage trains on."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("arithmetic_share", "held_out_file_share"):
            value = getattr(self, name)
            if not 0.0 < value < 1.0:
                raise ValueError(f"{name}={value} must lie between 0 and 1, both excluded")
        check_least(
            self, 1, *(field.name for field in dataclasses.fields(self) if field.type is int and field.name != "seed")
        )
        if not self.kinds or len(set(self.kinds)) != len(self.kinds) or not set(self.kinds) <= set(rl.KINDS):
            raise ValueError(f"kinds={self.kinds!r} must name some of {', '.join(rl.KINDS)}, none twice")


def _hash_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def find_held_out_pairs(text: str) -> list[tuple[int, int]]:
    """The held-out pairs of operands that the text adds, subtracts or multiplies, in order of appearance."""
    pairs = ((int(a), int(b)) for a, b in _OPERATION.findall(text))
    return [pair for pair in pairs if rl.is_held_out(*pair)]


def source_files(root: Path) -> list[str]:
    """Relative paths, with forward slashes, of the Python files worth reading under `root`, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [n for n in subfolders if n not in _SKIPPED_FOLDERS and not n.startswith(_SKIPPED_PREFIXES)]
        names = [n for n in names if n.endswith(".py") and not n.startswith(_SKIPPED_PREFIXES)]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in names]
    return sorted(found)


def split_prose(source: str, min_lines: int) -> tuple[str, str]:
    """Takes the docstrings of at least `min_lines` lines out of a module's source: (code, prose).

    The code still parses: a docstring that is a body's only statement stays. SyntaxError for other text.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like are the library's business
        tree = ast.parse(source)
    lines, prose, taken = source.split("\n"), [], set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text, body = ast.get_docstring(node, clean=False), node.body
        if text is None or len(body) < 2:
            continue
        first, last = body[0].lineno, body[0].end_lineno
        assert last is not None
        alone = lines[first - 1][: body[0].col_offset].strip() == "" and body[1].lineno > last
        cleaned = inspect.cleandoc(text)
        whole = whole_text(cleaned) == cleaned  # an escape in it can stand for half a character
        if alone and cleaned.count("\n") + 1 >= min_lines and whole:
            prose.append(cleaned)
            taken.update(range(first - 1, last))
    code = "\n".join(line for number, line in enumerate(lines) if number not in taken)
    return code.strip("\n") + "\n" if code.strip() else "", "\n\n".join(prose) + "\n" if prose else ""


def _read_documents(root: Path, name: str, config: CorpusConfig, keep: Callable[[str], bool]) -> list[Document] | str:
    """The code and prose documents of one file, or why it gives none."""
    data = (root / name).read_bytes()
    if len(data) > config.max_file_bytes:
        return "too_long"
    try:
        source = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        texts = zip(("code", "prose"), split_prose(source, config.min_prose_lines), strict=True)
    except (UnicodeDecodeError, SyntaxError, ValueError):  # ValueError: a NUL byte
        return "not_readable"
    documents = [{"text": text, "kind": kind, "source": name} for kind, text in texts if text]
    kept = [document for document in documents if keep(document["text"])]
    return kept or ("not_kept" if documents else "empty")


def _size(documents: Iterable[Document]) -> int:
    return sum(len(document["text"].encode()) for document in documents)


def _library_documents(
    root: Path, config: CorpusConfig, keep: Callable[[str], bool]
) -> tuple[list[Document], list[Document], Counter[str]]:
    """Training documents, held-out documents and a count of what became of the files.

    The side of a file depends on its path alone; the seed shuffles the order in which the sides take files,
    each until it has its share of `max_code_bytes`.
    """
    names = sorted(source_files(root), key=lambda name: (_hash_share(f"order {config.seed} {name}"), name))
    sides: dict[bool, list[Document]] = {False: [], True: []}
    budget = {True: config.max_code_bytes * config.held_out_file_share}
    budget[False] = config.max_code_bytes - budget[True]
    files: Counter[str] = Counter()
    for name in names:
        held_out = _hash_share(f"file {name}") < config.held_out_file_share
        if budget[held_out] <= 0:
            files["over_budget"] += 1
            continue
        documents = _read_documents(root, name, config, keep)
        if isinstance(documents, str):
            files[documents] += 1
        elif not held_out and any(find_held_out_pairs(document["text"]) for document in documents):
            files["spells_held_out_pair"] += 1
        else:
            files["held_out" if held_out else "train"] += 1
            sides[held_out] += documents
            budget[held_out] -= _size(documents)
    if not sides[False] or not sides[True]:
        raise ValueError(
            f"{root} gives {files['train']} training and {files['held_out']} held-out files of {len(names)} "
            f"({dict(files)}): the corpus needs both; is this the source of a standard library?"
        )
    return sides[False], sides[True], files


def _arithmetic(rng: np.random.Generator, config: CorpusConfig, *, held_out: bool) -> Iterator[Document]:
    """Endless documents of worked problems, each in one surface form."""
    stream = rl.stream_problems(rng, config.kinds, held_out=held_out)
    source = "held-out problems" if held_out else "held-in problems"
    while True:
        form = int(rng.integers(len(rl.PLAIN_FORMS)))
        chosen = islice(stream, config.problems_per_document)
        text = "".join(rl.to_plain_text(problem, form) for problem in chosen)
        yield {"text": text, "kind": "arithmetic", "source": source}


def _with_arithmetic(
    documents: list[Document], rng: np.random.Generator, config: CorpusConfig, *, held_out: bool
) -> list[Document]:
    """The documents, shuffled, with arithmetic added until it has its share of the bytes."""
    missing = _size(documents) * config.arithmetic_share / (1 - config.arithmetic_share)
    mixed = list(documents)
    for document in _arithmetic(rng, config, held_out=held_out):
        if missing <= 0:
            break
        mixed.append(document)
        missing -= _size([document])
    return [mixed[index] for index in rng.permutation(len(mixed))]


def _write_lines(path: Path, lines: Iterable[object]) -> dict[str, int | str]:
    """Writes JSON lines under a temporary name, then moves the file into place: its counts and SHA-256."""
    data = [json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, b"".join(data))
    return {
        "lines": len(data),
        "bytes": sum(map(len, data)),
        "sha256": hashlib.sha256(b"".join(data)).hexdigest(),
    }


def _count_by_kind(documents: Iterable[Document]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for document in documents:
        entry = counts.setdefault(document["kind"], {"documents": 0, "bytes": 0})
        entry["documents"] += 1
        entry["bytes"] += _size([document])
    return dict(sorted(counts.items()))


def build_corpus(
    folder: str | Path,
    config: CorpusConfig,
    *,
    source: str | Path | None = None,
    keep: Callable[[str], bool] = lambda text: True,
    more: Sequence[Document] = (),
) -> dict:
    """Writes the corpus into `folder` and returns its meta data.

    documents/train.jsonl, documents/heldout.jsonl: {"text", "kind": code | prose | arithmetic, "source"}.
    sft.jsonl: {"messages"} of held-in problems. problems_train.jsonl, problems_heldout.jsonl: `Problem`s.
    In these three the kinds take turns, so every prefix is balanced.
    meta.json (configuration, Python version, counts, SHA-256 of each file) is removed first and written last:
    a folder with it is whole. Other files in `folder` are left alone. `source` is the folder of Python files
    to read, by default the standard library. keep: which of its documents to take. more: documents to train on beside
    them; arithmetic has its share of all together. ValueError if it gives no training or no held-out file.
    """
    folder, root = Path(folder), Path(source or sysconfig.get_paths()["stdlib"])
    train, heldout, files = _library_documents(root, config, keep)
    # One generator for each part: changing the size of one leaves the others as they were.
    rngs = [np.random.default_rng([config.seed, part]) for part in range(5)]
    count, kinds = len(config.kinds), config.kinds
    train = _with_arithmetic([*train, *more], rngs[0], config, held_out=False)
    heldout = _with_arithmetic(heldout, rngs[1], config, held_out=True)
    sft = rl.sample_problems(rngs[2], config.sft_per_kind * count, kinds, held_out=False)
    asked = list(islice(rl.stream_problems(rngs[3], kinds, held_out=False), config.train_per_kind * count))
    tested = rl.sample_problems(rngs[4], config.heldout_per_kind * count, kinds, held_out=True)

    (folder / "meta.json").unlink(missing_ok=True)
    written = {
        "documents/train.jsonl": train,
        "documents/heldout.jsonl": heldout,
        "sft.jsonl": [{"messages": rl.to_messages(problem)} for problem in sft],
        "problems_train.jsonl": [dataclasses.asdict(problem) for problem in asked],
        "problems_heldout.jsonl": [dataclasses.asdict(problem) for problem in tested],
    }
    meta = {
        "python": platform.python_version(),
        "config": dataclasses.asdict(config) | {"kinds": list(config.kinds)},
        "source_files": dict(sorted(files.items())),
        "train": _count_by_kind(train),
        "heldout": _count_by_kind(heldout),
        "files": {name: _write_lines(folder / name, lines) for name, lines in written.items()},
    }
    _write_lines(folder / "meta.json", [meta])
    return meta
