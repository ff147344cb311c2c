"""The figure of short reads beside a long one: what a listing of all keys does to the GETs of others."""

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cluster import ROOT, BenchError, Server
from load import Round
from measuring import Bench
from results import Figure
from targets import TARGETS

# With the pauses of a calm GET about 1,500/s: a sixth of what a core answers, so that GETs seldom wait for each other.
CALM_CONNECTIONS: Final = 8


@dataclass
class Listed:
    """What the listings of one round came to."""

    keys: list[int] = field(default_factory=list)
    """The keys of each that was whole by the end of the round."""
    duration_s: float = 0.0


@contextmanager
def _listing(server: Server, directory: Path) -> Iterator[Listed]:
    """Have another process list all keys of *server*, again and again, during the block."""
    listed, output = Listed(), directory / "lister.out"
    start = time.monotonic()
    with output.open("wb") as file:
        lister = subprocess.Popen(
            [sys.executable, str(ROOT / "bench" / "lister.py"), server.url], stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield listed
        if lister.poll() is not None:
            raise BenchError(f"the listing ended: {output.read_text(errors='replace')}")
    finally:
        lister.terminate()
        lister.wait()
    listed.keys = [int(line) for line in output.read_text().splitlines()]
    listed.duration_s = time.monotonic() - start


def listing(bench: Bench) -> Figure:
    """The p99 of a calm load of GETs while all keys are listed, against the same load alone."""
    bench.stop_follower()
    leader = bench.leader(bench.cores.server)
    listings: list[Listed] = []

    def beside() -> Round:
        with _listing(leader, bench.cluster.directory) as listed:
            measured = bench.load(leader, "calm GET", CALM_CONNECTIONS)
        listings.append(listed)
        return measured

    rounds = bench.compare({"alone": lambda: bench.load(leader, "calm GET", CALM_CONNECTIONS), "beside": beside})
    keys = [keys for listed in listings for keys in listed.keys]
    if not keys or set(keys) != {bench.plan.keys}:
        raise BenchError(f"listings of {bench.plan.keys} keys had {sorted(set(keys)) or 'no end'}")
    samples = [b.p99_us / a.p99_us for a, b in zip(rounds["alone"], rounds["beside"], strict=True)]
    parts = {"keys/s listed": sum(keys) / sum(listed.duration_s for listed in listings)}
    for name, measured in rounds.items():
        parts[f"{name} GETs/s"] = statistics.median(one.per_second for one in measured)
        parts[f"{name} p50 ms"] = statistics.median(one.p50_us for one in measured) / 1000
        parts[f"{name} p99 ms"] = statistics.median(one.p99_us for one in measured) / 1000
    method = f"{CALM_CONNECTIONS} connections that pause between GETs, wrk; pages of 10,000 keys, one after another"
    return Figure("listing", TARGETS["listing"], statistics.median(samples), samples, method, parts)
