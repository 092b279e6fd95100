"""Metrics on their way to a function of the user's and to Weights & Biases, which is a stub here."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from deepseek_jax.workflows import log_to
from deepseek_jax.workflows.log_to import check_logs, opened_logs

FUNCTION = """
import json

def log(step, line):
    with open({path!r}, "a") as file:
        file.write(json.dumps([step, line["loss"]]) + "\\n")
    if step == 3:
        raise KeyError("no such metric")

def three(a, b, c):
    pass
"""


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(FUNCTION.format(path=str(tmp_path / "out")))
    return str(tmp_path / "mine.py")


@pytest.fixture
def wandb(monkeypatch) -> dict[str, Any]:
    """What the stub was told."""
    told: dict[str, Any] = {"init": [], "log": [], "finish": []}

    class Run:
        def log(self, line, step):
            told["log"].append((step, line))

        def finish(self, exit_code):
            told["finish"].append(exit_code)

    def init(**options):
        told["init"].append(options)
        return Run()

    module = types.ModuleType("wandb")
    vars(module).update(init=init, __spec__=types.SimpleNamespace(name="wandb"))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_a_function_gets_each_line_and_what_it_raises_is_said_once(own, tmp_path, caplog):
    with opened_logs([f"{own}:log"], tmp_path, {}) as log:
        assert log is not None
        for step in (1, 3, 3, 4):
            log(step, {"loss": step / 2})
    assert (tmp_path / "out").read_text() == "[1, 0.5]\n[3, 1.5]\n[3, 1.5]\n[4, 2.0]\n"
    assert len(caplog.messages) == 1
    assert "mine.py:log, step 3: KeyError: 'no such metric' (mine.py:8); the run goes on" in caplog.messages[0]


def test_what_is_no_log_is_refused_before_any_work(own, monkeypatch):
    for name, message in (
        ("tensorboard", "log_to='tensorboard': expected wandb, or file.py:function"),
        ("none.py:log", "none.py:log: there is no file none.py"),
        (f"{own}:other", "no function other; it has log, three"),
        (f"{own}:three", "is called with 2 arguments"),
    ):
        with pytest.raises(ValueError, match=message):
            check_logs([name])
    monkeypatch.setattr(log_to.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb is not installed: pip install 'deepseek-jax\[wandb\]'"):
        check_logs(["wandb"])


def test_wandb_gets_settings_and_scalars_and_a_run_that_goes_on_is_the_same_there(wandb, own, tmp_path):
    check_logs(["wandb"])
    run = tmp_path / "lr-3e-4"
    run.mkdir()
    for step in (1, 2):
        with opened_logs(["wandb", f"{own}:log"], run, {"recipe": {"seed": 3}}) as log:
            assert log is not None
            log(step, {"loss": 1.5, "load": [[0.5, 0.5]], "grad_norm": None})
    first, second = wandb["init"]
    assert first == second and first["name"] == "lr-3e-4" and first["config"] == {"recipe": {"seed": 3}}
    assert first["resume"] == "allow" and len(first["id"]) == 12 and Path(first["dir"]) == run
    assert wandb["log"] == [(1, {"loss": 1.5}), (2, {"loss": 1.5})] and wandb["finish"] == [0, 0]


def test_wandb_is_told_of_a_failure_and_its_own_is_one_line(wandb, tmp_path, monkeypatch):
    with pytest.raises(ArithmeticError), opened_logs(["wandb"], tmp_path, {}):
        raise ArithmeticError("not finite")
    assert wandb["finish"] == [1]

    def no_key(**_):
        raise Exception("api_key not configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", no_key)
    with (
        pytest.raises(RuntimeError, match="log_to wandb: api_key not configured .WANDB_MODE=offline"),
        opened_logs(["wandb"], tmp_path, {}),
    ):
        pass


def test_without_any_there_is_no_function(tmp_path):
    with opened_logs([], tmp_path, {}) as log:
        assert log is None
