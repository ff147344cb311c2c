"""What nodes answer, read: entries, listings page by page, and the lines of a watch. Nothing is asked twice here."""

import base64
import re
from collections.abc import Iterator
from typing import Final
from urllib.parse import quote, urlencode

import msgspec

from mehdb.client.http import Answer, Client, Request
from mehdb.errors import PeerAnswerInvalid

PAGE_KEYS: Final = 10_000  # the most that a node lists at once
NEXT: Final = re.compile(r'<(/keys\?[^>]*)>; rel="next"')


class Entry(msgspec.Struct, frozen=True):
    """A key with its value. Revision 0: there is no such key. *ttl* is in seconds, None for no end."""

    key: str
    revision: int
    content_type: str | None = None
    value: str | None = None
    base64: str | None = None
    ttl: float | None = None

    @property
    def data(self) -> bytes | None:
        """The value as it was written; None where there is none. Raises `PeerAnswerInvalid`."""
        if self.base64 is None:
            return None if self.value is None else self.value.encode()
        try:
            return base64.b64decode(self.base64, validate=True)
        except ValueError as error:  # not only binascii.Error: it may hold what is no ASCII
            raise PeerAnswerInvalid(f"the value of {self.key!r} is no base64: {error}") from error


class Event(msgspec.Struct, frozen=True):
    """A line of a watch: a change, a heartbeat, or why it ends."""

    op: str
    revision: int = 0
    error: str = ""
    message: str = ""


_entries = msgspec.json.Decoder(Entry)
_events = msgspec.json.Decoder(Event)
_keys = msgspec.json.Decoder(list[str])


def decode_event(line: bytes) -> Event:
    """Return the event on *line*. Raises `PeerAnswerInvalid`."""
    try:
        return _events.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PeerAnswerInvalid(f"not a line of a watch: {error}") from error


def decode_keys(body: bytes) -> list[str]:
    """Return the keys in *body*. Raises `PeerAnswerInvalid`."""
    try:
        return _keys.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PeerAnswerInvalid(f"not a listing: {error}") from error


def decode_entries(body: bytes) -> list[Entry]:
    """Return the entries in *body*. Raises `PeerAnswerInvalid`."""
    try:
        return _entries.decode_lines(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PeerAnswerInvalid(f"not a listing with values: {error}") from error


def list_keys(client: Client, prefix: str, delimiter: str = "") -> Iterator[str]:
    """Yield the keys that begin with *prefix*, in byte order; with *delimiter*, folders for what is in them."""
    for page in _pages(client, {"prefix": prefix, "delimiter": delimiter, "limit": str(PAGE_KEYS)}):
        yield from decode_keys(page.body)


def list_entries(client: Client, prefix: str) -> Iterator[Entry]:
    """Yield the keys that begin with *prefix*, in byte order, with their values: a page at a time in memory."""
    for page in _pages(client, {"prefix": prefix, "values": "true", "limit": str(PAGE_KEYS)}):
        yield from decode_entries(page.body)


def several(client: Client, keys: list[str], staleness_s_max: int) -> list[Entry] | None:
    """Return the entries of *keys*, in their order; None if that is more than an answer holds."""
    answer = client.ask(Request("POST", f"/get?max_staleness={staleness_s_max}", msgspec.json.encode(keys)))
    if answer.status == 413:
        return None
    if answer.status != 200:
        raise answer.refused()
    return decode_entries(answer.body)


def query(path: str, parameters: dict[str, str]) -> str:
    """Return *path* with those of *parameters* that have a value."""
    text = urlencode({name: value for name, value in parameters.items() if value}, quote_via=quote)
    return f"{path}?{text}" if text else path


def _pages(client: Client, parameters: dict[str, str]) -> Iterator[Answer]:
    """Yield each page of a listing. A page that has come is not asked for again, whichever node gives the next."""
    target = query("/keys", parameters)
    while True:
        answer = client.ask(Request("GET", target))
        if answer.status != 200:
            raise answer.refused()
        yield answer
        link = NEXT.search(answer.headers.get("Link", ""))
        if link is None:
            return
        if link[1] == target:
            raise PeerAnswerInvalid(f"{answer.url}: a page that links to itself")
        target = link[1]
