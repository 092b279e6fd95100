"""Rows on disk: they come back as they were, and nothing half-written looks whole."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.data import hub
from deepseek_jax.data.files import ROWS, TEXTS
from deepseek_jax.data.packing import Row, pack_samples
from deepseek_jax.data.rows import check_rows, open_rows, sources_of, write_rows

META = {"vocab_size": 50, "tokenizer_fingerprint": "t", "note": "kept"}
MakeRows = Callable[[int], list[Row]]

KILLED = """
import sys
from deepseek_jax.data.packing import pack_stream
from deepseek_jax.data.rows import write_rows

def docs():
    for i in range(10**9):
        if i == 5000:
            print("far enough", flush=True)
        yield list(range(3, 40))

write_rows(sys.argv[1], pack_stream(docs(), 64), meta={"vocab_size": 50, "tokenizer_fingerprint": "t"})
"""

DISK_FULL = """
import resource, sys
import numpy as np
from deepseek_jax.data.packing import pack_stream
from deepseek_jax.data.rows import write_rows

rng = np.random.default_rng(0)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
docs = (rng.integers(3, 60000, 64).tolist() for _ in range(4_000))
write_rows(sys.argv[1], pack_stream(docs, 64), meta={"vocab_size": 60000, "tokenizer_fingerprint": "t"})
"""


def test_rows_come_back(tmp_path: Path, rng: np.random.Generator) -> None:
    samples = [(rng.integers(3, 50, n).tolist(), rng.integers(0, 2, n).tolist()) for n in rng.integers(1, 16, 40)]
    rows = pack_samples(samples, 16)
    meta = write_rows(tmp_path / "deep/rows", rows, meta=META)
    assert meta.items() >= (META | {"seq_len": 16, "count": len(rows)}).items()
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["rows"]
    source = open_rows(tmp_path / "deep/rows")
    assert source.meta == meta and len(source) == len(rows)
    for index in rng.permutation(len(rows)):
        back = source[int(index)]
        assert back.keys() == rows[index].keys()
        for name, value in rows[index].items():
            np.testing.assert_array_equal(back[name], value)
            assert back[name].dtype == value.dtype


def test_fingerprint_is_of_the_content(tmp_path: Path, make_rows: MakeRows) -> None:
    def fingerprint(name: str, rows: list[Row]) -> str:
        return write_rows(tmp_path / name, rows, meta=META)["fingerprint"]

    rows = make_rows(3)
    first = fingerprint("a", rows)
    assert fingerprint("b", make_rows(3)) == first
    assert fingerprint("c", rows[::-1]) != first
    rows[1]["loss_mask"][3] = 0
    assert fingerprint("d", rows) != first


def test_a_killed_writer_leaves_nothing_whole(tmp_path: Path, make_rows: MakeRows) -> None:
    target = tmp_path / "rows"
    command = [sys.executable, "-c", KILLED, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "far enough\n"
        process.send_signal(signal.SIGKILL)
    assert not target.exists() and target.with_name("rows.partial").exists()
    with pytest.raises(ValueError, match="no dataset here"):
        open_rows(target)
    with pytest.raises(ValueError, match="no dataset here"):
        open_rows(target.with_name("rows.partial"))
    write_rows(target, make_rows(2), meta=META)
    assert len(open_rows(target)) == 2 and os.listdir(tmp_path) == ["rows"]


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    """The limit on a file's size stands for the full disk: both fail the write."""
    command = [sys.executable, "-c", DISK_FULL, str(tmp_path / "rows")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result
    assert "OSError" in result.stderr and str(tmp_path / "rows") in result.stderr
    assert os.listdir(tmp_path) == []


def test_two_processes_do_not_pack_into_one_folder(tmp_path: Path, make_rows: MakeRows) -> None:
    def rows() -> Iterator[Row]:
        with pytest.raises(ValueError, match=rf"{tmp_path}/rows\.partial: another process is packing rows there"):
            write_rows(tmp_path / "rows", make_rows(1), meta=META)
        yield from make_rows(2)

    write_rows(tmp_path / "rows", rows(), meta=META)
    assert len(open_rows(tmp_path / "rows")) == 2 and os.listdir(tmp_path) == ["rows"]


def test_locks_that_do_not_work_are_warned_of(tmp_path: Path, make_rows: MakeRows, monkeypatch, caplog) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    write_rows(tmp_path / "rows", make_rows(1), meta=META)
    assert len(open_rows(tmp_path / "rows")) == 1
    assert f"{tmp_path}/rows.partial: locks do not work there" in caplog.text


def test_a_full_disk_is_named_wherever_it_shows(tmp_path: Path, make_rows: MakeRows, monkeypatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"rows could not be written: '{tmp_path}/rows'"):
        write_rows(tmp_path / "rows", make_rows(1), meta=META)
    assert os.listdir(tmp_path) == []


def test_a_failing_row_leaves_nothing(tmp_path: Path, make_rows: MakeRows) -> None:
    def rows():
        yield from make_rows(2)
        raise KeyError("from the reader")

    with pytest.raises(KeyError, match="from the reader"):
        write_rows(tmp_path / "rows", rows(), meta=META)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokens", 50, r"row 1 has token 50; ids must lie in \[0, vocab_size=50\)"),
        ("tokens", -1, "row 1 has token"),
        ("positions", 7, "row 1 breaks the batch format in positions"),
        ("loss_mask", 0.5, "row 1 breaks the batch format in loss_mask"),
        ("segment_ids", 65536, "row 1 breaks the batch format in segment_ids"),
    ],
)
def test_rows_that_would_not_come_back_are_refused(
    tmp_path: Path, make_rows: MakeRows, name: str, value: float, message: str
) -> None:
    rows = make_rows(2)
    rows[1][name][0] = value
    with pytest.raises(ValueError, match=message):
        write_rows(tmp_path / "rows", rows, meta=META)
    rows[1][name] = rows[1][name][:-1]
    with pytest.raises(ValueError, match=f"row 1 has lengths .*'{name}': 7.*all must be 8"):
        write_rows(tmp_path / "rows", rows, meta=META)


