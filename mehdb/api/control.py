"""What an operator's commands ask of the node on their machine, over the socket in its data directory.

No port leads here: who may open the socket has the volume anyway. So nobody needs to be asked for a password, and
nobody can ask from elsewhere.
"""

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import msgspec
from aiohttp import web

from mehdb.api.audit import local
from mehdb.model import DrainReport, NodeStatus

JSON: Final = "application/json"
WAIT_S_MAX: Final = 3600.0
GONE_EVERY_S: Final = 0.02  # how often it looks whether the client has gone


class ControlView(Protocol):
    """A node, as its operator sees it."""

    def status(self) -> NodeStatus:
        """Return everything that the node tells about itself."""
        ...

    async def drained(self, timeout_s: float) -> DrainReport:
        """Take no more writes, and wait until those taken are durable here and on the followers that are connected."""
        ...

    def suspended(self) -> AbstractAsyncContextManager[None]:
        """Have the store closed while the block runs, though the directory stays locked; then start again."""
        ...


class ControlApi:
    """The routes of the socket."""

    def __init__(self, node: ControlView) -> None:
        self._node = node

    def application(self) -> web.Application:
        """Return them as an application of aiohttp's."""
        application = web.Application()
        application.add_routes(
            [
                web.get("/status", self._status),
                web.post("/drain", self._drain),
                web.post("/suspend", self._suspend),
            ]
        )
        return application

    async def _status(self, _request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self._node.status()), content_type=JSON)

    async def _drain(self, request: web.Request) -> web.Response:
        try:
            wait_s = min(float(request.query.get("wait", "0")), WAIT_S_MAX)
        except ValueError as error:
            raise web.HTTPBadRequest(text="wait must be a number of seconds") from error
        local(request)
        return web.Response(body=msgspec.json.encode(await self._node.drained(wait_s)), content_type=JSON)

    async def _suspend(self, request: web.Request) -> web.StreamResponse:
        """Suspend the node for as long as the client keeps the connection: one that dies cannot leave it suspended."""
        local(request)
        answer = web.StreamResponse()
        async with self._node.suspended():
            await answer.prepare(request)
            await answer.write(b"suspended\n")
            while request.transport is not None and not request.transport.is_closing():  # noqa: ASYNC110  aiohttp has
                await asyncio.sleep(GONE_EVERY_S)  # no event for it
        return answer
