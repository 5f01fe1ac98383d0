"""The selection: one expression over clip columns and scores decides what is trained on."""

from __future__ import annotations

import ast
import hashlib
import operator
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
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
    ast.In: lambda left, right: _is_in(left, right),
    ast.NotIn: lambda left, right: ~_is_in(left, right),
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], pc.Expression]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def compile_selection(expression: str, columns: Iterable[str]) -> pc.Expression:
    """Turn a condition such as `motion > 0.3 and not duplicate` into an Arrow expression.

    Known are and, or, not, comparisons (also chained), in, + - * /, `is None`, numbers, texts,
    true, false and the names in `columns`. A value that is not there (null: a score that no model
    measured, a licence that nobody told) makes every comparison with it unknown, and `not unknown`
    unknown too; `is None` asks for it.

    Raises:
        UserError: for anything else, naming it.
    """
    return _Compiler(expression, sorted(columns)).compile(_parse(expression))


def clauses_of(expression: str) -> list[str]:
    """The conditions that an expression joins with `and`, as text; itself if it joins none."""
    match _parse(expression):
        case ast.BoolOp(op=ast.And(), values=values):
            return [ast.unparse(value) for value in values]
    return [expression.strip()]


def evaluate(table: pa.Table, expression: str) -> np.ndarray:
    """Whether each row of `table` fulfils `expression`, `bool [rows]`; an unknown answer is no.

    Raises:
        UserError: if the expression is wrong or does not fit the columns' types.
    """
    condition = compile_selection(expression, table.column_names)
    numbers = pa.array(np.arange(table.num_rows))
    try:
        found = table.append_column("", numbers).filter(condition).column(table.num_columns)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"selection {expression!r} does not fit the columns ({reason}): compare numbers with "
            "numbers and texts with texts, and make it a condition"
        ) from None
    kept = np.zeros(table.num_rows, bool)
    kept[found.to_numpy()] = True
    return kept


def select_rows(table: pa.Table, expression: str) -> pa.Table:
    """Rows of `table` that fulfil `expression`; raises as :func:`evaluate` does."""
    return table.filter(pa.array(evaluate(table, expression)))


def split_of(source_id: str, held_out_share: float) -> str:
    """`held_out` for about that share of sources, `train` for the rest; by a hash of the id."""
    digest = hashlib.sha256(f"split:{source_id}".encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") < held_out_share * 2**64 else "train"


def _parse(expression: str) -> ast.expr:
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as error:
        raise UserError(
            f"selection {expression!r} is not an expression ({error.msg}): write for example "
            "`motion > 0.3 and blur > 50`"
        ) from None


def _is_in(value: pc.Expression, members: list[Any]) -> pc.Expression:
    """Membership, unknown for null (Arrow's own says no)."""
    return pc.if_else(value.is_valid(), value.isin(members), pa.scalar(None, pa.bool_()))


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


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
            if isinstance(op, (ast.Is, ast.IsNot)) and _is_none(right):
                missing = self.compile(left).is_null()
                part = missing if isinstance(op, ast.Is) else ~missing
                joined = part if joined is None else joined & part
                continue
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
