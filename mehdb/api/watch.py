"""Changes as they come: GET /watch, as lines of JSON or as Server-Sent Events, or one long poll.

The invariant it owns: a watcher gets each change after where it began once, in order, none skipped, or is told why not.
Each one pulls at its own pace, from the store's feed or, further behind, from the disk: nothing is kept for it but what
its connection has been given.
"""

import asyncio
import logging
from asyncio import Transport
from time import monotonic
from typing import Final, NamedTuple

import msgspec
from aiohttp import web

from mehdb.api import lines
from mehdb.api.access import require, require_valid
from mehdb.api.answers import JOIN_BYTES_MAX, NDJSON, Answer, StreamedAnswer, waiting
from mehdb.api.data import refuse_if_empty
from mehdb.api.listing import next_link
from mehdb.api.node import NodeView
from mehdb.api.replicate import history_id
from mehdb.api.requests import Parameters, Target, revision_number, seconds
from mehdb.errors import BadParameter, Compacted, Diverged, MehdbError, Stopping, TooSlow
from mehdb.model import Change, Revision
from mehdb.settings import WAIT_S_MAX
from mehdb.store import Store
from mehdb.tokens import Right

log = logging.getLogger("mehdb.api")

EVENT_STREAM: Final = "text/event-stream"
HEARTBEAT_S: Final = 5.0  # of quiet: proxies and clients give up on a silent connection after 30 s or more
SLICE_CHANGES: Final = 256  # looked at in one go: a watcher must not keep the others from theirs
PIECE_BYTES: Final = 16 << 10  # sent in one go: what a stalled watcher holds, beside its socket's buffer
POLL_BYTES: Final = 1 << 20  # of a long poll's answer
LINGER_S: Final = 5.0  # for one that is cut off to read the reason
CACHED_EVENTS: Final = 1024  # what many watchers get at the same time is encoded once
CACHED_BYTES: Final = 8 << 20
RETRY_MS: Final = 1000  # after which a browser connects again


class Event(NamedTuple):
    """A line of a watch: its kind, where the watcher is after it (None: as before), and its JSON."""

    op: str
    revision: Revision | None
    line: bytes

    def text(self, *, events: bool) -> bytes:
        """Return what is sent: the line alone, or one of the Server-Sent Events.

        See https://html.spec.whatwg.org/multipage/server-sent-events.html.
        """
        if not events:
            return self.line
        identity = "" if self.revision is None else f"id: {self.revision}\n"
        return f"{identity}event: {self.op}\ndata: ".encode() + self.line + b"\n"


class Slice(NamedTuple):
    """What comes next for a watcher, and where it is when it has been given that."""

    events: list[Event]
    position: Revision


class WatchRoutes:
    """The route for those who watch."""

    def __init__(self, node: NodeView, store: Store) -> None:
        self._node = node
        self._store = store
        self._cache = EventCache()

    async def watch(self, request: web.BaseRequest, target: Target, _rest: str) -> Answer:
        """Answer with the changes after a revision, for ever or, with `wait`, with the first that come."""
        parameters = Parameters(target.query)
        prefix = parameters.take("prefix", str, "")
        after = parameters.take("after", revision_number, None)
        history = parameters.take("history", history_id, None)
        wait_s = parameters.take("wait", seconds(WAIT_S_MAX), None)
        parameters.finish()
        require(request, Right.READ, prefix.encode())
        refuse_if_empty(self._store)
        meta = self._store.meta
        if history is not None and history != meta.history:
            raise Diverged(f"this node's history is {meta.history}: list anew, and watch from there")
        after = _last_event(request, after)
        watch = Watch(self._node, self._store, self._cache, prefix.encode(), meta.head if after is None else after)
        if watch.position < meta.floor:
            raise Compacted(
                f"revision {after} is behind the floor {meta.floor}: list anew, and watch from the listing's ETag",
                floor=meta.floor,
            )
        events = EVENT_STREAM in request.headers.get("Accept", "")
        if wait_s is None:
            return WatchAnswer(watch, events=events)
        found = await watch.poll(request, wait_s)
        body = b"".join(event.text(events=events) for event in found)
        cursor = {"prefix": prefix, "after": str(watch.position), "wait": f"{wait_s:g}", "history": str(meta.history)}
        link = next_link("/watch", cursor)
        shown = max((event.revision or 0 for event in found), default=0)  # never what a client has asked after
        return Answer(body, EVENT_STREAM if events else NDJSON, headers=link, revision=shown)


