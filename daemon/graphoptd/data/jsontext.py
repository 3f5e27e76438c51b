"""Strict JSON for requests, fast where tensors are, and never long in one piece.

A request is a small document with large arrays of numbers in it. The arrays are cut out first and
read in pieces of `PIECE_BYTES`, so that no call holds the interpreter lock for more than about a
millisecond (law 4); what remains, the *envelope*, goes through the standard library's parser with
hooks that refuse duplicate keys, NaN and Infinity.

    {"inputs": [{"name": "x", "shape": [2], "data": [1, 2.5]}]}
    {"inputs": [{"name": "x", "shape": [2], "data": -Infinity}]}  +  [NumberText(b"[1, 2.5]")]

The stand-in is a literal that strict JSON does not have, so no client can forge one: the parser
hands every such literal to our hook in document order, and one more than we cut out is a refusal.
"""

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isinf, prod
from typing import Any, NoReturn

import orjson

from graphopt.errors import LimitError, RequestError
from graphopt.limits import DOCUMENT_DEPTH_MAX
from graphoptd.data.datatypes import Datatype

PIECE_BYTES = 64 << 10  # orjson reads it in 0.3 to 0.7 ms
ARRAYS_MAX = 1024  # tensors of one request; graphs have a handful of inputs

_ARRAY_START = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*(?=\[)")
_STAND_IN = b"-Infinity"
_SPACE = b" \t\r\n"
# Number and word characters become "0": what stays is the nesting.
_TO_SKELETON = bytes(0x30 if chr(c) in "0123456789eE+-.truefals" else c for c in range(256))


@dataclass(frozen=True, slots=True)
class NumberText:
    """The text of one array of numbers (or of true and false), brackets included, not yet parsed."""

    text: bytes


def parse(body: bytes, envelope_bytes_max: int) -> tuple[Any, int]:
    """The document, and how many `NumberText` stand in it for numeric `"data"` arrays.

    The arrays are not proven JSON yet: the caller reads each one with `read_numbers`, or refuses
    the document.

    Raises:
        RequestError: it is not strict JSON in UTF-8, or nested deeper than DOCUMENT_DEPTH_MAX.
        LimitError: more than `envelope_bytes_max` remain when the numeric arrays are cut out.
    """
    envelope, arrays = _cut_arrays(body)
    if len(envelope) > envelope_bytes_max:
        raise LimitError(
            f"the JSON holds more than {envelope_bytes_max} bytes beside its numeric data arrays",
            where="body",
            remedy="send tensors as numbers in `data`, or as binary",
        )
    decoder = _decoder(iter([item for _, item in arrays])) if arrays else _PLAIN
    try:
        document = decoder.decode(envelope.decode())
    except RecursionError:
        _refuse_depth()
    except json.JSONDecodeError as error:
        offset = _offset_in_body(len(error.doc[: error.pos].encode(errors="replace")), arrays)
        raise RequestError(
            f"malformed JSON: {error.msg} at byte {offset}",
            where="body",
            remedy="send RFC 8259 JSON",
        ) from None
    except ValueError as error:  # not UTF-8, or an integer of thousands of digits
        raise RequestError(
            f"malformed JSON: {error}", where="body", remedy="send RFC 8259 JSON"
        ) from None
    if envelope.count(b"[") + envelope.count(b"{") > DOCUMENT_DEPTH_MAX:
        _check_depth(document)
    return document, len(arrays)


def number_text(values: list[Any], where: str) -> NumberText:
    """The text of a list that was parsed with the envelope.

    That happens when its key was written with escapes, or when it is not numeric.

    Raises:
        RequestError: it holds anything but numbers, booleans and lists of them.
    """
    level = values
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, list):
                below += item
            elif not isinstance(item, int | float):
                shown = repr(item)[:64]
                raise RequestError(
                    f"{shown} is no number", where=where, remedy="send numbers, or binary data"
                )
        level = below
    return NumberText(json.dumps(values).encode())


def read_numbers(
    source: NumberText, datatype: Datatype, shape: Sequence[int], where: str
) -> "array[Any]":
    """The elements in row-major order.

    The text is either flat or nested exactly as `shape` says. Nesting is proven on the text's
    skeleton, which costs two passes of `bytes.translate` instead of a Python list for every row.

    Raises:
        RequestError: the nesting or the element count does not fit the shape, or a value does not
            fit the type.
    """
    text = source.text
    n_elements = prod(shape)
    is_flat = text.count(b"[") == 1
    if not is_flat:
        _check_nesting(text, shape, n_elements, where)
        if n_elements == 0:
            return array(datatype.array_code)
    if datatype.kind != "bool" and (b"u" in text or b"l" in text):
        _refuse_value("true, false or null", datatype, where)
    values = array(datatype.array_code)
    for piece in (text,) if is_flat and len(text) <= PIECE_BYTES else _pieces(text, where):
        try:
            numbers = orjson.loads(piece)
        except ValueError as error:
            raise RequestError(
                f"malformed number: {error}", where=where, remedy="send RFC 8259 JSON"
            ) from None
        if datatype.kind == "bool" and not set(map(type, numbers)) <= {bool}:
            _refuse_value("a number or null", datatype, where)
        try:
            values.fromlist(numbers)
        except (TypeError, OverflowError):
            _refuse_value(_first_misfit(numbers, datatype), datatype, where)
    if len(values) != n_elements:
        raise RequestError(
            f"{len(values)} elements, but shape {list(shape)} takes {n_elements}",
            where=where,
            remedy="send as many as the shape",
        )
    return values


# -- the envelope


