import ast
import dataclasses
import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_jax.data.text import read_chats, read_documents
from deepseek_jax.rl import arithmetic as rl
from deepseek_jax.workflows import corpus
from deepseek_jax.workflows.corpus import CorpusConfig, build_corpus, find_held_out_pairs

SMALL = CorpusConfig(max_code_bytes=150_000, sft_per_kind=200, train_per_kind=300)
TRAINING = ("documents/train.jsonl", "sft.jsonl", "problems_train.jsonl")
HELD_OUT = next(p for p in rl.all_problems(["add"], held_out=True) if p.a != p.b)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("corpus")
    return folder, build_corpus(folder, SMALL)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def texts_in(value) -> list[str]:
    """Every string of a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in texts_in(item)]
    return [value] if isinstance(value, str) else []


def spelled_pairs(text: str) -> set[frozenset[int]]:
    """Operands of a+b, a-b and a*b: an independent scan over neighbouring numbers."""
    numbers = list(re.finditer("[0-9]+", text))
    pairs = set()
    for left, right in zip(numbers, numbers[1:], strict=False):
        between = "".join(text[left.end() : right.start()].split())
        if between in ("+", "-", "*") and max(len(left[0]), len(right[0])) <= 2:
            pairs.add(frozenset((int(left[0]), int(right[0]))))
    return pairs


HELD_OUT_PAIRS = {frozenset((p.a, p.b)) for p in rl.all_problems(held_out=True)}


@pytest.mark.parametrize("name", TRAINING)
def test_no_training_file_spells_a_held_out_pair(built, name):
    spelled = set()
    for line in lines_of(built[0] / name):
        for text in texts_in(line):
            spelled |= spelled_pairs(text)
    assert len(spelled) > 500  # the scan does see arithmetic
    assert not spelled & HELD_OUT_PAIRS


def test_training_and_held_out_problems_share_no_pair(built):
    sides = [rl.read_jsonl(built[0] / f"problems_{side}.jsonl") for side in ("train", "heldout")]
    train, heldout = ({frozenset((p.a, p.b)) for p in problems} for problems in sides)
    assert not train & heldout and heldout <= HELD_OUT_PAIRS
    for kind in rl.KINDS:
        assert len({p for p in sides[1] if p.kind == kind}) == 256
        assert sum(p.kind == kind for p in sides[0]) == SMALL.train_per_kind


def test_held_out_arithmetic_is_of_held_out_problems(built):
    texts = [d["text"] for d in lines_of(built[0] / "documents/heldout.jsonl") if d["kind"] == "arithmetic"]
    pairs = set().union(*(spelled_pairs(text) for text in texts))
    assert texts and {pair for pair in pairs if max(pair) >= 10} <= HELD_OUT_PAIRS


def test_source_files_are_split_by_file(built):
    train, heldout = (lines_of(built[0] / f"documents/{side}.jsonl") for side in ("train", "heldout"))
    files = [{d["source"] for d in documents if d["kind"] != "arithmetic"} for documents in (train, heldout)]
    assert len(files[0]) == built[1]["source_files"]["train"] > 5
    assert len(files[1]) == built[1]["source_files"]["held_out"] > 0
    assert not files[0] & files[1]
    assert not {d["text"] for d in train} & {d["text"] for d in heldout}


def test_a_file_is_on_one_side_for_every_seed(built, tmp_path):
    other = dataclasses.replace(SMALL, seed=1)
    build_corpus(tmp_path, other)
    for mine, theirs in (("train", "heldout"), ("heldout", "train")):
        here, there = (
            {d["source"] for d in lines_of(folder / f"documents/{side}.jsonl") if d["kind"] != "arithmetic"}
            for folder, side in ((built[0], mine), (tmp_path, theirs))
        )
        assert not here & there
    for name in (*TRAINING, "problems_heldout.jsonl"):
        assert (built[0] / name).read_bytes() != (tmp_path / name).read_bytes()


def test_shares_and_counts(built):
    folder, meta = built
    for side in ("train", "heldout"):
        documents = lines_of(folder / f"documents/{side}.jsonl")
        sizes = dict.fromkeys(("arithmetic", "code", "prose"), 0)
        for document in documents:
            sizes[document["kind"]] += len(document["text"].encode())
        assert {kind: entry["bytes"] for kind, entry in meta[side].items()} == sizes
        assert sizes["arithmetic"] / sum(sizes.values()) == pytest.approx(SMALL.arithmetic_share, abs=0.01)
    taken = sum(meta[side][kind]["bytes"] for side in ("train", "heldout") for kind in ("code", "prose"))
    assert SMALL.max_code_bytes <= taken < SMALL.max_code_bytes + 2 * SMALL.max_file_bytes
    assert json.loads((folder / "meta.json").read_text()) == meta
    for name, entry in meta["files"].items():
        data = (folder / name).read_bytes()
        assert entry["bytes"] == len(data) and entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["lines"] == data.count(b"\n")


def test_files_are_read_by_the_data_floor(built):
    folder, meta = built
    assert (
        len(list(read_documents(folder / "documents/train.jsonl"))) == meta["files"]["documents/train.jsonl"]["lines"]
    )
    chats = list(read_chats(folder / "sft.jsonl"))
    assert len(chats) == SMALL.sft_per_kind * 3
    assert all(re.fullmatch(r"<think>[^<>]+</think>[0-9]+", chat.messages[-1]["content"]) for chat in chats)


def test_code_still_parses_and_prose_is_text(built):
    documents = lines_of(built[0] / "documents/train.jsonl")
    for document in documents:
        if document["kind"] == "code":
            ast.parse(document["text"])
        elif document["kind"] == "prose":
            assert document["text"].count("\n") >= SMALL.min_prose_lines and "def " not in document["text"][:4]
        assert document["text"].strip()


def test_same_bytes_in_every_process(built, tmp_path):
    code = (
        "import sys; from deepseek_jax.workflows.corpus import *\n"
        "c = CorpusConfig(max_code_bytes=150_000, sft_per_kind=200, train_per_kind=300)\n"
        "build_corpus(sys.argv[1], c)"
    )
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], env=env, check=True)
        for name in (*built[1]["files"], "meta.json"):
            assert (tmp_path / seed / name).read_bytes() == (built[0] / name).read_bytes()


@pytest.mark.parametrize(
    "form", ["{a}+{b}", "{b} - {a}", "x = {a} *{b}\n", "2001-{a}-{b}", "1-{a}-{b}", "0{a}\n{a}\n+\n{b}."]
)
def test_held_out_pairs_are_found(form):
    text = form.format(a=HELD_OUT.a, b=HELD_OUT.b)
    assert {frozenset(pair) for pair in find_held_out_pairs(text)} >= {frozenset((HELD_OUT.a, HELD_OUT.b))}


def test_other_numbers_are_no_pairs():
    a, b = HELD_OUT.a, HELD_OUT.b
    for text in (f"{a}, {b}", f"1{a}+{b}", f"{a}+{b}0", f"{a}**{b}", f"{a}={b}", f"{a}+x+{b}", f"{a} {b}"):
        assert not find_held_out_pairs(text)


def write_sources(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def test_files_that_do_not_belong_are_left_out_and_counted(tmp_path):
    filler = {f"pkg/m{i}.py": f"value_{i} = {i}\n".encode() for i in range(100)}
    pair = f"x = {HELD_OUT.b} + {HELD_OUT.a}  # planted\n".encode()
    planted = {f"planted{i}.py": pair + b"y = %d\n" % i for i in range(40)}
    docstring = {f"doc{i}.py": b'"""a\n\n' + pair + b'"""\ny = %d\n' % i for i in range(40)}
    junk = {
        "latin.py": b"# \xe9\n",
        "broken.py": b"def (:\n",
        "nul.py": b"x = 1\0\n",
        "empty.py": b"\n",
        "long.py": b"#" * 5000,
    }
    hidden = {
        "test/a.py": b"hidden = 1\n",
        "pkg/tests/b.py": b"hidden = 1\n",
        "site-packages/c.py": b"hidden = 1\n",
        "_sysconfigdata_x.py": b"hidden = 1\n",
        "notes.txt": b"hidden",
    }
    write_sources(tmp_path / "lib", filler | planted | docstring | junk | hidden)
    config = CorpusConfig(max_code_bytes=10**6, max_file_bytes=4000, sft_per_kind=2, train_per_kind=2)
    meta = build_corpus(tmp_path / "out", config, source=tmp_path / "lib")
    files = meta["source_files"]
    assert sum(files.values()) == 185
    assert (files["not_readable"], files["empty"], files["too_long"]) == (3, 1, 1)
    assert files["spells_held_out_pair"] >= 60  # the others are held-out files, which may show the pair
    text = (tmp_path / "out/documents/train.jsonl").read_text(encoding="utf-8")
    assert "planted" not in text and "hidden" not in text and "value_" in text


SOURCE = '''"""Module

