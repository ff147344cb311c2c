"""One node: the only place where its parts are put together, started, supervised and stopped.

starting → syncing (follower) → serving → stopped
                    ↘ diverged
"""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator
from time import monotonic
from typing import Final

from aiohttp import web

from mehdb import __version__
from mehdb.api import Api, ApiServer, Check, Followers
from mehdb.errors import MehdbError, SettingsError
from mehdb.metrics import Metrics
from mehdb.model import NodeStatus, State
from mehdb.peers import Peer
from mehdb.replication import Follower
from mehdb.roles import Leadership, assign
from mehdb.settings import Settings
from mehdb.store import Store

log = logging.getLogger("mehdb.node")

LISTEN_BACKLOG: Final = 1024  # connections that the kernel holds while the loop is busy


class Node:
    """A node that has its store open. It is what the API speaks for (`mehdb.api.NodeView`)."""

    def __init__(self, settings: Settings, leadership: Leadership, store: Store, follower: Follower | None) -> None:
        self.name = settings.host
        self.role = leadership.role
        self.redirect_url = leadership.redirect_url
        self.stopping = False
        self._store = store
        self._follower = follower
        self._started_at_s = monotonic()
        self.followers = Followers()

    @property
    def state(self) -> State:
        """Where it is in its life: derived, so that it cannot disagree with what happens."""
        if self.stopping:
            return State.STOPPED
        return self._follower.state if self._follower else State.SERVING

    def checks(self) -> tuple[Check, ...]:
        """Return what must hold for the node to be ready."""
        return (
            Check("store", str(self._store.failure.result()) if self._store.failure.done() else None),
            Check("running", "the node is stopping" if self.stopping else None),
            Check("synced", self._follower.problem if self._follower else None),
        )

    def status(self) -> NodeStatus:
        """Return everything that the node tells about itself."""
        meta = self._store.meta
        problems = [f"{check.name}: {check.problem}" for check in self.checks() if check.problem]
        return NodeStatus(
            node=self.name,
            role=self.role,
            state=self.state,
            ready=not problems,
            reason="; ".join(problems) or None,
            history=meta.history,
            epoch=meta.epoch,
            revision=meta.head,
            chain=meta.chain.hex(),
            floor=meta.floor,
            keys=meta.keys,
            queue_bytes=self._store.queue_bytes,
            leader=self._follower.status() if self._follower else None,
            followers=self.followers.status(meta.head),
            uptime_seconds=round(monotonic() - self._started_at_s, 3),
            version=__version__,
            commits=self._store.commits,
        )


async def run(settings: Settings) -> None:
    """Run a node until SIGTERM or SIGINT, then finish what is queued and close the store.

    Raises `StoreError` before anything is served, and `StoreFailed` when the disk fails later.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    leadership = assign(settings)
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(_listener(settings))
        store = await Store.open(settings.data_dir, queue_bytes_max=settings.queue_size)
        stack.push_async_callback(store.close)
        follower = None
        if leadership.leader_url is None:
            await store.lead(leadership.next_epoch(store.meta.epoch))
        else:
            leader = await stack.enter_async_context(Peer(leadership.leader_url))
            follower = Follower(store, leader, settings.host)
        node = Node(settings, leadership, store, follower)
        await stack.enter_async_context(_served(node, store, settings, listener))
        log.info(
            "started node=%s role=%s listen=%s port=%d data_dir=%s revision=%d epoch=%d leader=%s version=%s",
            node.name, node.role, settings.listen, settings.port, settings.data_dir, store.head, store.meta.epoch,
            leadership.leader_url or "self", __version__,
        )  # fmt: skip
        await _supervise(stop, store, follower)
        log.info("stopping node=%s queue_bytes=%d", node.name, store.queue_bytes)
        node.stopping = True
    log.info("stopped node=%s revision=%d", node.name, store.head)


async def _supervise(stop: asyncio.Event, store: Store, follower: Follower | None) -> None:
    """Return when *stop* is set. Raises what a part of the node ended with: none may end by itself."""
    stopped = asyncio.create_task(stop.wait(), name="stop")
    following = asyncio.create_task(follower.run(), name="follower") if follower else None
    tasks = [task for task in (stopped, following) if task]
    try:
        await asyncio.wait([*tasks, store.failure], return_when=asyncio.FIRST_COMPLETED)
        if following and following.done():
            following.result()
            raise MehdbError("the follower's loop ended by itself: this is a bug")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    if store.failure.done():
        raise store.failure.result()


def _listener(settings: Settings) -> socket.socket:
    """Return a socket that listens where *settings* say. Raises `SettingsError`, before anything else is opened."""
    family = socket.AF_INET6 if ":" in settings.listen else socket.AF_INET
    try:
        return socket.create_server((settings.listen, settings.port), family=family, backlog=LISTEN_BACKLOG)
    except OSError as error:
        raise SettingsError(
            [f"--listen {settings.listen}, --port {settings.port}: cannot listen there: {error.strerror or error}"]
        ) from error


@contextlib.asynccontextmanager
async def _served(node: Node, store: Store, settings: Settings, listener: socket.socket) -> AsyncIterator[None]:
    """Answer requests while the block runs; at its end finish those under way, within `stop_timeout`."""
    api = Api(node, store, settings, node.followers, Metrics(node.status))
    # The API answers every error itself. What aiohttp would log is clients' broken requests: no change of our state.
    quiet = logging.getLogger("mehdb.http")
    quiet.setLevel(logging.CRITICAL)
    server = ApiServer(
        api,
        access_log=None,
        logger=quiet,
        keepalive_timeout=settings.keepalive_timeout,
        lingering_time=settings.body_timeout,  # for a client that sends all of a refused body before it reads
        auto_decompress=False,  # a value is stored as it was sent
    )
    # aiohttp waits this long twice: for the requests under way, and for those that it then cancels.
    runner = web.ServerRunner(server, shutdown_timeout=settings.stop_timeout / 2)
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        yield
    finally:
        store.stop_waiting()
        await runner.cleanup()
