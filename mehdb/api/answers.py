"""A whole answer and its wire form.

aiohttp's `Response` builds a header map, copies it, completes it and serialises it: a quarter of the time of a point
read. Here the head is one string, written with the body in one go. Answers that are streamed use aiohttp's own.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from http import HTTPStatus
from operator import itemgetter
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, Final, TypeVar

import aiofiles
import msgspec
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from mehdb.errors import BodyTooSlow, MehdbError, MethodNotAllowed, QueueFull, Unauthorized

T = TypeVar("T")

TEXT: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"
NDJSON: Final = "application/x-ndjson"
JOIN_BYTES_MAX: Final = 1 << 16  # below this, copying a body behind its head is cheaper than a second system call
STATUS_LINES: Final = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}
BODILESS: Final = frozenset({204, 304})  # RFC 9110, 6.4.1
BODY_RATE_MIN: Final = 64 << 10  # bytes per second, in the long run, either way: slower only holds memory and a socket
WAITED_S: Final = web.RequestKey("mehdb_waited_s", float)
"""In a request: for how long it has waited for a change. Who asks for a long poll does not call that slow."""
HEARTBEAT: Final = "Mehdb-Heartbeat"  # asked for by name: not every client passes over a 102
BEAT_S: Final = 1.0  # two may be lost to a busy machine before a peer gives up
FILE_CHUNK_BYTES: Final = 1 << 18  # amortises the thread that reads it
FILE_STALL_S: Final = 5.0  # for a chunk of a file: whoever waits for their turn is another node
FILE_RATE_MIN: Final = 1 << 20  # bytes per second, in the long run, for the same reason: a file takes room, too
PIECE_BYTES: Final = 256 << 10  # of a large answer: few waits, and a client at the lowest rate takes one in seconds
STALLED_S: Final = PIECE_BYTES / BODY_RATE_MIN  # a client that has taken no piece for so long makes room for others


class Sending:
    """Bounds the memory of the large answers under way, all together. Those that stall make room for others."""

    def __init__(self, bytes_max: int, stall_s: float) -> None:
        self.stall_s = stall_s  # how long a client may take nothing
        self._bytes_max = bytes_max
        self._under_way: dict[asyncio.Transport, tuple[float, int]] = {}  # when a piece was last taken, and the size

    def require(self, size_bytes: int) -> None:
        """Make room for that many bytes more, or raise `QueueFull`. One answer alone always has it."""
        free_bytes = self._bytes_max - sum(size for _, size in self._under_way.values())
        if free_bytes >= size_bytes:
            return
        stalled_since_s = monotonic() - STALLED_S
        for transport, (moved_at_s, size) in sorted(self._under_way.items(), key=itemgetter(1)):
            if free_bytes >= size_bytes or moved_at_s > stalled_since_s:
                break
            transport.abort()
            del self._under_way[transport]
            free_bytes += size
        if free_bytes < size_bytes and self._under_way:
            raise QueueFull("too many bytes of answers wait for their clients to read them: try again in a moment")

    def goes_on(self, transport: asyncio.Transport, size_bytes: int) -> None:
        """Hold that many bytes for the client behind *transport*, which takes its next piece now."""
        self._under_way[transport] = (monotonic(), size_bytes)

    def ends(self, transport: asyncio.Transport) -> None:
        """Hold nothing more for it."""
        self._under_way.pop(transport, None)


class Answer(web.StreamResponse):
    """A status, a body and headers.

    *headers* holds whole lines, each ended by CR LF. *revision* is what the answer shows of the store, if that may be
    newer than the head known when it is sent.
    """

    def __init__(
        self,
        body: bytes = b"",
        content_type: str = TEXT,
        *,
        status: int = 200,
        headers: str = "",
        revision: int = 0,
    ) -> None:
        super().__init__(status=status)
        self.content = body
        self.content_type_line = content_type
        self.header_lines = headers
        self.revision = revision
        self.content_bytes: int | None = len(body)
        """The length of the body; None if only its end will tell."""
        self._head = b""
        self._chunked = False
        self.ends_connection = False
        """Whether no other request is taken on the connection."""

    @property
    def keep_alive(self) -> bool | None:
        """Whether the connection may take another request."""
        return self._keep_alive

    def complete(self, request: web.BaseRequest, common_headers: str, sending: Sending, *, last: bool) -> None:
        """Serialise the head, with the headers that every answer bears. *last* ends the connection after it."""
        self._sending = sending
        # A client that still waits for `100 Continue` may send its body after a final answer, or may not (RFC 9110,
        # 10.1.1), and so may one that was too slow: only the end of the connection tells the next request from a body
        # that comes after all.
        owes_body = not request.content.is_eof() and ("Expect" in request.headers or self.status == BodyTooSlow.status)
        # After CONNECT a client may talk to the one that it believes to be at the other end (RFC 9110, 9.3.6).
        self._keep_alive = request.keep_alive and not (
            owes_body or last or self.ends_connection or request.method == "CONNECT"
        )
        self._chunked = self.content_bytes is None and request.version >= (1, 1)
        lines = [STATUS_LINES[self.status], common_headers, self.header_lines]
        if self.status not in BODILESS:
            lines.append(f"Content-Type: {self.content_type_line}\r\n")
            if self.content_bytes is not None:
                lines.append(f"Content-Length: {self.content_bytes}\r\n")
            elif self._chunked:
                lines.append("Transfer-Encoding: chunked\r\n")
        if not self._keep_alive:
            lines.append("Connection: close\r\n")
        elif request.version < (1, 1):
            lines.append("Connection: keep-alive\r\n")
        lines.append("\r\n")
        # A target echoed in Location may hold bytes that are no UTF-8: aiohttp decoded them as surrogates.
        self._head = "".join(lines).encode("utf-8", "surrogateescape")
        if request.method == "HEAD" or self.status in BODILESS:
            self.content = b""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Send all of it. Its end may still wait in the kernel, and little of it here, for the client to read."""
        writer = request.writer
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has gone")
        try:
            if len(self.content) > JOIN_BYTES_MAX:
                await self._send_slowly(writer, transport)
            else:
                await writer.write(self._head + self.content)
                if request.protocol.writing_paused:  # or answers pile up for a client that asks on and never reads
                    async with asyncio.timeout(self._sending.stall_s):
                        await writer.drain()
        except TimeoutError as error:
            transport.abort()
            raise ConnectionResetError("the client reads too slowly") from error
        return writer

    async def _send_slowly(self, writer: AbstractStreamWriter, transport: asyncio.Transport) -> None:
        """Send a large body to a client that may read it slowly, but not so slowly that it only holds the memory."""
        sending, clock = self._sending, asyncio.get_running_loop().time
        started_at_s = clock()
        content, size_bytes = memoryview(self.content), len(self.content)
        try:
            await writer.write(self._head)
            for start in range(0, size_bytes, PIECE_BYTES):
                sending.goes_on(transport, size_bytes)
                due_s = started_at_s + (start + PIECE_BYTES) / BODY_RATE_MIN
                async with asyncio.timeout_at(min(clock(), due_s) + sending.stall_s):
                    await writer.write(content[start : start + PIECE_BYTES])
                    await writer.drain()
        finally:
            sending.ends(transport)

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing more: `prepare` has sent it all."""


class StreamedAnswer(Answer):
    """An answer whose body is sent as it comes, by `send`."""

    async def send(self, request: web.BaseRequest) -> None:
        """Send head and body."""
        raise NotImplementedError

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Do nothing more: `send` has sent it all."""
        return request.writer


