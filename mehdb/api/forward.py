"""What a follower answers to what only the leader can: where the leader is, or the leader's own answer.

A request is passed on once at most: it then bears `Mehdb-Forwarded`, and a follower that gets it neither passes it on
nor redirects, so that nodes that take each other for the leader do not send it around for ever. The body is read within
the same bounds as on the leader, the answer goes through piece by piece. Nothing of either is interpreted.
"""

import asyncio
import re
from typing import Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from mehdb.api.answers import BODILESS, BODY_RATE_MIN, JOIN_BYTES_MAX, STATUS_LINES, Answer, Sending, json_answer
from mehdb.api.bodies import Bodies
from mehdb.api.node import NodeView
from mehdb.api.requests import Parameters, Target, boolean, seconds
from mehdb.credentials import Credentials
from mehdb.errors import Draining, NotLeader, OutcomeUnknown
from mehdb.peers import Peer, Relay, Relayed
from mehdb.settings import WAIT_S_MAX, Settings

FORWARDED: Final = "Mehdb-Forwarded"
CONNECTIONS_MAX: Final = 128  # to the leader: each holds a request under way, and its body
BODY_BYTES_LEAST: Final = 8 << 20  # what a batch may have, however small the largest value is
WAIT_S: Final = 5.0  # what a request may wait for on the leader, where it does not say
ANSWER_S: Final = 10.0  # beyond that, until the head of an answer: a leader under load commits within seconds
ASKED: Final = ("Authorization", "Content-Type", "Accept", "If-Match", "If-None-Match")  # of a request, to the leader
ANSWERED: Final = frozenset(
    b"allow date etag link retry-after server www-authenticate x-content-type-options".split()
)  # of an answer, to the client, beside what frames it; and all that begin with:
OURS: Final = b"mehdb-"
NOT_IN_TARGET: Final = re.compile(rb"[^\x21-\x7e]")  # RFC 9112, 3.2: what some clients send all the same
NO_BODY: Final = BODILESS | {304}
WRITE_ELSEWHERE: Final = (
    "nothing was written: this node follows. Send the same request to the Location (with curl: add -L)"
)
READ_ELSEWHERE: Final = "this node follows: send the same request to the Location (with curl: add -L)"


class ToLeader:
    """Sends what this node cannot do, as it follows, to its leader. *bodies* bounds those that it holds."""

    def __init__(self, node: NodeView, settings: Settings, bodies: Bodies, credentials: Credentials) -> None:
        self._node = node
        self._settings = settings
        self.bodies = bodies
        at = node.leader_at
        self._leader = Peer(at.url, credentials, CONNECTIONS_MAX, at) if at is not None else None

    async def close(self) -> None:
        """Close the connections to the leader."""
        if self._leader is not None:
            await self._leader.disconnect()

    async def write(self, request: web.BaseRequest, target: Target, parameters: Parameters) -> Answer | None:
        """Return what a follower answers to a write, before its body is read here; None on the leader.

        It takes `forward` out of *parameters*. Raises `Draining`, `NotLeader`, `LeaderUnreachable`, `OutcomeUnknown`,
        and what `Bodies.read` does.
        """
        forward = parameters.take("forward", boolean, self._settings.forward_writes)
        if self._leader is None:
            return None
        wait_s = parameters.take("wait", seconds(WAIT_S_MAX), max(WAIT_S, self._settings.acks_timeout))
        if self._node.leader_leaves:
            raise Draining("the leader is about to restart, nothing was written: try again in a moment")
        return await self._elsewhere(request, target, WRITE_ELSEWHERE, wait_s if forward else None)

    async def read(self, request: web.BaseRequest, target: Target, *, forward: bool, wait_s: float) -> Answer:
        """Return what a follower answers to a read that the leader must answer, which may take *wait_s*."""
        return await self._elsewhere(request, target, READ_ELSEWHERE, wait_s if forward else None)

    async def _elsewhere(
        self, request: web.BaseRequest, target: Target, message: str, forward_wait_s: float | None
    ) -> Answer:
        if FORWARDED in request.headers:
            raise NotLeader(
                "nothing was written: the node that passed this on takes this one for the leader, and it follows: see "
                "to the settings of both"
            )
        if forward_wait_s is not None and self._leader is not None:
            return await self._forward(request, target, self._leader, forward_wait_s)
        body = {"error": NotLeader.code, "message": message, "status": 307}
        return json_answer(body, status=307, headers=f"Location: {self._node.redirect_url}{target.text}\r\n")

    async def _forward(self, request: web.BaseRequest, target: Target, leader: Peer, wait_s: float) -> Answer:
        body = await self.bodies.read(request, max(self.bodies.value_bytes_max, BODY_BYTES_LEAST))
        with self.bodies.held(len(body)):
            relay = Relay(request.method, _raw(target), _headers(request, self._node.name), body)
            relayed = await leader.forward(relay, wait_s + ANSWER_S)
        if relayed.status not in STATUS_LINES:
            await relayed.close()
            raise OutcomeUnknown(f"what answered has status {relayed.status}, as no node does: who is at its address?")
        return await _answer(relayed, request, self._node.name)


