"""The bodies of requests: read within bounds on their size, on the time that they take, and on the memory of all."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Final

from aiohttp import StreamReader, web

from mehdb.api.answers import BODY_RATE_MIN
from mehdb.errors import BadBody, BatchTooLarge, BodyTooSlow, ExpectationFailed, QueueFull, RequestError, ValueTooLarge
from mehdb.settings import Settings

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class Bodies:
    """Reads the bodies that arrive at one node. A whole one counts in the store's queue, no longer here."""

    def __init__(self, settings: Settings) -> None:
        self.value_bytes_max = settings.max_value
        self._bytes_max = settings.queue_size
        self._stall_s = settings.body_timeout
        self._held_bytes = 0

    async def read(self, request: web.BaseRequest, bytes_max: int, too_large: str | None = None) -> bytes:
        """Return the whole body, after `100 Continue` where the client waits for it.

        Raises `ValueTooLarge`, or `BatchTooLarge` where *too_large* says why, and `QueueFull` as soon as it is known,
        `BodyTooSlow`, `ExpectationFailed` and `BadBody`.
        """
        if (request.content_length or 0) > bytes_max:
            raise _too_large(bytes_max, too_large)
        _check_expectation(request)
        if request.headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
            raise BadBody("send the body in no transfer coding but chunked: nothing was written")
        content = request.content
        if content.is_eof() and content.total_bytes <= bytes_max:  # it came with the head: most do
            return content.read_nowait()
        self._require(request.content_length or 0)
        if "Expect" in request.headers and request.version >= (1, 1):
            await request.writer.write(CONTINUE)
        try:
            return await self._read_chunks(content, bytes_max, too_large)
        except web.RequestPayloadError as error:
            raise BadBody(f"the body's framing is broken: nothing was written ({error})") from error

    async def _read_chunks(self, content: StreamReader, bytes_max: int, too_large: str | None) -> bytes:
        """Return what arrives until the body's end, within the bounds on its size and on the time that it may take."""
        chunks: list[bytes] = []
        size_bytes = 0
        clock = asyncio.get_running_loop().time
        started_at_s = clock()
        try:
            while True:
                deadline_s = min(clock() + self._stall_s, started_at_s + self._stall_s + size_bytes / BODY_RATE_MIN)
                async with asyncio.timeout_at(deadline_s):
                    chunk = await content.readany()
                if not chunk:
                    return b"".join(chunks)
                self._require(len(chunk))
                self._held_bytes += len(chunk)
                chunks.append(chunk)
                size_bytes += len(chunk)
                if size_bytes > bytes_max:
                    raise _too_large(bytes_max, too_large)
        except TimeoutError as error:
            raise BodyTooSlow(
                f"the body stalled for {self._stall_s:g} s or is too slow, {size_bytes} bytes came: nothing was written"
            ) from error
        finally:
            self._held_bytes -= size_bytes

    @contextlib.contextmanager
    def held(self, size_bytes: int) -> Iterator[None]:
        """Count a body that has come while the block still needs it. Raises `QueueFull`."""
        self._require(size_bytes)
        self._held_bytes += size_bytes
        try:
            yield
        finally:
            self._held_bytes -= size_bytes

    def _require(self, size_bytes: int) -> None:
        """Raise `QueueFull` if there is no room for that many bytes more. One body alone always has it."""
        if self._held_bytes and self._held_bytes + size_bytes > self._bytes_max:
            raise QueueFull(f"{self._held_bytes} bytes are arriving: nothing was written, try again in a moment")


def _too_large(bytes_max: int, reason: str | None) -> RequestError:
    if reason is not None:
        return BatchTooLarge(reason)
    return ValueTooLarge(f"a value may have {bytes_max} bytes (--max-value): nothing was written")


def _check_expectation(request: web.BaseRequest) -> None:
    """Raise `ExpectationFailed` if the client expects more than `100 Continue` (RFC 9110, 10.1.1)."""
    if request.headers.get("Expect", "100-continue").lower() != "100-continue":
        raise ExpectationFailed("send no Expect but 100-continue: nothing was written")