class Watch:
    """One client's watch of the keys with *prefix*. It has been given all of them up to `position`."""

    def __init__(self, node: NodeView, store: Store, cache: "EventCache", prefix: bytes, position: Revision) -> None:
        self.node = node
        self.position = position
        self._store = store
        self._cache = cache
        self._prefix = prefix
        self._lineage = store.lineage

    async def next(self, bytes_max: int) -> Slice:
        """Return what the next changes are to the watcher, about *bytes_max* of it.

        Raises `Compacted`, `Diverged` (another store is in the place of the one that was watched, and not certainly a
        later state of it), `DamagedRow` and `StoreAway`.
        """
        events: list[Event] = []
        position, size_bytes = self.position, 0
        changes = await self._store.changes_after(position, SLICE_CHANGES, bytes_max)
        if self._store.lineage != self._lineage:  # looked at last: what was read is of this one
            raise Diverged("another store is in the place of the one that was watched: list anew, and watch again")
        for change in changes:
            if size_bytes >= bytes_max:
                break
            position = change.revision
            if change.key.startswith(self._prefix):
                events.append(self._cache.event(change))
                size_bytes += len(events[-1].line)
        return Slice(events, position)

    async def wait(self, request: web.BaseRequest, timeout_s: float) -> None:
        """Return when there may be more, at most after *timeout_s*. Raises `Stopping` when the node does."""
        if self.node.closing or self._store.waits_no_more:
            raise Stopping("this node stops: go on at another one, from where this one ends")
        require_valid(request)
        with waiting(request):
            await self._store.wait_to_watch(self.position, timeout_s)

    async def poll(self, request: web.BaseRequest, wait_s: float) -> list[Event]:
        """Return what comes first within *wait_s*, about `POLL_BYTES`, and take it as given."""
        end_s = monotonic() + wait_s
        while True:
            events, self.position = await self.next(POLL_BYTES)
            require_valid(request)
            left_s = end_s - monotonic()
            if events or left_s <= 0:
                return events
            try:
                await self.wait(request, left_s)
            except Stopping:
                return []


