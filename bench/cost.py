"""Figures of what new features cost those who do not use them: this version against one without, side by side."""

import asyncio
import shutil
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

import httpx

from cluster import ROOT, BenchError, Cluster, Server
from dataset import fill
from measuring import Bench, ratio
from results import Figure

ROUND_S: Final = 1


class Version(NamedTuple):
    """An older version, and a route that it does not have yet: both versions say that they are the same one."""

    name: str
    revision: str
    lacks: str


BEFORE: Final = Version("before", "28bae09", "/batch")  # the last without conditions, lives, batches and watches
UNMEASURED: Final = Version("unmeasured", "cd2dd47", "/debug/tasks")  # the last without durations of requests


def cost_gets(bench: Bench) -> Figure:
    """GETs of random keys over 64 connections, against the version before."""
    return _gets(bench, "cost-gets", BEFORE)


def cost_metrics(bench: Bench) -> Figure:
    """The same, against the last version that did not measure how long each request takes."""
    return _gets(bench, "cost-metrics", UNMEASURED)


def _gets(bench: Bench, name: str, version: Version) -> Figure:
    now, before = _both(bench, version)
    sides = {"now": lambda: bench.load(now, "GET", duration_s=ROUND_S),
             "before": lambda: bench.load(before, "GET", duration_s=ROUND_S)}  # fmt: skip
    rounds = bench.compare(sides, bench.plan.cost_rounds)
    return ratio(name, rounds, "now", "before", _method(bench, version))


def cost_puts(bench: Bench) -> Figure:
    """PUTs of random keys over 64 connections, against the version before."""
    now, before = _both(bench, BEFORE)
    sides = {"now": lambda: bench.acknowledged(now, "PUT", duration_s=ROUND_S),
             "before": lambda: bench.acknowledged(before, "PUT", duration_s=ROUND_S)}  # fmt: skip
    return ratio("cost-puts", bench.compare(sides, bench.plan.cost_rounds), "now", "before", _method(bench, BEFORE))


def _method(bench: Bench, version: Version) -> str:
    return (
        f"revision {version.revision} and this one, each with its own copy of {bench.plan.keys:,} keys, by turns of "
        f"{ROUND_S} s"
    )


def _both(bench: Bench, version: Version) -> tuple[Server, Server]:
    """Return a leader of this version and one of *version*, with stores alike, both ready on the same core."""
    bench.stop_follower()
    bench.leader(bench.cores.server)
    known = {server.name: server for server in bench.cluster.servers}
    if version.name not in known:
        return _start_both(bench, version)
    return known[f"beside-{version.name}"], known[version.name]


def _start_both(bench: Bench, version: Version) -> tuple[Server, Server]:
    cluster = bench.cluster
    code = _code_of(cluster, version)
    now = cluster.leader(bench.cores.server, f"beside-{version.name}")
    before = cluster.leader(bench.cores.server, version.name, code)
    filled = cluster.directory / "filled"
    asyncio.run(fill(filled, bench.plan.keys))
    for server in (now, before):  # both of them copies: the kernel caches a file in the pieces that it was written in
        shutil.copytree(filled, cluster.data_dir(server))
    shutil.rmtree(filled)
    for server in (now, before):
        server.start()
        server.wait_ready()
        bench.check_data(server)
    for server, lacks in ((now, False), (before, True)):
        answer = server.get(version.lacks)
        if answer is None or (answer.status_code == httpx.codes.NOT_FOUND) != lacks:
            raise BenchError(f"the version called {server.name} is another: it answers {answer} to {version.lacks}")
    return now, before


def _code_of(cluster: Cluster, version: Version) -> Path:
    """Return a directory that has the package as it was then. Raises `BenchError` where that is not at hand."""
    directory = cluster.directory / f"code-{version.name}"
    directory.mkdir(exist_ok=True)
    archive = directory / "mehdb.tar"
    command = ["git", "-C", str(ROOT), "archive", f"--output={archive}", version.revision, "mehdb"]
    if shutil.which("git") is None:
        raise BenchError("git is not installed: it has the version before")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BenchError(f"git does not have the version before, {version.revision}: {result.stderr.strip()}")
    shutil.unpack_archive(archive, directory, filter="data")
    return directory
