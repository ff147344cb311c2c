"""A TCP proxy between a follower and its leader that does what networks do to connections, as a test tells it, live.

It carries bytes and knows of HTTP only that a client sends nothing before it has its answer: so that it can tell one
answer from the next, deliver a request twice, or an answer again. A byte stream that lost a byte never goes on: such a
connection is dead for good, also after healing, and neither side is told.
"""

import asyncio
import contextlib
import random
import re
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Self

from cluster import ADDRESS

CHUNK_BYTES: Final = 64 << 10
SLOW_PIECE_BYTES: Final = 256  # what is carried at once when slow: small beside a page, so that heads are torn too
ANSWERS_KEPT: Final = 40  # for delivery at another time
ANSWER_BYTES_KEPT: Final = 4 << 20
DUPLICATE_TIMEOUT_S: Final = 20.0


class Kind(StrEnum):
    """What happens to connections."""

    PASS = "pass"  # noqa: S105  no password
    REFUSE = "refuse"  # nobody listens any more, and what was connected is reset
    CUT_ASKING = "cut asking"  # each connection ends after so many bytes of requests
    CUT_ANSWER = "cut answer"  # … of answers
    BLACKHOLE = "blackhole"  # accepted, swallowed, never answered
    HOLD = "hold"  # nothing arrives until later, then all of it does
    SLOW = "slow"
    FORGOTTEN = "half-open: forgotten"  # the leader's side is gone, the follower is not told: no FIN
    DEAF = "half-open: deaf"  # requests arrive, answers do not
    DUPLICATE = "duplicate"  # each request arrives a second time, over a connection of its own
    REPLAY = "replay"  # requests are answered with what was answered earlier


@dataclass
class Answer:
    """What an upstream answered to one request, as far as it came."""

    upstream: int  # its port
    data: bytearray = field(default_factory=bytearray)

    @property
    def status(self) -> int:
        """The final status, 0 if it has not come."""
        found = re.search(rb"HTTP/1\.1 ([2-5]\d\d) ", self.data[:4096])
        return int(found[1]) if found else 0

    @property
    def epoch(self) -> int:
        found = re.search(rb"\r\nMehdb-Epoch: (\d+)\r\n", self.data[:4096])
        return int(found[1]) if found else 0

    @property
    def complete(self) -> bool:
        final = re.search(rb"HTTP/1\.1 [2-5]\d\d .*?\r\n\r\n", self.data[:4096], re.DOTALL)
        if final is None:
            return False
        length = re.search(rb"\r\nContent-Length: (\d+)\r\n", final[0])
        return len(self.data) - final.end() == (int(length[1]) if length else 0)


@dataclass(frozen=True)
class Fault:
    """A kind, and how much of it."""

    kind: Kind = Kind.PASS
    after_bytes: int = 0  # before a cut
    reset: bool = False  # whether a cut is an RST, not a FIN
    bytes_per_s: int = 0  # when slow
    answer: Answer | None = None  # to replay; None: any that was complete

    @classmethod
    def any(cls, chosen: random.Random) -> Self:
        """Return a fault. Sizes spread over magnitudes: within a head, a page, several pages."""
        kind = chosen.choice([kind for kind in Kind if kind is not Kind.PASS])
        return cls(
            kind,
            after_bytes=int(10 ** chosen.uniform(0, 2.6 if kind is Kind.CUT_ASKING else 6)),
            reset=chosen.random() < 0.5,
            bytes_per_s=int(10 ** chosen.uniform(3, 5.5)),
        )


