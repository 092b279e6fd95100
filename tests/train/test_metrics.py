"""Metrics survive a kill, no step appears twice, and progress can be read where there is no terminal."""

import io
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from deepseek_jax.train.metrics import MetricsWriter, read_metrics
from deepseek_jax.train.progress import Progress


def write(run_dir, steps, *, after_step=0, tensorboard=False):
    writer = MetricsWriter(run_dir, after_step=after_step, tensorboard=tensorboard)
    for step in steps:
        writer.write(step, {"loss": step / 2})
    writer.close()


def test_lines_hold_scalars_and_lists_and_reach_the_file_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    load = jnp.array([[0.25, 0.75], [1.0, 0.0]])
    line = writer.write(3, {"loss": np.float32(1.5), "finite": jnp.int32(1), "load": load, "bad": float("nan")})
    assert read_metrics(tmp_path) == [line]  # before it is closed
    assert line["time"] > 1.7e9
    del line["time"]
    assert line == {"step": 3, "loss": 1.5, "finite": 1, "load": [[0.25, 0.75], [1.0, 0.0]], "bad": None}
    writer.close()


def test_going_on_cuts_later_steps_and_a_half_written_line(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    write(tmp_path, [3, 4, 5], after_step=2)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    write(tmp_path, [1])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize("broken", ["{", "[1]", '{"loss": 1}'])
def test_a_broken_line_is_named(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + broken + "\n")
    with pytest.raises(ValueError, match=f"{path}:2: "):
        read_metrics(path)


def test_a_full_disk_is_named_and_closing_is_quiet(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer._file.close()  # pyright: ignore[reportOptionalMemberAccess]
    with Path("/dev/full").open("ab", buffering=0) as writer._file:
        with pytest.raises(OSError, match=r"No space left on device: metrics of step 1: .*/dev/full"):
            writer.write(1, {"loss": 1.0})
        writer.close()


def test_scalars_go_to_tensorboard(tmp_path):
    write(tmp_path, [1, 2], tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"loss") >= 2


def test_progress_without_a_terminal_prints_plain_lines():
    out = io.StringIO()
    progress = Progress("pretrain", 4, every_seconds=0.0, console=Console(file=out, width=200))
    progress.start(1)
    progress.update(2)
    progress.update(3, {"loss": -0.0, "other": 1.0, "reward": None})
    progress.update(4)
    progress.stop()
    compiling, compiled, first, second, last = out.getvalue().splitlines()
    assert compiling == "pretrain: compiling …" and re.fullmatch(r"pretrain: first step after \d+\.\d s", compiled)
    assert first == "pretrain 2/4 · ?:?? left"
    assert second == "pretrain 3/4 · 0:00:00 left · loss 0"
    assert last.startswith("pretrain 4/4 · 0:00:00 left")


def test_progress_in_a_terminal_shows_a_bar():
    out = io.StringIO()
    progress = Progress("sft", 2, console=Console(file=out, force_terminal=True, width=120))
    progress.start(0)
    progress.update(2, {"loss": 1.25})
    progress.stop()
    assert "sft" in out.getvalue() and "2/2" in out.getvalue() and "loss 1.25" in out.getvalue()
