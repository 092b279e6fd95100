"""Arithmetic problems with short worked traces, and the split into held-in and held-out.

Three kinds, written with one character, so one token, a digit and a sign:

    add   47+38=  7+8=15,4+3+1=08          85    units, then tens plus the carry; both sums as two digits
    sub   52-38=  2-8=4b1,5-3-1=2          14    units modulo ten and the borrow (b0 or b1), then tens
    mul   7*48=   7*8=56,7*4=28,+5=33      336   units, tens, then the units' carry added to the tens

Every step reads only digits of the prompt and of the steps before, and the answer copies digits of the trace.

A problem is held out by the unordered pair of its operands, for all kinds at once: when 47+38 is held out, so
are 38+47 and 47-38. Pairs of two single digits are never held out: they are the steps that traces consist of.
Of 8100, 4095 and 1620 problems 1185, 599 and 256 are held out.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.data.special_tokens import END_THINK, THINK
from deepseek_jax.rl.answers import final_answer
from deepseek_jax.rl.rewards import accuracy_reward
from deepseek_jax.rl.tasks import Row, Task, TaskConfig

KINDS = ("add", "sub", "mul")
HELD_OUT_SHARE = 0.15
# Changing the salt changes every split: results before and after are not comparable.
_SALT = "deepseek-jax held-out operands"
_SIGNS = {"add": "+", "sub": "-", "mul": "*"}

# Surface forms of worked arithmetic for pretraining: e is the expression, t the trace, r the result.
PLAIN_FORMS = ("{e}=\n{t}\n{r}\n", "{e}:{t};{r}\n", "{e}=[{t}]{r}\n", "{e}? {t} so {r}\n")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem: what is asked (`prompt`), the right `answer` and the worked steps towards it (`trace`)."""

    kind: str
    a: int
    b: int
    prompt: str
    answer: str
    trace: str


def _add_trace(a: int, b: int) -> str:
    units = a % 10 + b % 10
    tens = a // 10 + b // 10 + units // 10
    return f"{a % 10}+{b % 10}={units:02d},{a // 10}+{b // 10}+{units // 10}={tens:02d}"


def _sub_trace(a: int, b: int) -> str:
    units = a % 10 - b % 10
    borrow = int(units < 0)
    tens = a // 10 - b // 10 - borrow
    return f"{a % 10}-{b % 10}={units % 10}b{borrow},{a // 10}-{b // 10}-{borrow}={tens}"