def _cut_arrays(body: bytes) -> tuple[bytes, list[tuple[int, NumberText]]]:
    """The body with stand-ins for arrays, and each array with the offset of its end in the envelope."""
    arrays: list[tuple[int, NumberText]] = []
    kept: list[bytes] = []
    kept_bytes = done = 0
    at = body.find(b'"data"')
    while at >= 0:
        # After a backslash the quote belongs to a string; any other `"data":` is a key, or the
        # document is malformed.
        start = _ARRAY_START.match(body, at + 6) if at == 0 or body[at - 1] != 0x5C else None
        end = _array_end(body, start.end()) if start else 0
        if start and end:
            if len(arrays) == ARRAYS_MAX:
                raise LimitError(
                    f"more than {ARRAYS_MAX} tensors", where="body", remedy="send fewer"
                )
            kept += (body[done : start.end()], _STAND_IN)
            kept_bytes += start.end() - done + len(_STAND_IN)
            arrays.append((kept_bytes, NumberText(body[start.end() : end])))
            done = end
        at = body.find(b'"data"', max(end, at + 6))
    if not arrays:
        return body, arrays
    kept.append(body[done:])
    return b"".join(kept), arrays


def _array_end(body: bytes, start: int) -> int:
    """One past the array at `start`; 0 when it holds strings or objects.

    Numbers have no quotes and braces, so the array lies before the next of these, maybe together
    with brackets that close what is around it. It ends at the last bracket before them, if the
    brackets balance; if not, the document is malformed. What is in it is proven when it is read.
    """
    stop = body.find(b'"', start)
    stop = len(body) if stop < 0 else stop
    for brace in (b"{", b"}"):
        found = body.find(brace, start, stop)
        stop = stop if found < 0 else found
    end = body.rfind(b"]", start, stop) + 1
    if end == 0 or body.count(b"[", start, end) != body.count(b"]", start, end):
        return 0
    return end


def _offset_in_body(offset: int, arrays: list[tuple[int, NumberText]]) -> int:
    return offset + sum(len(item.text) - len(_STAND_IN) for end, item in arrays if end <= offset)


def _decoder(arrays: Iterator[NumberText]) -> json.JSONDecoder:
    def stand_in(literal: str) -> NumberText:
        item = next(arrays, None) if literal == "-Infinity" else None
        return _refuse_literal(literal) if item is None else item

    return json.JSONDecoder(object_pairs_hook=_object, parse_constant=stand_in, parse_float=_float)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise RequestError(f"duplicate key {twice!r}", where="body", remedy="write each key once")
    return result


def _float(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise RequestError(f"{text} is out of range", where="body", remedy="send a finite number")
    return value


def _refuse_literal(literal: str) -> NoReturn:
    raise RequestError(
        f"{literal} is not JSON", where="body", remedy="send such values as binary data"
    )


_PLAIN = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_refuse_literal, parse_float=_float
)


def _check_depth(document: Any) -> None:
    level = [document]
    for _ in range(DOCUMENT_DEPTH_MAX):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            return
        level = below
    if any(isinstance(item, dict | list) for item in level):
        _refuse_depth()


def _refuse_depth() -> NoReturn:
    raise RequestError(
        f"JSON nested deeper than {DOCUMENT_DEPTH_MAX}", where="body", remedy="send a flat document"
    ) from None


# -- the arrays


def _check_nesting(text: bytes, shape: Sequence[int], n_elements: int, where: str) -> None:
    skeleton = b"".join(
        text[i : i + PIECE_BYTES].translate(_TO_SKELETON, _SPACE)
        for i in range(0, len(text), PIECE_BYTES)
    )
    # A number right before an opening or after a closing bracket would vanish with the bracket.
    torn = b"0[" in skeleton or b"]0" in skeleton or (n_elements == 0 and b"0" in skeleton)
    skeleton = skeleton.translate(None, b"0")
    if torn or len(skeleton) != _skeleton_bytes(shape) or skeleton != _skeleton(shape):
        raise RequestError(
            f"the nesting does not follow shape {list(shape)}",
            where=where,
            remedy=f"send {n_elements} numbers flat, or nested as the shape says",
        )


def _skeleton_bytes(shape: Sequence[int]) -> int:
    size = 0
    for n in reversed(shape):
        size = 2 + n * size + max(n - 1, 0)
    return size


def _skeleton(shape: Sequence[int]) -> bytes:
    skeleton = b""
    for n in reversed(shape):
        skeleton = b"[" + b",".join([skeleton] * n) + b"]"
    return skeleton


def _pieces(text: bytes, where: str) -> Iterator[bytes]:
    """The text as flat arrays, cut at commas; a missing or doubled comma shows in one or in the count."""
    start = 0
    while len(text) - start > PIECE_BYTES:
        end = text.rfind(b",", start, start + PIECE_BYTES)
        if end < 0:
            raise RequestError(
                "a number is longer than 64 KiB", where=where, remedy="send RFC 8259 JSON"
            )
        yield b"[" + text[start:end].translate(None, b"[]") + b"]"
        start = end + 1
    yield b"[" + text[start:].translate(None, b"[]") + b"]"


def _first_misfit(numbers: list[Any], datatype: Datatype) -> str:
    for number in numbers:
        try:
            array(datatype.array_code, (number,))
        except (TypeError, OverflowError):
            return str(number)
    return "a value"


def _refuse_value(what: str, datatype: Datatype, where: str) -> NoReturn:
    raise RequestError(
        f"{what} is no {datatype.name}", where=where, remedy="send values of the declared datatype"
    )
