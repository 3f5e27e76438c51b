"""The kinds of values a request is made of, each refused by its path when it is another kind."""

from typing import Any, NoReturn

from graphopt.errors import RequestError


def read_object(value: Any, where: str) -> dict[str, Any]:
    """The value, an object; raises RequestError."""
    if not isinstance(value, dict):
        refuse("it", "an object", where)
    return value


def read_text(value: Any, where: str) -> str:
    """The value, text that UTF-8 can carry; raises RequestError."""
    if not isinstance(value, str):
        refuse("it", "a string", where)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            refuse("it", "text without lone surrogates", where)
    return value


def read_flag(value: Any, where: str) -> bool:
    """The value, a boolean; raises RequestError."""
    if not isinstance(value, bool):
        refuse("it", "true or false", where)
    return value


def refuse(what: str, should_be: str, where: str) -> NoReturn:
    """Raise the RequestError of a value of the wrong kind."""
    raise RequestError(
        f"{what} is not {should_be}", where=where or "body", remedy=f"send {should_be}"
    )
