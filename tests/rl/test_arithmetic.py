import hashlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from deepseek_jax.rl import arithmetic as rl

EXAMPLES = [
    ("add", 47, 38, "47+38=", "7+8=15,4+3+1=08", "85"),
    ("add", 97, 35, "97+35=", "7+5=12,9+3+1=13", "132"),
    ("sub", 52, 38, "52-38=", "2-8=4b1,5-3-1=1", "14"),
    ("sub", 60, 60, "60-60=", "0-0=0b0,6-6-0=0", "0"),
    ("mul", 7, 48, "7*48=", "7*8=56,7*4=28,+5=33", "336"),
    ("mul", 48, 7, "48*7=", "7*8=56,7*4=28,+5=33", "336"),
]


@pytest.mark.parametrize(("kind", "a", "b", "prompt", "trace", "answer"), EXAMPLES)
def test_examples(kind, a, b, prompt, trace, answer):
    assert rl.make_problem(kind, a, b) == rl.Problem(kind, a, b, prompt, answer, trace)


def columns(number: int) -> tuple[int, int]:
    tens, units = f"{number:02d}"
    return int(tens), int(units)


def check_add(problem: rl.Problem) -> str:
    match = re.fullmatch(r"(\d)\+(\d)=(\d)(\d),(\d)\+(\d)\+(\d)=(\d)(\d)", problem.trace)
    assert match
    ua, ub, carry, units, ta, tb, carried, hundreds, tens = map(int, match.groups())
    assert ((ta, ua), (tb, ub)) == (columns(problem.a), columns(problem.b))
    assert ua + ub == 10 * carry + units and carried == carry
    assert ta + tb + carried == 10 * hundreds + tens
    return f"{hundreds}{tens}{units}"


def check_sub(problem: rl.Problem) -> str:
    match = re.fullmatch(r"(\d)-(\d)=(\d)b([01]),(\d)-(\d)-([01])=(\d)", problem.trace)
    assert match
    ua, ub, units, borrow, ta, tb, borrowed, tens = map(int, match.groups())
    assert ((ta, ua), (tb, ub)) == (columns(problem.a), columns(problem.b))
    assert ua + 10 * borrow - ub == units and borrowed == borrow
    assert ta - tb - borrowed == tens
    return f"{tens}{units}"


def check_mul(problem: rl.Problem) -> str:
    match = re.fullmatch(r"(\d)\*(\d)=(\d)(\d),(\d)\*(\d)=(\d\d),\+(\d)=(\d\d)", problem.trace)
    assert match
    digit, units_in, carry, units, again, tens_in, product, carried, total = map(int, match.groups())
    assert digit == again and sorted((digit, 10 * tens_in + units_in)) == sorted((problem.a, problem.b))
    assert digit * units_in == 10 * carry + units and carried == carry
    assert digit * tens_in == product and product + carried == total
    return f"{total}{units}"


@pytest.mark.parametrize(("kind", "sign", "check"), [("add", 1, check_add), ("sub", -1, check_sub)])
def test_every_column_of_sums_and_differences_is_right(kind, sign, check):
    for problem in rl.all_problems([kind]):
        assert int(check(problem)) == problem.a + sign * problem.b == int(problem.answer)
        assert problem.answer == str(int(problem.answer)) and len(problem.trace) == 15


def test_every_column_of_products_is_right():
    for problem in rl.all_problems(["mul"]):
        assert int(check_mul(problem)) == problem.a * problem.b == int(problem.answer)
        assert problem.answer == str(int(problem.answer)) and len(problem.trace) == 19


def test_enumeration_is_complete():
    two, one = range(10, 100), range(1, 10)
    expected = {("add", a, b) for a in two for b in two}
    expected |= {("sub", a, b) for a in two for b in two if a >= b}
    expected |= {("mul", a, b) for a in one for b in two} | {("mul", b, a) for a in one for b in two}
    found = [(problem.kind, problem.a, problem.b) for problem in rl.all_problems()]
    assert len(found) == len(expected) and set(found) == expected


def test_split_is_by_unordered_pair_over_all_kinds():
    sides: dict[frozenset[int], set[bool]] = {}
    for held_out in (False, True):
        for problem in rl.all_problems(held_out=held_out):
            sides.setdefault(frozenset((problem.a, problem.b)), set()).add(held_out)
    assert all(len(side) == 1 for side in sides.values())
    share = np.mean([side == {True} for side in sides.values()])
    assert 0.10 <= share <= 0.16
    counts = [len(rl.all_problems([kind], held_out=True)) for kind in rl.KINDS]
    assert counts == [1185, 599, 256]


