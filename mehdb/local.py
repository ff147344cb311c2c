"""A StatefulSet on one machine: real node processes, each with a name, an ordinal and a volume of its own.

Started in order, each when the one before is ready; started again on the same volume when one dies; stopped in reverse
order. It knows nodes as the kubelet does: by their processes and by what they answer over HTTP.
"""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mehdb.errors import MehdbError, PeerError, SettingsError
from mehdb.model import NodeStatus
from mehdb.peers import Peer
from mehdb.settings import inherited_environment
from mehdb.store import lock_holder

ADDRESS: Final = "127.0.0.1"
COLUMNS: Final = ("node", "role", "url", "pid", "ready", "revision", "lag")
LOOK_EVERY_S: Final = 0.2  # often enough to look alive, seldom enough to cost nothing
STOP_TIMEOUT_S: Final = 30.0  # the kubelet's default grace period
RESTART_LEAST_S: Final = 0.5  # the kubelet waits longer, but somebody watches this one
RESTART_MOST_S: Final = 10.0
LOG_TAIL_BYTES: Final = 4096  # holds the last line
SETTLED_S: Final = 10.0  # a process that lived this long died of something new


@dataclass
class Pod:
    """What stays of a node (name, port, volume), and what comes and goes (process, status)."""

    name: str
    port: int
    volume: Path
    process: asyncio.subprocess.Process | None = None
    status: NodeStatus | None = None

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://{ADDRESS}:{self.port}"

    @property
    def log(self) -> Path:
        """Where its process writes its log: beside the volume, which holds the store alone."""
        return self.volume.with_suffix(".log")

    @property
    def ready(self) -> bool:
        """Whether it said so when last asked."""
        return self.status is not None and self.status.ready

    @property
    def reason(self) -> str:
        """Why it is not ready, in its own words; nothing if it is, or cannot say."""
        return f" reason={self.status.reason}" if self.status and self.status.reason else ""

    def cells(self) -> tuple[str, ...]:
        """Return what `COLUMNS` names."""
        pid = str(self.process.pid) if self.process else "-"
        if self.status is None:
            return self.name, "-", self.url, pid, "no", "-", "-"
        leader = self.status.leader
        lag = "-" if leader is None or leader.lag_revisions is None else str(leader.lag_revisions)
        return self.name, self.status.role, self.url, pid, "yes" if self.ready else "no", str(self.status.revision), lag


