"""Load that wrk cannot make: writes at a set pace, watched on their way to a follower, and writes until a kill.

A minimal HTTP client on raw sockets: requests one after another on each connection, answers with a Content-Length.
"""

import asyncio
import random
import re
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Final, Self

import uvloop

from cluster import BenchError, Server
from dataset import key, value

CONNECTIONS: Final = 64
ANSWER_TIMEOUT_S: Final = 10.0
WATCH_PAUSE_S: Final = 0.001  # uvloop's shortest: resolves a tenth of the target, and loads the follower little
CHECKED_BEHIND: Final = 20  # ask for the key of the write this many back: one that should have arrived, yet is recent
CONNECT_S: Final = 0.2  # for the connections, so that the first writes are not late
SETTLE_S: Final = 2.0  # how long after the last write its arrival may take

LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
REVISION: Final = re.compile(rb"\r\nmehdb-revision: *(\d+)", re.IGNORECASE)
ETAG: Final = re.compile(rb'\r\netag: *"(\d+)"', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """A good answer: *revision* is its ETag (0: none), *head* the newest revision in the store that gave it."""

    revision: int
    head: int
    at_s: float  # when all of it had been received


class Connection:
    """One connection, one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, server: Server) -> Self:
        """Connect to *server*."""
        return cls(*await asyncio.open_connection("127.0.0.1", server.port))

    async def get(self, number: int) -> Answer:
        """Read the key with *number*."""
        return await self._request(b"GET /get/%b HTTP/1.1\r\nHost: bench\r\n\r\n" % key(number))

    async def put(self, number: int) -> Answer:
        """Write the key with *number* and its value."""
        body = value(number)
        head = b"PUT /set/%b HTTP/1.1\r\nHost: bench\r\nContent-Length: %d\r\n\r\n" % (key(number), len(body))
        answer = await self._request(head + body)
        if not answer.revision:
            raise BenchError("a write was acknowledged without the ETag that says its revision")
        return answer

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()

    async def _request(self, request: bytes) -> Answer:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            self._writer.write(request)
            head = await self._reader.readuntil(b"\r\n\r\n")
            await self._reader.readexactly(_number(LENGTH, head))
        at_s = time.perf_counter()
        status = head[9:12]
        if status != b"200":
            raise BenchError(f"status {status.decode()} where 200 was due: {head.decode(errors='replace')}")
        return Answer(_number(ETAG, head), _number(REVISION, head), at_s)


def _number(pattern: re.Pattern[bytes], head: bytes) -> int:
    match = pattern.search(head)
    return int(match[1]) if match else 0


@dataclass
class Passage:
    """How acknowledged writes came through to a follower."""

    acknowledged: list[tuple[int, Answer]] = field(default_factory=list)  # the key's number; in order of arrival here
    seen: list[Answer] = field(default_factory=list)  # the follower's answers, in order of time; heads never fall
    went_back: int = 0
    """How many answers said that the follower was at a lower revision than an earlier answer had. Due: none."""

    def lags_s(self) -> list[float]:
        """Return, for each write, the time from its acknowledgement to the first answer that shows it.

        Both as received here, in this one process: too large by up to the time between two polls, too small by what the
        acknowledgement waited for its turn. 0 if the follower showed the write before that came.
        """
        lags = []
        for _, write in self.acknowledged:
            first = bisect_left(self.seen, write.revision, key=attrgetter("head"))
            lags.append(max(0.0, self.seen[first].at_s - write.at_s))
        return lags

    @property
    def resolution_s(self) -> float:
        """The time between two polls that 99 of 100 kept."""
        gaps = sorted(after.at_s - before.at_s for before, after in zip(self.seen, self.seen[1:], strict=False))
        return gaps[len(gaps) * 99 // 100]

    @property
    def rate(self) -> float:
        """Acknowledged writes per second, over the whole time."""
        times = [write.at_s for _, write in self.acknowledged]
        return (len(times) - 1) / (max(times) - min(times))


def watch_passage(leader: Server, follower: Server, *, keys: int, rate: int, duration_s: int) -> Passage:
    """Write random keys at *rate* per second to *leader*, and watch *follower* until it shows them all."""
    return uvloop.run(_watch_passage(leader, follower, keys, rate, duration_s))


async def _watch_passage(leader: Server, follower: Server, keys: int, rate: int, duration_s: int) -> Passage:
    passage, finished = Passage(), asyncio.Event()
    start_s = time.perf_counter() + CONNECT_S
    due_s = [start_s + number / rate for number in range(rate * duration_s)]

    async def write() -> None:
        shares = (due_s[number::CONNECTIONS] for number in range(CONNECTIONS))
        await asyncio.gather(*(_write_when_due(leader, share, keys, passage) for share in shares))
        finished.set()

    async with asyncio.timeout(CONNECT_S + duration_s + SETTLE_S):
        await asyncio.gather(_watch(follower, passage, finished), write())
    return passage


async def _write_when_due(leader: Server, due_s: list[float], keys: int, passage: Passage) -> None:
    connection = await Connection.open(leader)
    for moment_s in due_s:
        await asyncio.sleep(moment_s - time.perf_counter())
        number = random.randrange(keys)  # noqa: S311  a key, not a secret
        passage.acknowledged.append((number, await connection.put(number)))
    connection.close()


async def _watch(follower: Server, passage: Passage, finished: asyncio.Event) -> None:
    """Read from *follower*, and note the head that each answer shows, until *finished* and it has shown every write.

    That what it shows can be read as well is checked on the way: the key asked for is that of a recent write, and if an
    earlier answer has shown that write's revision, this one must hold it, or a later one of the same key.
    """
    connection = await Connection.open(follower)
    head = 0
    while not (finished.is_set() and head >= max(write.revision for _, write in passage.acknowledged)):
        recent = passage.acknowledged[-CHECKED_BEHIND:]
        number, write = recent[0] if recent else (0, Answer(0, 0, 0.0))
        answer = await connection.get(number)
        if write.revision <= head and answer.revision < write.revision:
            raise BenchError(f"the follower showed revision {head}, then revision {answer.revision} of {write}'s key")
        passage.went_back += answer.head < head
        head = max(head, answer.head)
        passage.seen.append(replace(answer, head=head))  # what has been seen stays seen, whatever the header says then
        await asyncio.sleep(WATCH_PAUSE_S)
    connection.close()


def write_until_killed(server: Server, kill: Callable[[], None], *, keys: int, duration_s: float) -> int:
    """Write random keys for *duration_s*, call *kill* in the midst of it, return the newest revision acknowledged."""
    return uvloop.run(_write_until_killed(server, kill, keys, duration_s))


async def _write_until_killed(server: Server, kill: Callable[[], None], keys: int, duration_s: float) -> int:
    newest = 0

    async def write() -> None:
        nonlocal newest
        connection = await Connection.open(server)
        try:
            while True:
                answer = await connection.put(random.randrange(keys))  # noqa: S311  a key, not a secret
                newest = max(newest, answer.revision)
        except (ConnectionError, asyncio.IncompleteReadError):
            connection.close()

    async def kill_in_the_midst() -> None:
        await asyncio.sleep(duration_s)
        kill()

    await asyncio.gather(kill_in_the_midst(), *(write() for _ in range(CONNECTIONS)))
    return newest
