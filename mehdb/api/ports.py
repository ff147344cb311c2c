"""What a node listens with: its port, and a second one for probes alone where that is wanted."""

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
from mehdb.api.node import NodeView
from mehdb.api.replicate import Followers
from mehdb.api.routes import all_routes, probe_routes
from mehdb.api.server import ApiServer
from mehdb.credentials import ANONYMOUS, Credentials
from mehdb.metrics import Metrics
from mehdb.settings import Settings
from mehdb.store import Store
from mehdb.tokens import Tokens

PROBES_AT_ONCE: Final = 64  # connections to the health port


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
        self._runner = self._runner_of(api, settings.max_connections, credentials, audit)
        self._probes_runner = self._runner_of(probes, PROBES_AT_ONCE, ANONYMOUS, audit)

    async def open(self, listener: socket.socket, health_listener: socket.socket | None) -> None:
        """Begin to answer."""
        for runner, one in ((self._runner, listener), (self._probes_runner, health_listener)):
            if one is not None:
                await runner.setup()
                await web.SockSite(runner, one).start()

    async def finish(self) -> None:
        """Take no more connections, and finish the requests under way, within `stop_timeout`."""
        await self._runner.cleanup()
        await self._probes_runner.cleanup()

    async def close(self) -> None:
        """Close the connections to other nodes."""
        await self._to_leader.close()

    def _runner_of(self, api: Api, connections_max: int, credentials: Credentials, audit: Audit) -> web.ServerRunner:
        settings = self._settings
        # The API answers every error itself. What aiohttp would log is clients' broken requests: no change of state.
        quiet = logging.getLogger("mehdb.http")
        quiet.setLevel(logging.CRITICAL)
        server = ApiServer(
            api,
            connections_max=connections_max,
            head_timeout_s=settings.header_timeout,
            credentials=credentials,
            on_refused=audit.refused,
            access_log=None,
            logger=quiet,
            keepalive_timeout=settings.keepalive_timeout,
            lingering_time=settings.body_timeout,  # for a client that sends all of a refused body before it reads
            auto_decompress=False,  # a value is stored as it was sent
        )
        # aiohttp waits this long twice: for the requests under way, and for those that it then cancels.
        return web.ServerRunner(server, shutdown_timeout=settings.stop_timeout / 2)
