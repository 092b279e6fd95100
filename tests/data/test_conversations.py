"""Chats as people have them: every spelling gives the messages that the plain one gives, and what is wrong is named."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from deepseek_jax.data.conversations import Conversation, read_conversation, read_messages, with_thinking
from deepseek_jax.data.text import read_chats

ASK, SAY = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "Be brief."}
PLAIN = [SYSTEM, ASK, SAY]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": PLAIN},
        {"messages": [m | {"name": None, "tool_calls": None, "id": 7, "time": b"x"} for m in PLAIN], "source": "web"},
        {"messages": [m | {"content": [{"type": "text", "text": m["content"], "image": None}]} for m in PLAIN]},
        {"messages": [m | {"content": [m["content"][:1], {"text": m["content"][1:]}]} for m in PLAIN]},
        {"messages": [ASK, SAY], "system": "Be brief."},
        {"messages": PLAIN, "system": "another", "prompt": "1+1?"},
        {"messages": None, "conversations": PLAIN},
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}], "system": "Be brief."},
        {"conversation": [{"from": m["role"], "value": m["content"], "weight": None} for m in PLAIN]},
        {"prompt": "1+1?", "completion": "2", "system": "Be brief."},
        {"prompt": [SYSTEM, ASK], "completion": [SAY]},
        {"prompt": [SYSTEM, ASK], "response": "2"},
        {"instruction": "1+1?", "input": "", "output": "2", "system": "Be brief."},
        {"question": "1+1?", "answer": "2", "system": "Be brief."},
        {"query": "1+1?", "response": "2", "system": "Be brief.", "history": []},
    ],
)
def test_every_spelling_is_one_conversation(row):
    assert read_conversation(row) == Conversation(PLAIN)


def test_an_instruction_has_its_input_under_it():
    messages = read_conversation({"instruction": "Add.", "input": "1 1", "output": "2"}).messages
    assert messages == [{"role": "user", "content": "Add.\n\n1 1"}, SAY]


def test_a_history_is_what_was_said_before():
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    row = {"instruction": "1+1?", "output": "2", "history": [["Hi", "Hello"]]}
    assert read_conversation(row).messages == [*earlier, ASK, SAY]
    assert read_conversation(row | {"system": "Be brief."}).messages == [SYSTEM, *earlier, ASK, SAY]
    row = {"prompt": [SYSTEM, ASK], "completion": "2", "history": [["Hi", "Hello"]]}
    assert read_conversation(row).messages == [SYSTEM, *earlier, ASK, SAY]


def test_tools_and_calls():
    answer = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = {"messages": [ASK, answer, {"role": "tool", "content": "2", "tool_call_id": "x"}, SAY], "tools": [TOOL]}
    found = read_conversation(row)
    assert found == Conversation(row["messages"], [TOOL])
    assert read_conversation(row | {"tools": json.dumps([TOOL])}) == found
    assert read_conversation(row | {"tools": "[]"}).tools is None
    bare = CALL["function"] | {"extra": None}
    for call in ({"tool_calls": [bare]}, {"tool_calls": [{"function": bare, "id": None}]}, {"function_call": bare}):
        assert read_messages([ASK, {"role": "assistant"} | call])[1] == answer
        as_text = {name: json.dumps(value) for name, value in call.items()}
        assert read_messages([ASK, {"role": "assistant"} | as_text])[1] == answer
    for calls in (bare, [bare]):
        assert read_messages([{"from": "function_call", "value": json.dumps(calls)}]) == [answer]
    assert [m["role"] for m in read_messages([ASK | {"role": r} for r in ("function", "ipython")])] == ["tool"] * 2


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning", "part"])
def test_reasoning_under_each_of_its_names(name):
    said = {"role": "assistant", "content": "2"} | {name: "easy"}
    if name == "part":
        said = SAY | {"content": [{"type": "thinking", "thinking": "easy"}, {"type": "text", "text": "2"}]}
    (found,) = read_messages([said])
    assert found == SAY | {"reasoning_content": "easy"} and read_messages([found]) == [found]
    assert with_thinking(found) == "<think>\neasy\n</think>\n\n2"
    assert with_thinking(SAY | {"reasoning_content": "easy", "content": "<think>x</think>2"}) == "<think>x</think>2"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "a list; each line must be an object"),
        ({"text": "x", "id": 1}, "no field of messages, conversations, conversation, nor prompt with completion, .*id"),
        ({"messages": []}, "non-empty list"),
        ({"messages": "hello"}, "non-empty list"),
        ({"messages": [ASK, "x"]}, "message 1 is of type str"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "message 0 has role 'judge'; allowed are system, dev"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"message 0 has role \['user'\]; allowed"),
        ({"messages": [{"content": "x"}]}, "message 0 has role None"),
        ({"messages": [ASK, {"role": "assistant", "content": None}]}, "message 1 has no content"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "message 0 has content of type dict"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "part of type 'image"),
        ({"messages": [SAY | {"tool_calls": [{"name": "f", "arguments": 7}]}]}, "message 0 has a tool call that is no"),
        ({"messages": [SAY | {"tool_calls": ["f"]}]}, "message 0 has a tool call that is no"),
        ({"messages": [SAY | {"tool_calls": "[f"}]}, "what message 0 calls is a text that is no JSON"),
        ({"messages": [{"from": "function_call", "value": "f()"}]}, "what message 0 calls is a text that is no JSON"),
        ({"messages": [{"from": "function_call", "value": "7"}]}, "message 0 has a tool call that is no"),
        ({"messages": [{"from": "function_call", "value": ""}]}, "message 0 has no content"),
        ({"query": "x", "response": "y", "history": [["a"]]}, '"history" is no list of .question, answer.'),
        ({"query": "x", "response": "y", "history": [["a", 7]]}, '"history" 0: what the assistant says has content of'),
        ({"messages": [SAY | {"reasoning": 7}]}, "reasoning of type int"),
        ({"messages": [ASK], "tools": 7}, '"tools" is of type int'),
        ({"messages": [ASK], "tools": "{"}, "tools. is a text that is no JSON .Expecting property"),
        ({"prompt": 7, "completion": "x"}, '"prompt" is of type int; it must be text or a list of messages'),
        ({"prompt": "x", "chosen": "a"}, "it has prompt, chosen"),
        ({"question": "x", "answer": None}, "it has question, and null in answer"),
    ],
)
def test_what_is_wrong_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        read_conversation(row)


def test_parquet_fills_with_null_what_only_some_have(tmp_path: Path):
    calling = {"messages": [ASK, SAY | {"tool_calls": [CALL | {"id": "7"}]}], "tools": json.dumps([TOOL])}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([calling, {"messages": PLAIN}]), tmp_path / "a.parquet")
    called, plain = read_chats(tmp_path / "a.parquet")
    assert plain == Conversation(PLAIN)
    assert called == Conversation(calling["messages"], [TOOL])
