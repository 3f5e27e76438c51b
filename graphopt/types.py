"""What flows along an edge: a tensor of dtype, shape and layout, or a symbolic integer.

`layout` says how the dims lie in memory: `CONTIGUOUS`, a permutation of the dims from outermost to
innermost (channels-last is `(0, 2, 3, 1)`), or `STRIDED` for everything else (slices, expands).
Device is not part of a type: the engine places values.
"""

import re
from dataclasses import dataclass

from graphopt.dims import Dim, parse_dim

DTYPES = {  # short name -> torch name; the order is the one documents list
    "f32": "float32", "f64": "float64", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32",
    "i16": "int16", "i8": "int8", "u8": "uint8", "bool": "bool", "c64": "complex64", "c128": "complex128",
}  # fmt: skip
DTYPE_BYTES = {
    "f32": 4,
    "f64": 8,
    "f16": 2,
    "bf16": 2,
    "i64": 8,
    "i32": 4,
    "i16": 2,
    "i8": 1,
    "u8": 1,
    "bool": 1,
    "c64": 8,
    "c128": 16,
}
FLOATS = frozenset({"f32", "f64", "f16", "bf16", "c64", "c128"})
_SHORT = {name: name for name in DTYPES} | {long: short for short, long in DTYPES.items()}
_SHORT |= {"float": "f32", "double": "f64", "half": "f16", "long": "i64", "int": "i32"}

Layout = str | tuple[int, ...]
CONTIGUOUS = "contiguous"
STRIDED = "strided"


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor: `dtype` is a short name of `DTYPES`, `shape` may hold symbolic dims."""

    dtype: str
    shape: tuple[Dim, ...]
    layout: Layout = CONTIGUOUS

    @property
    def rank(self) -> int:
        """The number of dims."""
        return len(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether the dtype can carry a gradient: floating point or complex."""
        return self.dtype in FLOATS

    def __str__(self) -> str:
        text = f"{self.dtype}[{', '.join(str(dim) for dim in self.shape)}]"
        if self.layout == CONTIGUOUS:
            return text
        order = self.layout if isinstance(self.layout, str) else ",".join(map(str, self.layout))
        return f"{text}{{{order}}}"


@dataclass(frozen=True, slots=True)
class SymIntType:
    """An integer that shapes alone decide, with its value as a dimension."""

    value: Dim

    def __str__(self) -> str:
        return f"int[{self.value}]"


ValueType = TensorType | SymIntType

_TYPE = re.compile(r"(?P<dtype>\w+)\[(?P<dims>[^\]]*)\](?:\{(?P<layout>[^}]*)\})?\s*\Z")


def short_dtype(name: str) -> str:
    """The short name of a dtype written short or as torch writes it; ValueError for anything else."""
    short = _SHORT.get(name.removeprefix("torch."))
    if short is None:
        raise ValueError(f"unknown dtype {name!r}; known are {', '.join(DTYPES)}")
    return short


def parse_type(text: str) -> ValueType:
    """The type that `str(type)` printed; ValueError when it is not one."""
    match = _TYPE.match(text.strip())
    if match is None:
        raise ValueError(f"not a type: {text!r}; write for example f32[batch, 768]")
    dims = _split_dims(match["dims"])
    if match["dtype"] == "int":
        if len(dims) != 1:
            raise ValueError(f"not a type: {text!r}; int takes one dimension")
        return SymIntType(parse_dim(dims[0]))
    layout: Layout = match["layout"] or CONTIGUOUS
    if isinstance(layout, str) and layout not in (CONTIGUOUS, STRIDED):
        layout = tuple(int(part) for part in layout.split(","))
    return TensorType(short_dtype(match["dtype"]), tuple(parse_dim(dim) for dim in dims), layout)


def _split_dims(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for position, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return [part for part in parts if part.strip()]