class WatchAnswer(StreamedAnswer):
    """The stream of a watch, as lines or as *events*."""

    def __init__(self, watch: Watch, *, events: bool) -> None:
        super().__init__(b"", EVENT_STREAM if events else NDJSON, headers="Cache-Control: no-store\r\n")
        self.content_bytes = None
        self.ends_connection = True
        self._watch = watch
        self._events = events

    async def send(self, request: web.BaseRequest) -> None:
        """Send what comes, until the client goes or there is a reason to end."""
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has gone")
        transport.write(self._head)
        if self._events:
            self._write(transport, b"retry: %d\n\n" % RETRY_MS)
        with self._watch.node.watching():
            try:
                await self._stream(request, transport)
            except MehdbError as reason:
                self._end(transport, reason)
            except ConnectionError:
                raise  # the client has gone: nobody is left to tell
            except Exception:  # an answer is under way: another one must not be put into it
                log.exception("unexpected route=%s method=%s", "/watch", request.method)
                self._end(transport, MehdbError("an unexpected error, see the node's log: watch again"))

    async def _stream(self, request: web.BaseRequest, transport: Transport) -> None:
        watch = self._watch
        await self._give(request, transport, _heartbeat(watch.position))
        beat_at_s = monotonic() + HEARTBEAT_S
        while True:
            found = await watch.next(PIECE_BYTES)
            if found.events:
                await self._give(request, transport, found)
                beat_at_s = monotonic() + HEARTBEAT_S
                continue
            if found.position > watch.position:  # nothing of it is the watcher's: that need not be told at once
                watch.position = found.position
                continue
            if monotonic() >= beat_at_s:
                await self._give(request, transport, _heartbeat(watch.position))
                beat_at_s = monotonic() + HEARTBEAT_S
            await watch.wait(request, beat_at_s - monotonic())

    async def _give(self, request: web.BaseRequest, transport: Transport, found: Slice) -> None:
        """Hand over what was *found*, to a client that reads it.

        Raises `TooSlow` for one that does not, and `QueueFull` where too many large values are on their way already.
        """
        if transport.is_closing():
            raise ConnectionResetError("the client has gone")
        require_valid(request)  # a token may be taken back meanwhile
        texts = [event.text(events=self._events) for event in found.events]
        large_bytes = sum(len(text) for text in texts if len(text) > JOIN_BYTES_MAX)
        if large_bytes:
            self._sending.require(large_bytes)
            self._sending.goes_on(transport, large_bytes)
        try:
            if large_bytes:
                for text in texts:
                    self._write(transport, text)
            else:
                self._write(transport, b"".join(texts))
            self._watch.position = found.position
            if request.protocol.writing_paused:
                async with asyncio.timeout(self._sending.stall_s):
                    await request.writer.drain()
        except TimeoutError as error:
            raise TooSlow(
                f"nothing was read for {self._sending.stall_s:g} s: go on from where this ends, and read faster"
            ) from error
        finally:
            if large_bytes:
                self._sending.ends(transport)

    def _write(self, transport: Transport, text: bytes) -> None:
        """Put *text* on its way, whole: a stream that is cut off ends between two lines."""
        transport.writelines((b"%x\r\n" % len(text), text, b"\r\n") if self._chunked else (text,))

    def _end(self, transport: Transport, reason: MehdbError) -> None:
        """Say why the stream ends, and end it once that has been read, or after a while."""
        told = {"op": "error", "error": reason.code, "message": str(reason), "revision": self._watch.position}
        line = msgspec.json.encode(told | dict(reason.details)) + b"\n"
        self._write(transport, Event("error", None, line).text(events=self._events))
        if self._chunked:
            transport.write(b"0\r\n\r\n")
        transport.close()
        asyncio.get_running_loop().call_later(LINGER_S, transport.abort)


class EventCache:
    """The events of the newest changes, encoded once for all watchers."""

    def __init__(self) -> None:
        self._events: dict[Revision, tuple[Change, Event]] = {}
        self._bytes = 0

    def event(self, change: Change) -> Event:
        """Return what *change* is to a watcher."""
        cached = self._events.get(change.revision)
        if cached is not None and cached[0] is change:  # not one of another history, or read from the disk again
            return cached[1]
        event = _event(change)
        self._drop(change.revision)
        self._events[change.revision] = (change, event)
        self._bytes += len(event.line)
        while len(self._events) > CACHED_EVENTS or (self._bytes > CACHED_BYTES and len(self._events) > 1):
            self._drop(next(iter(self._events)))
        return event

    def _drop(self, revision: Revision) -> None:
        dropped = self._events.pop(revision, None)
        if dropped is not None:
            self._bytes -= len(dropped[1].line)


def _event(change: Change) -> Event:
    line = lines.event(change)
    return Event(str(line.op), change.revision, lines.encode_lines([line]))


def _heartbeat(position: Revision) -> Slice:
    """Return what tells a watcher that it has been given everything up to *position*."""
    line = b'{"op":"heartbeat","revision":%d}\n' % position
    return Slice([Event("heartbeat", position, line)], position)


def _last_event(request: web.BaseRequest, after: Revision | None) -> Revision | None:
    """Return the revision that a client that reconnects has had last, or *after*. Raises `BadParameter`."""
    text = request.headers.get("Last-Event-ID")
    if text is None:
        return after
    try:
        return revision_number(text)
    except ValueError as error:
        raise BadParameter(f"Last-Event-ID: {error}") from error