class FileAnswer(StreamedAnswer):
    """A whole file, sent in pieces. *on_sent* is told how much has been, *close* called when all has, or cannot be."""

    def __init__(
        self, path: Path, size_bytes: int, headers: str, on_sent: Callable[[int], None], close: Callable[[], None]
    ) -> None:
        super().__init__(b"", "application/vnd.sqlite3", headers=headers)
        self.content_bytes = size_bytes
        self._path = path
        self._on_sent = on_sent
        self._close = close

    async def send(self, request: web.BaseRequest) -> None:
        """Send it to a client that may read slowly, but must go on reading."""
        try:
            clock = asyncio.get_running_loop().time
            sent_bytes = 0
            due_s = clock()  # when the next chunk ought to go out, at the lowest rate
            async with asyncio.timeout(FILE_STALL_S):
                await request.writer.write(self._head)
            async with aiofiles.open(self._path, "rb") as file:
                while chunk := await file.read(FILE_CHUNK_BYTES):
                    async with asyncio.timeout_at(min(clock(), due_s) + FILE_STALL_S):
                        await request.writer.write(chunk)
                    due_s += len(chunk) / FILE_RATE_MIN
                    sent_bytes += len(chunk)
                    self._on_sent(sent_bytes)
        except TimeoutError as error:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the client reads too slowly") from error
        finally:
            self._close()


def json_answer(value: object, *, status: int = 200, headers: str = "") -> Answer:
    """Return *value* as JSON on one line."""
    return Answer(msgspec.json.encode(value) + b"\n", JSON, status=status, headers=headers)


def error_answer(error: MehdbError) -> Answer:
    """Return *error* as JSON: `error` (a stable code), `message` (what to do next), `status`, and its details."""
    headers = ""
    if error.retry_after_s is not None:
        headers += f"Retry-After: {error.retry_after_s}\r\n"
    if isinstance(error, Unauthorized):
        headers += 'WWW-Authenticate: Bearer realm="mehdb"\r\n'
    if isinstance(error, MethodNotAllowed):
        headers += f"Allow: {error.allowed}\r\n"
    if error.etag and error.details.get("revision"):
        headers += f'ETag: "{error.details["revision"]}"\r\n'
    body = {"error": error.code, "message": str(error), "status": error.status, **error.details}
    return json_answer(body, status=error.status, headers=headers)


@contextlib.contextmanager
def waiting(request: web.BaseRequest) -> Iterator[None]:
    """Have the connection count as idle while the block waits for a change: a probe may need its place.

    Nor is that time of the answer's duration: see `WAITED_S`.
    """
    connection: Any = request.protocol  # each is a `server._Connection`
    connection.waits_for_change = True
    began_s = perf_counter()
    try:
        yield
    finally:
        connection.waits_for_change = False
        request[WAITED_S] = request.get(WAITED_S, 0.0) + perf_counter() - began_s


async def heard(request: web.BaseRequest, work: Coroutine[Any, Any, T]) -> T:
    """Return what *work* gives. Until it does, tell a peer each second that somebody is at it (102, RFC 2518).

    So a client need not wait long for a leader that has gone without a word, however long an answer may take.
    """
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait([task], timeout=BEAT_S))[0]:
            if request.transport is not None and HEARTBEAT in request.headers:
                request.transport.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])  # it may have a file to clear away
