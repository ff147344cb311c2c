"""A node's life: the only place where its parts are put together, started, supervised, suspended and stopped."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

from aiohttp import web

from mehdb import __version__, control
from mehdb.api import ControlApi, Ports
from mehdb.credentials import Credentials
from mehdb.discovery import Neighbours
from mehdb.errors import Damaged, DiskFull, MehdbError, SettingsError, StoreFailed
from mehdb.expiry import expire
from mehdb.metrics import Metrics
from mehdb.model import DrainReport, NodePosition, NodeStatus, Role
from mehdb.node import OPENING, Node
from mehdb.peers import Peer
from mehdb.recovery import Leader
from mehdb.replication import Follower
from mehdb.roles import address_url, assign, peer_urls, peers_service, pod_name, pod_url
from mehdb.settings import Settings
from mehdb.store import Store, StoreOptions
from mehdb.tokens import Tokens
from mehdb.whereabouts import Whereabouts

log = logging.getLogger("mehdb.life")

LISTEN_BACKLOG: Final = 1024  # connections that the kernel holds while the loop is busy
WATCH_EVERY_S: Final = 1.0
REFRESH_EVERY_S: Final = 2.0  # a token that is taken back should be of no use soon
OPEN_EVERY_S: Final = 1.0  # how often a store is tried that had no room to be opened


async def run(settings: Settings) -> None:
    """Run a node until SIGTERM or SIGINT, then let clients and followers go, and close the store.

    Raises `SettingsError` and `StoreError` before anything is served, and `StoreFailed` when the disk fails later.
    """
    store = Store(settings.data_dir, StoreOptions(settings.queue_size, settings.disk_reserve, settings.retain_changes))
    await Life(settings, store).run()


class Life:
    """One node from its start to its end. To its operator, it is `mehdb.api.ControlView`."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._leadership = assign(settings)
        self._tokens = Tokens(settings.tokens_file) if settings.tokens_file else None
        self._credentials = Credentials(
            settings.token_file, ca=settings.tls_ca, cert=settings.tls_cert, key=settings.tls_key,
            verify_clients=settings.tls_verify_clients,
        )  # fmt: skip
        self._refreshed = [self._credentials.refresh, *([self._tokens.refresh] if self._tokens else [])]
        self._neighbours = _neighbours(settings, self._credentials)
        self._leader_at = self._whereabouts_of_leader()
        self._node = Node(settings, self._leadership, store, self._leader_at)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._one_operator = asyncio.Lock()
        self._suspend, self._away, self._resume = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Live."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._be_told_to_stop)
        loop.add_signal_handler(signal.SIGUSR1, self._node.drain)
        settings = self._settings
        async with contextlib.AsyncExitStack() as stack:
            listener = stack.enter_context(_listener(settings, settings.port, "--port"))
            health_listener = None
            if settings.health_port is not None:
                health_listener = stack.enter_context(_listener(settings, settings.health_port, "--health-port"))
            stack.push_async_callback(self._store.close)
            if self._neighbours is not None:
                stack.push_async_callback(self._neighbours.close)
            # What can pass or be mended is seen to while requests are answered; anything else ends it here.
            with contextlib.suppress(Damaged, DiskFull):
                await self._store.start()
            await stack.enter_async_context(self._controlled())
            ports = await stack.enter_async_context(self._served(listener, health_listener))
            log.info(
                "started node=%s role=%s version=%s listen=%s port=%d data_dir=%s revision=%d leader=%s",
                self._node.name, self._node.role, __version__, settings.listen, settings.port, settings.data_dir,
                self._store.head, self._leadership.leader_url or "self",
            )  # fmt: skip
            self._tell_who_is_let_in()
            await self._supervise(ports.endless)
            log.info("stopping node=%s queue_bytes=%d", self._node.name, self._store.queue_bytes)
            self._node.stopped = True
        log.info("stopped node=%s revision=%d", self._node.name, self._store.head)

    def _tell_who_is_let_in(self) -> None:
        if self._settings.anonymous:
            log.warning("open to everybody who reaches it listen=%s", self._settings.listen)

    def _be_told_to_stop(self) -> None:
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def _supervise(self, others: list[asyncio.Task[None]]) -> None:
        """Return when the node has stopped and left. Raises what a part of it ended with: none may end by itself.

        Nor may *others*, which somebody else ends.
        """
        leaving = asyncio.create_task(self._leave(), name="leave")
        endless = [
            asyncio.create_task(self._watch(), name="watch"),
            *(asyncio.create_task(_keep_fresh(what), name="refresh") for what in self._refreshed),
            asyncio.create_task(self._play(), name=self._node.role),
        ]
        if self._node.role is Role.LEADER:
            endless.append(asyncio.create_task(expire(self._store, self._node.writing_of_its_own), name="expiry"))
        try:
            parts: list[asyncio.Future[Any]] = [leaving, *endless, *others, self._store.failure]
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                leaving.result()
            for task in (*endless, *others):
                if task.done() and not self._store.failure.done():
                    task.result()
                    raise MehdbError(f"the {task.get_name()} ended by itself: this is a bug")
        finally:
            for task in (leaving, *endless):
                task.cancel()
            await asyncio.wait([leaving, *endless])
        if self._store.failure.done():
            raise self._store.failure.result()

    async def _watch(self) -> None:
        """Fail when the volume has gone from under this node: a deleted file takes writes, but keeps none."""
        while not self._store.failure.done():
            await asyncio.sleep(WATCH_EVERY_S)
            if self._store.vanished() and not self._store.failure.done():
                self._store.failure.set_result(
                    StoreFailed(f"the store in {self._settings.data_dir} was deleted or replaced while it was open")
                )

    async def _leave(self) -> None:
        """When told to stop: drain, and go on answering until nobody asks any more. Told again: at once."""
        await self._stop.wait()
        self._node.closing = True
        self._node.drain()
        self._store.interrupt_waiting()  # a drain that began earlier ended no watch
        ending = asyncio.create_task(self._end(), name="end")
        hurry = asyncio.create_task(self._hurry.wait(), name="hurry")
        try:
            await asyncio.wait([ending, hurry], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (ending, hurry):
                task.cancel()
            await asyncio.wait([ending, hurry])
        if not ending.cancelled():
            ending.result()

    async def _end(self) -> None:
        """Wait until the node is drained, or as long as that may take, and until clients have been told."""
        settings = self._settings
        report, _ = await asyncio.gather(self._node.drained(settings.drain_timeout), asyncio.sleep(settings.lame_duck))
        if not report.done:
            log.warning(
                "not drained queue_bytes=%d writes=%d missing=%s",
                report.queue_bytes, report.writes, ",".join(report.missing) or "nobody",
            )  # fmt: skip

    async def _play(self) -> None:
        """Play this node's role for ever, and again from the start after each time that an operator suspended it."""
        while True:
            playing = asyncio.create_task(self._play_once(), name=f"{self._node.role} at work")
            suspended = asyncio.create_task(self._suspend.wait(), name="suspend")
            try:
                await asyncio.wait([playing, suspended], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (playing, suspended):
                    task.cancel()
                await asyncio.wait([playing, suspended])
            if not self._suspend.is_set():
                return playing.result()
            self._node.part, self._node.obstacle = None, "an operator's command has the store"
            with contextlib.suppress(Damaged, DiskFull):
                async with self._store.suspended():
                    log.info("suspended node=%s", self._node.name)
                    self._suspend.clear()
                    self._away.set()
                    await self._resume.wait()
            log.info("resumed node=%s", self._node.name)

    async def _play_once(self) -> None:
        await self._opened()
        async with contextlib.AsyncExitStack() as stack:
            if self._leader_at is None:
                part: Leader | Follower = Leader(
                    self._store, self._leadership, peer_urls(self._settings), self._credentials, self._neighbours,
                    self._node.name,
                )  # fmt: skip
            else:
                at = self._leader_at
                leader = await stack.enter_async_context(Peer(at.url, self._credentials, whereabouts=at))
                part = Follower(self._store, leader, self._node.name)
            self._node.part = part
            await part.run()

    def _whereabouts_of_leader(self) -> Whereabouts | None:
        """Return where the leader is, for all that ask it; None on the leader."""
        url, neighbours = self._leadership.leader_url, self._neighbours
        if url is None:
            return None
        if neighbours is None:
            return Whereabouts(url)

        def is_over(one: NodePosition) -> bool:
            meta = self._store.meta
            return one.history == meta.history and one.epoch < meta.epoch

        name = pod_name(self._settings, self._settings.leader_ordinal)
        return Whereabouts(url, lambda: neighbours.leader(name, is_over))

    async def _opened(self) -> None:
        """Return when the store is open, or known to be damaged."""
        while not self._store.is_open:
            try:
                await self._store.start()
            except Damaged as error:
                log.error('store damaged reason="%s"', error)  # noqa: TRY400  the reason says it all
                break
            except DiskFull as error:
                if self._node.obstacle != str(error):
                    log.error('store not opened reason="%s"', error)  # noqa: TRY400
                self._node.obstacle = str(error)
                await asyncio.sleep(OPEN_EVERY_S)
        self._node.obstacle = OPENING

    # To an operator's commands.

    def status(self) -> NodeStatus:
        """Return everything that the node tells about itself."""
        return self._node.status()

    async def drained(self, timeout_s: float) -> DrainReport:
        """Drain, and wait until that is done."""
        return await self._node.drained(timeout_s)

    @contextlib.asynccontextmanager
    async def suspended(self) -> AsyncIterator[None]:
        """Have the store closed while the block runs, then start again. One operator at a time."""
        async with self._one_operator:
            self._resume.clear()
            self._away.clear()
            self._suspend.set()
            await self._away.wait()
            try:
                yield
            finally:
                self._resume.set()

    # To the outside.

    @contextlib.asynccontextmanager
    async def _controlled(self) -> AsyncIterator[None]:
        """Answer an operator's commands while the block runs."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                listener = stack.enter_context(control.listener(self._settings.data_dir))
            except OSError as error:  # a volume that can only be read, or holds no sockets
                log.warning('no control socket reason="%s"', error)
            else:
                runner = web.AppRunner(ControlApi(self).application(), access_log=None, shutdown_timeout=0.1)
                await runner.setup()
                stack.push_async_callback(runner.cleanup)
                await web.SockSite(runner, listener).start()
            yield

    @contextlib.asynccontextmanager
    async def _served(self, listener: socket.socket, health_listener: socket.socket | None) -> AsyncIterator[Ports]:
        """Answer requests while the block runs; at its end finish those under way, within `stop_timeout`."""
        node = self._node
        metrics = Metrics(node.status, self._store.figures)
        ports = Ports(node, self._store, self._settings, node.followers, metrics, self._tokens, self._credentials)
        try:
            await ports.open(listener, health_listener)
            yield ports
        finally:
            self._store.stop_waiting()
            await self._unless_hurried(ports.finish())
            await ports.close()

    async def _unless_hurried(self, work: Coroutine[Any, Any, None]) -> None:
        """Finish the requests under way; told to hurry, leave them to the end of the process."""
        finishing = asyncio.create_task(work, name="finish")
        hurry = asyncio.create_task(self._hurry.wait(), name="hurry")
        await asyncio.wait([finishing, hurry], return_when=asyncio.FIRST_COMPLETED)
        for task in (finishing, hurry):
            task.cancel()
        await asyncio.wait([finishing, hurry])


async def _keep_fresh(refresh: Callable[[], None]) -> None:
    """Have tokens or certificates that have been changed used as soon as they have."""
    while True:
        await asyncio.sleep(REFRESH_EVERY_S)
        await asyncio.to_thread(refresh)  # in a thread: a file may be on a disk that hangs


def _neighbours(settings: Settings, credentials: Credentials) -> Neighbours | None:
    """Return the pods that are listed ready or not; None outside Kubernetes."""
    service = peers_service(settings)
    if service is None or settings.ordinal is None:
        return None
    return Neighbours(
        service,
        partial(address_url, settings),
        credentials,
        certified_as=urlsplit(pod_url(settings, settings.ordinal)).hostname,  # all pods mount one certificate
        family=socket.AF_UNSPEC if ":" in settings.listen else socket.AF_INET,
    )


def _listener(settings: Settings, port: int, flag: str) -> socket.socket:
    """Return a socket that listens on *port*, from *flag*. Raises `SettingsError`, before anything else is opened."""
    family = socket.AF_INET6 if ":" in settings.listen else socket.AF_INET
    try:
        return socket.create_server((settings.listen, port), family=family, backlog=LISTEN_BACKLOG)
    except OSError as error:
        raise SettingsError(
            [f"--listen {settings.listen}, {flag} {port}: cannot listen there: {error.strerror or error}"]
        ) from error
