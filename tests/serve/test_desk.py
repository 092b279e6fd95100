"""The engine's side of the link to the HTTP process."""

from typing import Any

import jax
import pytest

from deepseek_jax.inference.continuous import Event
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.serve.config import ServeConfig
from deepseek_jax.serve.engine_process import Desk, HttpProcess


class Failing:
    """Its second request's grammar cannot be gone on with."""

    def submit(self, ids: list[int], sampling: Any, *, draw: int) -> int:
        return ids[0]

    def step(self) -> list[Event]:
        return [Event(5, [9], [-1.0], ""), Event(7, [], [], "error", error="too many items")]


def test_an_answer_whose_grammar_fails_is_refused_and_the_others_go_on():
    sent = list[Any]()
    desk = Desk(Failing(), sent.append)  # pyright: ignore[reportArgumentType]
    for key, first in ((0, 5), (1, 7)):
        desk.take({"op": "submit", "key": key, "ids": [first], "sampling": {}, "draw": 0})
    sent.clear()
    desk.step()
    assert sent == [{"events": [[0, [9], [-1.0], [], "", 0]]}, {"refused": 1, "message": "too many items"}]
    assert desk._numbers == {0: 5} and desk._keys == {5: 0}


class Ailing(Failing):
    def step(self) -> list[Event]:
        return [Event(5, [], [], "error", error="NaN", ours=True)]


def test_an_answer_that_fails_by_no_fault_of_the_clients_is_lost():
    sent = list[Any]()
    desk = Desk(Ailing(), sent.append)  # pyright: ignore[reportArgumentType]
    desk.take({"op": "submit", "key": 3, "ids": [5], "sampling": {}, "draw": 0})
    sent.clear()
    desk.step()
    assert sent == [{"lost": 3, "message": "NaN"}] and not desk._keys


class Broken(Failing):
    def step(self) -> list[Event]:
        raise OSError("out of order")


@pytest.mark.parametrize("processes, steps", [(1, 3), (2, 1)])
def test_a_step_that_fails_is_tried_again_but_where_others_have_taken_it(processes, steps, monkeypatch, capfd):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    desk = Desk(Broken(), lambda frame: None)  # pyright: ignore[reportArgumentType]
    for _ in range(steps - 1):
        desk.step()
    with pytest.raises(RuntimeError, match=f"{steps} steps one after another have failed, the last: out of order"):
        desk.step()
    assert "a step has failed" in capfd.readouterr().err


class Strict(Failing):
    def held_to(self, sampling: SamplingParams) -> None:
        raise ValueError(f"no grammar: {sampling.json_schema}")


def test_a_grammar_of_a_later_part_is_refused_before_the_first():
    sent = list[Any]()
    desk = Desk(Strict(), sent.append)  # pyright: ignore[reportArgumentType]
    frame = {"op": "submit", "key": 0, "ids": [5], "draw": 0}
    desk.take(frame | {"sampling": {"behind": {"json_schema": "{"}}})
    desk.take(frame | {"sampling": {}})
    assert sent == [{"refused": 0, "message": "no grammar: {"}, {"events": [[0, []]]}]


def test_keys_that_cannot_be_read_are_told_before_anything_is_loaded(tmp_path):
    with pytest.raises(FileNotFoundError):
        HttpProcess(ServeConfig(port=0, api_keys_file=str(tmp_path / "none")))
