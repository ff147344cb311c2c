"""Nodes on volumes that tests have made, lost, rolled back, forked and damaged, of which nothing may be lost.

A scene's volumes are written by the store alone, before any node runs: what they hold is then known exactly. At its end
all that any of them held must be in the nodes' stores, or in the folders beside them in which what is replaced is kept.
"""

import asyncio
import contextlib
import hashlib
import inspect
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import apsw
import msgspec
import pytest

from cluster import DEADLINE_S, Cluster, Node, clean_environment, eventually
from mehdb.model import Epoch, NodeStatus
from mehdb.store import Store, StoreOptions, Write

DATABASE, WAL, MARK = "store.db", "store.db-wal", "acknowledged"
KEPT: Final = ("damaged-*", "behind-*", "replaced-*", "adopted-*", "rejoined-*", "abandoned-*")
LIVE: Final = """
    SELECT meta.history, change.revision, change.chain, change.key, change.value
    FROM meta, entry JOIN change USING (revision)
    WHERE change.key = entry.key AND substr(entry.key, 1, 3) <> CAST('hot' AS BLOB)"""
CONTENTS: Final = (
    "SELECT history, epoch, head, chain, keys FROM meta",
    "SELECT * FROM entry ORDER BY key",
    """SELECT * FROM change WHERE revision > :floor OR EXISTS (
        SELECT 1 FROM entry WHERE entry.key = change.key AND entry.revision = change.revision) ORDER BY revision""",
)
BUSY_TIMEOUT_MS: Final = 5000  # a node that starts has the store for itself for a moment
proven: Final[list[Path]] = []
"""The scenes of promise 4 in which nothing was lost."""
_values = itertools.count(1)  # no value is written twice: a fork's are others


class Row(NamedTuple):
    """A value, and where it stands: the chain says what all changes before it are."""

    history: str
    revision: int
    chain: bytes
    key: bytes
    value: bytes


def rows(directory: Path) -> set[Row]:
    """Return all that the store in *directory* holds, read from a copy, so that nothing there changes.

    Keys that start with "hot" are left out: they are there to be overwritten.
    """
    with tempfile.TemporaryDirectory() as copy:
        for name in (DATABASE, WAL):
            if (directory / name).exists():
                shutil.copy(directory / name, copy)
        with contextlib.closing(apsw.Connection(f"{copy}/{DATABASE}")) as connection:
            return {Row(*row) for row in connection.execute(LIVE)}


