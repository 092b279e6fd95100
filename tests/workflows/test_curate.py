"""Rows that are kept by difficulty and for sharing nothing with evaluation sets, counted by reason."""

import json
from pathlib import Path

import pytest

from deepseek_jax.cli.main import main
from deepseek_jax.workflows.curate import CurateConfig, curate

LONG = "a train leaves the station at noon with seven cars"


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, tuple[str, ...]]:
    rows = [
        {"question": "easy?", "answer": "1"},
        {"question": "hard?", "answer": "2"},
        {"question": "fair?", "answer": "3"},
        {"question": "fair too?", "answer": f"Since {LONG.upper()}, it is 4."},
        {"question": "fair and fine?", "answer": "5", "more": {"kept": [None, 1.5, "é"]}},
        {"question": "never asked?", "answer": "6"},
    ]
    data = write(tmp_path / "train.jsonl", rows)
    rates = [(1, 1), (0, 0), (0, 1), (1, 0), (1, 0)]
    answers = [
        {"row": f"{data}:{line}", "correct": bool(right)} for line, pair in enumerate(rates, 1) for right in pair
    ]
    answers.append({"row": f"{data}:6", "correct": None})
    exam = write(tmp_path / "exam.jsonl", [{"problem": LONG, "answer": "fair and fine"}, {"problem": "too short"}])
    return {"data": (data,), "answers": (write(tmp_path / "said.jsonl", answers),), "against": (exam,)}


def test_rows_are_kept_by_difficulty_and_by_what_they_share(files, tmp_path):
    counts = curate(CurateConfig(**files), tmp_path / "out.jsonl")
    shared = f"shared with {files['against'][0]}"
    assert counts == {"read": 6, "kept": 2, "easy": 1, "hard": 1, shared: 1, "unanswered": 1}
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["question"] for row in kept] == ["fair?", "fair and fine?"]
    assert kept[1]["more"] == {"kept": [None, 1.5, "é"]}
    # The answers' column too, by name: three words, all of which occur.
    more = CurateConfig(**files | {"answers": (), "against_columns": ("problem|question", "answer|problem")})
    assert curate(more, tmp_path / "more.jsonl") == {"read": 6, "kept": 4, shared: 2}


def test_the_command(files, tmp_path, capsys):
    out = str(tmp_path / "out.jsonl")
    given = [part for name, paths in files.items() for part in (f"--{name}", *paths)]
    assert main(["curate", out, *given, "--least", "0", "--most", "0.5"]) == 0
    assert "6 read, 3 kept" in capsys.readouterr().out.replace("\n", " ")
    assert main(["curate", out, *given]) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"against": (), "answers": ()}, "give --data FILES, and what rows are kept by"),
        ({"least": 0.5, "most": 0.2}, "least=0.5, most=0.2"),
        ({"against_columns": ("question",)}, r'exam\.jsonl:1: no column "question"; it has problem, answer'),
        ({"against_columns": ("answer|problem",), "shortest": 9}, "no text of shortest=9 words to look for"),
        ({"answers": "data"}, r"train\.jsonl:1: no answer of eval"),
        ({"data": "against"}, r"there are answers to .*train\.jsonl:1, which is no row of --data"),
    ],
)
def test_what_makes_no_sense_is_refused(files, tmp_path, change, message):
    given = files | {name: files[value] if isinstance(value, str) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        curate(CurateConfig(**given), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
