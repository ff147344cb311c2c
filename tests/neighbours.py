"""Nodes that only say where they are, each at a loopback address of its own, and a name that lists them."""

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from aiohttp import web

from cluster import free_port
from mehdb.discovery import Neighbours
from mehdb.model import Role, State
from mehdb.names import Names

HISTORY: Final = "aa" * 16
SERVICE: Final = "mehdb-peers"
LEADER: Final = "mehdb-0"


def position(node: str, revision: int = 1, *, epoch: int = 1, history: str = HISTORY) -> dict[str, Any]:
    """Return what *node* answers to `/position`: mehdb-0 leads, any other follows."""
    return {
        "node": node, "role": Role.LEADER if node == LEADER else Role.FOLLOWER, "state": State.SERVING, "epoch": epoch,
        "history": history, "revision": revision, "chain": "cc" * 16,
    }  # fmt: skip


class Listed:
    """The nodes and their list, which a test changes. It counts how often they were asked."""

    def __init__(self) -> None:
        self.port = free_port()
        self.addresses: list[str] = []
        self.failure: OSError | None = None
        self.asked: list[str] = []
        self._stack = contextlib.AsyncExitStack()
        self.neighbours = Neighbours(SERVICE, self.url, names=self.names())

    def url(self, address: str) -> str:
        return f"http://{address}:{self.port}"

    def names(self, own: Callable[[], dict[str, list[str]]] = dict) -> Names:
        """Return what looks names up: the list, and what *own* tells of others."""

        def find(name: str, _port: None, **_options: Any) -> list[tuple[Any, ...]]:
            if self.failure:
                raise self.failure
            addresses = self.addresses if name == SERVICE else own().get(name, [])
            if not addresses:
                raise socket.gaierror(socket.EAI_NONAME, "no such name")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

        return Names(find)

    async def add(self, address: str, answer: dict[str, Any] | None) -> None:
        """Have a node at *address* that answers that; None: it takes connections, and says nothing."""
        self.addresses.append(address)
        if answer is None:
            self._stack.enter_context(socket.create_server((address, self.port)))
            return

        async def answers(_: web.BaseRequest) -> web.Response:
            self.asked.append(address)
            return web.json_response(answer)

        runner = web.ServerRunner(web.Server(answers), shutdown_timeout=0.1)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, address, self.port).start()

    async def close(self) -> None:
        await self.neighbours.close()
        await self._stack.aclose()


@contextlib.asynccontextmanager
async def listed(**nodes: dict[str, Any] | None) -> AsyncIterator[Listed]:
    """Have *nodes* at 127.0.0.N, called `aN`."""
    them = Listed()
    try:
        for name, answer in nodes.items():
            await them.add(f"127.0.0.{name.removeprefix('a')}", answer)
        yield them
    finally:
        await them.close()
