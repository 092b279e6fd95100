"""An answer is the same, and counted the same, however many of its tokens come at a time."""

import asyncio
import dataclasses

import pytest
from serve.fake import SERVED, FakeAsker, fake_app
from starlette.testclient import TestClient

from deepseek_jax.serve.answering import Asked, Piece, answers
from deepseek_jax.serve.config import ServeConfig

STOPS = ((), ("4=",), ("=46, é", "zz"), ("é",), ("é!",))


def pieces(at_once: int, stops: tuple[str, ...]) -> list[Piece]:
    asker = FakeAsker(at_once=at_once)
    asked = Asked([[1]], {"max_tokens": 50, "alternatives": 0}, stops=stops, alternatives=0)

    async def all_of_them() -> list[Piece]:
        return [piece async for piece in answers(asker, asker.tokenizer, asked)]

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("stops", STOPS)
def test_what_comes_at_once_changes_nothing(stops):
    def told(at_once: int) -> tuple:
        found = pieces(at_once, stops)
        tokens = [token for piece in found for token in piece.tokens]
        return "".join(piece.text for piece in found), sum(piece.count for piece in found), tokens

    one = told(1)
    assert one[0] == min(("12+34=46, é".partition(stop)[0] for stop in stops), key=len, default="12+34=46, é")
    assert all(told(at_once) == one for at_once in (2, 3, 8, 50))


def test_more_answers_than_there_will_ever_be_room_for_are_not_told_to_come_again():
    asker = FakeAsker(served=dataclasses.replace(SERVED, slots=1))
    client = TestClient(fake_app(asker, ServeConfig(queue=1)))
    status = lambda n: client.post("/v1/completions", json={"prompt": "a", "n": n}).status_code  # noqa: E731
    assert (status(2), status(3)) == (200, 400)
