"""Readers: every format, and a broken line named by file and line or skipped and counted."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from deepseek_jax.data.conversations import Conversation
from deepseek_jax.data.text import RefusedError, read_chats, read_documents, read_objects, read_rows

TEXTS = ["one\ntwo", "ünï 数", "", "four"]


def write(path: Path, values: list[Any], field: str = "text") -> Path:
    """Writes documents; bytes stand for a raw line of JSONL."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"other": range(len(values)), field: values}), path)
        return path
    lines = [v if isinstance(v, bytes) else json.dumps({field: v}).encode() for v in values]
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_documents_come_in_order(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, TEXTS, field="content")
    assert list(read_documents(path, text_field="content")) == TEXTS


def test_many_files_and_plain_text(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"whole\r\nfile\n")
    paths = [
        write(tmp_path / "a.jsonl", TEXTS[:2]),
        tmp_path / "b.txt",
        str(write(tmp_path / "c.parquet", TEXTS)),
    ]
    assert list(read_documents(paths)) == [*TEXTS[:2], "whole\r\nfile\n", *TEXTS]


BROKEN = [
    (b'{"text": "cut', "not JSON .*column 10"),
    (b'{"other": "x"}', 'no field "text"'),
    (b'{"text": 3}', '"text" is of type int; it must be text'),
    (b'["x"]', "a list; each line must be an object"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"text": "\xff"}', "can't decode byte 0xff"),
    (b'{"text": "\\ud800"}', "surrogates not allowed"),
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(("line", "message"), BROKEN)
def test_a_broken_line_is_named_or_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, line: bytes, message: str
) -> None:
    path = write(tmp_path / name, ["good", b"", line, "also good", line])
    with pytest.raises(ValueError, match=rf"{name}:3: .*{message}"):
        list(read_documents(path))
    skipped: Counter[str] = Counter()
    assert list(read_documents(path, skip_broken=True, skipped=skipped)) == ["good", "also good"]
    assert skipped == {str(path): 2}
    assert f"{name}: skipped 2 broken lines" in caplog.text


def test_a_broken_parquet_row_is_named_or_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["x"] * 1500 + [None] + ["y"])
    with pytest.raises(ValueError, match=r'a\.parquet:1501: "text" is of type NoneType'):
        list(read_documents(path))
    skipped: Counter[str] = Counter()
    assert len(list(read_documents(path, skip_broken=True, skipped=skipped))) == 1501
    assert skipped == {str(path): 1}


def test_broken_files_are_named_even_when_lines_may_be_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", [f"document {i}" for i in range(2000)])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz:\d+: the gzip data is broken from here on"):
        list(read_documents(path, skip_broken=True))
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"plain\.jsonl\.gz:1: the gzip data is broken"):
        list(read_documents(tmp_path / "plain.jsonl.gz", skip_broken=True))
    (tmp_path / "a.parquet").write_bytes(write(tmp_path / "b.parquet", TEXTS).read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"a\.parquet: not a whole Parquet file"):
        list(read_documents(tmp_path / "a.parquet", skip_broken=True))
    about = pyarrow.parquet.read_metadata(tmp_path / "b.parquet")
    for where in (
        about.row_group(0).column(1).dictionary_page_offset,
        -8 - about.serialized_size,
    ):  # a page, the footer
        damaged = bytearray((tmp_path / "b.parquet").read_bytes())
        damaged[where : where + 8] = b"\xff" * 8
        (tmp_path / "a.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.parquet: .*Parquet.*thrift"):
            list(read_documents(tmp_path / "a.parquet", skip_broken=True))
    with pytest.raises(ValueError, match=r'b\.parquet: no column "body"; it has other, text'):
        list(read_documents(tmp_path / "b.parquet", text_field="body"))
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"a\.csv: unknown kind of file"):
        list(read_documents(tmp_path / "a.csv"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt:1: .*0xe9"):
        list(read_documents(tmp_path / "latin.txt"))


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def test_chats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "c.jsonl", [CHAT, [{"role": "judge", "content": "x"}], b"{}", CHAT], field="messages")
    with pytest.raises(ValueError, match=r"c\.jsonl:2: message 0 has role 'judge'; allowed are system, dev"):
        list(read_chats(path))
    skipped: Counter[str] = Counter()
    assert list(read_chats(path, skip_broken=True, skipped=skipped)) == [Conversation(CHAT)] * 2
    assert skipped == {str(path): 2} and "skipped 2" in caplog.text
    assert list(read_chats(write(tmp_path / "c.parquet", [CHAT, CHAT], field="messages"))) == [Conversation(CHAT)] * 2
    (tmp_path / "c.txt").touch()
    with pytest.raises(ValueError, match="unknown kind of file"):
        list(read_chats(tmp_path / "c.txt"))

    def refuse(chat: Conversation) -> None:
        raise RefusedError("too long")

    with pytest.raises(ValueError, match=r"c\.parquet:1: too long"):
        list(read_chats(tmp_path / "c.parquet", then=refuse, skip_broken=True))


ROWS = [
    {"question": "ünï\u2028数", "n": [1, 2], "chat": [{"role": "user", "content": "hi"}], "x": None},
    {"question": "two\nlines", "n": [], "chat": [], "x": 0.5},
]


def test_rows_of_any_columns_know_where_they_stand(tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    paths = [write(tmp_path / "a.jsonl", [lines[0], b"", lines[1]]), write(tmp_path / "b.jsonl.gz", lines)]
    paths.append(tmp_path / "c.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), paths[-1])
    found = list(read_rows(paths))
    assert found == ROWS * 3
    numbers = [(0, 1), (0, 3), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert [row.where for row in found] == [f"{paths[file]}:{number}" for file, number in numbers]
    assert read_objects(paths[-1]) == ROWS


def test_fields_that_arrow_adds_to_structs_are_no_part_of_a_row(tmp_path: Path) -> None:
    def chat(**arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "ask", "arguments": arguments}}
        return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}], "x": None}

    chats = [chat(city="Paris"), chat(unit={"of": "heat"}), chat(unit={"in": ["K", None]})]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "a.parquet")
    assert read_objects(tmp_path / "a.parquet") == chats
    asked = [call.messages[1]["tool_calls"][0]["function"]["arguments"] for call in read_chats(tmp_path / "a.parquet")]
    assert asked == [{"city": "Paris"}, {"unit": {"of": "heat"}}, {"unit": {"in": ["K", None]}}]
    nulls = write(tmp_path / "b.jsonl", [{"city": None}])  # written on purpose
    assert read_objects(nulls) == [{"text": {"city": None}}]


def test_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for line, message in ((b"[1]", "a list; each line must be an object"), (b'{"a', "not JSON"), (b"\xff", "0xff")):
        with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{message}"):
            list(read_rows(write(tmp_path / "a.jsonl", ["good", line])))
    many = pyarrow.array([b"x"] * 1500 + [b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"a": many}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet:1501: .*0xff"):
        list(read_rows(tmp_path / "a.parquet"))
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"a\.csv: unknown kind of file; \.jsonl, .*, \.parquet can be read"):
        list(read_rows(tmp_path / "a.csv"))
