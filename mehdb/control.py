"""The way to the node on this machine: a socket in its data directory, for its operator's commands.

Who may use it is who may use the volume. The path of a socket may have 107 bytes, a directory's may be longer: so both
ends go through an open descriptor of the directory.
"""

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import httpx

from mehdb.errors import MehdbError, NotRunning, PeerUnreachable
from mehdb.model import DrainReport, NodeStatus, decode_drain_report, decode_status

SOCKET_NAME: Final = "control"
ANSWER_TIMEOUT_S: Final = 10.0  # beyond the time that the node was asked to wait


@contextlib.contextmanager
def _reachable(directory: Path) -> Iterator[str]:
    """Have a short path to the socket in *directory*."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET_NAME}"
    finally:
        os.close(fd)


@contextlib.contextmanager
def listener(directory: Path) -> Iterator[socket.socket]:
    """Have a socket that listens in *directory*, whose lock is held. Raises `OSError` where there can be none."""
    with _reachable(directory) as path:
        with contextlib.suppress(FileNotFoundError):
            Path(path).unlink()  # a killed process has left it
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            control.bind(path)
            Path(path).chmod(0o600)
            control.listen()
            yield control
        finally:
            control.close()
            with contextlib.suppress(OSError):
                Path(path).unlink()


class Control:
    """The node that runs on *directory*. An async context manager. Raises `NotRunning` where none does."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            path = self._stack.enter_context(_reachable(self._directory))
        except OSError as error:
            raise NotRunning(f"{self._directory}: {error.strerror}: name another with --data-dir") from error
        transport = httpx.AsyncHTTPTransport(uds=path)
        self._client = await self._stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://node", timeout=ANSWER_TIMEOUT_S)
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def status(self) -> NodeStatus:
        """Return what the node says of itself."""
        async with self._asking():
            return decode_status((await self._client.get("/status")).content)

    async def drain(self, wait_s: float) -> DrainReport:
        """Drain the node, and wait until that is done, at most *wait_s*."""
        async with self._asking():
            answer = await self._client.post("/drain", params={"wait": wait_s}, timeout=ANSWER_TIMEOUT_S + wait_s)
            return decode_drain_report(answer.content)

    @contextlib.asynccontextmanager
    async def suspended(self) -> AsyncIterator[None]:
        """Have the node's store closed while the block runs. The directory stays locked: no other process opens it."""
        async with self._asking(), self._client.stream("POST", "/suspend", timeout=60) as answer:
            if answer.status_code != httpx.codes.OK:
                raise MehdbError(f"the node cannot be suspended: it answered {answer.status_code}")
            yield

    @contextlib.asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise NotRunning(f"no node runs on {self._directory}: name its data directory with --data-dir") from error
        except httpx.HTTPError as error:
            raise PeerUnreachable(f"the node on {self._directory}: {type(error).__name__}: {error}") from error
