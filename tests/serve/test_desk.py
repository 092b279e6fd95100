"""The engine's side of the link to the HTTP process."""

import fcntl
import importlib.util
import resource
import socket
from typing import Any

import jax
import pytest

from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.events import Event
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.serve.asking import Served
from deepseek_jax.serve.config import Limits, ServeConfig
from deepseek_jax.serve.engine_process import Desk, HttpProcess, Stopping, run
from deepseek_jax.serve.link import Link


class Failing:
    """Its second request's grammar cannot be gone on with."""

    def submit(self, ids: list[int], sampling: Any, *, draw: int, begun: int) -> int:
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
    assert sent == [{"events": [[0, [9], [-1.0], [], "", 0, None]]}, {"refused": 1, "message": "too many items"}]
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


class Late(Failing):
    """What a step has sent fails while the next one looks at it."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> list[Event]:
        self.steps += 1
        if self.steps % 2 == 0:
            raise OSError("out of order")
        return [Event(7, [], [], "cancelled")]


def test_steps_that_bring_nothing_in_between_fail_one_after_another():
    desk = Desk(Late(), lambda frame: None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match="3 steps one after another have failed"):
        for _ in range(6):
            desk.step()


class Working(Failing):
    """Three steps of a token each, the last of which ends the answer; the second fails at first."""

    def __init__(self) -> None:
        self.made, self.failed = 0, False

    @property
    def busy(self) -> bool:
        return self.made < 3

    def step(self) -> list[Event]:
        if self.made == 1 and not self.failed:
            self.failed = True
            raise OSError("out of order")
        self.made += 1
        return [Event(5, [self.made], [-1.0], "" if self.busy else "length")]


def test_what_steps_bring_is_told_once_though_one_fails(capfd):
    sent, engine = list[Any](), Working()
    desk = Desk(engine, sent.append)  # pyright: ignore[reportArgumentType]
    desk.take({"op": "submit", "key": 0, "ids": [5], "sampling": {}, "draw": 0})
    sent.clear()
    while engine.busy:
        desk.step()
    assert [frame["events"][0][1] for frame in sent] == [[1], [2], [3]] and not desk._keys
    assert "out of order" in capfd.readouterr().err


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


class Idle(Engine):
    busy = False  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __init__(self) -> None:
        pass


class Child(HttpProcess):
    def __init__(self, link: Link):
        self.link = link

    def end(self) -> int:
        return 0


def test_a_process_that_has_a_thousand_files_open_hears_the_other(request):
    """``select`` knows descriptors below 1024 alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))
    low, other = socket.socketpair()
    link, theirs = Link(socket.socket(fileno=fcntl.fcntl(low, fcntl.F_DUPFD, 1500))), Link(other)
    low.close()
    heard, stopping = list[Any](), Stopping()
    theirs.send({"op": "ready"})

    def ready() -> None:
        heard.extend(theirs.receive())
        stopping.ask()
        theirs.close()

    run(Idle(), Child(link), Served("tiny", 8, 8, 1), stopping, ready)
    assert link.fileno() >= 1500 and [*heard[0]] == ["ready"] and stopping.count == 1
    link.close()
    stopping.close()


def test_a_limit_beyond_what_the_engine_takes_is_refused():
    with pytest.raises(ValueError, match="schema_bytes=65537: expected at most 65536"):
        Limits(schema_bytes=65_537)


def test_what_is_not_installed_is_told_before_anything_is_loaded(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    with pytest.raises(ValueError, match=r"not installed: uvicorn: pip install 'deepseek-jax\[serve\]'"):
        HttpProcess(ServeConfig(port=0))


def test_a_child_that_has_ended_is_told_of():
    with HttpProcess(ServeConfig(port=0)) as http:
        http.start("nowhere", "", 300)
        http.check()
        http.kill()
        with pytest.raises(RuntimeError, match="the HTTP process has ended, with status -9"):
            http.check()
