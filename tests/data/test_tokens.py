"""Tokens on disk: what encoding one by one gives, made once, by several processes, killed and gone on with."""

import fcntl
import functools
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.data import files, hub, token_worker, tokens
from deepseek_jax.data.conversations import Conversation
from deepseek_jax.data.files import describe, find_files
from deepseek_jax.data.text import LONGEST_TEXT, read_chats, read_documents, read_rows
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.tokens import tokenize

SHARD = 2000  # bytes of text


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SHARD_BYTES", SHARD)


def write_lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))
    return path


@pytest.fixture
def documents(texts: list[str], rng: np.random.Generator) -> list[str]:
    return [texts[i % 3][: rng.integers(1, 200)] for i in range(150)] + ["", "x" * 3 * SHARD, "last"]


@pytest.fixture
def corpus(tmp_path: Path, documents: list[str]) -> Path:
    (tmp_path / "corpus").mkdir()
    write_lines(tmp_path / "corpus" / "a.jsonl", documents[:100])
    write_lines(tmp_path / "corpus" / "b.jsonl", documents[100:])
    return tmp_path / "corpus"


@pytest.mark.parametrize("workers", [1, 2])
def test_tokens_are_those_of_each_document_in_order(
    tmp_path: Path, corpus: Path, documents: list[str], tokenizer: Tokenizer, workers: int
) -> None:
    seen: list[tuple[int, int]] = []
    made = tokenize(
        corpus, tokenizer, tmp_path / "cache", workers=workers, progress=lambda done, total: seen.append((done, total))
    )
    assert len(made) == len(documents) and made.meta["shards"] > 5
    expected = [tokenizer.encode(text) for text in documents]
    for index in np.random.default_rng(1).permutation(len(documents)):
        assert made[int(index)].tolist() == expected[index]
    assert made.count == sum(map(len, expected))
    size = sum(path.stat().st_size for path in corpus.iterdir())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1] == (size, size)


