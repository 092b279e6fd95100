"""Strings that end an answer, wherever its text is made: found across tokens, and the text cut before them."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.data.streaming import StopStrings
from deepseek_jax.inference import together
from deepseek_jax.inference.answers import Answer
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.events import Event
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.serving_config import ServingConfig

SERVING = ServingConfig(slots=3, pages=32, page=4, chunk=16, turns=3)
DRAWN = SamplingParams(max_tokens=24, seed=3)
words = st.text(alphabet="ab+é🙂\ufffd", min_size=1, max_size=5)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(whole(SPEAKER, *weights(SPEAKER), tokenizer()), serving=SERVING)


def cut_by_hand(text: str, stops: list[str]) -> tuple[str, int]:
    """Looked for at each character -> (the text before the first that ends, where it ends: 0 for none)."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], end
    return text, 0


@given(text=st.text(alphabet="ab+é🙂", max_size=40), stops=st.lists(words, max_size=4), data=st.data())
def test_text_ends_before_the_first_string(text, stops, data):
    """In whatever pieces it comes; nothing that is given out is taken back."""
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    expected, end = cut_by_hand(text, stops)
    strings, given_out, found = StopStrings(stops), "", False
    for at, until in itertools.pairwise([0, *borders, len(text)]):
        piece, found = strings.push(text[at:until])
        given_out += piece
        assert expected.startswith(given_out)
        if found:
            break
    given_out += strings.finish()
    assert given_out == expected and found == bool(end)


def test_what_is_held_back_is_given_out_as_soon_as_it_is_no_string():
    strings = StopStrings(["STOP", "OPEN"])
    pieces = [strings.push(text) for text in ("a S", "T", "A ST", "O", "PEX")]
    assert pieces == [("a ", False), ("", False), ("STA ", False), ("", False), ("", True)]
    strings = StopStrings(["STOP"])
    assert [strings.push("x ST"), strings.finish()] == [("x ", False), "ST"]


@given(data=st.data())
def test_an_answers_text_is_cut_wherever_its_events_are(data):
    """Ids that are no UTF-8 together among them; tokens go on to the one that completes the string."""
    ids = data.draw(st.lists(st.integers(3, 299), min_size=1, max_size=15))
    decode = lambda ids: tokenizer().decode(ids, skip_special_tokens=False)  # noqa: E731
    at = data.draw(st.integers(0, max(len(decode(ids)) - 1, 0)))
    stops = (decode(ids)[at : at + data.draw(st.integers(1, 4))], "never said") if decode(ids) else ("never said",)
    expected, end = cut_by_hand(decode(ids), list(stops))
    answer, rest, text = Answer(tokenizer(), stops), ids, ""
    while not answer.finish_reason:
        count = data.draw(st.integers(1, len(rest)))
        some, rest = rest[:count], rest[count:]
        text += answer.add(Event(0, some, [0.0] * count, "" if rest else "length")).text
    found = answer.completion()
    assert text == found.text == expected and found.finish_reason == ("stop" if end else "length")
    assert found.token_ids == ids[: len(found.token_ids)] and len(found.logprobs) == len(found.token_ids)
    assert decode(found.token_ids).startswith(decode(ids)[:end])


def strings_of(engine: Engine, sampling: SamplingParams) -> list[str]:
    """Some that stand in the answer, over the borders of its tokens."""
    ((whole_answer,),) = engine.answer(["def"], sampling)
    text = whole_answer.text
    return [text[4:7], text[9:10], text[6:14]]


@pytest.mark.parametrize("at", range(3))
def test_an_answer_ends_wherever_it_is_made(engine, at, monkeypatch):
    stop = strings_of(engine, DRAWN)[at]
    ((plain,),) = engine.answer(["def"], DRAWN)
    cut = dataclasses.replace(DRAWN, stop=("never said", stop))
    ((answer,),) = engine.answer(["def"], cut)
    assert answer.finish_reason == "stop" and answer.text == plain.text[: plain.text.index(stop)]
    count = len(answer.token_ids)
    assert answer.token_ids == plain.token_ids[:count] and answer.logprobs == plain.logprobs[:count]
    decode = lambda ids: tokenizer().decode(ids, skip_special_tokens=False)  # noqa: E731
    assert stop in decode(answer.token_ids)  # and it is completed by the last token; half a character by the next one
    assert stop not in decode(answer.token_ids[:-1]) or stop.endswith("\ufffd")
    assert engine.generate(["def"], cut)[0].text == answer.text
    assert engine.generate(["def"], cut)[0].token_ids == answer.token_ids
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(together, "STREAM_SECONDS", seconds)
        pieces = [*engine.stream("def", cut)]
        assert "".join(piece.text for piece in pieces) == answer.text
        assert sum((piece.token_ids for piece in pieces), []) == answer.token_ids
        assert [piece.finish_reason for piece in pieces] == [""] * (len(pieces) - 1) + ["stop"]


def test_who_is_ended_by_a_string_frees_what_it_has(engine):
    """Also while others go on, who are answered as ever."""
    stop = strings_of(engine, DRAWN)[0]
    params = [dataclasses.replace(DRAWN, stop=(stop,)), DRAWN, dataclasses.replace(DRAWN, stop=(stop,), max_tokens=2)]
    answers = engine.answer(["def"] * 3, params)
    assert [len(answer.token_ids) for (answer,) in answers][1:] == [24, 2]
    assert [answer.finish_reason for (answer,) in answers] == ["stop", "length", "length"]
    assert not engine.busy and engine.metrics()["pages_held"] == 0


@pytest.mark.parametrize("stop", [("",), ("a",) * 17, ("a" * 257,), "a"])
def test_strings_that_cannot_be_are_refused(stop):
    with pytest.raises(ValueError, match="stop"):
        SamplingParams(stop=stop)


def test_where_no_text_is_made_strings_are_refused(engine):
    for ask in (lambda how: engine.submit([5], how), lambda how: engine.generate_ids([[5]], how)):
        with pytest.raises(ValueError, match=r"stop=\('a',\): ends text; Engine.answer, generate and stream make it"):
            ask(SamplingParams(max_tokens=8, stop=("a",)))
