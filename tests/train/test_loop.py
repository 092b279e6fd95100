"""The loop goes on after any end as if there had been none, and stops where going on would do harm."""

import dataclasses
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from train.toy import META, ToyBatches, toy_step, train

from deepseek_jax.checkpoint import CheckpointStore
from deepseek_jax.train import loop as loop_module
from deepseek_jax.train.log import NonFiniteError
from deepseek_jax.train.loop import CHECKPOINTS, LoopConfig
from deepseek_jax.train.metrics import read_metrics
from deepseek_jax.train.preemption import Preempted
from deepseek_jax.train.progress import Progress
from deepseek_jax.train.reference import Reference

CLOCKS = ("time", "seconds", "tokens_per_second", "peak_bytes_process")  # all that may differ between two runs


def numbers(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_metrics(run_dir)]


def saved_steps(run_dir: Path) -> list[int]:
    return CheckpointStore(run_dir / CHECKPOINTS, keep=1).steps()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing disturbs."""
    run_dir = tmp_path_factory.mktemp("whole")
    train(run_dir, steps=12)
    return run_dir


def test_a_run_writes_all_it_promises(whole):
    lines = read_metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line["finite"] == 1 and line["position"] == line["step"] for line in lines)
    assert len(lines[0]["load"]) == 2
    assert "tokens_per_second" not in lines[0]  # the first step only compiles
    assert all(line["tokens_per_second"] > 0 for line in lines[1:])
    config = json.loads((whole / "config.json").read_text())
    assert config["loop"]["steps"] == 12 and config["model"] == META["model"]
    assert saved_steps(whole) == [8, 12]


def test_the_last_line_has_the_time_of_its_batch_too(tmp_path):
    """A step that waits for its end, as reinforcement learning's does: 100 tokens take the batch's 20 ms at least."""
    train(tmp_path, steps=4, batches=ToyBatches(pause=0.02), step_fn=lambda *of: jax.block_until_ready(toy_step(*of)))
    assert all(line["tokens_per_second"] < 100 / 0.02 for line in read_metrics(tmp_path)[1:])


def test_a_finished_run_is_left_as_it_is(whole):
    before = (whole / "metrics.jsonl").read_bytes()
    state = train(whole, steps=12, step_fn=lambda state, batch: pytest.fail("a step was taken"))
    assert int(state.step) == 12 and (whole / "metrics.jsonl").read_bytes() == before


def test_going_on_is_the_same_as_never_stopping(whole, tmp_path):
    train(tmp_path, steps=5)
    state = train(tmp_path, steps=12)
    assert int(state.step) == 12
    assert numbers(tmp_path) == numbers(whole)


def test_steps_after_the_checkpoint_are_done_again_and_appear_once(whole, tmp_path):
    def fail():
        raise RuntimeError("a data error")

    with pytest.raises(RuntimeError, match="a data error"):
        train(tmp_path, batches=ToyBatches(hooks={8: fail}))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert saved_steps(tmp_path) == [4]
    train(tmp_path)
    assert numbers(tmp_path) == numbers(whole)


def test_progress_follows_the_run(tmp_path):
    out = io.StringIO()
    shown = Progress("toy", 12, every_seconds=0.0, console=Console(file=out, width=200))
    train(tmp_path, callbacks={"progress": shown})
    assert re.search(r"toy 12/12 · 0:00:00 left · loss \S+ · tokens_per_second", out.getvalue())
    out.truncate(0)
    shown = Progress("toy", 12, every_seconds=0.0, console=Console(file=out, width=200))
    train(tmp_path / "rare", log_every=100, callbacks={"progress": shown})  # fewer lines than are shown
    assert re.search(r"toy 7/12 · \S+ left · loss \d", out.getvalue())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(whole, tmp_path, number, capfd):
    before = signal.getsignal(number)
    with pytest.raises(Preempted, match=f"{number.name}: stopped after step 6, saved in {tmp_path}") as caught:
        train(tmp_path, batches=ToyBatches(hooks={6: lambda: os.kill(os.getpid(), number)}))
    assert (caught.value.step, caught.value.signal) == (6, number)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert "finishing this step and saving" in capfd.readouterr().err
    assert signal.getsignal(number) is before
    assert saved_steps(tmp_path) == [4, 6]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    train(tmp_path)
    assert numbers(tmp_path) == numbers(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_stops_at_once_in_one_line(tmp_path, number, capfd):
    with pytest.raises(KeyboardInterrupt, match=f"{number.name}: stopped before a step was taken; .* again") as caught:
        train(tmp_path, batches=ToyBatches(hooks={1: lambda: os.kill(os.getpid(), number)}))
    assert not isinstance(caught.value, Preempted) and capfd.readouterr().err == ""
    assert saved_steps(tmp_path) == []


COMPILING = """
import ctypes, sys, time
from deepseek_jax.train.preemption import stop_signals

c = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(64)  # zeros: unlocked
with stop_signals(" early"):
    c.pthread_mutex_lock(mutex)
    print("compiling", flush=True)
    c.pthread_mutex_lock(mutex)  # as the compiler does, it lets no signal in; unlike it, it never returns
