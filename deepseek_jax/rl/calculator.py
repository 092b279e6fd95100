"""The calculator that models may call. A file of its own, loaded in a worker: it imports the standard library alone."""

import ast
import math
import operator

_LONGEST = 1000  # characters
_BITS = 1 << 14  # of a power
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**"})
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS = {"sqrt": math.sqrt, "abs": abs, "round": round, "min": min, "max": max}


def calculator(text: str) -> str:
    """the value of an arithmetic expression, such as 12 * (3 + 4) / 7 or sqrt(2)"""
    if len(text) > _LONGEST:
        raise ValueError(f"an expression of {len(text)} characters; at most {_LONGEST}")
    try:
        tree = ast.parse(text.strip().translate(_SIGNS), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"not an arithmetic expression: {text.strip()}") from error
    value = _value(tree.body)
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _UNARY:
            return _UNARY[type(sign)](_value(operand))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _BINARY:
            return _BINARY[type(sign)](_value(left), _value(right))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*map(_value, arguments))
    raise ValueError(f"not arithmetic: {ast.unparse(node)}")


def _power(base: int | float, exponent: int | float) -> int | float:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > _BITS:
        raise ValueError(f"{base} ** {exponent} is too large")
    value = base**exponent
    if isinstance(value, complex):
        raise ValueError(f"{base} ** {exponent} is no real number")
    return value
