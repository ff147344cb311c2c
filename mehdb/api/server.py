"""Connections: how many there may be, how long a request's head may take, and answers to what cannot be parsed.

aiohttp's server, but what its parser refuses is answered like every other error, and nobody can hold connections that
others need. Other bounds are where the bytes are: on bodies in `requests`, on answers in `answers`.
"""

import heapq
import logging
import re
import resource
from asyncio import BaseTransport, Task, TimerHandle
from operator import itemgetter
from time import monotonic
from typing import Any, Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import _ErrInfo

from mehdb.api.app import Api
from mehdb.api.handshake import Connection, Patience
from mehdb.errors import HeadTooSlow, MalformedRequest, MehdbError, RequestError

log = logging.getLogger("mehdb.api")

RESERVED_DESCRIPTORS: Final = 128  # for the store, other nodes, the log, and connections accepted but not counted yet
HEAD_BYTES_MAX: Final = 32 << 10  # of a head that comes in pieces: what many half-sent ones hold together is bounded
HEADERS_MAX: Final = 64  # with aiohttp's 8 KiB for each
PICKED_AT_ONCE: Final = 64  # looking through all connections for those to close is shared by so many new ones
CALM_S: Final = 60.0  # without too many connections, before the next time is told again


class ApiServer(web.Server):
    """A server whose requests, well-formed or not, are answered by *api*. *options* are those of a connection.

    It has at most *connections_max* connections, or as many as the file descriptors allow. One more takes the place of
    the one that has waited longest for its client, so that an attacker's idle connections never keep out a probe.
    """

    def __init__(self, api: Api, *, connections_max: int, head_timeout_s: float, **options: Any) -> None:
        super().__init__(api, request_factory=self._request, max_headers=HEADERS_MAX, **options)
        self.api = api
        self.head_timeout_s = head_timeout_s
        self._connections_max = _allowed(connections_max)
        self._open: set[Connection] = set()
        self._picked: list[tuple[Patience, Connection]] = []
        self._crowded_at_s = -CALM_S

    def __call__(self) -> web.RequestHandler:
        """Return the protocol of a new connection."""
        return _Connection(self, loop=self._loop, **self._kwargs)

    def opened(self, connection: "Connection") -> None:
        """Count *connection*, and close another for it, or it, if that is one too many."""
        self._open.add(connection)
        if len(self._open) > self._connections_max:
            self._tell_crowd()
            unlucky = self._most_patient(connection)
            self._open.discard(unlucky)
            unlucky.abort()

    def closed(self, connection: "Connection") -> None:
        """Count *connection* no longer."""
        self._open.discard(connection)

    def _request(
        self,
        message: Any,
        content: StreamReader,
        connection: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: "Task[None]",
    ) -> web.BaseRequest:
        connection.content = content  # type: ignore[attr-defined]  # each is a _Connection: a check would cost each request
        return web.BaseRequest(message, content, connection, writer, task, self._loop)

    def _most_patient(self, newest: "Connection") -> "Connection":
        """Return the connection that has waited longest for its client; *newest* if none waits."""
        for again in (True, False):
            while self._picked:
                patience, connection = self._picked.pop()
                if connection in self._open and connection.patience == patience:  # nothing came since it was picked
                    return connection
            if again:
                waiting = [(so_far, one) for one in self._open if one is not newest and (so_far := one.patience)]
                # A request under way is closed only where nothing else is: never one that was picked beforehand.
                idle = [pair for pair in waiting if not pair[0].in_request]
                self._picked = heapq.nsmallest(PICKED_AT_ONCE if idle else 1, idle or waiting, key=itemgetter(0))[::-1]
        return newest

    def _tell_crowd(self) -> None:
        """Log the first connection too many, and again only after a time without."""
        now = monotonic()
        if now - self._crowded_at_s >= CALM_S:
            log.warning("too many connections, closing the longest idle max_connections=%d", self._connections_max)
        self._crowded_at_s = now


