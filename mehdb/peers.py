"""The client to another node: asks for pages, snapshots, its position and its status, with time limits on everything.

It checks that an answer is one; what it means for this node is the replication's to decide. Where a node is, `route`
finds out: anew whenever an address has failed, so a pod that moved is found at its new one.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import ipaddress
import re
import shutil
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Final, NamedTuple, Self

import aiofiles
import httpx

from mehdb.credentials import ANONYMOUS, NO_TLS, Credentials
from mehdb.errors import (
    Compacted,
    DiskFull,
    Diverged,
    LeaderUnreachable,
    OutcomeUnknown,
    PeerAbsent,
    PeerAnswerInvalid,
    PeerUnreachable,
    SnapshotRefused,
    StaleEpoch,
)
from mehdb.model import (
    PAGE_BYTES_MAX,
    Epoch,
    History,
    NodePosition,
    NodeStatus,
    Page,
    Position,
    Revision,
    Role,
    State,
    decode_page,
    decode_position,
    decode_status,
    error_message,
    is_history,
)
from mehdb.names import NameAbsent, NameUnknown, is_address
from mehdb.whereabouts import Transport, Whereabouts

CONNECT_TIMEOUT_S: Final = 2.0  # a dead address answers nothing: one retry of the kernel's SYN
ANSWER_TIMEOUT_S: Final = 2.5  # between two chunks of an answer: whoever works on one says so each second (102)
PAGE_TIMEOUT_S: Final = 60.0  # for a whole page of the largest size, beyond that: 1 MiB/s
RELAY_RATE_MIN: Final = 1 << 20  # bytes per second, for a body that is passed on
CLIENTS_MAX: Final = 2  # certificates are changed hours apart: what was asked with the last but one is over
HEADERS: Final = {"Mehdb-Heartbeat": "yes"}
REPR_DIGEST: Final = re.compile(r"sha-256=:([A-Za-z0-9+/=]{44}):")  # RFC 9530
WAITED: Final = "Mehdb-Waited"  # seconds that a peer held a request before it found that there is no more to give
SECONDS: Final = re.compile(r"[0-9]{1,4}\.[0-9]{3}")
NUMBER: Final = re.compile("[0-9]{1,18}")  # below 2**63: what a column can hold


class Pull(NamedTuple):
    """The answer to one request for a page. *page* is None when the peer has nothing after the position.

    *as_of_s*, by this process's monotonic clock: the peer had nothing beyond *head* at that moment.
    """

    history: History
    epoch: Epoch
    head: Revision
    page: Page | None
    state: str = State.SERVING  # the peer's
    as_of_s: float = 0.0


class Download(NamedTuple):
    """A snapshot that has arrived whole, and what its sender says that it is."""

    history: History
    revision: Revision
    size_bytes: int


class Relay(NamedTuple):
    """A client's request, as it is passed on: *target* and *headers* byte for byte."""

    method: str
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Relayed:
    """The answer to what was passed on: its head is here, its body is still to come. Whoever has one closes it."""

    def __init__(self, url: str, answer: httpx.Response) -> None:
        self.status = answer.status_code
        self.headers = answer.headers.raw
        self.content_type = answer.headers.get("Content-Type", "application/octet-stream")
        length = answer.headers.get("Content-Length", "")
        self.size_bytes = int(length) if NUMBER.fullmatch(length) else None
        self._url = url
        self._answer = answer

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes. Raises `OutcomeUnknown` if its end does not."""
        try:
            async for chunk in self._answer.aiter_raw():
                yield chunk
        except (httpx.HTTPError, OSError) as error:
            raise _unknown(self._url, error) from error

    async def close(self) -> None:
        """Read no more of it."""
        await self._answer.aclose()


class Peer:
    """One other node, at a base URL. An async context manager: leaving it closes the connections.

    *whereabouts* says where that is; others may share them. By default that is what the name resolves to.
    """

    def __init__(
        self,
        url: str,
        credentials: Credentials = ANONYMOUS,
        connections_max: int = 4,
        whereabouts: Whereabouts | None = None,
    ) -> None:
        self.url = url
        self.whereabouts = whereabouts or Whereabouts(url)
        self._credentials = credentials
        self._connections_max = connections_max
        self._clients: dict[ssl.SSLContext, httpx.AsyncClient] = {}
        self._closing: asyncio.Task[None] | None = None

    @property
    def _client(self) -> httpx.AsyncClient:
        """The client for the certificates of now. One more may have requests under way, with those of before."""
        context = self._credentials.client if self.url.startswith("https:") else NO_TLS
        if context not in self._clients:
            # Made when it is first used: it takes milliseconds, and most pods that there might be do not exist.
            self._clients[context] = self._made(context)
            if len(self._clients) > CLIENTS_MAX:
                oldest = self._clients.pop(next(iter(self._clients)))
                self._closing = asyncio.create_task(oldest.aclose(), name=f"close what was before to {self.url}")
        return self._clients[context]

    def _made(self, context: ssl.SSLContext) -> httpx.AsyncClient:
        limits = httpx.Limits(
            max_connections=self._connections_max,
            max_keepalive_connections=self._connections_max // 2,
            keepalive_expiry=30,
        )
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        transport = Transport(self.whereabouts, context, limits)
        return httpx.AsyncClient(
            base_url=self.url, headers=HEADERS, timeout=timeout, trust_env=False, transport=transport
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.disconnect()

    async def pull(
        self,
        position: Position,
        epoch: Epoch,
        *,
        node: str | None,
        durable: Revision,
        wait_s: float,
        pages_only: bool = False,
        from_leader: bool = True,
    ) -> Pull:
        """Return the page after *position*; *node* tells the peer who holds everything up to *durable* for certain.

        With nothing to return, the peer waits up to *wait_s* for a change. *epoch* is the highest seen. *pages_only*
        asks for pages where the peer would rather give a snapshot. Unless *from_leader*, any node's answer will do.
        Raises `PeerUnreachable`, `PeerAnswerInvalid`, `StaleEpoch`, and as the peer says: `Diverged`, `Compacted`.
        """
        query: dict[str, str | int | float] = {"after": position.revision, "durable": durable, "wait": wait_s}
        if node is not None:
            query["node"] = node
        if position.history is not None:
            query["history"], query["chain"] = position.history, position.chain.hex()
        if pages_only:
            query["snapshot"] = "no"
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        # No parameter: a node of another version would refuse what it does not know.
        headers = {"Mehdb-Epoch": str(epoch), **self._credentials.headers()}
        request = self._client.stream("GET", "/replicate", params=query, headers=headers, timeout=timeout)
        asked_at_s = monotonic()
        async with self._asking(wait_s + PAGE_TIMEOUT_S), request as answer:
            body = await _body(answer)
        pull = self._understood(answer, body, position, epoch if from_leader else None)
        # Not when the answer came: it may have been on its way for long. That the peer waited, it must say itself.
        waited = answer.headers.get(WAITED, "")
        waited_s = float(waited) if SECONDS.fullmatch(waited) else 0.0
        return pull._replace(as_of_s=min(asked_at_s + waited_s, monotonic()))

    async def disconnect(self) -> None:
        """Close every connection, and look anew for where the peer is before the next one."""
        self.whereabouts.forget()
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.aclose()

    async def position(self) -> NodePosition:
        """Return where the peer is. Raises `PeerAbsent`, `PeerUnreachable` and `PeerAnswerInvalid`."""
        await self._require_presence()
        async with self._asking(ANSWER_TIMEOUT_S):
            answer = await self._client.get("/position", headers=self._credentials.headers())
        if answer.status_code != httpx.codes.OK:
            raise PeerUnreachable(f"{self.url} answered {answer.status_code}: {_message(answer.content)}")
        return decode_position(answer.content)

    async def status(self) -> NodeStatus:
        """Return what the peer says of itself. Raises `PeerUnreachable` and `PeerAnswerInvalid`."""
        async with self._asking(ANSWER_TIMEOUT_S):
            headers = {"Accept": "application/json", **self._credentials.headers()}
            answer = await self._client.get("/status", headers=headers)
        return decode_status(answer.content)

    async def forward(self, relay: Relay, answer_timeout_s: float) -> Relayed:
        """Pass a client's request on, and return the answer once its head has come.

        The peer may take *answer_timeout_s* for that, and for each piece of the body. Raises `LeaderUnreachable` if
        nothing reached the peer, `OutcomeUnknown` if something did and no answer came.
        """
        write_timeout_s = ANSWER_TIMEOUT_S + len(relay.body) / RELAY_RATE_MIN
        timeout = httpx.Timeout(
            answer_timeout_s, connect=CONNECT_TIMEOUT_S, write=write_timeout_s, pool=CONNECT_TIMEOUT_S
        )
        request = self._client.build_request(
            relay.method, "/", content=relay.body, headers=relay.headers, timeout=timeout,
            extensions={"target": relay.target},
        )  # fmt: skip
        try:
            answer = await self._client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise LeaderUnreachable(
                f"nothing was written: the leader, {self.url}, is not reached ({type(error).__name__}): try again"
            ) from error
        except (httpx.HTTPError, OSError) as error:
            self.whereabouts.forget()
            raise _unknown(self.url, error) from error
        if answer.headers.get("Mehdb-Role") != Role.LEADER:  # its address is another's by now
            self.whereabouts.forget()
        return Relayed(self.url, answer)

    async def download(self, path: Path, on_progress: Callable[[int, int], None]) -> Download:
        """Write the peer's snapshot to *path* and verify its length and digest. *on_progress* is told bytes, of bytes.

        Raises `PeerUnreachable` (what has arrived is of no use), `SnapshotRefused`, `PeerAnswerInvalid`, and `DiskFull`
        of this node's.
        """
        request = self._client.stream("GET", "/snapshot", headers=self._credentials.headers())
        async with self._asking(None), request as answer:
            if answer.status_code != httpx.codes.OK:
                passes = answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
                kind = PeerUnreachable if passes else SnapshotRefused
                raise kind(f"{self.url} gives no snapshot: {_message(await _body(answer))}")
            expected, size_bytes, digest = self._announced(answer)
            if shutil.disk_usage(path.parent).free < size_bytes:
                raise DiskFull(f"a snapshot of {size_bytes} bytes does not fit on this volume: make room or enlarge it")
            hashed = hashlib.sha256()
            with _own_disk(path):
                async with aiofiles.open(path, "wb") as file:
                    async for chunk in answer.aiter_raw():  # each within the read timeout
                        hashed.update(chunk)
                        await file.write(chunk)
                        on_progress(answer.num_bytes_downloaded, size_bytes)
        if answer.num_bytes_downloaded != size_bytes or hashed.digest() != digest:
            raise PeerUnreachable(f"{self.url}: the snapshot did not arrive as it was sent")
        return expected

    def _announced(self, answer: httpx.Response) -> tuple[Download, int, bytes]:
        """Return what the headers of a snapshot say that it is."""
        history, revision = (answer.headers.get(f"Mehdb-Snapshot-{name}", "") for name in ("History", "Revision"))
        match = REPR_DIGEST.fullmatch(answer.headers.get("Repr-Digest", ""))
        size = answer.headers.get("Content-Length", "")
        try:
            digest = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            digest = b""
        if not (is_history(history) and NUMBER.fullmatch(revision) and NUMBER.fullmatch(size) and digest):
            raise PeerAnswerInvalid(f"{self.url} is no mehdb node, or of another version: no snapshot of ours")
        return Download(History(history), Revision(int(revision)), int(size)), int(size), digest

    @contextlib.asynccontextmanager
    async def _asking(self, timeout_s: float | None) -> AsyncIterator[None]:
        """Turn what the network may do into `PeerUnreachable`."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
            raise PeerUnreachable(f"{self.url}: {type(error).__name__}: {error}") from error

    async def _require_presence(self) -> None:
        """Raise `PeerAbsent` if the peer's name does not resolve, or nobody listens at its address."""
        try:
            addresses = await self.whereabouts.resolved()
        except NameAbsent as error:
            raise PeerAbsent(f"{self.url}: {error}") from error
        except NameUnknown as error:
            raise PeerUnreachable(f"{self.url}: {error}") from error
        if _says_something(self.whereabouts.host, addresses):
            return
        obstacles = [await self._obstacle_at(address) for address in addresses]
        if None in obstacles:
            return
        for obstacle in obstacles:
            if not isinstance(obstacle, ConnectionRefusedError):  # a machine that is off may come back, with data
                raise PeerUnreachable(f"{self.url}: {type(obstacle).__name__}: {obstacle}") from obstacle
        raise PeerAbsent(f"{self.url}: nobody listens there") from obstacles[0]

    async def _obstacle_at(self, address: str) -> OSError | None:
        """Return why *address* takes no connection, None if it does."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, writer = await asyncio.open_connection(address, self.whereabouts.port)
        except OSError as error:
            return error
        writer.close()
        return None

    def _understood(self, answer: httpx.Response, body: bytes, position: Position, seen: Epoch | None) -> Pull:
        """Return what an answer to `/replicate` means. *seen* is None where any node may answer."""
        if answer.status_code not in (200, 204, Diverged.status, Compacted.status):
            raise PeerUnreachable(f"{self.url} answered {answer.status_code}: {_message(body)}")
        # Nothing is believed of an answer, a refusal above all, before it is known to be a node's and of our time.
        history, epoch, head = (answer.headers.get(f"Mehdb-{name}", "") for name in ("History", "Epoch", "Revision"))
        if not (is_history(history) and NUMBER.fullmatch(epoch) and NUMBER.fullmatch(head)):
            raise PeerAnswerInvalid(f"{self.url} is no mehdb node, or of another version: its answer lacks our headers")
        if seen is not None and answer.headers.get("Mehdb-Role") != Role.LEADER:
            raise PeerAnswerInvalid(f"{self.url} does not lead: is the list of peers in order?")
        if seen is not None and history == position.history and int(epoch) < seen:
            raise StaleEpoch(
                f"{self.url} leads in epoch {epoch}, which is over: {seen} has been seen. If another process leads as "
                "well, end the older one; if none does, restart it"
            )
        if answer.status_code == Diverged.status:
            raise Diverged(_message(body))
        if answer.status_code == Compacted.status:
            raise Compacted(_message(body))
        state = answer.headers.get("Mehdb-State", State.SERVING)
        if answer.status_code == 204:  # its head was ours when it said so; the header may already be of a later one
            return Pull(History(history), Epoch(int(epoch)), position.revision, None, state)
        page = decode_page(body)
        if page.history != history or not page.changes:
            raise PeerAnswerInvalid(f"{self.url}: a page of nothing, or of another history than {history}")
        return Pull(History(history), Epoch(int(epoch)), Revision(int(head)), page, state)


def _says_something(host: str, addresses: tuple[str, ...]) -> bool:
    """Return whether that *host* resolves says that the peer exists: not if it is an address, or this machine's."""
    return not is_address(host) and not all(ipaddress.ip_address(address).is_loopback for address in addresses)


@contextlib.contextmanager
def _own_disk(path: Path) -> Iterator[None]:
    """Tell an error of this node's disk from one of the network."""
    try:
        yield
    except TimeoutError:  # an OSError too, but the network's
        raise
    except OSError as error:
        raise DiskFull(f"{path} cannot be written: {error.strerror}: make room or enlarge the volume") from error


async def _body(answer: httpx.Response) -> bytes:
    """Return the answer's body. Raises `PeerAnswerInvalid` if it is larger than any page."""
    chunks, size_bytes = [], 0
    async for chunk in answer.aiter_bytes():
        chunks.append(chunk)
        size_bytes += len(chunk)
        if size_bytes > PAGE_BYTES_MAX:
            raise PeerAnswerInvalid(f"an answer of more than {PAGE_BYTES_MAX} bytes is no page")
    return b"".join(chunks)


def _unknown(url: str, error: Exception) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"the request was passed on to the leader, {url}, and no whole answer came ({type(error).__name__}): whether "
        "anything was written is unknown. Read what is there before you send it again"
    )


def _message(body: bytes) -> str:
    """Return what an error's answer says, on one line."""
    return " ".join(error_message(body)[:500].split())