class LocalCluster:
    """*replicas* nodes on consecutive ports from *port*, with their volumes in *data_dir*."""

    def __init__(self, replicas: int, port: int, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._pods = [
            Pod(f"mehdb-{ordinal}", port + ordinal, data_dir / f"mehdb-{ordinal}") for ordinal in range(replicas)
        ]
        self._console = Console()
        self._stop = asyncio.Event()
        self._failure: Exception | None = None
        self._said: dict[str, tuple[str, ...]] = {}

    async def run(self) -> None:
        """Run until SIGINT, SIGTERM or SIGHUP. Raises `SettingsError` if a port is taken or the directory unusable."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        self._prepare()
        keepers: dict[str, asyncio.Task[None]] = {}
        async with self._shown():
            try:
                for pod in self._pods:
                    if self._stop.is_set():
                        break
                    keepers[pod.name] = asyncio.create_task(self._guarded(partial(self._keep, pod)), name=pod.name)
                    await self._ready_or_stopped(pod)
                if not self._stop.is_set() and not self._console.is_terminal:
                    self._console.print(self._hints(), soft_wrap=True)
                await self._stop.wait()
            finally:
                for pod in reversed(self._pods):
                    if keeper := keepers.get(pod.name):
                        keeper.cancel()
                        await asyncio.wait([keeper])
        if self._failure:
            raise MehdbError(f"the cluster was stopped: {self._failure}") from self._failure

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do *work*, which does not end by itself. What it fails with stops the cluster."""
        try:
            await work()
        except Exception as error:  # noqa: BLE001  whatever it was, the cluster is no longer kept or watched
            self._failure = error
            self._stop.set()

    def _prepare(self) -> None:
        """Refuse what would fail in every node's log, before any is started."""
        problems = []
        for pod in self._pods:
            holder = lock_holder(pod.volume) if pod.volume.exists() else None
            if holder:
                problems.append(
                    f"--data-dir: {pod.volume} is in use by process {holder}, of a cluster that still runs or was "
                    f"killed: end it with `kill {holder}`"
                )
            elif _taken(pod.port):
                problems.append(f"--port: {pod.port} is in use, choose another range")
        try:
            self._data_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problems.append(f"--data-dir: {self._data_dir} cannot be used: {error.strerror}")
        if problems:
            raise SettingsError(problems)

    async def _ready_or_stopped(self, pod: Pod) -> None:
        while not pod.ready and not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), LOOK_EVERY_S)

    async def _keep(self, pod: Pod) -> None:
        """Keep a process running for *pod*: another on the same volume when one ends. Stop it when cancelled."""
        delay_s = RESTART_LEAST_S
        while True:
            started_at_s = monotonic()
            pod.process = await self._start(pod)
            try:
                code = await pod.process.wait()
            except asyncio.CancelledError:
                await _terminate(pod.process)
                pod.process = pod.status = None
                self._console.print(f"{pod.name} stopped", highlight=False)
                raise
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._console.print(
                f"{pod.name} (pid {pod.process.pid}) ended: {how}; starting it again on its volume. "
                f"Its last words, in {pod.log}: {_last_line(pod.log)}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
            pod.process = pod.status = None
            delay_s = RESTART_LEAST_S if monotonic() - started_at_s > SETTLED_S else min(delay_s * 2, RESTART_MOST_S)
            await asyncio.sleep(delay_s)

    async def _start(self, pod: Pod) -> asyncio.subprocess.Process:
        command = [
            sys.executable, "-m", "mehdb", "serve",
            "--host", pod.name, "--listen", ADDRESS, "--port", str(pod.port), "--data-dir", str(pod.volume),
            "--peers", ",".join(one.url for one in self._pods), "--lame-duck", "0",
        ]  # fmt: skip
        with pod.log.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal must reach this process alone, which stops them in order.
            return await asyncio.create_subprocess_exec(
                *command, env=inherited_environment(), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    @contextlib.asynccontextmanager
    async def _shown(self) -> AsyncIterator[None]:
        """Keep what is shown current while the block runs: a table on a terminal, a line for each change elsewhere."""
        live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        async with contextlib.AsyncExitStack() as stack:
            peers = {pod.name: await stack.enter_async_context(Peer(pod.url)) for pod in self._pods}
            if live:
                stack.enter_context(live)
            watcher = asyncio.create_task(self._guarded(partial(self._watch, peers, live)), name="watcher")
            try:
                yield
            finally:
                watcher.cancel()
                await asyncio.wait([watcher])
                if live:
                    live.update(Text(f"The volumes are in {self._data_dir}."), refresh=True)

    async def _watch(self, peers: dict[str, Peer], live: Live | None) -> None:
        while True:
            await asyncio.gather(*(_look(pod, peers[pod.name]) for pod in self._pods if pod.process))
            if live:
                live.update(self._screen(), refresh=True)
            elif not self._stop.is_set():
                self._print_changes()
            await asyncio.sleep(LOOK_EVERY_S)

    def _print_changes(self) -> None:
        """Print a line for each pod whose role, process or readiness is no longer what was last printed."""
        for pod in self._pods:
            line = pod.cells()
            state = (line[1], line[3], line[4])
            if pod.process and self._said.get(pod.name) != state:
                self._said[pod.name] = state
                text = " ".join(f"{name}={cell}" for name, cell in zip(COLUMNS, line, strict=True)) + pod.reason
                self._console.print(text, highlight=False, soft_wrap=True)

    def _screen(self) -> Group:
        table = Table(*COLUMNS, box=None, pad_edge=False)
        for pod in self._pods:
            if pod.process or pod.status:
                table.add_row(*pod.cells(), style=None if pod.ready else "dim")
        if all(pod.ready for pod in self._pods):
            return Group(table, self._hints())
        return Group(table, *(Text(pod.name + pod.reason, style="bold") for pod in self._pods if pod.reason))

    def _hints(self) -> Text:
        """Return the commands to try, for the processes that run now."""
        reader = self._pods[-1]
        lines = [
            "",
            "Try, in another terminal:",
            f"  echo 'test data' | curl -sL -XPUT -T - {reader.url}/set/test",
            f"  curl -s {reader.url}/get/test",
            f"  curl -s '{reader.url}/status?level=full'",
        ]
        if reader.process:
            lines.append(
                f"  kill -9 {reader.process.pid}    # {reader.name} comes back on its volume, under another pid"
            )
        return Text("\n".join([*lines, "Ctrl-C stops the cluster; its volumes stay in " + str(self._data_dir)]))


async def _look(pod: Pod, peer: Peer) -> None:
    """Ask *pod* how it is."""
    process = pod.process
    try:
        status = await peer.status()
    except PeerError:
        status = None
    if pod.process is process:  # else it has ended since, and what it said is over
        pod.status = status


async def _terminate(process: asyncio.subprocess.Process) -> None:
    """End *process* as the kubelet does: SIGTERM, the grace period, SIGKILL."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()


def _last_line(log: Path) -> str:
    """Return the last line of a log: what a process that ended had to say."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return lines[-1] if lines else "nothing was logged"


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex((ADDRESS, port)) == 0