def _mul_trace(a: int, b: int) -> str:
    digit, number = min(a, b), max(a, b)
    units, tens = digit * (number % 10), digit * (number // 10)
    # The carry's sum has no left operand, so "28+5", itself a pair that may be held out, is never written.
    total = tens + units // 10
    return f"{digit}*{number % 10}={units:02d},{digit}*{number // 10}={tens:02d},+{units // 10}={total:02d}"


def is_operand_pair(kind: str, a: int, b: int) -> bool:
    """Whether `kind` has a problem with these operands in this order.

    add: both 10..99. sub: both 10..99 and a >= b. mul: one operand 1..9, the other 10..99.
    """
    if kind == "mul":
        return 1 <= min(a, b) <= 9 and 10 <= max(a, b) <= 99
    if kind not in KINDS:
        raise ValueError(f"unknown kind of problem {kind!r}: choose from {', '.join(KINDS)}")
    return min(a, b) >= 10 and max(a, b) <= 99 and (kind == "add" or a >= b)


def make_problem(kind: str, a: int, b: int) -> Problem:
    """The problem of this kind and these operands; ValueError where the kind has no such operands."""
    if not is_operand_pair(kind, a, b):
        raise ValueError(f"{kind!r} has no problem with operands {a} and {b}: see is_operand_pair")
    answer = {"add": a + b, "sub": a - b, "mul": a * b}[kind]
    trace = {"add": _add_trace, "sub": _sub_trace, "mul": _mul_trace}[kind](a, b)
    return Problem(kind, a, b, prompt=f"{a}{_SIGNS[kind]}{b}=", answer=str(answer), trace=trace)


@functools.cache
def is_held_out(a: int, b: int) -> bool:
    """Whether the unordered pair of operands {a, b} is kept from every training stage.

    HELD_OUT_SHARE of the pairs that some kind of problem uses, chosen by SHA-256: the same in every process,
    for every seed and for all kinds. Pairs that no problem has are never held out.
    """
    low, high = min(a, b), max(a, b)
    if low < 1 or not 10 <= high <= 99:
        return False
    digest = hashlib.sha256(f"{_SALT} {low} {high}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


@functools.cache
def _problems_of(kind: str) -> tuple[Problem, ...]:
    pairs = ((a, b) for a in range(1, 100) for b in range(1, 100))
    return tuple(make_problem(kind, a, b) for a, b in pairs if is_operand_pair(kind, a, b))


def all_problems(kinds: Iterable[str] = KINDS, *, held_out: bool | None = None) -> list[Problem]:
    """Every problem of these kinds in a fixed order; `held_out` keeps one side of the split, None both."""
    problems = (problem for kind in kinds for problem in _problems_of(kind))
    return [p for p in problems if held_out is None or is_held_out(p.a, p.b) == held_out]


def stream_problems(rng: np.random.Generator, kinds: Sequence[str], *, held_out: bool) -> Iterator[Problem]:
    """Endless problems of one side of the split.

    The kinds take turns, so every prefix is balanced. Within a kind each problem comes once, in random order,
    before any comes again.
    """
    if not kinds or len(set(kinds)) != len(kinds):
        raise ValueError(f"kinds={kinds!r} must name at least one kind and none twice")
    pools = [all_problems([kind], held_out=held_out) for kind in kinds]
    orders: list[list[int]] = [[] for _ in kinds]
    while True:
        for pool, order in zip(pools, orders, strict=True):
            if not order:
                order.extend(rng.permutation(len(pool)).tolist())
            yield pool[order.pop()]


def sample_problems(rng: np.random.Generator, n: int, kinds: Sequence[str], held_out: bool) -> list[Problem]:
    """`n` different problems of one side of the split, the kinds taking turns.

    ValueError when a kind has too few: one that cannot give its share ceil(n / len(kinds)).
    """
    for kind in kinds:
        available, share = len(all_problems([kind], held_out=held_out)), -(-n // len(kinds))
        if available < share:
            side = "held-out" if held_out else "held-in"
            raise ValueError(f"n={n} needs {share} {side} problems of kind {kind!r}: there are {available}")
    return list(islice(stream_problems(rng, kinds, held_out=held_out), n))


def to_prompt(problem: Problem) -> list[dict[str, str]]:
    """The chat messages that ask the problem."""
    return [{"role": "user", "content": problem.prompt}]


def to_messages(problem: Problem) -> list[dict[str, str]]:
    """The chat messages of a cold-start sample: the question, then `<think>trace</think>answer`."""
    content = f"{THINK}{problem.trace}{END_THINK}{problem.answer}"
    return [*to_prompt(problem), {"role": "assistant", "content": content}]


def to_plain_text(problem: Problem, variation: int) -> str:
    """The worked problem as plain text for pretraining, without chat or thinking markers.

    `variation` counts through PLAIN_FORMS, starting again after the last.
    """
    form = PLAIN_FORMS[variation % len(PLAIN_FORMS)]
    return form.format(e=problem.prompt.removesuffix("="), t=problem.trace, r=problem.answer)


def write_jsonl(path: str | Path, problems: Iterable[Problem]) -> None:
    """Writes one JSON object a line, with the fields of `Problem`."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(dataclasses.asdict(problem)) + "\n" for problem in problems)


def read_jsonl(path: str | Path) -> list[Problem]:
    """Reads what `write_jsonl` wrote and checks it; ValueError "FILE:LINE: what" for a broken line."""
    problems = []
    *lines, last = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate([*lines, last] if last else lines, start=1):
        try:
            problems.append(_parse_line(line))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors too
            raise ValueError(f"{path}:{number}: {error}") from error
    return problems


def _parse_line(line: bytes) -> Problem:
    fields = json.loads(line.decode("utf-8"))
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {line[:80]!r}")
    return check_problem(fields)


def check_problem(fields: Mapping[str, Any]) -> Problem:
    """The problem with these fields and maybe others. ValueError where one of `Problem` is missing or not right."""
    names = [field.name for field in dataclasses.fields(Problem)]
    if not set(names) <= set(fields):
        raise ValueError(f"expected the fields {', '.join(names)}, got {', '.join(map(str, fields)) or 'none'}")
    if not isinstance(fields["kind"], str):
        raise ValueError(f"kind must be a string, got {fields['kind']!r}")
    if type(fields["a"]) is not int or type(fields["b"]) is not int:  # True is an int to isinstance
        raise ValueError(f"operands must be integers, got a={fields['a']!r}, b={fields['b']!r}")
    right = make_problem(fields["kind"], fields["a"], fields["b"])
    for name in names:
        if fields[name] != getattr(right, name):
            raise ValueError(f"{name} is {fields[name]!r}, but this problem's is {getattr(right, name)!r}")
    return right


def make(config: TaskConfig) -> Task:
    """The task: rows are `Problem`s, and right is the answer to the letter."""
    for name in ("prompt", "answer", "template"):
        if getattr(config, name):
            raise ValueError(f"task.{name}={getattr(config, name)!r}: the task arithmetic asks its own problems")

    def accuracy(completion: str, row: Row) -> float:
        return accuracy_reward(completion, right(row))

    def right(row: Row) -> str:
        return check_problem(row).answer

    said = lambda completion, row: final_answer(completion)[0] or None  # noqa: E731
    return Task(lambda row: to_prompt(check_problem(row)), accuracy, right, system=config.system, said=said)
