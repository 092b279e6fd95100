"""The engine's side of the link to the HTTP process."""

from typing import Any

from deepseek_jax.inference.continuous import Event
from deepseek_jax.serve.engine_process import Desk


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
    assert sent == [{"refused": 1, "message": "too many items"}, {"events": [[0, [9], [-1.0], [], "", 0]]}]
    assert desk._numbers == {0: 5} and desk._keys == {5: 0}
