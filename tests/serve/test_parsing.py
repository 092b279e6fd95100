"""Answers told apart while they come: by hand-written answers of each format, and wherever they are cut."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data.chat import split_thinking
from deepseek_jax.data.special_tokens import END_THINK, THINK
from deepseek_jax.serve.parsing import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR, Parser, delta, message

ARGUMENTS = '{"city": "Pa```ris", "days": 2}'
V3 = f"{CALL_BEGIN}function{SEPARATOR}weather\n```json\n{ARGUMENTS}\n```{CALL_END}"
V31 = f"{CALL_BEGIN}weather{SEPARATOR}{ARGUMENTS}{CALL_END}"


def parsed(text: str, cuts: list[int] | None = None, **options) -> list[tuple[str, int, str]]:
    """(kind, call, text), with what belongs together joined."""
    parser = Parser(**options)
    edges = [0, *sorted(cuts or []), len(text)]
    pieces = [piece for a, b in itertools.pairwise(edges) for piece in parser.push(text[a:b])]
    pieces += parser.finish()
    assert all(piece.text for piece in pieces)
    groups = itertools.groupby(pieces, key=lambda piece: (piece.kind, piece.call, piece.kind == "call" and id(piece)))
    return [(kind, call, "".join(piece.text for piece in group)) for (kind, call, _), group in groups]


@pytest.mark.parametrize(
    "text, opened, expected",
    [
        ("2", False, [("content", "2")]),
        (" 2 \n", False, [("content", " 2 \n")]),
        ("<think>\n1 + 1\n</think>\n\n2", False, [("thinking", "1 + 1"), ("content", "2")]),
        ("\n<think>a", False, [("thinking", "a")]),
        ("1 + 1\n</think>\n\n2\n", True, [("thinking", "1 + 1"), ("content", "2\n")]),
        ("\n<think>\n1 + 1</think>2", True, [("thinking", "1 + 1"), ("content", "2")]),
        ("never closed </thin", True, [("thinking", "never closed </thin")]),
        ("</think>2", True, [("content", "2")]),
        ("<think>\n\n</think>\n\n", False, []),
        ("a <think>b</think>", False, [("content", "a <think>b</think>")]),
        ("<thin", False, [("content", "<thin")]),
        ("", False, []),
    ],
)
def test_thinking_and_answer(text, opened, expected):
    assert [(kind, part) for kind, _, part in parsed(text, opened=opened, tools=True)] == expected


@pytest.mark.parametrize("text", ["<think>a\n b</think>\n c", "plain", "<think>cut", "<think></think>x"])
def test_thinking_is_what_split_thinking_finds(text):
    said = {kind: part for kind, _, part in parsed(text)}
    thinking, answer = split_thinking(text)
    assert (said.get("thinking", ""), said.get("content", "")) == (thinking or "", answer)


@pytest.mark.parametrize("call", [V3, V31], ids=["v3", "v3.1"])
@pytest.mark.parametrize("between", ["", "\n"])
def test_calls_behind_thinking(call, between):
    text = f"<think>hm</think>Let me look.{CALLS_BEGIN}{call}{between}{call}{CALLS_END}"
    calls = [(kind, n, part) for n in (0, 1) for kind, part in (("call", "weather"), ("arguments", ARGUMENTS))]
    expected = [("thinking", 0, "hm"), ("content", 0, "Let me look."), *calls]
    assert parsed(text, tools=True) == expected
    assert parsed(text, [*range(len(text))], tools=True) == expected


def test_without_tools_calls_are_content():
    text = f"{CALLS_BEGIN}{V3}{CALLS_END}"
    assert parsed(text) == [("content", 0, text)]


@pytest.mark.parametrize(
    "text",
    [
        f"{CALLS_BEGIN}what?",
        f"{CALLS_BEGIN}{CALLS_END}",
        f"{CALLS_BEGIN} {CALL_BEGIN}function{SEPARATOR}weather{CALL_END}{CALLS_END}",
        f"{CALLS_BEGIN}{CALL_BEGIN}we ather{SEPARATOR}{{}}{CALL_END}{CALLS_END}",
        f"{CALLS_BEGIN}{CALL_BEGIN}weather{SEPARATOR}Paris, please{CALL_END}",
        f"{CALLS_BEGIN}{CALL_BEGIN}{'w' * 65}{SEPARATOR}{{}}{CALL_END}" + "and so on, " * 30,
        f"{CALLS_BEGIN}{CALL_BEGIN}weat",
        CALL_BEGIN + "weather",
    ],
)
def test_what_opens_no_call_is_content(text):
    assert parsed(text, tools=True) == parsed(text, [*range(len(text))], tools=True) == [("content", 0, text)]


def test_calls_that_end_otherwise():
    head = f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}f\n```json\n"
    for end in ("", "\n```", f"\n```{CALLS_END}", f"{CALL_END}", f"\n``` \n{CALL_END}\n"):
        assert parsed(head + '{"a": 1}' + end, tools=True) == [("call", 0, "f"), ("arguments", 0, '{"a": 1}')]
    assert parsed(head + '{"a": "`', tools=True)[1] == ("arguments", 0, '{"a": "`')  # cut
    assert parsed(head + f"\n```{CALL_END}", tools=True)[1] == ("arguments", 0, "{}")
    assert parsed(f"{CALLS_BEGIN}{V31}{CALLS_END}\nDone.", tools=True)[2:] == [("content", 0, "Done.")]
    assert parsed(f"{CALLS_BEGIN}{V31} and {V31}", tools=True)[2:] == [("content", 0, f"and {V31}")]


MARKS = (THINK, END_THINK, CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)
WORDS = ("function", "weather", "```", "json", V3, V31, ARGUMENTS, "\n", " ", "{", "`", "<")
TEXTS = st.lists(st.one_of(st.sampled_from([*MARKS, *WORDS]), st.text()))


@given(TEXTS.map("".join), st.data(), st.booleans(), st.booleans())
def test_it_is_the_same_wherever_it_is_cut(text, data, opened, tools):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    whole = parsed(text, opened=opened, tools=tools)
    assert parsed(text, cuts, opened=opened, tools=tools) == whole
    assert parsed(text, [*range(len(text))], opened=opened, tools=tools) == whole


def test_arguments_come_while_they_are_written():
    parser = Parser(tools=True)
    head, rest = V3.split("Pa")
    assert [piece.text for piece in parser.push(CALLS_BEGIN + head)] == ["weather", '{"city": "']
    assert [piece.text for piece in parser.push("Pa" + rest[:5])] == ["Pa```ri"]
    assert parser.calls == 1 and not parser.thinking


def test_whether_it_thinks_is_known_at_once():
    assert Parser(opened=True).thinking
    parser = Parser()
    for text, thinking in (("<thi", False), ("nk>", True), ("so", True), ("</think>", False)):
        parser.push(text)
        assert parser.thinking == thinking


def test_as_clients_read_it():
    parser = Parser(tools=True)
    text = f"<think>hm</think>Look:{CALLS_BEGIN}{V3}{V31}{CALLS_END}"
    pieces = [piece for at in range(len(text)) for piece in parser.push(text[at])] + parser.finish()
    whole = message(pieces)
    assert (whole["role"], whole["content"]) == ("assistant", "Look:")
    assert whole["reasoning_content"] == whole["reasoning"] == "hm"
    assert [json.loads(call["function"]["arguments"]) for call in whole["tool_calls"]] == [json.loads(ARGUMENTS)] * 2
    assert len({call["id"] for call in whole["tool_calls"]}) == 2
    deltas = [delta(piece) for piece in pieces]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "hm"
    calls = [call for d in deltas for call in d.get("tool_calls", ())]
    assert [call["index"] for call in calls if "id" in call] == [0, 1]
    second = "".join(call["function"]["arguments"] for call in calls if call["index"] == 1)
    assert second == ARGUMENTS
    assert message([]) == {"role": "assistant", "content": ""}
    assert message(Parser(opened=True).push("x"))["content"] is None
