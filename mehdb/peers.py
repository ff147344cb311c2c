"""The client to another node: asks for pages, with time limits on everything.

It checks that an answer is one; what it means for this node is the replication's to decide. A name is resolved anew at
each new connection, so a pod that moved is found at its new address.
"""

import asyncio
import re
from types import TracebackType
from typing import Final, NamedTuple, Self

import httpx

from mehdb.errors import Compacted, Diverged, PeerAnswerInvalid, PeerUnreachable, StaleEpoch
from mehdb.model import (
    PAGE_BYTES_MAX,
    Epoch,
    History,
    NodeStatus,
    Page,
    Position,
    Revision,
    Role,
    decode_page,
    decode_status,
    error_message,
    is_history,
)

CONNECT_TIMEOUT_S: Final = 3.0  # a dead address answers nothing: two retries of the kernel's SYN
ANSWER_TIMEOUT_S: Final = 10.0  # between two chunks of an answer, beyond the time that it was asked to wait
PAGE_TIMEOUT_S: Final = 60.0  # for a whole page of the largest size, beyond that: 1 MiB/s
NUMBER: Final = re.compile("[0-9]{1,18}")  # below 2**63: what a column can hold


class Pull(NamedTuple):
    """The answer to one request for a page. *page* is None when the peer has nothing after the position."""

    history: History
    epoch: Epoch
    head: Revision
    page: Page | None


class Peer:
    """One other node, at a base URL. An async context manager: leaving it closes the connections."""

    def __init__(self, url: str) -> None:
        self.url = url
        limits = httpx.Limits(max_connections=4, max_keepalive_connections=2, keepalive_expiry=30)
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        # trust_env: a proxy for the outside world must not come between two pods.
        self._client = httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def pull(self, position: Position, epoch: Epoch, *, node: str, durable: Revision, wait_s: float) -> Pull:
        """Return the page after *position*; *node* tells the peer who holds everything up to *durable* for certain.

        With nothing to return, the peer waits up to *wait_s* for a change. *epoch* is the highest seen. Raises
        `PeerUnreachable`, `PeerAnswerInvalid`, `StaleEpoch`, and as the peer says: `Diverged`, `Compacted`.
        """
        query: dict[str, str | int | float] = {
            "after": position.revision,
            "durable": durable,
            "node": node,
            "wait": wait_s,
        }
        if position.history is not None:
            query["history"], query["chain"] = position.history, position.chain.hex()
        try:
            async with asyncio.timeout(wait_s + PAGE_TIMEOUT_S):
                return await self._pull(query, position, epoch, wait_s)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
            raise PeerUnreachable(f"{self.url}: {type(error).__name__}: {error}") from error

    async def status(self) -> NodeStatus:
        """Return what the peer says of itself. Raises `PeerUnreachable` and `PeerAnswerInvalid`."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                answer = await self._client.get("/status", headers={"Accept": "application/json"})
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
            raise PeerUnreachable(f"{self.url}: {type(error).__name__}: {error}") from error
        return decode_status(answer.content)

    async def _pull(self, query: dict[str, str | int | float], position: Position, seen: Epoch, wait_s: float) -> Pull:
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S + wait_s, connect=CONNECT_TIMEOUT_S)
        async with self._client.stream("GET", "/replicate", params=query, timeout=timeout) as answer:
            body = await _body(answer)
        if answer.status_code not in (200, 204, Diverged.status, Compacted.status):
            raise PeerUnreachable(f"{self.url} answered {answer.status_code}: {_message(body)}")
        # Nothing is believed of an answer, a refusal above all, before it is known to be a node's and of our time.
        history, epoch, head = (answer.headers.get(f"Mehdb-{name}", "") for name in ("History", "Epoch", "Revision"))
        if not (is_history(history) and NUMBER.fullmatch(epoch) and NUMBER.fullmatch(head)):
            raise PeerAnswerInvalid(f"{self.url} is no mehdb node, or of another version: its answer lacks our headers")
        if answer.headers.get("Mehdb-Role") != Role.LEADER:
            raise PeerAnswerInvalid(f"{self.url} does not lead: is the list of peers in order?")
        if history == position.history and int(epoch) < seen:
            raise StaleEpoch(f"{self.url} leads in epoch {epoch}, which is over: {seen} has been seen")
        if answer.status_code == Diverged.status:
            raise Diverged(_message(body))
        if answer.status_code == Compacted.status:
            raise Compacted(_message(body))
        if answer.status_code == 204:  # its head was ours when it said so; the header may already be of a later one
            return Pull(History(history), Epoch(int(epoch)), position.revision, None)
        page = decode_page(body)
        if page.history != history or not page.changes:
            raise PeerAnswerInvalid(f"{self.url}: a page of nothing, or of another history than {history}")
        return Pull(History(history), Epoch(int(epoch)), Revision(int(head)), page)


async def _body(answer: httpx.Response) -> bytes:
    """Return the answer's body. Raises `PeerAnswerInvalid` if it is larger than any page."""
    chunks, size_bytes = [], 0
    async for chunk in answer.aiter_bytes():
        chunks.append(chunk)
        size_bytes += len(chunk)
        if size_bytes > PAGE_BYTES_MAX:
            raise PeerAnswerInvalid(f"an answer of more than {PAGE_BYTES_MAX} bytes is no page")
    return b"".join(chunks)


def _message(body: bytes) -> str:
    """Return what an error's answer says, on one line."""
    return " ".join(error_message(body)[:500].split())