class RelayedAnswer(Answer):
    """The leader's answer. *rest* is its body where that still has to come, None where *body* is all of it."""

    def __init__(
        self, status: int, content_type: str, headers: str, size_bytes: int | None, body: bytes, rest: Relayed | None
    ) -> None:
        super().__init__(body, content_type, status=status, headers=headers)
        self.content_bytes = size_bytes
        self._rest = rest

    def complete(self, request: web.BaseRequest, common_headers: str, sending: Sending, *, last: bool) -> None:  # noqa: ARG002
        """Serialise the head: in place of this node's headers, those that came with the answer."""
        super().complete(request, "", sending, last=last)

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Send it, as it comes. If its end does not come, the end of the connection tells the client."""
        if self._rest is None:
            return await super().prepare(request)
        transport = request.transport
        try:
            if transport is None:
                raise ConnectionResetError("the client has gone")
            await self._pass_through(request.writer, self._rest)
        except (TimeoutError, OutcomeUnknown) as error:
            if transport is not None:
                transport.abort()
            raise ConnectionResetError("the client reads too slowly, or the leader has gone") from error
        finally:
            await self._rest.close()
        return request.writer

    async def _pass_through(self, writer: AbstractStreamWriter, rest: Relayed) -> None:
        """Send a body to a client that may read it slowly, but must go on reading, while it comes."""
        clock, stall_s = asyncio.get_running_loop().time, self._sending.stall_s
        due_s = clock()  # when the next piece ought to go out, at the lowest rate
        await writer.write(self._head)
        async for chunk in rest.chunks():
            due_s += len(chunk) / BODY_RATE_MIN
            async with asyncio.timeout_at(min(clock(), due_s) + stall_s):
                await writer.write(b"%x\r\n" % len(chunk) + chunk + b"\r\n" if self._chunked else chunk)
                await writer.drain()
        if self._chunked:
            await writer.write(b"0\r\n\r\n")


async def _answer(relayed: Relayed, request: web.BaseRequest, node: str) -> RelayedAnswer:
    """Return what to answer: a short body whole, so that one whose end does not come can still be told as an error."""
    status, size_bytes = relayed.status, relayed.size_bytes
    bodiless = request.method == "HEAD" or status in NO_BODY
    whole = bodiless or (size_bytes is not None and size_bytes <= JOIN_BYTES_MAX)
    body = b""
    if whole:
        try:
            body = b"".join([chunk async for chunk in relayed.chunks()])
        finally:
            await relayed.close()
    lines = [
        b"%b: %b\r\n" % (name, value)
        for name, value in relayed.headers
        if name.lower() in ANSWERED or name.lower().startswith(OURS)
    ]
    headers = b"".join(lines).decode("utf-8", "surrogateescape") + f"Via: 1.1 {node}\r\n"
    told_bytes = len(body) if whole and size_bytes is None else size_bytes
    return RelayedAnswer(status, relayed.content_type, headers, told_bytes, body, None if whole else relayed)


def _raw(target: Target) -> bytes:
    """Return the target's bytes as they came, but what HTTP has no place for percent-encoded: it means the same."""
    raw = target.text.encode("utf-8", "surrogateescape")
    return NOT_IN_TARGET.sub(lambda byte: b"%%%02X" % ord(byte[0]), raw)


def _headers(request: web.BaseRequest, node: str) -> list[tuple[bytes, bytes]]:
    """Return the headers that the leader gets."""
    found = [
        (name.encode(), value.encode("utf-8", "surrogateescape"))
        for name in ASKED
        for value in request.headers.getall(name, ())
    ]
    return [*found, (FORWARDED.encode(), node.encode())]
