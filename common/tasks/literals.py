"""Answers that a scorer of reasoning-gym will evaluate as Python, held against a grammar first.

Read through at 0.1.25: of its scorers nine call ``eval`` on an answer, or sympy's ``parse_expr``, which does. What an
answer may be there is a literal, sums and products of the puzzle's whole numbers, or a formula; anything else never
reaches them. Two more take what says nothing for right: ``nan`` as a complex number, any text as a yes or no. Others
read JSON or split text. The walls (``common/rewards/sandbox.py``) are for what is overlooked here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

_LONGEST = 100_000
_MOST_BITS = 4096
_FUNCTIONS = re.compile("a?(sin|cos|tan|cot|sec|csc)|a?(sinh|cosh|tanh|coth)|exp|log|ln|sqrt|Abs")


def readable(answer: str, entry: Mapping[str, Any]) -> bool:
    """Whether the entry's scorer may be given this answer."""
    metadata = entry["metadata"]
    if answer in (entry["answer"], *metadata.get("valid_answers", ())):
        return True  # taken as it is, and never evaluated
    if len(answer) > _LONGEST or re.search(r"[eE][+-]?\d{4}", answer):  # as a whole number 1e999999999 takes for ever
        return False
    grammar = _GRAMMARS.get(metadata.get("source_dataset", ""))
    return grammar is None or grammar(answer)


def _literal(text: str) -> bool:
    """Lists, numbers and strings. No names: the scorer's own variables hold the right answer."""
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _arithmetic(text: str) -> bool:
    """Whole numbers and + - * / alone: the scorer finds the numbers used by their digits, so 0x32 would be free."""
    return re.fullmatch(r"[0-9\s()+*/-]+", text) is not None and not re.search(r"\*\*|//", text)


def _complex(text: str) -> bool:
    return re.search("nan|inf", text, re.IGNORECASE) is None


def _nothing_else(text: str) -> bool:
    """The right answer only, which has been let through already."""
    return False


def _formula(text: str) -> bool:
    """Numbers, variables of one letter, + - * / **, and the usual functions; nothing that comes to a huge number."""
    try:
        return _bits(ast.parse(text.strip(), mode="eval").body) <= _MOST_BITS
    except (ValueError, SyntaxError, OverflowError, MemoryError, RecursionError):
        return False


def _bits(node: ast.expr) -> int:
    """The length at most of a number that this comes to, a variable counting as 1. ``ValueError``: no formula."""
    match node:
        case ast.Constant(value=bool() | complex()):
            pass
        case ast.Constant(value=int() | float() as value):
            return max(1, int(abs(value)).bit_length())
        case ast.Name(id=name) if len(name) == 1 or name == "pi":
            return 1
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _bits(operand)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right=right):
            return _bits(left) + _bits(right)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            exponent = _bits(right)
            if exponent <= _MOST_BITS.bit_length():
                return _bits(left) << exponent
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if _FUNCTIONS.fullmatch(name):
            return _bits(argument)
    raise ValueError(ast.dump(node)[:100])


_GRAMMARS: dict[str, Callable[[str], bool]] = {
    "string_insertion": _literal,
    "spiral_matrix": _literal,
    "binary_matrix": _literal,
    "n_queens": _literal,
    "complex_arithmetic": _complex,
    "game_of_life_halting": _nothing_else,
    "countdown": _arithmetic,
    "puzzle24": _arithmetic,
    "polynomial_multiplication": _formula,
    "simple_integration": _formula,
    "intermediate_integration": _formula,
}
