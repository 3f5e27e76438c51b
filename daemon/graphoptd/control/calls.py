"""Reading a call strictly: the service trusts no line.

JSON without duplicate keys, NaN, infinities or deep nesting, and no key in the envelope that this
version does not know: a client that asks for more than it gets must hear so.
"""

import re

from graphopt.documents import Reader, load_json
from graphopt.errors import GraphoptError, ProtocolError
from graphoptd.control.wire import DESCRIPTORS_CALL_MAX, Call, CallId

METHOD_CHARS_MAX = 64
ID_CHARS_MAX = 256

_BARE_WORD = re.compile(rb"[a-z][a-z_-]{0,63}")


def parse_call(line: bytes) -> Call:
    """The call in a line, without its newline.

    Raises:
        ProtocolError: not JSON, not an envelope, or an unknown key in it; `detail` lists faults.
    """
    word = line.strip()
    if _BARE_WORD.fullmatch(word):
        return Call(word.decode())
    try:
        reader = Reader(load_json(line, source="call"))
        call = _envelope(reader)
        reader.finish()
    except GraphoptError as error:
        raise ProtocolError(
            error.message,
            where=error.where or "call",
            remedy=error.remedy or "send one JSON object a line, or a bare word",
            detail=error.detail,
        ) from None
    return call


def _envelope(reader: Reader) -> Call:
    id_: CallId = None
    if (given := reader.maybe("id")) is not None and given.kind != "null":
        id_ = given.integer() if given.kind == "integer" else given.string(chars_max=ID_CHARS_MAX)
    method = reader.field("method").string(chars_max=METHOD_CHARS_MAX)
    params = reader.maybe("params")
    more = reader.maybe("more")
    count = reader.maybe("descriptors")
    return Call(
        method=method,
        params={key: value.raw() for key, value in params.entries()} if params else {},
        id=id_,
        more=more.boolean() if more else False,
        descriptors=count.integer(low=0, high=DESCRIPTORS_CALL_MAX) if count else 0,
    )