def opened(volume: Path) -> apsw.Connection:
    """Return a connection that only reads the store on *volume*, also while a process has it."""
    connection = apsw.Connection(str(volume / DATABASE), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(BUSY_TIMEOUT_MS)
    return connection


def chains(volume: Path, after: int = 0) -> dict[int, str]:
    """Return the chain at each revision after *after* that the store on *volume* still has."""
    with contextlib.closing(opened(volume)) as connection:
        found = connection.execute("SELECT revision, chain FROM change WHERE revision > ? ORDER BY revision", (after,))
        return {revision: chain.hex() for revision, chain in found}


def contents(volume: Path, floor: int = 0) -> str:
    """Return a hash over every row of the store on *volume*, but for what was superseded up to *floor*."""
    digest = hashlib.blake2b()
    with contextlib.closing(opened(volume)) as connection, connection:  # one state of it
        for query in CONTENTS:
            for row in connection.execute(query, {"floor": floor}):
                digest.update(msgspec.msgpack.encode(row))
    return digest.hexdigest()


def kept(volume: Path, reason: str = "*") -> list[Path]:
    """Return the folders on *volume* in which what was replaced for *reason* is kept."""
    return sorted(path for pattern in KEPT for path in volume.glob(pattern) if path.match(f"{reason}-*"))


def fingerprint(directory: Path) -> str:
    """Return a digest of the files that make the store in *directory*, sound or not."""
    digest = hashlib.sha256()
    for name in (DATABASE, WAL):
        path = directory / name
        if path.exists() and path.stat().st_size:
            digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()


def grow(volume: Path, count: int, *, key: str = "key", retain: int = 100_000, history: str | None = None) -> Path:
    """Write *count* new keys to *volume* as the leader of the next epoch does, and return it.

    With a *key* that starts with "hot", all go to that one.
    """

    async def write() -> None:
        store = await Store.open(volume, StoreOptions(retain_changes=retain))
        try:
            await store.lead(Epoch(store.meta.epoch + 1), history)  # type: ignore[arg-type]  a plain string will do
            numbers = list(itertools.islice(_values, count))
            names = [key if key.startswith("hot") else f"{key}-{number}" for number in numbers]
            values = [b"value %d%s" % (number, b"." * 80) for number in numbers]
            writes = [Write(name.encode(), value) for name, value in zip(names, values, strict=True)]
            await asyncio.gather(*map(store.write, writes))
        finally:
            await store.close()

    asyncio.run(write())
    return volume


def copy(volume: Path, to: Path) -> Path:
    """Return *to*, now a copy of *volume*, as of a disk."""
    shutil.copytree(volume, to, ignore=shutil.ignore_patterns("lock", "control", "*-shm", "ballast"))
    return to


def flip(path: Path, offset: int, bit: int = 0x10) -> None:
    """Flip one bit of the file at *path*."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ bit]))


# What else becomes of a store's file.


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def torn(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 100)


def broken_header(path: Path) -> None:
    flip(path, 18)


def gone(path: Path) -> None:
    path.unlink()


DAMAGES: Final = [nothing, gone, *(pytest.param(one, marks=pytest.mark.soak) for one in (garbage, torn, broken_header))]


def suspend(node: Node) -> None:
    """Have a node do nothing for a while: its kernel still accepts connections."""
    assert node.process is not None
    node.process.send_signal(signal.SIGSTOP)
    state = Path(f"/proc/{node.process.pid}/stat")
    eventually(lambda: re.search(r"\) T ", state.read_text()), f"{node.name} to stop")


def resume(node: Node) -> None:
    assert node.process is not None
    node.process.send_signal(signal.SIGCONT)


def mehdb(*arguments: str, code: int = 0) -> str:
    """Return what a command prints. It must end with *code*."""
    done = subprocess.run(
        [sys.executable, "-m", "mehdb", *arguments], env=clean_environment() | {"COLUMNS": "500"},
        capture_output=True, text=True, timeout=DEADLINE_S * 2, check=False,
    )  # fmt: skip
    assert done.returncode == code, f"mehdb {arguments} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@dataclass
class Scene:
    """A leader and its followers, who all know each other, on volumes of which everything was noted that they hold."""

    cluster: Cluster
    held: set[Row] = field(default_factory=set)
    files: set[str] = field(default_factory=set)

    @property
    def leader(self) -> Node:
        return self.cluster.leader

    @property
    def followers(self) -> list[Node]:
        return self.cluster.followers

    def note(self) -> None:
        """Note what all volumes hold now."""
        for node in self.cluster.nodes:
            if (node.volume / DATABASE).exists():
                self.held |= rows(node.volume)

    def note_damage(self, node: Node) -> None:
        """Note the very bytes of a volume that is damaged."""
        self.files.add(fingerprint(node.volume))

    def start(self, *nodes: Node) -> None:
        """Start several nodes at once; they answer, and need not be ready."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: node.start(ready=False), nodes))

    def until(self, node: Node, state: str, said: str = "", deadline_s: float = DEADLINE_S) -> NodeStatus:
        """Wait until *node* is in *state* and says *said* as the reason why it is not ready. Return its status."""

        def look() -> NodeStatus | None:
            status = node.status()
            return status if status.state == state and said in (status.reason or "") else None

        try:
            return eventually(look, f"{node.name} to be {state}, {said!r}", deadline_s)
        except AssertionError as error:
            error.add_note(f"it says {node.status().reason!r}; its log:\n{node.log}")
            raise

    def diverged_and_whole(self, follower: Node) -> None:
        """Expect *follower* to keep what it holds and to say that it is diverged."""
        self.until(follower, "diverged", "this node keeps its data")
        assert follower.get("/readyz").status_code == 503
        own = rows(follower.volume)
        assert {follower.get(f"/get/{row.key.decode()}").content for row in own} == {row.value for row in own}

    def equal(self) -> NodeStatus:
        """Wait until all that run are ready and in one position, and the leader knows. Return its status."""
        for node in self.cluster.nodes:
            if node.process:
                self.until(node, "serving")
        self.cluster.converge()
        running = {node.name for node in self.followers if node.process}

        def known() -> NodeStatus | None:
            status = self.leader.status()
            held = {follower.node for follower in status.followers if follower.revision == status.revision}
            return status if running <= held else None

        return eventually(known, "the leader to know it: else it waits for them when it is stopped")

    def nothing_is_gone(self) -> None:
        """Fail if anything that was noted is not on any of the volumes."""
        stores = [n.volume for n in self.cluster.nodes] + [path for n in self.cluster.nodes for path in kept(n.volume)]
        stores = [path for path in stores if (path / DATABASE).exists()]
        missing_files = self.files - {fingerprint(path) for path in stores}
        assert not missing_files, f"of {len(self.files)} damaged stores, {len(missing_files)} were not kept whole"
        found: set[Row] = set()
        for path in stores:
            with contextlib.suppress(apsw.Error):  # a damaged one
                found |= rows(path)
        assert self.held <= found, f"gone: {sorted(self.held - found)}"


@contextlib.contextmanager
def scene(directory: Path, replicas: int = 2, **environment: str) -> Iterator[Scene]:
    """Have a scene of *replicas* nodes. At its end they are stopped, all is there, and every store is sound."""
    directory.mkdir(exist_ok=True)
    nodes = Cluster(directory)
    for _ in range(replicas):
        nodes.add(**environment)
    for node in nodes.nodes:
        node.environment["MEHDB_PEERS"] = ",".join(other.url for other in nodes.nodes)
    stage = Scene(nodes)
    try:
        yield stage
        nodes.stop()
        stage.nothing_is_gone()
    finally:
        nodes.discard()
    asyncio.run(nodes.check())


@contextlib.contextmanager
def never_wiped(directory: Path, replicas: int = 2, **environment: str) -> Iterator[Scene]:
    """Have a scene that counts once nothing was lost in it."""
    with scene(directory, replicas, **environment) as stage:
        yield stage
    proven.append(directory)


def scenes_in(test: pytest.Function) -> int:
    """Return in how many scenes that count *test* acts: its source has one block for each."""
    if vars(test.module).get("never_wiped") is not never_wiped:
        return 0
    return inspect.getsource(test.function).count("never_wiped(")