class Proxy:
    """Listens on a port of its own and carries to *upstream*, a port, what `fault` lets through."""

    def __init__(self, upstream: int, chosen: random.Random | None = None) -> None:
        self.upstream = upstream
        self.detour: tuple[bytes, int] | None = None  # requests that begin so go to this port, the others do not
        self.fault = Fault()
        self.answers: deque[Answer] = deque(maxlen=ANSWERS_KEPT)
        self.replayed = 0  # how many requests were answered with an earlier answer
        self.changed = asyncio.Event()  # set, and replaced, when another fault comes
        self.chosen = chosen or random.Random(0)
        self.tasks: set[asyncio.Task[None]] = set()
        self._connections: set[_Connection] = set()
        # It keeps the port ours while nobody listens: connecting is refused, and no other process can be given it.
        self._guard = _bound(0)
        self.port = int(self._guard.getsockname()[1])
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.port}"

    async def set(self, fault: Fault) -> None:
        """From now on do this, to connections that are there as well as to those that come."""
        self.fault = fault
        for connection in tuple(self._connections):
            connection.meet(fault)
        if fault.kind is Kind.REFUSE:
            await self._close()
        elif self._server is None:
            self._server = await asyncio.start_server(self._accept, sock=_bound(self.port), backlog=64)
        self.changed.set()
        self.changed = asyncio.Event()

    async def heal(self) -> None:
        """Carry everything again. What is dead stays so."""
        await self.set(Fault())

    def lead_to(self, upstream: int, *, cut: bool) -> None:
        """Have new connections go to the port *upstream*.

        The others are *cut*, or left where they are: those stay open to their upstream even when the client leaves.
        """
        self.upstream = upstream
        for connection in tuple(self._connections):
            if cut:
                connection.end(reset=True)
            else:
                connection.kept = True

    @property
    def waiting(self) -> bool:
        """Whether a request has been delivered that has no answer yet, such as a long poll."""
        return any(connection.waiting for connection in self._connections)

    def spawn(self, task: "asyncio.Task[None]") -> None:
        """Keep *task* until it is done; it ends with the proxy at the latest."""
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # it came just before nobody listened any more
            writer.transport.abort()
            return
        connection = _Connection(self, reader, writer)
        self._connections.add(connection)
        self.spawn(asyncio.create_task(self._serve(connection)))

    async def _serve(self, connection: "_Connection") -> None:
        try:
            with contextlib.suppress(OSError):
                await connection.run()
        finally:
            connection.leave()
            self._connections.discard(connection)

    async def _close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            for listening in server.sockets:
                asyncio.get_running_loop().remove_reader(listening)
            # What has been accepted becomes a connection first: asyncio loses it if its server is closed before that.
            await asyncio.sleep(0)
            server.close()

    async def close(self) -> None:
        """End everything."""
        await self._close()
        for connection in tuple(self._connections):  # a task that is cancelled before it has begun closes nothing
            connection.end()
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._guard.close()


