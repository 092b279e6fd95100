"""Two real processes of four devices are one process of eight: what they learn, write, save and how they end."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parallel.stages import rows_read, run, write_inputs
from parallel.two_processes import Ended, start

from deepseek_jax.files import read_json_lines, read_json_object
from deepseek_jax.parallel import processes
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.train.metrics import read_metrics

pytestmark = pytest.mark.timeout(900)  # all of it is the first test's setup, about a minute of two idle cores
STAGES = ("pretrain", "sft", "grpo")
# All in one pair, the death at its end. What a process has to tell is in a file: gloo writes where print does.
PROGRAM = """
import json, signal, time
from pathlib import Path
from deepseek_jax.train.preemption import Preempted
from parallel.stages import rows_read, run, signalled
inputs, two = map(Path, sys.argv[1:])
second = jax.process_index() == 1
with rows_read() as rows:
    run("pretrain", inputs, two / "pretrain")
for name in ("sft", "grpo"):
    run(name, inputs, two / name)
with signalled(signal.SIGTERM, 3, here=second):
    try:
        run("pretrain", inputs, two / "stopped")
    except Preempted as stop:
        said = str(stop)
told = {"rows": rows, "said": said, "time": time.time()}
(two / f"told.{jax.process_index()}").write_text(json.dumps(told))
with signalled(signal.SIGKILL, 8, here=second, after=two / "killed" / "checkpoints" / "5"):
    run("pretrain", inputs, two / "killed")
"""
CLOCKS = ("time", "seconds", "tokens_per_second", "peak_bytes_process", "rollout_seconds", "reward_seconds")
CLOCKS += ("train_seconds", "samples_per_second", "rollout_tokens_per_second")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def one(inputs, tmp_path_factory) -> Path:
    """The runs of one process, and the rows that its pretraining has read."""
    folder = tmp_path_factory.mktemp("one")
    with rows_read() as rows:
        run("pretrain", inputs, folder / "pretrain")
    (folder / "rows.json").write_text(json.dumps(rows))
    for name in STAGES[1:]:
        run(name, inputs, folder / name)
    return folder


@pytest.fixture(scope="module")
def two(inputs, one, tmp_path_factory) -> tuple[Path, list[Ended], float]:
    """Those of two, how each ended, and when all had."""
    folder = tmp_path_factory.mktemp("two")
    half(one / "pretrain", folder / "stopped")
    with start(PROGRAM, [inputs, folder], folder=folder) as group:
        ended = group.wait(600)
    return folder, ended, time.time()


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"told.{index}").read_text()) for index in range(2)]


def half(run_dir: Path, to: Path) -> None:
    """A run as it was after its first checkpoint."""
    shutil.copytree(run_dir, to)
    shutil.rmtree(to / "checkpoints" / "10")
    (to / "result.json").unlink()


def check_same(found: Path, expected: Path) -> None:
    """Every metric of every step, but for clocks."""
    pairs = list(zip(read_metrics(found), read_metrics(expected), strict=True))
    assert [line["step"] for line, _ in pairs] == list(range(1, 11))
    for line, wanted in pairs:
        assert line.keys() ^ wanted.keys() <= set(CLOCKS)  # a first line has no tokens_per_second
        for name in line.keys() - set(CLOCKS):
            what = f"{name} of step {line['step']}"
            np.testing.assert_allclose(line[name], wanted[name], rtol=1e-5, atol=1e-7, err_msg=what)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_learn_what_one_does(stage, one, two):
    check_same(two[0] / stage, one / stage)
    evaluated = [read_json_object(folder / stage / "result.json") for folder in (two[0], one)]
    names = {"bits_per_byte", "heldout_loss", "accuracy_greedy", "accuracy_sampled"} & evaluated[1].keys()
    assert names and all(evaluated[0][name] == pytest.approx(evaluated[1][name], rel=1e-5) for name in names)


def test_questions_answers_and_rewards_are_those_of_one_process(one, two):
    for name in ("rollouts.jsonl", "samples.jsonl"):
        found, expected = (read_json_lines(folder / "grpo" / name) for folder in (two[0], one))
        assert found == expected and found


def test_no_process_reads_the_rows_of_another(one, two):
    whole = np.reshape(json.loads((one / "rows.json").read_text())[:80], (10, 2, 4))
    for index, process in enumerate(told(two[0])):
        assert process["rows"][:40] == whole[:, index].ravel().tolist()


def test_a_signal_to_one_stops_all_after_the_same_step(inputs, one, two):
    """Two go on with what one saved, and one with what they did: the losses are those of a run that nothing stopped."""
    said = [process["said"] for process in told(two[0])]
    steps = sorted(path.name for path in (two[0] / "stopped" / "checkpoints").iterdir())
    assert steps in (["5", "8"], ["5", "9"])
    assert said[0] == said[1] and f"SIGTERM: stopped after step {steps[1]}, saved in" in said[0]
    run("pretrain", inputs, two[0] / "stopped")
    check_same(two[0] / "stopped", one / "pretrain")


def test_a_death_ends_the_others_and_another_mesh_goes_on(inputs, one, two):
    folder, (first, second), end = two
    assert second.code == -9 and first.code not in (0, -9)
    assert end - told(folder)[0]["time"] < 60
    assert [path.name for path in (folder / "killed" / "checkpoints").iterdir()] == ["5"]
    run("pretrain", inputs, folder / "killed", mesh=MeshConfig(data=8))
    check_same(folder / "killed", one / "pretrain")


def test_one_process_agrees_with_itself():
    assert processes.gather({"a": 1}) == [{"a": 1}]
    assert processes.any_process(True) and not processes.any_process(False)
    assert processes.own_part([1, 2, 3]) == [1, 2, 3]
    assert processes.Agreement().largest(15) == 15
    done = []
    processes.first_host_alone(lambda: done.append("work"))
    assert done == ["work"]
