"""Symbolic dimensions: integer polynomials over named symbols.

A dimension is an `int`, or an `Expr` when it depends on a symbol such as `batch`. Most are affine;
products come from reshapes that merge two dynamic dims, floor divisions from strided windows.
Equality is structural on a normal form, so `2*batch + batch` equals `3*batch`; nothing here solves
equations or guesses ranges (that is what torch's own shape environment does, at milliseconds an
op).

>>> batch, seq = symbol("batch"), symbol("seq")
>>> str(batch * seq + 2 * batch - batch)
'batch*seq + batch'
>>> (batch * 4) // 2 == batch * 2
True
>>> evaluate((seq + 1) // 2, {"seq": 8})
4
"""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Union

Dim = Union[int, "Expr"]
Atom = Union[str, "Call"]
Monomial = tuple[Atom, ...]  # sorted by text; the empty one is the constant term


@dataclass(frozen=True, slots=True)
class Call:
    """An operation that is no polynomial: `floordiv`, `mod`, `max` or `min` of two dimensions."""

    op: str
    left: Dim
    right: Dim

    def __str__(self) -> str:
        if self.op in ("max", "min"):
            return f"{self.op}({self.left}, {self.right})"
        sign = {"floordiv": "//", "mod": "%"}[self.op]
        return f"({_wrapped(self.left)} {sign} {_wrapped(self.right)})"


class Expr:
    """An integer polynomial: sum of coefficient times product of atoms. Immutable, hashable."""

    __slots__ = ("_text", "terms")

    def __init__(self, terms: tuple[tuple[Monomial, int], ...]) -> None:
        self.terms = terms
        self._text: str | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(self.terms)

    def __add__(self, other: Dim) -> Dim:
        total = dict(self.terms)
        for monomial, coefficient in _terms(other):
            total[monomial] = total.get(monomial, 0) + coefficient
        return _normal(total)

    def __mul__(self, other: Dim) -> Dim:
        total: dict[Monomial, int] = {}
        for left, a in self.terms:
            for right, b in _terms(other):
                monomial = tuple(sorted(left + right, key=str))
                total[monomial] = total.get(monomial, 0) + a * b
        return _normal(total)

    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self) -> Dim:
        return self * -1

    def __sub__(self, other: Dim) -> Dim:
        return self + (other * -1)

    def __rsub__(self, other: Dim) -> Dim:
        return (self * -1) + other

    def __floordiv__(self, other: Dim) -> Dim:
        return floordiv(self, other)

    def __rfloordiv__(self, other: Dim) -> Dim:
        return floordiv(other, self)

    def __mod__(self, other: Dim) -> Dim:
        return mod(self, other)

    def __str__(self) -> str:
        if self._text is None:
            self._text = _text(self.terms)
        return self._text

    def __repr__(self) -> str:
        return f"<{self}>"


def symbol(name: str) -> Expr:
    """The dimension that is the symbol `name` itself."""
    return Expr((((name,), 1),))


def floordiv(left: Dim, right: Dim) -> Dim:
    """`left // right`, exact where every coefficient divides or a common factor cancels."""
    if isinstance(left, int) and isinstance(right, int):
        return left // right
    if right == 1:
        return left
    exact = _exact_quotient(left, right)
    return exact if exact is not None else Expr((((Call("floordiv", left, right),), 1),))


def mod(left: Dim, right: Dim) -> Dim:
    """`left % right`; 0 where the division is exact."""
    if isinstance(left, int) and isinstance(right, int):
        return left % right
    if _exact_quotient(left, right) is not None:
        return 0
    return Expr((((Call("mod", left, right),), 1),))


def maximum(left: Dim, right: Dim) -> Dim:
    """The larger of two dimensions."""
    if isinstance(left, int) and isinstance(right, int):
        return max(left, right)
    return left if left == right else Expr((((Call("max", left, right),), 1),))


def minimum(left: Dim, right: Dim) -> Dim:
    """The smaller of two dimensions."""
    if isinstance(left, int) and isinstance(right, int):
        return min(left, right)
    return left if left == right else Expr((((Call("min", left, right),), 1),))


def bounds(dim: Dim, ranges: Mapping[str, tuple[int, int | None]]) -> tuple[int | None, int | None]:
    """Bounds that `dim` surely keeps where each symbol lies in its range and is not negative; None
    where there is none. Not tight.
    """
    if isinstance(dim, int):
        return dim, dim
    low: int | None = 0
    high: int | None = 0
    for monomial, coefficient in dim.terms:
        least: int | None = 1
        most: int | None = 1
        for atom in monomial:
            small, large = (
                ranges.get(atom, (0, None)) if isinstance(atom, str) else _call_bounds(atom, ranges)
            )
            if small is None or small < 0:
                return None, None
            least = None if least is None else least * small
            most = None if most is None or large is None else most * large
        if coefficient < 0:
            least, most = most, least
        low = None if low is None or least is None else low + least * coefficient
        high = None if high is None or most is None else high + most * coefficient
    return low, high


def simplify(dim: Dim, ranges: Mapping[str, tuple[int, int | None]]) -> Dim:
    """`dim` with each `max` and `min` that the ranges decide replaced by what it comes to."""
    if isinstance(dim, int) or not any(
        isinstance(atom, Call) for monomial, _ in dim.terms for atom in monomial
    ):
        return dim
    total: Dim = 0
    for monomial, coefficient in dim.terms:
        term: Dim = coefficient
        for atom in monomial:
            term = term * (symbol(atom) if isinstance(atom, str) else _simplify_call(atom, ranges))
        total = total + term
    return total


