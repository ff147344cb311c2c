"""What a request says: its target, key, parameters and body."""

import asyncio
import re
from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar
from urllib.parse import parse_qsl, unquote_to_bytes

from aiohttp import StreamReader, web

from mehdb.api.answers import BODY_RATE_MIN
from mehdb.errors import (
    BadBody,
    BadKey,
    BadParameter,
    BatchTooLarge,
    BodyTooSlow,
    ExpectationFailed,
    QueueFull,
    RequestError,
    ValueTooLarge,
)
from mehdb.model import Revision, checked_key
from mehdb.settings import whole_number

T = TypeVar("T")

BROKEN_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
PARAMETERS_MAX: Final = 32  # more than any route has
REVISION_MAX: Final = (1 << 63) - 1  # SQLite's largest integer
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


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


class BodyBudget:
    """Bounds the memory of the bodies that are arriving, all together. A whole one counts in the store's queue."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._held_bytes = 0

    def require(self, size_bytes: int) -> None:
        """Raise `QueueFull` if there is no room for that many bytes more. One body alone always has it."""
        if self._held_bytes and self._held_bytes + size_bytes > self._bytes_max:
            raise QueueFull(f"{self._held_bytes} bytes are arriving: nothing was written, try again in a moment")

    def take(self, size_bytes: int) -> None:
        """Hold that many bytes more. Raises `QueueFull`."""
        self.require(size_bytes)
        self._held_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        """Hold that many bytes no longer."""
        self._held_bytes -= size_bytes


async def read_body(
    request: web.BaseRequest, bytes_max: int, stall_s: float, budget: BodyBudget, too_large: str | None = None
) -> bytes:
    """Return the whole body, after `100 Continue` where the client waits for it.

    Raises `ValueTooLarge`, or `BatchTooLarge` where *too_large* says why, and `QueueFull` as soon as it is known,
    `BodyTooSlow`, `ExpectationFailed` and `BadBody`.
    """
    if (request.content_length or 0) > bytes_max:
        raise _too_large(bytes_max, too_large)
    _check_expectation(request)
    if request.headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
        raise BadBody("send the body in no transfer coding but chunked: nothing was written")
    content = request.content
    if content.is_eof() and content.total_bytes <= bytes_max:  # it came with the head: most do
        return content.read_nowait()
    budget.require(request.content_length or 0)
    if "Expect" in request.headers and request.version >= (1, 1):
        await request.writer.write(CONTINUE)
    try:
        return await _read_chunks(content, bytes_max, stall_s, budget, too_large)
    except web.RequestPayloadError as error:
        raise BadBody(f"the body's framing is broken: nothing was written ({error})") from error


async def _read_chunks(
    content: StreamReader, bytes_max: int, stall_s: float, budget: BodyBudget, too_large: str | None
) -> bytes:
    """Return what arrives until the body's end, within the bounds on its size and on the time that it may take."""
    chunks: list[bytes] = []
    size_bytes = 0
    clock = asyncio.get_running_loop().time
    started_at_s = clock()
    try:
        while True:
            deadline_s = min(clock() + stall_s, started_at_s + stall_s + size_bytes / BODY_RATE_MIN)
            async with asyncio.timeout_at(deadline_s):
                chunk = await content.readany()
            if not chunk:
                return b"".join(chunks)
            budget.take(len(chunk))
            chunks.append(chunk)
            size_bytes += len(chunk)
            if size_bytes > bytes_max:
                raise _too_large(bytes_max, too_large)
    except TimeoutError as error:
        raise BodyTooSlow(
            f"the body stalled for {stall_s:g} s or is too slow ({size_bytes} bytes came): nothing was written"
        ) from error
    finally:
        budget.give_back(size_bytes)


def _too_large(bytes_max: int, reason: str | None) -> RequestError:
    if reason is not None:
        return BatchTooLarge(reason)
    return ValueTooLarge(f"a value may have {bytes_max} bytes (--max-value): nothing was written")


def _check_expectation(request: web.BaseRequest) -> None:
    """Raise `ExpectationFailed` if the client expects more than `100 Continue` (RFC 9110, 10.1.1)."""
    if request.headers.get("Expect", "100-continue").lower() != "100-continue":
        raise ExpectationFailed("send no Expect but 100-continue: nothing was written")