def test_steps_of_traces_are_never_held_out():
    assert not any(rl.is_held_out(a, b) for a in range(10) for b in range(10))
    assert not any(rl.is_held_out(a, b) for a, b in [(0, 50), (100, 7), (30, 101), (-5, 20)])


def test_split_does_not_depend_on_the_process():
    code = (
        "from deepseek_jax.rl.arithmetic import is_held_out as f\n"
        "print(*[int(f(a, b)) for a in range(100) for b in range(100)], sep='')"
    )
    outputs = set()
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        outputs.add(run.stdout.strip())
    here = "".join(str(int(rl.is_held_out(a, b))) for a in range(100) for b in range(100))
    assert outputs == {here}
    # The split of every released version: results are comparable only while this stays as it is.
    assert (
        hashlib.sha256(here.encode()).hexdigest() == "af366109a213fdebe30b5c58d5b99b81afd77db73e3750afab74294342546ef1"
    )


def test_samples_are_distinct_balanced_and_reproducible():
    def draw(seed: int) -> list[rl.Problem]:
        return rl.sample_problems(np.random.default_rng(seed), 768, rl.KINDS, held_out=True)

    problems = draw(0)
    assert len(set(problems)) == 768 and all(rl.is_held_out(p.a, p.b) for p in problems)
    assert [p.kind for p in problems[:6]] == ["add", "sub", "mul"] * 2
    assert problems == draw(0) and problems != draw(1)
    held_in = rl.sample_problems(np.random.default_rng(0), 100, ["mul"], held_out=False)
    assert not any(rl.is_held_out(p.a, p.b) for p in held_in)


def test_stream_shows_every_problem_before_any_again():
    stream = rl.stream_problems(np.random.default_rng(0), ["mul"], held_out=True)
    epochs = [[next(stream) for _ in range(256)] for _ in range(2)]
    assert set(epochs[0]) == set(epochs[1]) == set(rl.all_problems(["mul"], held_out=True))
    assert epochs[0] != epochs[1]


def test_user_mistakes_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="needs 257 held-out problems of kind 'mul': there are 256"):
        rl.sample_problems(rng, 257, ["mul"], held_out=True)
    with pytest.raises(ValueError, match="unknown kind of problem 'div'"):
        rl.make_problem("div", 10, 20)
    with pytest.raises(ValueError, match="no problem with operands 20 and 30"):
        rl.make_problem("sub", 20, 30)
    for kinds in ([], ["add", "add"]):
        with pytest.raises(ValueError, match="at least one kind and none twice"):
            next(rl.stream_problems(rng, kinds, held_out=False))


def test_messages_and_plain_text():
    problem = rl.make_problem("add", 47, 38)
    question = {"role": "user", "content": "47+38="}
    answer = {"role": "assistant", "content": "<think>7+8=15,4+3+1=08</think>85"}
    assert rl.to_prompt(problem) == [question]
    assert rl.to_messages(problem) == [question, answer]
    texts = [rl.to_plain_text(problem, variation) for variation in range(len(rl.PLAIN_FORMS) + 1)]
    assert len(set(texts)) == len(rl.PLAIN_FORMS) and texts[0] == texts[-1]
    for text in texts:
        assert text.startswith("47+38") and problem.trace in text and text.endswith("85\n")
        assert "think" not in text


def test_jsonl_round_trip(tmp_path):
    problems = rl.sample_problems(np.random.default_rng(0), 30, rl.KINDS, held_out=False)
    rl.write_jsonl(tmp_path / "problems.jsonl", problems)
    assert rl.read_jsonl(tmp_path / "problems.jsonl") == problems


GOOD = '{"kind": "add", "a": 47, "b": 38, "prompt": "47+38=", "answer": "85", "trace": "7+8=15,4+3+1=08"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "add"', "Expecting"),
        ("", "Expecting value"),
        ("[1, 2]", "expected a JSON object, got"),
        ('{"kind": "add", "a": 47}', "expected the fields kind, a, b, prompt, answer, trace, got kind, a"),
        (GOOD.replace("47,", "true,"), "operands must be integers, got a=True"),
        (GOOD.replace('"add"', '"pow"'), "unknown kind of problem 'pow'"),
        (GOOD.replace('"add"', "[]"), "kind must be a string, got []"),
        (GOOD.replace('"85"', '"84"'), "answer is '84', but this problem's is '85'"),
        (GOOD.replace("=08", "=09"), "trace is"),
        (GOOD.replace("add", "\udcff"), "decode"),
    ],
)
def test_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(f"{GOOD}\n{line}\n{GOOD}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"problems\.jsonl:2: .*{re.escape(message)}"):
        rl.read_jsonl(path)
