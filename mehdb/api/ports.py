"""What a node listens with: its port, and a second one for probes alone where that is wanted."""

import asyncio
import logging
import socket
from typing import Final

from aiohttp import web

from mehdb.api.access import Gate
from mehdb.api.answers import Sending
from mehdb.api.app import Api
from mehdb.api.audit import Audit
from mehdb.api.bodies import Bodies
from mehdb.api.forward import ToLeader
from mehdb.api.handshake import TlsSite
from mehdb.api.node import NodeView
from mehdb.api.replicate import Followers
from mehdb.api.routes import all_routes, probe_routes
from mehdb.api.server import ApiServer
from mehdb.credentials import Credentials
from mehdb.metrics import Metrics
from mehdb.settings import Settings
from mehdb.store import Store
from mehdb.tokens import Tokens

PROBES_AT_ONCE: Final = 64  # connections to the health port
PROBES_STOP_S: Final = 0.1  # none takes longer


class Ports:
    """Answers requests for *node*. Who may ask what is in *tokens*; None: everybody may do everything."""

    def __init__(
        self,
        node: NodeView,
        store: Store,
        settings: Settings,
        followers: Followers,
        metrics: Metrics,
        tokens: Tokens | None,
        credentials: Credentials,
    ) -> None:
        self._settings = settings
        audit, sending = Audit(metrics), Sending(settings.queue_size, settings.body_timeout)
        self._to_leader = ToLeader(node, settings, Bodies(settings), credentials)
        gate = Gate(tokens, audit)
        routes = all_routes(node, store, settings, followers, metrics, gate, self._to_leader)
        api = Api(node, store, metrics, gate, routes, sending)
        probes = Api(node, store, metrics, Gate(None, audit), probe_routes(node, metrics), sending)
        self._credentials, self._on_refused = credentials, audit.refused
        self._server = self._server_of(api, settings.max_connections)
        # aiohttp waits this long twice: for the requests under way, and for those that it then cancels.
        self._runner = web.ServerRunner(self._server, shutdown_timeout=settings.stop_timeout / 2)
        self.endless: list[asyncio.Task[None]] = []
        """What must not end by itself while it answers."""
        self._probes_runner = web.ServerRunner(self._server_of(probes, PROBES_AT_ONCE), shutdown_timeout=PROBES_STOP_S)

    async def open(self, listener: socket.socket, health_listener: socket.socket | None) -> None:
        """Begin to answer."""
        await self._runner.setup()
        if self._credentials.server is None:
            await web.SockSite(self._runner, listener).start()
        else:
            site = TlsSite(self._runner, self._server, listener, self._credentials, self._on_refused)
            await site.start()
            self.endless += [site.accepting] if site.accepting else []
        if health_listener is not None:
            await self._probes_runner.setup()
            await web.SockSite(self._probes_runner, health_listener).start()

    async def finish(self) -> None:
        """Take no more connections, and finish the requests under way, within `stop_timeout`."""
        await self._runner.cleanup()
        await self._probes_runner.cleanup()

    async def close(self) -> None:
        """Close the connections to other nodes."""
        await self._to_leader.close()

    def _server_of(self, api: Api, connections_max: int) -> ApiServer:
        settings = self._settings
        # The API answers every error itself. What aiohttp would log is clients' broken requests: no change of state.
        quiet = logging.getLogger("mehdb.http")
        quiet.setLevel(logging.CRITICAL)
        return ApiServer(
            api,
            connections_max=connections_max,
            head_timeout_s=settings.header_timeout,
            access_log=None,
            logger=quiet,
            keepalive_timeout=settings.keepalive_timeout,
            lingering_time=settings.body_timeout,  # for a client that sends all of a refused body before it reads
            auto_decompress=False,  # a value is stored as it was sent
        )