"""


def test_a_signal_that_meets_the_compiler_is_answered_and_a_second_one_does_not_wait():
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "kernels")))}
    command = [sys.executable, "-c", COMPILING]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "compiling\n"
        time.sleep(0.5)  # until it waits
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None and process.stderr.readline() == "\n"
        assert process.stderr.readline() == "SIGINT: stopping as soon as the compiler returns; again to stop at once\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130


def test_a_signal_while_the_last_save_is_written_is_not_lost(tmp_path, monkeypatch):
    wait = CheckpointStore.close

    def late(store):
        os.kill(os.getpid(), signal.SIGTERM)
        wait(store)

    monkeypatch.setattr(CheckpointStore, "close", late)
    with pytest.raises(Preempted, match="SIGTERM: stopped after step 12"):
        train(tmp_path)
    assert saved_steps(tmp_path) == [8, 12]


def test_totals_go_on_where_the_run_does(tmp_path):
    train(tmp_path, steps=5, log_every=3, checkpoint_every=2)
    train(tmp_path, steps=8, log_every=3, checkpoint_every=2)
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["tokens_seen"]) for line in lines] == [(s, 100 * s) for s in (3, 5, 6, 8)]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and all(line["peak_bytes_process"] > 1e7 for line in lines)


def test_what_was_changed_on_the_way_is_kept(tmp_path):
    for steps, every in ((4, 1), (4, 1), (8, 1), (8, 2), (8, 2)):
        train(tmp_path, steps=steps, log_every=every)
    history = json.loads((tmp_path / "config.json").read_text())["history"]
    assert [(entry["step"], entry["changed"]) for entry in history] == [
        (4, {"steps": [4, 8]}),
        (8, {"log_every": [1, 2]}),
    ]
    assert all(re.fullmatch(r"2\d{3}-\d\d-\d\dT[\d:]+[+-]\d{4}", entry["time"]) for entry in history)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not JSON"):
        train(tmp_path, steps=8)


def test_a_second_signal_does_not_wait(tmp_path, capfd):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="second SIGINT") as caught:
        train(tmp_path, batches=ToyBatches(hooks={6: twice}))
    assert not isinstance(caught.value, Preempted)
    assert saved_steps(tmp_path) == [4]


def start_toy(run_dir: Path, steps: int) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "kernels", root / "tests")))}
    command = [sys.executable, "-W", "error", "-m", "train.toy", str(run_dir), str(steps), "0.005"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_kill_9_at_random_steps_changes_no_number(tmp_path):
    """Killed twice, saves in flight included (there is one every 4 steps of 5 ms), then left to finish."""
    train(tmp_path / "whole", steps=60)
    rng = random.Random(5)
    for kill_after in (rng.randrange(1, 25), rng.randrange(25, 50)):
        process = start_toy(tmp_path / "killed", 60)
        path = tmp_path / "killed" / "metrics.jsonl"
        while not (path.exists() and any(line["step"] >= kill_after for line in read_metrics(path))):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.communicate()
    process = start_toy(tmp_path / "killed", 60)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and said == ""  # no warning at exit either
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert saved_steps(tmp_path / "killed") == [56, 60]


def test_bad_steps_in_a_row_end_the_run_before_anything_is_saved(tmp_path):
    with pytest.raises(NonFiniteError, match=r"in 3 steps in a row, up to step 9; .* is step 4 in .*checkpoints"):
        train(
            tmp_path,
            batches=ToyBatches(bad=(2, 3, 5, 7, 8, 9)),
            max_bad_steps=3,
            checkpoint_every=4,
            log_every=1,
        )
    assert saved_steps(tmp_path) == [4]  # none of step 8, in the middle
    with pytest.raises(NonFiniteError, match="there is no checkpoint yet"):
        train(tmp_path / "first", batches=ToyBatches(bad=(2, 3, 4)), max_bad_steps=3, log_every=100)
    assert saved_steps(tmp_path / "first") == []


def test_single_bad_steps_are_survived(tmp_path):
    train(tmp_path, steps=8, batches=ToyBatches(bad=(2, 4, 5, 8)), max_bad_steps=3)
    assert [line["finite"] for line in read_metrics(tmp_path)] == [1, 0, 1, 0, 0, 1, 1, 0]
    assert [line["bad_steps"] for line in read_metrics(tmp_path)] == [0, 1, 1, 2, 3, 3, 3, 4]


def test_bad_steps_are_counted_between_lines_and_across_a_resume(tmp_path):
    bad = ToyBatches(bad=(2, 5, 6, 11))
    options: dict[str, Any] = {"checkpoint_every": 6, "log_every": 4, "max_bad_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        bad.hooks[9] = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
        train(tmp_path, steps=12, batches=bad, **options)
    assert saved_steps(tmp_path) == []  # step 6 was in a streak
    train(tmp_path, steps=12, batches=ToyBatches(bad=(2, 5, 6, 11)), **options)
    assert [(line["step"], line["bad_steps"]) for line in read_metrics(tmp_path)] == [(4, 1), (8, 3), (12, 4)]


def test_a_run_that_ended_by_its_evaluation_stays_ended(tmp_path):
    def run(enough, **options):
        callbacks = {"evaluate": lambda state: {"eval/score": int(state.step)}} | {
            "stop_when": lambda found: found["eval/score"] >= enough
        }
        return int(train(tmp_path, steps=20, eval_every=4, log_every=3, callbacks=callbacks, **options).step)

    assert run(enough=7) == 8 and saved_steps(tmp_path)[-1] == 8
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert run(enough=7, step_fn=lambda state, batch: pytest.fail("a step was taken")) == 8
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert run(enough=15) == 16  # more is asked now
    assert run(enough=100) == 20


def test_evaluation_joins_the_line_of_its_step_and_picks_the_best_checkpoint(tmp_path):
    scores = {3: 0.5, 6: 0.9, 9: 0.2, 10: 0.3}
    state = train(
        tmp_path,
        steps=10,
        eval_every=3,
        checkpoint_every=100,
        keep=1,
        log_every=5,
        best_metric="eval/score",
        callbacks={"evaluate": lambda state: {"eval/score": scores[int(state.step)]}},
    )
    assert int(state.step) == 10
    lines = read_metrics(tmp_path)
    assert {line["step"]: line["eval/score"] for line in lines if "eval/score" in line} == scores
    assert [line["step"] for line in lines] == [3, 5, 6, 9, 10] and all("loss" in line for line in lines)
    assert saved_steps(tmp_path) == [6, 10]
    with pytest.raises(ValueError, match=r"best_metric 'eval/score' is none of \['eval/other'\]"):
        train(
            tmp_path / "other",
            eval_every=3,
            best_metric="eval/score",
            callbacks={"evaluate": lambda state: {"eval/other": 1.0}},
        )


def test_the_device_is_asked_only_when_a_line_is_due(tmp_path, monkeypatch):
    """Were a metric fetched in between, the host would wait for every step."""
    asked = []
    fetch = jax.device_get
    monkeypatch.setattr(loop_module.jax, "device_get", lambda x: asked.append(len(running)) or fetch(x))
    running = []

    def step(state, batch):
        running.append(None)
        return toy_step(state, batch)

    train(tmp_path, steps=12, log_every=5, checkpoint_every=12, step_fn=step)
    # The lines of steps 5 and 10 are fetched while 6 and 11 run; 12, the last, when it is done.
    assert set(asked) == {6, 11, 12}


def test_another_model_is_refused(whole, monkeypatch):
    monkeypatch.setitem(META, "model", {"width": 9})
    with pytest.raises(ValueError, match="another model: width is 8 there and 9 here"):
        train(whole, steps=20)


def test_a_reference_that_moves_is_saved_and_a_fixed_one_is_not(tmp_path):
    """The parameters of step 3 stand in the checkpoint of step 4, and are what a run goes on with."""

    def follower(run_dir, steps, every=3):
        reference = Reference({"w": np.zeros(8, np.float32)}, None, path="before", every=every)

        def step(state, batch):
            state, metrics = toy_step(state, batch)
            if every and int(state.step) % every == 0:
                reference.arrays = jax.tree.map(jax.numpy.copy, {"params": state.params, "router_bias": None})
            return state, metrics | {"held": reference.params["w"]}

        train(run_dir, steps=steps, step_fn=step, reference=reference)
        return [line["held"] for line in read_metrics(run_dir)]

    whole = follower(tmp_path / "whole", 8)
    follower(tmp_path / "stopped", 4)
    assert (tmp_path / "stopped" / CHECKPOINTS / "4" / "reference").is_dir()
    assert follower(tmp_path / "stopped", 8) == whole
    assert whole[3] == whole[4] != whole[5] and not any(whole[1])
    follower(tmp_path / "fixed", 4, every=0)
    assert not (tmp_path / "fixed" / CHECKPOINTS / "4" / "reference").exists()


def test_on_log_sees_every_line_and_may_end_the_run(tmp_path):
    def no_signal(step, line):
        if line["step"] == 7:
            raise StopIteration(f"no signal at {step}")

    with pytest.raises(StopIteration, match="no signal at 7"):
        train(tmp_path, callbacks={"on_log": no_signal})
    assert saved_steps(tmp_path) == [4]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps=0: must be at least 1"),
        ("max_bad_steps", 0, "max_bad_steps=0: must be at least 1"),
        ("eval_every", -1, "eval_every=-1: must not be negative"),
        ("best_metric", "eval/score", "needs evaluations"),
        ("steps", 10.5, r"LoopConfig.steps=10.5: expected int, got float"),
        ("tensorboard", "no", r"LoopConfig.tensorboard='no': expected bool, got str"),
    ],
)
def test_impossible_configurations_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LoopConfig(steps=5), **{field: value})


def test_calls_that_do_not_fit_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give both or neither"):
        train(tmp_path, eval_every=2)
    with pytest.raises(ValueError, match=r"must report 'finite'.*\['loss'\]"):
        train(tmp_path, step_fn=lambda state, batch: (state, {"loss": np.float32(1)}))
