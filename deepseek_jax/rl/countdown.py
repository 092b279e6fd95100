"""Countdown: reach a target with some numbers, each used exactly once, by + - * / and brackets."""

import ast
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from deepseek_jax.rl.answers import final_answer, to_number
from deepseek_jax.rl.tasks import Row, Task, TaskConfig, column, fill

TEMPLATE = (
    "Make {target} from the numbers {numbers}, each used exactly once, with + - * / and brackets.\n"
    "Give the expression alone, as #### EXPRESSION."
)
_ALLOWED = re.compile(r"[-+*/() 0-9]{1,500}")  # longer ones could exhaust the parser's stack
_SIGNS = str.maketrans("×÷−", "*/-")


def make(config: TaskConfig) -> Task:
    """Column `nums` (task.prompt) holds the numbers, `target` (task.answer) what they must come to."""
    numbers, target = config.prompt or "nums", config.answer or "target"
    template = config.template or TEMPLATE.replace("{numbers}", f"{{{numbers}}}").replace("{target}", f"{{{target}}}")

    def read(row: Row) -> tuple[list[int], int]:
        given, goal = column(row, numbers), column(row, target)
        if not isinstance(given, list) or not given or any(type(number) is not int for number in given):
            raise ValueError(f'"{numbers}" is {given!r}; it must be a list of integers')
        if type(goal) is not int:
            raise ValueError(f'"{target}" is {goal!r}; it must be an integer')
        return given, goal

    def ask(row: Row) -> str:
        read(row)
        return fill(template, row)

    def accuracy(completion: str, row: Row) -> float:
        said, marked = final_answer(completion)
        return float(reaches(said if marked else said.rpartition("\n")[2], *read(row)))

    return Task(ask, accuracy, lambda row: str(read(row)[1]), system=config.system)


def reaches(text: str, numbers: Sequence[int], target: int) -> bool:
    """Whether `text` is an expression of exactly these numbers with this value; "= target" may follow it.

    Exact arithmetic, nothing is executed, and the cost is bounded by the length that is accepted.
    """
    expression, equals, claimed = text.translate(_SIGNS).partition("=")
    if equals and to_number(claimed) != target or not _ALLOWED.fullmatch(expression):
        return False
    used: list[int] = []
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False
    return value == target and sorted(used) == sorted(numbers)


def _value(node: Any, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):
        raise ValueError("no number and no operation on two")
    left, right = _value(node.left, used), _value(node.right, used)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
    raise ValueError("another operation than + - * /")