def test_wrong_folders_and_meta(tmp_path: Path, make_rows: MakeRows, dataset: Path) -> None:
    with pytest.raises(ValueError, match="rows: exists already"):
        write_rows(dataset, make_rows(1), meta=META)
    with pytest.raises(ValueError, match="meta lacks tokenizer_fingerprint"):
        write_rows(tmp_path / "new", make_rows(1), meta={"vocab_size": 50})
    with pytest.raises(ValueError, match=f"{tmp_path}/new: there are no rows to write"):
        write_rows(tmp_path / "new", [], meta=META)


def test_rows_of_other_data_are_named_field_by_field(tmp_path: Path, make_rows: MakeRows) -> None:
    text, folder = tmp_path / "a.txt", tmp_path / "rows"
    text.write_text("abc")
    sources = lambda *paths: sources_of(paths or [text, tmp_path / "gone.txt"], (*TEXTS, *ROWS))  # noqa: E731
    made_of = META | {"seed": 1, "data": {"path": ["a.txt"], "fim": 0.1}, **sources()}
    write_rows(folder, make_rows(1), meta=made_of)
    check_rows(folder, made_of)
    check_rows(folder, made_of | {"new": "what the rows do not tell of"})
    text.write_text("abcd")
    other = made_of | {"data": {"path": ["a.txt"], "fim": 0.2}, **sources()}
    said = rf"other data or settings: data\.fim is 0\.1 there and 0\.2 here; sources\.{text} is 3 there and 4 here;"
    with pytest.raises(ValueError, match=said):
        check_rows(folder, other)
    text.write_text("abd")  # of the same size
    with pytest.raises(ValueError, match=rf"settings: sha256\.{text} is '\w{{16}}' there and '\w{{16}}' here"):
        check_rows(folder, made_of | sources())
    text.write_text("abc")
    (tmp_path / "b.txt").write_text("new in the folder")
    with pytest.raises(ValueError, match=rf"sources\.{tmp_path}/b\.txt is '\(absent\)' there and 17 here"):
        check_rows(folder, made_of | sources(tmp_path))


def test_files_that_are_gone_are_told_from_sources_that_are(tmp_path: Path, make_rows: MakeRows, monkeypatch, capsys):
    """Packed rows outlive their source, but a folder that has lost a file is another corpus."""
    (tmp_path / "texts").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "texts" / f"{name}.txt").write_text(name)
    (tmp_path / "single.txt").write_text("one")
    monkeypatch.setattr(hub, "describe", lambda path: {"bytes": 9, "sha256": "f"})
    paths = [f"{tmp_path}/texts", f"{tmp_path}/single.txt", f"{tmp_path}/**/[bc].txt", "hf:some/set:train"]
    kinds = (*TEXTS, *ROWS)
    made_of = META | sources_of(paths, kinds)
    write_rows(tmp_path / "rows", make_rows(1), meta=made_of)
    check_rows(tmp_path / "rows", made_of, paths)
    assert not capsys.readouterr().err

    def no_network(path: str) -> dict[str, int | str]:
        raise ValueError(f"{path}: could not be loaded")

    monkeypatch.setattr(hub, "describe", no_network)
    (tmp_path / "single.txt").unlink()
    check_rows(tmp_path / "rows", META | sources_of(paths, kinds), paths)
    said = capsys.readouterr().err.replace("\n", " ")
    assert re.findall(r"(\S+): is not to be had now", said) == [f"{tmp_path}/single.txt", "hf:some/set:train"]
    (tmp_path / "texts" / "b.txt").unlink()
    with pytest.raises(ValueError, match=rf"sources\.{tmp_path}/texts/b\.txt is 1 there and '\(absent\)' here;"):
        check_rows(tmp_path / "rows", META | sources_of(paths, kinds), paths)
    with pytest.raises(ValueError, match=r"sources\..*single\.txt is 3 there and '\(absent\)' here"):
        check_rows(tmp_path / "rows", META | sources_of(paths[:1], kinds), paths[:1])  # it is not asked for
    shutil.rmtree(tmp_path / "texts")
    check_rows(tmp_path / "rows", META | sources_of(paths, kinds), paths)
    assert capsys.readouterr().err.count("is not to be had now") >= 4


def test_a_dataset_cut_while_copied_is_named(dataset: Path) -> None:
    records = dataset / "rows.array_record"
    whole = records.read_bytes()
    records.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"rows\.array_record: has {len(whole) - 100} bytes where {len(whole)}"):
        open_rows(dataset)
    records.write_bytes(whole)
    meta = json.loads((dataset / "meta.json").read_text())
    for damaged in ("", "{", "[]"):
        (dataset / "meta.json").write_text(damaged)
        with pytest.raises(ValueError, match=rf"{dataset}/meta\.json: is damaged .*; remove {dataset}, and it"):
            open_rows(dataset)
    (dataset / "meta.json").write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(ValueError, match="format 99; this version reads format 1"):
        open_rows(dataset)