docs.
"""
import os


class A:
    """One line."""

    def f(self):
        r"""Long
          \\d text
        here."""
        return 1

    def g(self):
        """Alone,
        long
        body."""
'''

CODE = '''import os


class A:
    """One line."""

    def f(self):
        return 1

    def g(self):
        """Alone,
        long
        body."""
'''


def test_split_prose():
    code, prose = corpus.split_prose(SOURCE, 3)
    assert prose == "Module\n\ndocs.\n\nLong\n  \\d text\nhere.\n"
    assert code == CODE
    shared_line = '"""a\nb\nc"""; x = 1\n'
    assert corpus.split_prose(shared_line, 3) == (shared_line, "")
    half_character = '"""a\nb\n\\ud800"""\nx = 1\n'
    assert corpus.split_prose(half_character, 3) == (half_character, "")


def test_a_build_that_is_cut_off_does_not_look_whole(tmp_path, monkeypatch):
    write_sources(tmp_path / "lib", {f"m{i}.py": b"x = %d\n" % i for i in range(100)})
    config = CorpusConfig(sft_per_kind=2, train_per_kind=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/other.txt").write_text("kept")
    first = build_corpus(tmp_path / "out", config, source=tmp_path / "lib")
    move, moved = os.replace, []

    def replace_twice(*paths) -> None:
        if len(moved) == 2:
            raise OSError(errno.ENOSPC, "disk full")
        moved.append(move(*paths))

    monkeypatch.setattr(os, "replace", replace_twice)
    with pytest.raises(OSError, match="disk full"):
        build_corpus(tmp_path / "out", config, source=tmp_path / "lib")
    assert not (tmp_path / "out/meta.json").exists()
    monkeypatch.undo()
    assert build_corpus(tmp_path / "out", config, source=tmp_path / "lib") == first
    assert not [p for p in (tmp_path / "out").rglob("*") if p.suffix == ".tmp"]
    assert (tmp_path / "out/other.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arithmetic_share": 1.0}, "arithmetic_share=1.0 must lie between 0 and 1"),
        ({"held_out_file_share": 0.0}, "held_out_file_share=0.0 must lie"),
        ({"max_code_bytes": 0}, "max_code_bytes=0: must be at least 1"),
        ({"kinds": ("add", "div")}, r"kinds=\('add', 'div'\) must name some of add, sub, mul"),
        ({"kinds": ()}, "kinds="),
    ],
)
def test_wrong_configuration_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        CorpusConfig(**fields)


def test_a_folder_without_sources_is_named(tmp_path):
    with pytest.raises(ValueError, match="gives 0 training and 0 held-out files of 0"):
        build_corpus(tmp_path / "out", SMALL, source=tmp_path)
    with pytest.raises(ValueError, match="needs 900 held-out problems of kind 'sub': there are 599"):
        build_corpus(tmp_path / "out", dataclasses.replace(SMALL, heldout_per_kind=900))
    assert not (tmp_path / "out").exists()