class _Connection:
    """One connection of a client, and the one to the upstream that it is carried over."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._near = (reader, writer)
        self._far: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.kept = False
        self.waiting = False
        self._home = self._upstream = proxy.upstream  # where it goes, and where it goes just now
        self._dead = False
        self._asked_bytes = self._answered_bytes = 0  # since the fault began
        self._answer: Answer | None = None  # to the newest request

    def meet(self, fault: Fault) -> None:
        """Suffer what *fault* does at once."""
        self._asked_bytes = self._answered_bytes = 0
        if fault.kind is Kind.REFUSE:
            self.end(reset=True)
        elif fault.kind is Kind.FORGOTTEN:
            self._forget()

    def end(self, *, reset: bool = False) -> None:
        """Close both sides; with *reset* the client gets an RST, if it is not cut off anyway."""
        if reset:
            with contextlib.suppress(OSError, AttributeError):  # a socket that is closed already
                near = self._near[1].get_extra_info("socket")
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._near[1].close()
        if reset:
            self._near[1].transport.abort()
        self._end_far()

    def leave(self) -> None:
        """The client has closed. The upstream hears of it, unless nothing reaches the other side any more."""
        self._near[1].close()
        if not self._dead and not self.kept and self._proxy.fault.kind is not Kind.DEAF:
            self._end_far()

    async def run(self) -> None:
        """Carry until either side closes."""
        if self._proxy.fault.kind in (Kind.BLACKHOLE, Kind.FORGOTTEN):
            self._dead = True
        else:
            await self._connect(self._upstream)
        _unbuffered(self._near[1])
        while data := await self._near[0].read(CHUNK_BYTES):
            if not self._dead:
                await self._ask(data)

    async def _connect(self, upstream: int) -> None:
        self._end_far()
        self._far, self._upstream = None, upstream
        self._far = await asyncio.open_connection(ADDRESS, upstream)
        _unbuffered(self._far[1])
        self._proxy.spawn(asyncio.create_task(self._answers(*self._far)))

    async def _ask(self, data: bytes) -> None:
        fault, detour = self._proxy.fault, self._proxy.detour
        goal = detour[1] if detour and data.startswith(detour[0]) else self._home
        if goal != self._upstream:
            await self._connect(goal)
        if fault.kind is Kind.REPLAY and (again := self._again(fault)):
            self._proxy.replayed += 1
            self._near[1].write(bytes(again.data))
            return
        self._answer = None
        if fault.kind is Kind.DUPLICATE:
            self._proxy.spawn(asyncio.create_task(self._ask_again(data)))
        if self._far:
            await self._carry(data, self._far[1], asking=True)
            self.waiting = not self._dead

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry what comes from the upstream, and close what is still alive when that does."""
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(CHUNK_BYTES):
                    self._record(data)
                    if not self._dead:
                        await self._carry(data, self._near[1], asking=False)
        finally:
            writer.close()
            if not self._dead and self._far == (reader, writer):  # else it has been replaced
                self._near[1].close()

    async def _carry(self, data: bytes, writer: asyncio.StreamWriter, *, asking: bool) -> None:
        while data:
            fault = self._proxy.fault
            if fault.kind is Kind.HOLD:
                await self._proxy.changed.wait()
                continue
            if fault.kind is Kind.BLACKHOLE or (fault.kind is Kind.DEAF and not asking):
                self._dead = True
            if self._dead:  # by now
                return
            piece = data[: SLOW_PIECE_BYTES if fault.kind is Kind.SLOW else None]
            if fault.kind is Kind.SLOW:
                await asyncio.sleep(len(piece) / fault.bytes_per_s)
            if fault.kind is (Kind.CUT_ASKING if asking else Kind.CUT_ANSWER):
                piece = piece[: max(0, fault.after_bytes - (self._asked_bytes if asking else self._answered_bytes))]
            self._note(len(piece), asking=asking)
            writer.write(piece)
            await writer.drain()
            if len(piece) < len(data) and fault.kind is not Kind.SLOW:
                self.end(reset=fault.reset)
                return
            data = data[len(piece) :]

    def _note(self, size_bytes: int, *, asking: bool) -> None:
        if asking:
            self._asked_bytes += size_bytes
        else:
            self._answered_bytes += size_bytes

    def _record(self, data: bytes) -> None:
        if self._answer is None:
            self._answer = Answer(self._upstream)
            self._proxy.answers.append(self._answer)
        if len(self._answer.data) < ANSWER_BYTES_KEPT:
            self._answer.data += data
        if self._answer.complete:
            self.waiting = False

    def _again(self, fault: Fault) -> Answer | None:
        if fault.answer is not None:
            return fault.answer
        whole = [answer for answer in self._proxy.answers if answer.complete]
        return self._proxy.chosen.choice(whole) if whole else None

    async def _ask_again(self, data: bytes) -> None:
        """Deliver a request over a connection of its own. Nobody hears the answer."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(DUPLICATE_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(ADDRESS, self._proxy.upstream)
                try:
                    writer.write(data)
                    answer = Answer(self._proxy.upstream)
                    while not answer.complete and (more := await reader.read(CHUNK_BYTES)):
                        answer.data += more
                finally:
                    writer.close()

    def _forget(self) -> None:
        self._dead = True
        self._end_far()

    def _end_far(self) -> None:
        if self._far:
            self._far[1].close()


@contextlib.asynccontextmanager
async def proxied(upstream: int, chosen: random.Random | None = None) -> AsyncIterator[Proxy]:
    """Have a proxy run, which passes everything at first."""
    proxy = Proxy(upstream, chosen)
    try:
        await proxy.heal()
        yield proxy
    finally:
        await proxy.close()


def _bound(port: int) -> socket.socket:
    """Return a socket bound to *port*, which others may share."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind((ADDRESS, port))
    return bound


def _unbuffered(writer: asyncio.StreamWriter) -> None:
    """Have `drain` wait until the kernel has everything: what is written before a cut is sent."""
    writer.transport.set_write_buffer_limits(0)
