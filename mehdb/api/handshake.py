"""Connections that are to be encrypted: they are counted, and may be closed for others, before they have shaken hands.

asyncio's own TLS server makes its protocol only afterwards, so that whoever never finishes would hold a connection that
nobody sees. The certificate is looked up at each connection: one that was read anew is shown from the next one on.
"""

import asyncio
import logging
import socket
import ssl
from asyncio import AbstractEventLoop
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from aiohttp import web

from mehdb.credentials import Credentials

log = logging.getLogger("mehdb.api")

SHUTDOWN_S: Final = 1.0  # many clients never answer to the end of a connection
HANDSHAKES_MAX: Final = 128  # at once: each may hold 300 KB that a stranger has sent
STOP_S: Final = 1.0  # for those under way when no more are accepted
ANSWER_S: Final = 0.1  # for a request that comes right behind one
ACCEPT_AGAIN_S: Final = 1.0  # after the file descriptors ran out


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


class TlsServer(Protocol):
    """What a server is to those who make its connections."""

    @property
    def head_timeout_s(self) -> float:
        """How long a handshake may take."""
        ...

    def __call__(self) -> asyncio.Protocol:
        """Return the protocol of a new connection."""
        ...

    def opened(self, connection: Connection) -> None:
        """Count *connection*."""
        ...

    def closed(self, connection: Connection) -> None:
        """Count it no longer."""
        ...


class TlsSite(web.BaseSite):
    """Has the *server* of *runner* answer on *listener*, behind TLS.

    *on_refused* is told whose handshake failed, by address, and why.
    """

    def __init__(
        self,
        runner: web.ServerRunner,
        server: TlsServer,
        listener: socket.socket,
        credentials: Credentials,
        on_refused: Callable[[str, str], None],
    ) -> None:
        super().__init__(runner)
        self._tls_server = server
        self._listener = listener
        self._credentials = credentials
        self._on_refused = on_refused
        self.accepting: asyncio.Task[None] | None = None
        """Accepts connections, without end: whoever supervises the node looks at it."""
        self._shaking: dict[asyncio.Task[None], None] = {}  # in the order in which they began

    @property
    def name(self) -> str:
        """Where it answers."""
        return f"https://{self._listener.getsockname()}"

    async def start(self) -> None:
        """Begin to accept connections."""
        await super().start()
        self._listener.setblocking(False)
        self.accepting = asyncio.create_task(self._accept(), name="accept")

    async def stop(self) -> None:
        """Accept no more."""
        if self.accepting is not None:
            self.accepting.cancel()
            await asyncio.wait([self.accepting])
        self._listener.close()
        if self._shaking:  # what they ask is still answered
            await asyncio.wait(self._shaking, timeout=STOP_S)
            await asyncio.sleep(ANSWER_S)
        await super().stop()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(self._listener)
            except OSError as error:
                log.warning('no connection accepted reason="%s"', error.strerror)
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            context = self._credentials.server
            assert context, "without a certificate there is no such site"  # noqa: S101  our own invariant
            handshake = Handshake(loop, self._tls_server, accepted, str(address[0]), context, self._on_refused)
            self._shaking[handshake.task] = None
            handshake.task.add_done_callback(lambda task: self._shaking.pop(task, None))
            if len(self._shaking) > HANDSHAKES_MAX:
                oldest = next(iter(self._shaking))
                del self._shaking[oldest]
                oldest.cancel()


class Handshake:
    """A connection until it is encrypted, and its server's own protocol has it."""

    def __init__(
        self,
        loop: AbstractEventLoop,
        server: TlsServer,
        accepted: socket.socket,
        address: str,
        context: ssl.SSLContext,
        on_refused: Callable[[str, str], None],
    ) -> None:
        self.patience = Patience(in_request=False, since=loop.time())
        self._server = server
        self._accepted = accepted
        self._address = address
        self._on_refused = on_refused
        self._shaken = False
        self.task = loop.create_task(self._shake(loop, context), name="handshake")
        self.task.add_done_callback(self._ended)  # also of one that never began
        server.opened(self)

    def abort(self) -> None:
        """Close the connection at once."""
        self.task.cancel()

    async def _shake(self, loop: AbstractEventLoop, context: ssl.SSLContext) -> None:
        timeout_s = self._server.head_timeout_s
        try:
            await loop.connect_accepted_socket(
                self._server, self._accepted, ssl=context, ssl_handshake_timeout=timeout_s,
                ssl_shutdown_timeout=SHUTDOWN_S,
            )  # fmt: skip
            self._shaken = True
        except ssl.SSLError as error:
            self._on_refused(self._address, error.reason or str(error))
        except (OSError, TimeoutError):  # who goes away, or is too slow, is no news
            pass

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._server.closed(self)
        if not self._shaken:
            self._accepted.close()
        if not task.cancelled() and (error := task.exception()):
            log.error("unexpected route=%s method=%s", "accept", "-", exc_info=error)