def test_a_corpus_is_tokenized_once_wherever_it_lies(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenize(corpus, tokenizer, tmp_path / "cache", workers=1)
    corpus = corpus.rename(tmp_path / "elsewhere")
    with monkeypatch.context() as patched:
        patched.setattr(tokens, "read_documents", None)  # would be called, and cannot
        again = tokenize(tmp_path / "elsewhere" / "*.jsonl", tokenizer, tmp_path / "cache")
    assert again.folder == first.folder
    a = corpus / "a.jsonl"
    a.write_bytes(a.read_bytes().replace(b"quick", b"slow!"))  # of the same size
    assert tokenize(corpus, tokenizer, tmp_path / "cache", workers=1).folder != first.folder
    assert tokenize(corpus, tokenizer, tmp_path / "cache", skip_broken=True).folder != first.folder


def test_broken_lines_are_counted_again_from_the_cache(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{\n{"text": 3}\n')
    for _ in range(2):
        made = tokenize(path, tokenizer, tmp_path / "cache", skip_broken=True)
        assert len(made) == 1 and made.skipped == {str(path): 2}
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not JSON"):
        tokenize(path, tokenizer, tmp_path / "cache")


def _call(change: Callable[[], object], done: int, total: int) -> None:
    change()


def test_a_corpus_that_changes_while_it_is_read_leaves_nothing(
    tmp_path: Path, corpus: Path, documents: list[str], tokenizer: Tokenizer
) -> None:
    b = corpus / "b.jsonl"
    whole = b.read_bytes()
    for change in (lambda: b.write_bytes(whole[:-9] + b'a line"}\n'), lambda: b.unlink(missing_ok=True)):
        with pytest.raises(ValueError, match=f"{b}: was changed or taken away while it was read"):
            tokenize(corpus, tokenizer, tmp_path / "cache", workers=1, progress=functools.partial(_call, change))
        b.write_bytes(whole)
        assert not list((tmp_path / "cache").glob("*/*.tokens"))
    made = tokenize(corpus, tokenizer, tmp_path / "cache", workers=1)
    assert made[len(documents) - 1].tolist() == tokenizer.encode(documents[-1])


def test_who_waits_for_another_process_says_so(tmp_path: Path, corpus: Path, tokenizer: Tokenizer, capsys) -> None:
    folder = tokenize(corpus, tokenizer, tmp_path / "cache", workers=1).folder
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(tokenize, corpus, tokenizer, tmp_path / "cache")
        while "another process is tokenising this corpus" not in capsys.readouterr().err:
            assert not other.done()
            time.sleep(0.01)
        os.close(handle)
        assert other.result().folder == folder


KILLED = """
import sys
from pathlib import Path
from deepseek_jax.data import token_worker, tokens
from deepseek_jax.data.tokenizer import Tokenizer
tokens.SHARD_BYTES = {SHARD}
def progress(done, total):
    print(len(list(Path(sys.argv[3]).glob("*/*.tokens"))), flush=True)
tokens.tokenize(sys.argv[1], Tokenizer.from_folder(sys.argv[2]), Path(sys.argv[3]), workers=2, progress=progress)
"""


def test_kill_9_keeps_the_finished_shards(
    tmp_path: Path, corpus: Path, documents: list[str], tokenizer: Tokenizer
) -> None:
    write_lines(corpus / "c.jsonl", ["more text, and more\n" * 20] * 800)
    tokenizer.save(tmp_path / "tokenizer")
    command = [sys.executable, "-c", KILLED.replace("{SHARD}", str(SHARD))]
    command += [str(corpus), str(tmp_path / "tokenizer"), str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 4:
            pass
        process.send_signal(signal.SIGKILL)
    folder = next((tmp_path / "cache").glob("*/*.tokens")).parent
    time.sleep(0.2)  # its workers finish the shard that they have
    assert not (folder / "meta.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.tokens")}
    made = tokenize(corpus, tokenizer, tmp_path / "cache", workers=2)
    assert made.folder == folder and made.meta["shards"] > len(kept) >= 4
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [made[i].tolist() for i in range(100)] == [tokenizer.encode(text) for text in documents[:100]]
    assert made[len(made) - 1].tolist() == tokenizer.encode("more text, and more\n" * 20)
    assert {path.suffix for path in folder.iterdir()} == {".tokens", ".json"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_names_the_file(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """The limit on a file's size, which processes inherit, stands for the full disk."""
    if not workers:
        monkeypatch.setattr(tokens, "SHARD_BYTES", 2**30)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"tokens could not be written: '.*/\d{6}\.tokens'"):
            tokenize(corpus, tokenizer, tmp_path / "cache", workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "cache").glob("*/*.tokens.*"))
    tokenize(corpus, tokenizer, tmp_path / "cache", workers=workers)


def test_a_worker_that_dies_is_told(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dead.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.setattr(token_worker, "__file__", str(tmp_path / "dead.py"))
    with pytest.raises(OSError, match=r"\.tokens: the process that makes these tokens has ended"):
        tokenize(corpus, tokenizer, tmp_path / "cache", workers=1)


def test_damage_is_named(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    made = tokenize(corpus, tokenizer, tmp_path / "cache", workers=1)
    shard = made.folder / "000001.tokens"
    whole = shard.read_bytes()
    for damaged in (b"", whole[:-3], whole[3:], b"\xff" * 16):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{shard}: is missing or not whole; remove its folder"):
            tokenize(corpus, tokenizer, tmp_path / "cache")
    shard.write_bytes(whole)
    (made.folder / "meta.json").write_text("")
    with pytest.raises(ValueError, match=f"{made.folder}/meta.json: is damaged"):
        tokenize(corpus, tokenizer, tmp_path / "cache")


def test_hashes_of_large_files_are_kept_while_size_and_times_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LARGE", 0)
    path, memory = tmp_path / "a.txt", tmp_path / "hashes"
    path.write_text("abc")
    first = describe([path], memory)
    assert not memory.exists()  # it may still be written to within the clock's tick
    monkeypatch.setattr(files, "_SETTLED", -1.0)
    assert describe([path], memory) == first and len(list(memory.iterdir())) == 1
    with monkeypatch.context() as patched:
        patched.setattr(files, "hash_file", None)
        assert describe([path], memory) == first
    path.write_text("abd")
    assert describe([path], memory) != first
    next(memory.iterdir()).write_text("{")
    path.write_text("abc")
    assert describe([path], memory) == first


def test_folders_globs_and_what_is_not_there(tmp_path: Path) -> None:
    names = ["b.txt", "a.md", "deep/er/c.jsonl", "d.parquet", "e.csv", ".hidden/f.txt", "g[1].txt", "h.jsonl.zst"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(*paths: str, kinds: tuple[str, ...] = (*files.TEXTS, *files.ROWS)) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in find_files([tmp_path / path for path in paths], kinds)]

    with pytest.raises(ValueError, match="an empty path"):
        find_files([""])
    assert found(".") == ["a.md", "b.txt", "d.parquet", "deep/er/c.jsonl", "g[1].txt", "h.jsonl.zst"]
    assert found(".", kinds=files.ROWS) == ["d.parquet", "deep/er/c.jsonl", "h.jsonl.zst"]
    assert found("*.txt", "a.md", "a.md") == ["b.txt", "g[1].txt", "a.md", "a.md"]
    assert found("**/*.jsonl*") == ["deep/er/c.jsonl", "h.jsonl.zst"]
    assert found("g[1].txt") == ["g[1].txt"]  # a name before it is a pattern
    with pytest.raises(FileNotFoundError, match=r"/no\.txt: there is no such file or folder"):
        found("no.txt")
    with pytest.raises(FileNotFoundError, match=r"/\*\.gz: there is no file that matches"):
        found("*.gz")
    with pytest.raises(ValueError, match=r"/deep: this folder holds no file of the kinds \.txt, \.md$"):
        found("deep", kinds=files.TEXTS)


def test_zstd_as_gzip(tmp_path: Path, documents: list[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    lines = write_lines(tmp_path / "a.jsonl", documents).read_bytes()
    packed = pyarrow.compress(lines, codec="zstd", asbytes=True)
    (tmp_path / "b.jsonl.zst").write_bytes(packed + packed)  # two frames
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines) * 2)
    for name in ("b.jsonl.zst", "c.jsonl.gz"):
        assert list(read_documents(tmp_path / name)) == documents * 2
        assert list(read_rows(tmp_path / name))[0].where == f"{tmp_path / name}:1"
    for broken in (packed[:-9], b"no zstd"):
        (tmp_path / "b.jsonl.zst").write_bytes(broken)
        with pytest.raises(ValueError, match=r"b\.jsonl\.zst:\d+: the zstd data is broken from here on"):
            list(read_documents(tmp_path / "b.jsonl.zst", skip_broken=True))


def test_a_byte_order_mark_opens_a_file_and_line_separators_are_text(tmp_path: Path) -> None:
    text, bom = "a\u2028b\u0085c\x0bd", b"\xef\xbb\xbf"
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    row = json.dumps({"messages": chat, "text": text}, ensure_ascii=False).encode()
    (tmp_path / "a.jsonl").write_bytes(bom + row.replace(b"\x0b", b"\\u000b") + b"\n")
    (tmp_path / "b.txt").write_bytes(bom + text.encode())
    (tmp_path / "c.md").write_bytes(text.encode())
    for skip in (False, True):
        assert list(read_documents(tmp_path, skip_broken=skip)) == [text] * 3
        assert list(read_chats(tmp_path / "a.jsonl", skip_broken=skip)) == [Conversation(chat)]
    assert list(read_rows(tmp_path / "a.jsonl")) == [{"messages": chat, "text": text}]


def test_a_long_text_is_several_documents_cut_at_lines(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    lines = "".join(f"line {i} ünï 数\n" for i in range(150_000))
    path.write_text(lines)
    found = list(read_documents(path))
    assert "".join(found) == lines and len(found) == -(-len(lines.encode()) // LONGEST_TEXT)
    assert all(text.endswith("\n") and len(text.encode()) < LONGEST_TEXT + 100 for text in found)
    path.write_text("数" * LONGEST_TEXT)  # no line ends
    found = list(read_documents(path))
    assert "".join(found) == "数" * LONGEST_TEXT and len(found) == 2
    path.write_bytes(b"a\n" * LONGEST_TEXT + b"\xff\n")
    with pytest.raises(ValueError, match=rf"long\.txt:{LONGEST_TEXT + 1}: .*0xff"):
        list(read_documents(path))


def test_datasets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    """Without a network: a folder in its place."""
    with pytest.raises(ValueError, match="hf:name: expected hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"):
        list(read_documents("hf:name"))
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=r'pip install "deepseek-jax\[datasets\]"'):
        patched.setitem(sys.modules, "datasets", None)
        list(read_documents("hf:name:train"))
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", ["one", "two"])
    spec = f"hf:{tmp_path / 'set'}:train"
    assert list(read_documents(spec)) == ["one", "two"]
    assert [row.where for row in read_rows(spec)] == [f"{spec}:1", f"{spec}:2"]
    assert [ids.tolist() for ids in tokenize(spec, tokenizer, tmp_path / "cache")] == [
        tokenizer.encode(text) for text in ("one", "two")
    ]
    with pytest.raises(ValueError, match=f'{spec}: no column "body"; it has text'):
        list(read_documents(spec, text_field="body"))
    with pytest.raises(ValueError, match=f"{spec}x: could not be loaded"):
        hub.load(f"{spec}x")
