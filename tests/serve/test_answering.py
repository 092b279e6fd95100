"""An answer is the same, and counted the same, however many of its tokens come at a time."""

import asyncio
import dataclasses

import pytest
from serve.fake import SERVED, FakeAsker, fake_app
from starlette.testclient import TestClient

from deepseek_jax.serve.answering import Asked, Piece, answers
from deepseek_jax.serve.asking import Event, RefusedError
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


def test_what_a_request_leaves_open_is_as_the_model_says():
    says = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    asker = FakeAsker(served=dataclasses.replace(SERVED, sampling=says))
    client = TestClient(fake_app(asker))
    for body in ({}, {"temperature": 0, "top_k": -1}, {"top_p": 0.5, "min_p": 0.1}):
        assert client.post("/v1/completions", json={"prompt": "a", **body}).status_code == 200
    asked = [{name: sampling.get(name) for name in (*says, "min_p")} for _, sampling, _ in asker.asked]
    assert asked == [{**says, "min_p": None}, {**says, "temperature": 0, "top_k": 0, "min_p": None}] + [
        {**says, "top_p": 0.5, "min_p": 0.1}
    ]


@pytest.mark.parametrize(
    "path, body, field, told",
    [
        ("completions", {"n": -1}, "n", "n=-1: "),
        ("completions", {"temperature": 3}, "temperature", "temperature=3"),
        ("completions", {"prompt": [1] * 4096}, "prompt", "4096 tokens"),
        ("completions", {"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ("completions", {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}})
        + ("structured_outputs", "expected one"),
        ("completions", {"n": 10**4000, "prompt": ["a"] * 16}, "n", "n=1000"),
        ("chat/completions", {"max_completion_tokens": 10**6}, "max_completion_tokens", "1000000"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 9000}]}, "messages", "tokens"),
        ("responses", {"max_output_tokens": 10**6}, "max_output_tokens", "max_output_tokens: 1000000"),
        ("responses", {"input": [{"role": "user", "content": "a"}] * 1025}, "input", "input: 1025 messages"),
        ("responses", {"input": "a" * 9000}, "input", "tokens"),
        ("responses", {"input": [{"type": "reasoning"}]}, "input", "no content"),
    ],
)
def test_what_is_wrong_is_told_by_its_field_and_value(path, body, field, told):
    ask = {"chat/completions": {"messages": [{"role": "user", "content": "a"}]}, "completions": {"prompt": "a"}}
    asked = ask.get(path, {"input": "a"}) | body
    response = TestClient(fake_app()).post(f"/v1/{path}", json=asked)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == field and told in error["message"]


@pytest.mark.parametrize("message", ["logit_bias has the id 300", "json_schema, regex: no", "the prompt has the id 5"])
def test_what_the_engine_refuses_is_told_by_its_field_and_is_no_answer(message):
    asker = FakeAsker()
    client = TestClient(fake_app(asker))
    client.post("/v1/completions", json={"prompt": "a"})
    asker.refuses = message
    bound = {"structured_outputs": {"regex": "a"}}
    error = client.post("/v1/completions", json={"prompt": "a", "n": 2, **bound}).json()["error"]
    fields = {"l": "logit_bias", "j": "structured_outputs", "t": "prompt"}
    assert error == error | {"message": message, "param": fields[message[0]]}
    told = client.get("/metrics").text.split("\n")
    assert 'deepseek_jax_answers_total{finish_reason="refused"} 2.0' in told
    assert 'deepseek_jax_answers_total{finish_reason="cancelled"} 0.0' in told
    assert "deepseek_jax_request_seconds_count 1.0" in told and "deepseek_jax_answers_open 0.0" in told


def test_what_is_refused_in_mid_stream_is_told_by_the_routes_own_names():
    class Refusing(FakeAsker):
        async def submit(self, ids, sampling, draw):
            yield Event([])
            raise RefusedError("nothing can be said")

    body = {"input": "a", "stream": True, "text": {"format": {"type": "json_object"}}}
    told = TestClient(fake_app(Refusing())).post("/v1/responses", json=body).text
    assert '"message":"nothing can be said","param":"text"' in told


def test_a_response_tells_what_it_was_drawn_by():
    client = TestClient(fake_app(FakeAsker(served=dataclasses.replace(SERVED, sampling={"temperature": 0.6}))))
    told = lambda **more: client.post("/v1/responses", json={"input": "a", **more}).json()  # noqa: E731
    assert [(each["temperature"], each["top_p"]) for each in (told(), told(temperature=0, top_p=0.5))] == [
        (0.6, 1.0),
        (0.0, 0.5),
    ]


@pytest.mark.parametrize("body", [b'{"prompt": "\xff"}', b"[" * 20_000])
def test_why_a_body_is_no_json_is_told(body):
    response = TestClient(fake_app()).post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    message = response.json()["error"]["message"]
    assert response.status_code == 400 and message.startswith("the body could not be read: "), message
    assert "Error" in message
