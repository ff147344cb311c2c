"""Connections that are to be encrypted: they are counted, and may be closed for others, before they have shaken hands.

asyncio's own TLS server makes its protocol only afterwards, so that whoever never finishes would hold a connection that
nobody sees. The context is looked up at each connection: one that was read anew holds from the next one on.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import NamedTuple, Protocol, cast


class Patience(NamedTuple):
    """How long a connection has waited for its client. Of two, the lower is closed first."""

    in_request: bool
    """Whether a request is under way: its body is waited for, or that its answer is read."""
    since: float
    """By the loop's clock."""


class Connection(Protocol):
    """What a server counts, and closes where there are too many."""

    @property
    def patience(self) -> Patience | None:
        """How long the client has been waited for; None if it waits for us."""
        ...

    def abort(self) -> None:
        """Close the connection at once."""
        ...


class Counter(Protocol):
    """Who counts connections."""

    head_timeout_s: float

    def opened(self, connection: Connection) -> None:
        """Count *connection*."""
        ...

    def closed(self, connection: Connection) -> None:
        """Count it no longer."""
        ...


class Handshake(asyncio.Protocol):
    """A connection to *server* until it is encrypted. Then *accepted* makes the protocol that takes it over.

    *refused* is told the address that it came from, and what was wrong, where that is so.
    """

    def __init__(
        self,
        server: Counter,
        context: ssl.SSLContext,
        accepted: Callable[[], asyncio.Protocol],
        refused: Callable[[str, str], None],
    ) -> None:
        self._server = server
        self._context = context
        self._accepted = accepted
        self._refused = refused
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self.patience: Patience | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Shake hands."""
        loop = asyncio.get_running_loop()
        self.patience = Patience(in_request=False, since=loop.time())
        self._transport = connection = cast("asyncio.Transport", transport)  # what a TCP server has
        self._server.opened(self)
        if not connection.is_closing():  # or there were too many
            self._task = loop.create_task(self._shake(connection), name="handshake")

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  asyncio's signature
        """Count it no longer."""
        self._server.closed(self)

    def abort(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    async def _shake(self, transport: asyncio.Transport) -> None:
        early = _Early()
        try:
            encrypted = await asyncio.get_running_loop().start_tls(
                transport, early, self._context, server_side=True, ssl_handshake_timeout=self._server.head_timeout_s
            )
        except ssl.SSLError as error:
            self._refused(_address(transport), error.reason or str(error))
        except (OSError, TimeoutError):  # who goes away, or is too slow, is no news
            pass
        else:
            if encrypted is not None and not encrypted.is_closing():
                early.hand_over(encrypted, self._accepted())
                return
        finally:
            self._server.closed(self)
        transport.abort()


class _Early(asyncio.Protocol):
    """Keeps what comes with the end of the handshake, until somebody takes it."""

    def __init__(self) -> None:
        self._data: list[bytes] = []
        self._lost: list[Exception | None] = []

    def data_received(self, data: bytes) -> None:
        self._data.append(bytes(data))

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost.append(exc)

    def hand_over(self, transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
        """Have *protocol* take over *transport*, and what has come."""
        protocol.connection_made(transport)
        transport.set_protocol(protocol)
        for data in self._data:
            protocol.data_received(data)
        for error in self._lost:
            protocol.connection_lost(error)


def _address(transport: asyncio.Transport) -> str:
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) else "-"
