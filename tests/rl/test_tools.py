"""Tools: what a call is, and what becomes of it when all goes well or anything wrong."""

import math
import re
from pathlib import Path

import pytest

from deepseek_jax.rl.calculator import calculator
from deepseek_jax.rl.tasks import TaskConfig, make_task
from deepseek_jax.rl.tools import Call, Result, Tools, ToolsConfig, read_call
from deepseek_jax.rl.user_worker import load_function

ROOT = Path(__file__).parents[2]
BAD = '''
import os, time

def upper(text):
    """TEXT in capitals"""
    return text.upper()

def raises(text):
    return {}[text]

def hangs(text):
    time.sleep(60)

def dies(text):
    os._exit(3)

def lists(text):
    return [text]

def number(text):
    return 42
'''


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("<tool>calculator: 2*3</tool>", Call("calculator", "2*3")),
        ("<think>so\n</think>I ask.\n<tool> calculator :  2:3 \n</tool>\n", Call("calculator", "2:3")),
        ("<tool>a: 1</tool> then <tool>b: 2</tool>", Call("b", "2")),  # the last
        ("<tool>unclosed <tool>b: 2\n+ 3</tool>", Call("b", "2\n+ 3")),
        ("<tool>2*3</tool>", Call("", "2*3")),
        ("<tool>two words: 3</tool>", Call("", "two words: 3")),
        ("<tool></tool>", Call("", "")),
        ("<tool>calculator: 2*3</tool> is 6", None),  # the turn went on
        ("calculator: 2*3</tool>", None),
        ("<tool>calculator: 2*3", None),
        ("", None),
    ],
)
def test_a_call_is_what_a_turn_ends_with(text, call):
    assert read_call(text) == call


def test_reading_a_call_takes_no_long_time():
    for text in ("<tool>" * 30_000, "<tool>" + "</tool> x" * 30_000, "<tool>a" + " " * 100_000 + "</tool>x"):
        assert read_call(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("-2**2", -4),
        ("2^10", 1024),
        ("7/2", 3.5),
        ("7//2", 3),
        ("7 % 4", 3),
        ("12 × 3 − 4 ÷ 2", 34),
        ("0.1+0.2", 0.3),
        ("sqrt(2)", math.sqrt(2)),
        ("max(1, 2.5, abs(-3))", 3),
        ("10**30", 10**30),
    ],
)
def test_the_calculator_calculates(text, value):
    assert float(calculator(text)) == pytest.approx(float(value), rel=1e-11)
    if isinstance(value, int) and "/" not in text.replace("//", "") and "÷" not in text:
        assert calculator(text) == str(value)


REFUSED = ("", "2+", "x", "9**9**9", "2**-99999", "(-8)**0.5", "1/0", "__import__('os')", "'a'*9", "True", "[1]", "min")
REFUSED += ("min()", "sqrt(-1)", "10.0**400", "1+" * 600 + "1", "(" * 400 + "1" + ")" * 400)


@pytest.mark.parametrize("text", REFUSED)
def test_the_calculator_refuses_what_is_no_arithmetic(text):
    with pytest.raises((ValueError, ArithmeticError, TypeError)):
        calculator(text)


def test_whatever_goes_wrong_is_told_to_the_model(tmp_path):
    """And the next call is answered, by another process where one hung or died."""
    (tmp_path / "bad.py").write_text(BAD)
    names = ("upper", "raises", "hangs", "dies", "lists", "number")
    tools = Tools(ToolsConfig(use=("calculator", *(f"{tmp_path}/bad.py:{name}" for name in names)), seconds=0.5))
    calls = [Call("calculator", "6*7"), Call("calculator", "six"), *(Call(name, "a\u2028ß") for name in names)]
    calls += [Call("lookup", "x"), Call("", "6*7"), Call("upper", "again")]
    assert tools.call(calls) == [
        Result("42"),
        Result("error: ValueError: not arithmetic: six", "error"),
        Result("A\u2028SS"),
        Result("error: KeyError: 'a\\u2028ß'", "error"),
        Result("error: no answer within 0.5 s", "timeout"),
        Result("error: its process ended with code 3", "crash"),
        Result("error: it returned no text, but ['a\\u2028ß']", "error"),
        Result("42"),
        Result(f"error: there is no tool lookup; there is calculator, {', '.join(names)}", "unknown"),
        Result("error: expected <tool>NAME: INPUT</tool>", "malformed"),
        Result("AGAIN"),
    ]
    assert tools.call([]) == []


def test_a_task_tells_its_tools_in_the_system_message(tmp_path):
    (tmp_path / "bad.py").write_text(BAD)
    use = ("calculator", f"{tmp_path}/bad.py:upper", f"{tmp_path}/bad.py:dies")
    config = TaskConfig(name="gsm8k", system="Be brief.", tools=ToolsConfig(use=use))
    system, asked = make_task(config).messages({"question": "2+3?", "answer": "#### 5"})
    assert system["role"] == "system" and asked["role"] == "user"
    brief, _, told = system["content"].partition("\n\n")
    assert brief == "Be brief." and "<tool>NAME: INPUT</tool>" in told
    listed = told.partition("Tools:\n")[2].splitlines()
    assert listed[0].startswith("- calculator: the value of an arithmetic expression")
    assert listed[1:] == ["- upper: TEXT in capitals", "- dies"]
    silent = make_task(TaskConfig(name="gsm8k", tools=ToolsConfig(use=("calculator",), told=False)))
    assert [message["role"] for message in silent.messages({"question": "2+3?", "answer": "#### 5"})] == ["user"]
    assert silent.tools is not None and make_task(TaskConfig(name="gsm8k")).tools is None


def test_what_makes_no_sense_is_refused(tmp_path):
    (tmp_path / "two.py").write_text("def f(a, b): return a\ndef calculator(text): return text\n")
    for use, message in (
        (("calcualtor",), r"task.tools.use='calcualtor': expected calculator or file.py:function"),
        ((f"{tmp_path}/none.py:f",), "there is no file"),
        ((f"{tmp_path}/two.py:g",), "no function g; it has f, calculator"),
        ((f"{tmp_path}/two.py:f",), "is called with 1 arguments"),
        (("calculator", f"{tmp_path}/two.py:calculator"), "none of the same name twice"),
    ):
        with pytest.raises(ValueError, match=message):
            Tools(ToolsConfig(use=use))
    for fields in ({"calls": 0}, {"seconds": 0.0}, {"seconds": float("inf")}, {"result_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            ToolsConfig(**fields)  # pyright: ignore[reportArgumentType]


def test_the_tool_of_the_documents_works(tmp_path):
    text = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert source is not None and len(source.group(1).splitlines()) <= 10
    (tmp_path / "mine.py").write_text(source.group(1))
    tools = Tools(ToolsConfig(use=(f"{tmp_path}/mine.py:capital",)))
    assert tools.call([Call("capital", "France "), Call("capital", "Atlantis")]) == [
        Result("Paris"),
        Result("not known"),
    ]
    assert "capital: " in tools.told
    assert load_function(str(tmp_path / "mine.py"), "capital", arguments=1)("japan") == "Tokyo"
