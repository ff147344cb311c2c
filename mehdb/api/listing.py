"""Many keys at once, and what they were: GET /keys, POST /get and GET /history/KEY."""

import asyncio
from collections.abc import Iterable
from typing import Final
from urllib.parse import quote, urlencode

import msgspec
from aiohttp import web

from mehdb.api import lines
from mehdb.api.access import require
from mehdb.api.answers import JSON, NDJSON, Answer
from mehdb.api.bodies import Bodies
from mehdb.api.consistency import Reads
from mehdb.api.data import refuse_if_empty
from mehdb.api.requests import Parameters, Target, boolean, decode_key, revision_number
from mehdb.errors import AnswerTooLarge, BadBody, BatchTooLarge, KeyNotFound
from mehdb.model import Change, checked_key
from mehdb.parsing import whole_number
from mehdb.store import Folder, Query, Store, history, list_page
from mehdb.tokens import Right

LIMIT_DEFAULT: Final = 1000  # one screenful for a person, one round trip for a program
LIMIT_MAX: Final = 10_000  # at 1 KiB a key, 10 MiB in memory
KEYS_AT_ONCE_MAX: Final = 1000
KEYS_BYTES_MAX: Final = 8 << 20  # the longest keys, so many, with every character escaped
TOO_LARGE: Final = f"a list of keys may have {KEYS_BYTES_MAX} bytes: ask for fewer at once"
ANSWER_BYTES_MAX: Final = 16 << 20  # of values
QUICK_BYTES: Final = 256 << 10  # of values: encoded on the event loop within a millisecond


class ListingRoutes:
    """The routes that read many keys, and a key's past."""

    def __init__(self, store: Store, bodies: Bodies, reads: Reads) -> None:
        self._store = store
        self._bodies = bodies
        self._reads = reads

    async def keys(self, request: web.BaseRequest, target: Target, _rest: str) -> Answer:
        """List live keys in byte order, with their values or without: one page, and a link to the next."""
        parameters = Parameters(target.query)
        texts = {name: parameters.take(name, str, "") for name in ("prefix", "after", "before", "delimiter")}
        limit = parameters.take("limit", whole_number(1, LIMIT_MAX), LIMIT_DEFAULT)
        values = parameters.take("values", boolean, default=False)
        if answer := await self._reads.admit(request, target, parameters):
            return answer
        require(request, Right.READ, texts["prefix"].encode())
        refuse_if_empty(self._store)
        query = Query(**{name: text.encode() for name, text in texts.items()}, limit=limit, values=values)
        # Encoded in the thread of the scan as well: ten thousand keys would keep all other requests waiting meanwhile.
        page, body = await self._store.scan(
            lambda reader: (page := list_page(reader, query), _body(page.items, self._store.now_ms(), values=values))
        )
        headers = f'ETag: "{page.revision}"\r\n'
        if page.last is not None:
            cursor = texts | {"after": page.last.decode(), "limit": str(limit), "values": "true" if values else ""}
            headers += next_link("/keys", cursor)
        return Answer(body, NDJSON if values else JSON, headers=headers, revision=page.revision)

    async def several(self, request: web.BaseRequest, target: Target, _rest: str) -> Answer:
        """Answer with the values of the keys in the body, in their order, all of one state."""
        if answer := await self._reads.admit(request, target, Parameters(target.query)):
            return answer
        body = await self._bodies.read(request, KEYS_BYTES_MAX, TOO_LARGE)
        keys = _keys(body)
        for key in keys:
            require(request, Right.READ, key)
        refuse_if_empty(self._store)
        revision, changes = await self._store.several(keys, ANSWER_BYTES_MAX)
        now_ms, found = self._store.now_ms(), {change.key: change for change in changes}
        size_bytes = sum(len(found[key].value or b"") for key in keys if key in found)  # a key may be asked for twice
        if size_bytes > ANSWER_BYTES_MAX:
            raise AnswerTooLarge(
                f"the values have {size_bytes} bytes, of {ANSWER_BYTES_MAX}: ask for fewer keys at once"
            )

        def encode() -> bytes:
            return lines.encode_lines(
                lines.entry(found[key], now_ms) if key in found else lines.absent(key) for key in keys
            )

        body = encode() if size_bytes <= QUICK_BYTES else await asyncio.to_thread(encode)
        return Answer(body, NDJSON, headers=f'ETag: "{revision}"\r\n', revision=revision)

    async def history(self, request: web.BaseRequest, target: Target, rest: str) -> Answer:
        """Answer with the changes of a key that are retained, the newest first: one page, and a link to the next."""
        key = decode_key(rest)
        parameters = Parameters(target.query)
        before = parameters.take("before", revision_number, None)
        limit = parameters.take("limit", whole_number(1, LIMIT_MAX), LIMIT_DEFAULT)
        values = parameters.take("values", boolean, default=False)
        if answer := await self._reads.admit(request, target, parameters):
            return answer
        refuse_if_empty(self._store)
        past, body = await self._store.scan(
            lambda reader: (past := history(reader, key, before, limit), _changes(past.changes, values=values))
        )
        if not past.changes and before is None:
            raise KeyNotFound("this node retains no change of such a key")
        headers = f"Mehdb-Floor: {past.floor}\r\n"
        if past.more:
            oldest = str(past.changes[-1].revision)
            cursor = {"before": oldest, "limit": str(limit), "values": "true" if values else ""}
            headers += next_link(f"/history/{quote(key)}", cursor)
        newest = past.changes[0].revision if past.changes else 0
        return Answer(body, NDJSON, headers=headers, revision=newest)


def _body(items: Iterable[bytes | Change | Folder], now_ms: int, *, values: bool) -> bytes:
    """Return *items* as lines with their *values*, or as an array of names."""
    if not values:
        names = [
            item.decode() if isinstance(item, bytes) else item.prefix.decode()
            for item in items
            if not isinstance(item, Change)
        ]
        return msgspec.json.encode(names) + b"\n"
    return lines.encode_lines(
        lines.Folder(item.prefix.decode()) if isinstance(item, Folder) else lines.entry(item, now_ms)
        for item in items
        if isinstance(item, Folder | Change)
    )


def _changes(changes: Iterable[Change], *, values: bool) -> bytes:
    """Return *changes* as lines."""
    return lines.encode_lines(lines.event(change, values=values) for change in changes)


def next_link(path: str, cursor: dict[str, str]) -> str:
    """Return the header that links to the next page (RFC 8288)."""
    query = urlencode({name: value for name, value in cursor.items() if value}, quote_via=quote)
    return f'Link: <{path}?{query}>; rel="next"\r\n'


def _keys(body: bytes) -> tuple[bytes, ...]:
    """Return the keys in *body*, a JSON array. Raises `BadBody`, `BadKey` and `BatchTooLarge`."""
    try:
        texts = msgspec.json.decode(body, type=list[str])
        keys = tuple(text.encode() for text in texts)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise BadBody(f'the body must be a JSON array of keys, such as ["a","b/c"]: {error}') from error
    if not 1 <= len(keys) <= KEYS_AT_ONCE_MAX:
        kind = BatchTooLarge if keys else BadBody
        raise kind(f"{len(keys)} keys: ask for 1 to {KEYS_AT_ONCE_MAX} at once")
    for key in keys:
        checked_key(key)
    return keys
