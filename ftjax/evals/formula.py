"""Formulas over named numbers, `0.7 * exact + 0.3 * min(style, length)`: parsed, and never run as code."""

import ast
import math
import operator
from collections.abc import Callable, Mapping

from ftjax.errors import UserError

_MOST = 1000  # characters
_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {
    **{"min": min, "max": max, "abs": abs, "floor": math.floor, "ceil": math.ceil},
    **{"exp": math.exp, "sqrt": math.sqrt, "log": math.log},
}


def names(formula: str) -> set[str]:
    """The numbers that a formula names; UserError where it is none."""
    if len(formula) > _MOST:
        raise UserError(f"a formula has {_MOST} characters at most, and this one {len(formula)}")
    try:
        return _names(_parsed(formula))
    except RecursionError:
        raise UserError(f"{formula[:40]!r}... is nested too deeply") from None


def value(formula: str, numbers: Mapping[str, float]) -> float:
    """What it is for these numbers; UserError where that is no finite number."""
    names(formula)
    try:
        found = float(_value(_parsed(formula), numbers))
    except (ArithmeticError, ValueError, TypeError) as error:
        raise UserError(f"{formula!r} has no value for {dict(numbers)}: {error}") from error
    if not math.isfinite(found):
        raise UserError(f"{formula!r} is {found} for {dict(numbers)}")
    return found


def _parsed(formula: str) -> ast.expr:
    try:
        return ast.parse(formula.strip().replace("^", "**"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{formula!r} is no formula: {error}") from error


def _names(node: ast.expr) -> set[str]:
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return set()
        case ast.Name():
            return {node.id}
        case ast.BinOp() if type(node.op) in _OPERATORS:
            return _names(node.left) | _names(node.right)
        case ast.UnaryOp() if type(node.op) in _OPERATORS:
            return _names(node.operand)
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS and node.args:
            return set().union(*map(_names, node.args))
    functions = ", ".join(_FUNCTIONS)
    raise UserError(f"{ast.unparse(node)!r}: a formula has numbers, names, + - * / ^ and the functions {functions}")


def _value(node: ast.expr, numbers: Mapping[str, float]) -> float:
    match node:
        case ast.Constant():
            return float(node.value)
        case ast.Name():
            return float(numbers[node.id])
        case ast.BinOp():
            return _OPERATORS[type(node.op)](_value(node.left, numbers), _value(node.right, numbers))
        case ast.UnaryOp():
            return _OPERATORS[type(node.op)](_value(node.operand, numbers))
        case ast.Call():
            return _FUNCTIONS[node.func.id](*(_value(argument, numbers) for argument in node.args))
    raise AssertionError(node)
