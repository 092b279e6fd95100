"""R1 from one end to the other on two real processes of a device each is that of one process of two."""

import json
from pathlib import Path

import pytest
from parallel.two_processes import start
from workflows import tiny_r1

from deepseek_jax.files import read_json_lines, read_json_object

PROGRAM = """
import dataclasses, io, sys
from pathlib import Path
import jax
from rich.console import Console
from workflows import tiny_r1
from deepseek_jax.workflows.r1 import r1
folder, run = map(Path, sys.argv[1:])
for _ in range(2):
    out = io.StringIO()
    r1(dataclasses.replace(tiny_r1.config(folder), run_dir=str(run)), Console(file=out, width=200))
    Path(f"{run}.{jax.process_index()}").write_text(out.getvalue())
"""


@pytest.mark.slow
def test_two_processes_go_through_all_stages_as_one_does(tmp_path):
    tiny_r1.write_questions(tmp_path)
    for run, processes in (("one", 1), ("two", 2)):
        given = {"processes": processes, "devices": 2 // processes, "folder": tmp_path / f"said.{run}"}
        with start(PROGRAM, [tmp_path, tmp_path / run], **given) as group:
            group.done(1200)
    one, two = tmp_path / "one", tmp_path / "two"
    stages = sorted(path.name for path in one.iterdir() if path.is_dir())
    assert stages == sorted(path.name for path in two.iterdir() if path.is_dir()) and len(stages) == 14
    said = (tmp_path / "two.0").read_text()  # of the second time
    assert said.count("is done already") == 14 and not (tmp_path / "two.1").read_text()
    for stage in ("zero", "reasoning", "all_scenarios"):
        found, wanted = (read_json_lines(run / stage / "rollouts.jsonl") for run in (two, one))
        assert found == wanted and found
    for stage in ("cold_start_samples", "samples"):
        assert (two / stage / "kept.jsonl").read_text() == (one / stage / "kept.jsonl").read_text()
    assert read_json_object(two / "evaluation" / "result.json") == read_json_object(one / "evaluation" / "result.json")
    assert json.loads((two / "helpful" / "result.json").read_text())["agreement"] >= 0
    assert (two / "report.html").is_file() and not list(Path(two).glob("lock.json"))
