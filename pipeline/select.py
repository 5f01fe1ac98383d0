"""The selection: one expression over clip columns and scores decides what is trained on."""

from __future__ import annotations

import ast
import hashlib
import operator
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from streamdit.errors import UserError

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], pc.Expression]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda left, right: left.isin(right),
    ast.NotIn: lambda left, right: ~left.isin(right),
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], pc.Expression]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def compile_selection(expression: str, columns: Iterable[str]) -> pc.Expression:
    """Turn a condition such as `motion > 0.3 and not caption == ""` into an Arrow expression.

    Known are and, or, not, comparisons (also chained), in, + - * /, numbers, texts, true, false
    and the names in `columns`.

    Raises:
        UserError: for anything else, naming it.
    """
    known = sorted(columns)
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as error:
        raise UserError(
            f"selection {expression!r} is not an expression ({error.msg}): write for example "
            "`motion > 0.3 and blur > 50`"
        ) from None
    return _Compiler(expression, known).compile(tree)


def select_rows(table: pa.Table, expression: str) -> pa.Table:
    """Rows of `table` that fulfil `expression`; an unknown (null) answer leaves a row out.

    Raises:
        UserError: if the expression is wrong or does not fit the columns' types.
    """
    condition = compile_selection(expression, table.column_names)
    try:
        return table.filter(condition)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"selection {expression!r} does not fit the columns ({reason}): compare numbers with "
            "numbers and texts with texts, and make it a condition"
        ) from None


def split_of(source_id: str, held_out_share: float) -> str:
    """`held_out` for about that share of sources, `train` for the rest; by a hash of the id."""
    digest = hashlib.sha256(f"split:{source_id}".encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") < held_out_share * 2**64 else "train"


class _Compiler:
    """Walks the parsed expression."""

    def __init__(self, expression: str, columns: list[str]) -> None:
        self.expression = expression
        self.columns = columns

    def compile(self, node: ast.AST) -> pc.Expression:
        """Arrow expression of `node`."""
        match node:
            case ast.BoolOp(op=op, values=values):
                joined = self.compile(values[0])
                for value in values[1:]:
                    other = self.compile(value)
                    joined = joined & other if isinstance(op, ast.And) else joined | other
                return joined
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self.compile(operand)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return pc.negate(self.compile(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](self.compile(left), self.compile(right))
            case ast.Compare():
                return self._compare(node)
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return pc.scalar(value)
            case ast.Name(id=name):
                return self._name(name)
        raise self._error(f"`{ast.unparse(node)}` is not allowed")

    def _compare(self, node: ast.Compare) -> pc.Expression:
        """A comparison; `a < b < c` is `a < b and b < c`."""
        operands = [node.left, *node.comparators]
        joined = None
        for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
            if type(op) not in _COMPARISONS:
                raise self._error(f"`{ast.unparse(node)}` is not allowed")
            other = (
                self._constants(right)
                if isinstance(op, (ast.In, ast.NotIn))
                else self.compile(right)
            )
            part = _COMPARISONS[type(op)](self.compile(left), other)
            joined = part if joined is None else joined & part
        return joined

    def _constants(self, node: ast.AST) -> list[Any]:
        """Members of a list or tuple on the right of `in`."""
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            values = [item.value for item in node.elts if isinstance(item, ast.Constant)]
            if values and len(values) == len(node.elts):
                return values
        raise self._error(f"`{ast.unparse(node)}` is not a list of numbers or texts")

    def _name(self, name: str) -> pc.Expression:
        if name.lower() in ("true", "false"):
            return pc.scalar(name.lower() == "true")
        if name not in self.columns:
            raise self._error(f"there is no column {name!r}")
        return pc.field(name)

    def _error(self, reason: str) -> UserError:
        return UserError(
            f"selection {self.expression!r}: {reason}; use and, or, not, comparisons and the "
            f"columns {', '.join(self.columns)}"
        )