class _Connection(web.RequestHandler):
    """One connection. aiohttp has no public way to say in which state one is, so its private attributes tell."""

    __slots__ = ("_head_bytes", "_head_timer", "_server", "content", "waits_for_change")

    def __init__(self, server: ApiServer, **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server
        self._head_bytes = 0
        self._head_timer: TimerHandle | None = None
        self.content = EMPTY_PAYLOAD
        """The body of the request under way, or of the last: it comes in while an answer is made, or after that."""
        self.waits_for_change = False
        """Whether the answer waits for something to happen: a client that asked for that can ask again."""

    def connection_made(self, transport: BaseTransport) -> None:
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._await_head()
        self._server.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Wait no longer."""
        self._server.closed(self)
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse *data*, and see that the head of a request does not take too long."""
        requests = self._request_count
        content = self._messages[-1][1] if self._messages else self.content
        in_head = content.is_eof() and not self._upgraded and not self._buffer_paused
        super().data_received(data)
        if self._request_count != requests or not in_head:
            if self._head_timer is not None:
                self._head_came()
        elif self._head_bytes or data.strip(b"\r\n"):  # empty lines before a request are none (RFC 9112, 2.2)
            self._head_bytes += len(data)
            if self._head_timer is None:
                self._await_head()
            if self._head_bytes > HEAD_BYTES_MAX:
                self._refuse(MalformedRequest(f"the request's head has more than {HEAD_BYTES_MAX} bytes: send less"))

    @property
    def patience(self) -> Patience | None:
        """How long the client has been waited for; None if it waits for us."""
        # aiohttp takes down a moment that lies one and the same time after the last answer, or the opening.
        since = self._next_keepalive_close_time
        if not self._request_count or (self._waiter is not None and not self._waiter.done()):
            return Patience(in_request=False, since=since)
        if self.waits_for_change or self.writing_paused or not self.content.is_eof():
            return Patience(in_request=True, since=since)
        return None

    def abort(self) -> None:
        """Close the connection at once."""
        if self.transport is not None:
            self.transport.abort()

    def _await_head(self) -> None:
        """Give the head its time. aiohttp's timer, for the time between requests, does not count meanwhile."""
        self.keep_alive(True)
        self._head_timer = self._loop.call_later(self._server.head_timeout_s, self._head_late)

    def _head_came(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = None
        self._head_bytes = 0

    def _head_late(self) -> None:
        if self._head_bytes:
            patience_s = self._server.head_timeout_s
            self._refuse(HeadTooSlow(f"the request's head took more than {patience_s:g} s: send it in one go"))
        else:
            self.force_close()

    def _refuse(self, error: RequestError) -> None:
        """Answer *error* to a head that is not whole, after what was asked before, as if the parser had refused it."""
        self._head_came()
        self._messages.append((_ErrInfo(error.status, error, str(error)), EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,  # noqa: ARG002  aiohttp's signature
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what could not be parsed. What a handler raises never comes here."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer is under way: only the end of the connection can tell")
        return self._server.api.refuse(request, exc if isinstance(exc, MehdbError) else _malformed(message))


def _allowed(connections_max: int) -> int:
    """Return how many connections the file descriptors allow, at most *connections_max*, raising their soft limit."""
    wanted = connections_max + RESERVED_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            allowed = max(1, soft - RESERVED_DESCRIPTORS)
            log.warning("fewer connections max_connections=%d file_descriptors=%d", allowed, soft)
            return allowed
    return connections_max


def _malformed(reason: str | None) -> MalformedRequest:
    """Return the error for a request that aiohttp's parser refuses for *reason*."""
    what = re.split(r"[:\n]", reason or "it cannot be read")[0]  # without the bytes that the parser quotes behind it
    advice = "percent-encode what is no ASCII in the target" if "url" in what else "send HTTP/1.1 (RFC 9112)"
    return MalformedRequest(f"the request is malformed ({what}): {advice}")
