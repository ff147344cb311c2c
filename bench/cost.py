"""Figures of what new features cost those who do not use them: this version against the one before, side by side."""

import asyncio
import shutil
import subprocess
from pathlib import Path
from typing import Final

import httpx

from cluster import ROOT, BenchError, Cluster, Server
from dataset import fill
from measuring import Bench, ratio
from results import Figure

BEFORE: Final = "28bae09"  # the last version without conditions, times to live, batches and watches
ROUND_S: Final = 1


def cost_gets(bench: Bench) -> Figure:
    """GETs of random keys over 64 connections, against the version before."""
    now, before = _both(bench)
    sides = {"now": lambda: bench.load(now, "GET", duration_s=ROUND_S),
             "before": lambda: bench.load(before, "GET", duration_s=ROUND_S)}  # fmt: skip
    return ratio("cost-gets", bench.compare(sides, bench.plan.cost_rounds), "now", "before", _method(bench))


def cost_puts(bench: Bench) -> Figure:
    """PUTs of random keys over 64 connections, against the version before."""
    now, before = _both(bench)
    sides = {"now": lambda: bench.acknowledged(now, "PUT", duration_s=ROUND_S),
             "before": lambda: bench.acknowledged(before, "PUT", duration_s=ROUND_S)}  # fmt: skip
    return ratio("cost-puts", bench.compare(sides, bench.plan.cost_rounds), "now", "before", _method(bench))


def _method(bench: Bench) -> str:
    return (
        f"revision {BEFORE} and this one, each with its own copy of {bench.plan.keys:,} keys, by turns of {ROUND_S} s"
    )


def _both(bench: Bench) -> tuple[Server, Server]:
    """Return a leader of this version and one of the version before, with stores alike, both ready on the same core."""
    bench.stop_follower()
    bench.leader(bench.cores.server)
    known = {server.name: server for server in bench.cluster.servers}
    if "now" not in known:
        return _start_both(bench)
    return known["now"], known["before"]


def _start_both(bench: Bench) -> tuple[Server, Server]:
    cluster = bench.cluster
    code = _code_before(cluster)
    now = cluster.leader(bench.cores.server, "now")
    before = cluster.leader(bench.cores.server, "before", code)
    filled = cluster.directory / "filled"
    asyncio.run(fill(filled, bench.plan.keys))
    for server in (now, before):  # both of them copies: the kernel caches a file in the pieces that it was written in
        shutil.copytree(filled, cluster.data_dir(server))
    shutil.rmtree(filled)
    for server in (now, before):
        server.start()
        server.wait_ready()
        bench.check_data(server)
    # Both say that they are of the same version: what they can do tells them apart.
    for server, expected in ((now, httpx.codes.METHOD_NOT_ALLOWED), (before, httpx.codes.NOT_FOUND)):
        answer = server.get("/batch")
        if answer is None or answer.status_code != expected:
            raise BenchError(f"the version called {server.name} is another: it answers {answer} to GET /batch")
    return now, before


def _code_before(cluster: Cluster) -> Path:
    """Return a directory that has the package as it was before. Raises `BenchError` where that is not at hand."""
    directory = cluster.directory / "code-before"
    directory.mkdir(exist_ok=True)
    archive = directory / "mehdb.tar"
    command = ["git", "-C", str(ROOT), "archive", f"--output={archive}", BEFORE, "mehdb"]
    if shutil.which("git") is None:
        raise BenchError("git is not installed: it has the version before")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BenchError(f"git does not have the version before, {BEFORE}: {result.stderr.strip()}")
    shutil.unpack_archive(archive, directory, filter="data")
    return directory
