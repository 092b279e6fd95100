"""``chat --url``: a talk with a server of ours that somebody made up answers for."""

import asyncio
import builtins
import json
import os
import signal
import time
from contextlib import ExitStack, aclosing

import pytest
from serve.fake import FakeAsker, fake_app
from serve.live import live

from deepseek_jax.cli.main import main
from deepseek_jax.data.special_tokens import ASSISTANT, BOS, EOS, USER
from deepseek_jax.serve.asking import Served
from deepseek_jax.serve.config import ServeConfig
from deepseek_jax.serve.guard import guarded

KEY = "sk-0123456789"


@pytest.fixture
def talk(monkeypatch, capsys):
    """A chat of these lines -> (what was printed, on standard error)."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ExitStack() as stack:

        def run(asker, lines: list[str], *options: str, status: int = 0, app=None, path: str = "") -> tuple[str, str]:
            port, typed = stack.enter_context(live(app or fake_app(asker))), iter(lines)
            monkeypatch.setattr(builtins, "input", lambda prompt="": next(typed, ""))
            assert main(["chat", "--url", f"http://127.0.0.1:{port}{path}", *options]) == status
            return capsys.readouterr()

        yield run


def prompts(asker: FakeAsker) -> list[str]:
    return [asker.tokenizer.decode(ids, skip_special_tokens=False) for ids, _, _ in asker.asked]


def test_thinking_is_shown_and_told_no_more(talk, tmp_path):
    """In the file that is saved it stands."""
    asker, file = FakeAsker("<think>easy, é</think>\n\nOne."), tmp_path / "talk.jsonl"
    out, _ = talk(asker, ["1", "2", f"/save {file}"], "--system", "Be brief.", path="/v1/")
    head, *lines = out.splitlines()
    assert head.startswith("fake at http://127.0.0.1:") and head.endswith(
        "an empty line ends the talk, /help says more"
    )
    assert lines == ["easy, é", "One."] * 2 + [f"→ {file}"]
    said = f"{BOS}Be brief.{USER}1{ASSISTANT}"
    assert prompts(asker) == [said, f"{said}One.{EOS}{USER}2{ASSISTANT}"]
    first, *rest = json.loads(file.read_text())["messages"]
    assert first == {"role": "system", "content": "Be brief."}
    assert [each["content"] for each in rest] == ["1", "<think>easy, é</think>One.", "2", "<think>easy, é</think>One."]


def test_what_is_drawn_and_by_whom(talk):
    asker = FakeAsker("a")
    talk(asker, ["1"])
    talk(
        asker, ["1", "2"], "--temperature", "0.5", "--top-k", "7", "--max-tokens", "9", "--seed", "3", "--turns=single"
    )
    plain, drawn, other = (sampling for _, sampling, _ in asker.asked)
    assert (plain["temperature"], plain["seed"], plain.get("top_k")) == (0.0, 0, None) and plain["max_tokens"] > 4000
    assert drawn == other and prompts(asker)[2].count(USER) == 1
    assert [drawn[name] for name in ("temperature", "top_k", "max_tokens", "seed")] == [0.5, 7, 9, 3]
    _, error = talk(asker, [], "--model", "other", status=1)
    assert "--model other" in error and error.splitlines()[0].endswith("has fake")


def test_a_key(talk, monkeypatch, tmp_path):
    asker, file = FakeAsker("One."), tmp_path / "keys"
    file.write_text(KEY)
    app = guarded(fake_app(asker), ServeConfig(api_keys_file=str(file)))
    assert "401: " in talk(asker, ["1"], status=1, app=app)[1]
    assert talk(asker, ["1"], "--api-key", KEY, app=app)[0].endswith("One.\n")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert talk(asker, ["1"], app=app)[0].endswith("One.\n")


class Stopped(FakeAsker):
    """Ctrl-C is pressed at the ``at``-th token, after which nothing comes; 0: before the first."""

    at = 0

    async def submit(self, ids, sampling, draw):
        count = 0
        async with aclosing(super().submit(ids, sampling, draw)) as events:
            async for event in events:
                count += len(event.ids)
                if len(self.asked) == 1 and count == self.at:
                    asyncio.get_running_loop().call_later(0.3, os.kill, os.getpid(), signal.SIGINT)
                    if count:
                        yield event
                    try:
                        await asyncio.sleep(60)
                    finally:
                        self.cancelled += 1
                yield event


@pytest.mark.parametrize("at", [0, 2])
def test_ctrl_c_stops_an_answer_that_says_nothing(talk, at):
    """At once, and the server gives it up; the talk goes on behind what was said."""
    asker, began = Stopped("abc"), time.monotonic()
    asker.at = at
    out, _ = talk(asker, ["1", "2"])
    assert time.monotonic() - began < 30 and asker.cancelled and not asker.open
    assert out.splitlines()[1:] == [asker.tokenizer.decode(asker.answer[:at]), "(stopped)", "abc"]
    assert prompts(asker)[1].count(USER) == 1 + bool(at)


def test_what_a_server_refuses_is_said_and_the_talk_goes_on(talk):
    asker = FakeAsker("One.")
    asker.refuses = "not that"
    assert talk(asker, ["1"])[0].endswith("\n400: not that\n")
    short = FakeAsker("One.", served=Served("fake", context=40, vocab_size=300, slots=8))
    out, _ = talk(short, ["12+" * 4, "34+" * 4, "56+" * 40], "--max-tokens", "8")
    assert "the talk is too long for this model; starting anew" in out and out.count("One.") == 2
    assert len(short.asked) == 2 and "400: " in out.splitlines()[-1]


class Ending(FakeAsker):
    """Its engine is lost, in the middle of the answer."""

    async def submit(self, ids, sampling, draw):
        from deepseek_jax.serve.asking import LostError

        async for event in super().submit(ids, sampling, draw):
            yield event
            if event.ids:
                raise LostError("the engine has ended")


def test_who_is_gone_is_said(talk, capsys):
    out, _ = talk(Ending("abc"), ["1"])
    assert out.endswith("a\nthe engine has ended\n")
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9: " in capsys.readouterr().err
    for wrong in ("localhost:8000", "ftp://host"):
        assert main(["chat", "--url", wrong]) == 1
        assert f"--url {wrong}: expected http://HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [b"<html>hello</html>", b"{}", b"[]"])
def test_who_is_no_such_server(talk, answer):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer})

    assert "no server of OpenAI's kind" in talk(None, [], status=1, app=app)[1]
