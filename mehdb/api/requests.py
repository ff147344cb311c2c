"""What a request says: its target, key and parameters."""

import re
from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar
from urllib.parse import parse_qsl, unquote_to_bytes

from mehdb.errors import BadKey, BadParameter
from mehdb.model import Revision, checked_key
from mehdb.parsing import whole_number

T = TypeVar("T")

BROKEN_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
PARAMETERS_MAX: Final = 32  # more than any route has
REVISION_MAX: Final = (1 << 63) - 1  # SQLite's largest integer


class Target(NamedTuple):
    """A request's target in origin form, as it was sent: nothing decoded. *query* is without its question mark."""

    path: str
    query: str

    @property
    def text(self) -> str:
        """Path and query, byte for byte."""
        return f"{self.path}?{self.query}" if self.query else self.path


def target(raw: str) -> Target:
    """Return the target that *raw* is, in origin form or absolute form (RFC 9112, 3.2), without its authority."""
    if not raw.startswith("/"):
        _, _, raw = raw.partition("://")
        _, slash, raw = raw.partition("/")
        raw = slash + raw
    path, _, query = raw.partition("?")
    return Target(path, query)


def decode_key(text: str) -> bytes:
    """Return the key that *text*, the raw path after the route's prefix, stands for: percent-decoded once.

    Raises `BadKey`.
    """
    if text.isascii() and "%" not in text and "#" not in text:
        return checked_key(text.encode())
    if "#" in text:
        raise BadKey("a '#' in a key must be sent as %23")
    if BROKEN_ESCAPE.search(text):
        raise BadKey("a '%' in a key must be sent as %25, or be followed by two hexadecimal digits")
    return checked_key(unquote_to_bytes(text.encode("utf-8", "surrogateescape")))


class Parameters:
    """The query's parameters, each read once; those never read are unknown."""

    def __init__(self, query: str) -> None:
        """Raises `BadParameter` for a query that cannot be decoded, or a parameter given twice."""
        self._values: dict[str, str] = {}
        if not query:  # most writes have none
            return
        if BROKEN_ESCAPE.search(query):
            raise BadParameter("a '%' in a query must be sent as %25, or be followed by two hexadecimal digits")
        try:
            pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=PARAMETERS_MAX)
        except UnicodeDecodeError as error:
            raise BadParameter("a query must be UTF-8, percent-encoded") from error
        except ValueError as error:
            raise BadParameter(f"the query cannot be read: {error}") from error
        self._values = dict(pairs)
        if len(self._values) != len(pairs):
            raise BadParameter("a parameter is given twice: give each once")

    def take(self, name: str, parse: Callable[[str], T], default: T) -> T:
        """Return the value of *name*, read by *parse*, or *default*. Raises `BadParameter` when *parse* cannot."""
        text = self._values.pop(name, None)
        if text is None:
            return default
        try:
            return parse(text)
        except ValueError as error:
            raise BadParameter(f"{name}={text!r}: {error}") from error

    def finish(self) -> None:
        """Raise `BadParameter` if there are others than those taken: a misspelt one must not be passed over."""
        if self._values:
            raise BadParameter(f"unknown parameter {min(self._values)!r}: leave it out, or send a '?' in a key as %3F")


def revision_number(text: str) -> Revision:
    """Return the revision that *text* stands for. Raises `ValueError`."""
    return Revision(whole_number(0, REVISION_MAX)(text))


def no_parameters(query: str) -> None:
    """Raise `BadParameter` if *query* has any."""
    if query:
        Parameters(query).finish()


def boolean(text: str) -> bool:
    """Return whether *text* is true. Raises `ValueError` if it is neither that nor false."""
    if text not in ("true", "false"):
        raise ValueError("must be true or false")
    return text == "true"


def seconds(most: float) -> Callable[[str], float]:
    """Return a parser of seconds from 0 to *most*."""

    def parse(text: str) -> float:
        if not (re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) and float(text) <= most):
            raise ValueError(f"must be a number of seconds from 0 to {most:g}")
        return float(text)

    return parse
