"""Entries and changes as lines of JSON (NDJSON): in listings, answers to many keys, histories and watches.

Bytes that are no UTF-8 cannot stand in JSON: such a value is in `base64`, any other in `value`.
"""

import base64
from typing import Final

import msgspec
from msgspec import UNSET, UnsetType

from mehdb.model import Change, Revision


class Line(msgspec.Struct, gc=False):
    """One line. What is unset is left out. *ttl* and *expires_at* are in seconds: left, and since the Unix epoch."""

    op: str | UnsetType
    key: str
    revision: Revision
    size: int | UnsetType = UNSET
    content_type: str | UnsetType | None = UNSET
    value: str | UnsetType = UNSET
    base64: str | UnsetType = UNSET
    ttl: float | UnsetType = UNSET
    expires_at: float | UnsetType = UNSET


class Folder(msgspec.Struct, gc=False):
    """A line of a listing that stands for all keys with a prefix."""

    prefix: str


encode_lines: Final = msgspec.json.Encoder().encode_lines


def entry(change: Change, now_ms: int) -> Line:
    """Return the line of what a key is live with."""
    assert change.value is not None, "a deletion is no entry"  # noqa: S101  our own invariant
    line = Line(UNSET, change.key.decode(), change.revision, len(change.value), change.content_type)
    _put_value(line, change.value)
    if change.expires_at is not None:
        line.ttl = ttl_s(change.expires_at, now_ms)
    return line


def absent(key: bytes) -> Line:
    """Return the line of a key that is not live: it is at revision 0."""
    return Line(UNSET, key.decode(), Revision(0))


def event(change: Change, *, values: bool = True) -> Line:
    """Return the line of a change as it was made, with its value or without."""
    if change.value is None:
        return Line("delete", change.key.decode(), change.revision)
    line = Line("set", change.key.decode(), change.revision, len(change.value), change.content_type)
    if values:
        _put_value(line, change.value)
    if change.expires_at is not None:
        line.expires_at = change.expires_at / 1000
    return line


def ttl_s(expires_at_ms: int, now_ms: int) -> float:
    """Return how long something lives on. What should have gone already goes at once."""
    return max(0, expires_at_ms - now_ms) / 1000


def _put_value(line: Line, value: bytes) -> None:
    try:
        line.value = value.decode()
    except UnicodeDecodeError:
        line.base64 = base64.b64encode(value).decode()