def _simplify_call(call: Call, ranges: Mapping[str, tuple[int, int | None]]) -> Dim:
    left, right = simplify(call.left, ranges), simplify(call.right, ranges)
    if call.op in ("max", "min"):
        low, high = bounds(left - right, ranges)
        if low is not None and low >= 0:
            return left if call.op == "max" else right
        if high is not None and high <= 0:
            return right if call.op == "max" else left
    return _CALLS[call.op](left, right)


def _call_bounds(
    call: Call, ranges: Mapping[str, tuple[int, int | None]]
) -> tuple[int | None, int | None]:
    (a, b), (c, d) = bounds(call.left, ranges), bounds(call.right, ranges)
    if call.op in ("max", "min"):
        both = [[v for v in pair if v is not None] for pair in ((a, c), (b, d))]
        if call.op == "max":
            return max(both[0], default=None), max(both[1]) if len(both[1]) == 2 else None
        return min(both[0]) if len(both[0]) == 2 else None, min(both[1], default=None)
    if c is None or c <= 0 or c != d:
        return None, None
    if call.op == "mod":
        return 0, c - 1
    return None if a is None else a // c, None if b is None else b // c


def product(dims: Iterable[Dim]) -> Dim:
    """The number of elements of a shape."""
    total: Dim = 1
    for dim in dims:
        total = total * dim
    return total


def evaluate(dim: Dim, values: Mapping[str, int]) -> int:
    """The value of `dim` where each symbol has the value given; KeyError names a symbol without
    one.
    """
    if isinstance(dim, int):
        return dim
    total = 0
    for monomial, coefficient in dim.terms:
        term = coefficient
        for atom in monomial:
            term *= values[atom] if isinstance(atom, str) else _evaluate_call(atom, values)
        total += term
    return total


def substitute(dim: Dim, names: Mapping[str, Dim]) -> Dim:
    """`dim` with symbols replaced; symbols that `names` lacks stay."""
    if isinstance(dim, int):
        return dim
    total: Dim = 0
    for monomial, coefficient in dim.terms:
        term: Dim = coefficient
        for atom in monomial:
            if isinstance(atom, str):
                term = term * names.get(atom, symbol(atom))
            else:
                left, right = substitute(atom.left, names), substitute(atom.right, names)
                term = term * _CALLS[atom.op](left, right)
        total = total + term
    return total


def symbols_of(dim: Dim) -> set[str]:
    """The names of the symbols that `dim` depends on."""
    if isinstance(dim, int):
        return set()
    found: set[str] = set()
    for monomial, _ in dim.terms:
        for atom in monomial:
            found |= (
                {atom} if isinstance(atom, str) else symbols_of(atom.left) | symbols_of(atom.right)
            )
    return found


def parse_dim(text: str) -> Dim:
    """The dimension that `str(dim)` printed; ValueError when it is not one."""
    try:
        return _from_ast(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"not a dimension: {text!r}") from error


_CALLS = {"floordiv": floordiv, "mod": mod, "max": maximum, "min": minimum}


def _evaluate_call(call: Call, values: Mapping[str, int]) -> int:
    result = _CALLS[call.op](evaluate(call.left, values), evaluate(call.right, values))
    assert isinstance(result, int)
    return result


def _terms(dim: Dim) -> tuple[tuple[Monomial, int], ...]:
    return (((), dim),) if isinstance(dim, int) else dim.terms


def _normal(total: Mapping[Monomial, int]) -> Dim:
    kept = {monomial: c for monomial, c in total.items() if c}
    if not kept:
        return 0
    if len(kept) == 1 and () in kept:
        return kept[()]
    # Longest monomials first and the constant last: the order people write.
    return Expr(tuple(sorted(kept.items(), key=lambda term: (-len(term[0]), str(term[0])))))


def _exact_quotient(left: Dim, right: Dim) -> Dim | None:
    if left == right:
        return 1
    divisor = _terms(right)
    if len(divisor) != 1 or divisor[0][1] == 0:
        return None
    atoms, factor = divisor[0]
    quotient: dict[Monomial, int] = {}
    for monomial, coefficient in _terms(left):
        rest = list(monomial)
        for atom in atoms:
            if atom not in rest:
                return None
            rest.remove(atom)
        if coefficient % factor:
            return None
        quotient[tuple(rest)] = coefficient // factor
    return _normal(quotient)


def _text(terms: tuple[tuple[Monomial, int], ...]) -> str:
    parts: list[str] = []
    for monomial, coefficient in terms:
        factors = [str(atom) for atom in monomial]
        if abs(coefficient) != 1 or not factors:
            factors.insert(0, str(abs(coefficient)))
        sign = "-" if coefficient < 0 else "+"
        parts.append(f" {sign} {'*'.join(factors)}")
    joined = "".join(parts)
    return joined.removeprefix(" + ") if joined.startswith(" + ") else "-" + joined[3:]


def _wrapped(dim: Dim) -> str:
    simple = isinstance(dim, int) or (
        len(dim.terms) == 1 and dim.terms[0][1] == 1 and len(dim.terms[0][0]) == 1
    )
    return str(dim) if simple else f"({dim})"


def _from_ast(node: ast.expr) -> Dim:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name):
            return symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _from_ast(operand) * -1
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _from_ast(left), _from_ast(right)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.FloorDiv():
                    return floordiv(a, b)
                case ast.Mod():
                    return mod(a, b)
        case ast.Call(func=ast.Name(id=("max" | "min") as name), args=[left, right], keywords=[]):
            return _CALLS[name](_from_ast(left), _from_ast(right))
    raise ValueError(f"not a dimension: {ast.unparse(node)}")
