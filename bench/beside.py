"""The figure of short reads beside a long one: what a listing of all keys does to the GETs of others."""

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cluster import ROOT, BenchError, Server
from lister import FIRST_PAGE
from load import Round
from measuring import Bench
from results import Figure
from targets import TARGETS

# With the pauses of a calm GET about 1,500/s: a sixth of what a core answers, so that GETs seldom wait for each other.
CALM_CONNECTIONS: Final = 8


class Listing:
    """A listing of all keys of *server*, again and again, by another process; it goes on only during `under_way`."""

    def __init__(self, server: Server, output: Path) -> None:
        self._server, self._output = server, output
        self._path, self._keys = FIRST_PAGE, 0
        self.whole: list[int] = []
        """The keys of each listing from the first page to the last."""
        self.keys = 0
        self.duration_s = 0.0

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Go on listing where it was left, during the block. Raises `BenchError` if the listing fails."""
        start = time.monotonic()
        command = [sys.executable, str(ROOT / "bench" / "lister.py"), self._server.url, self._path]
        with self._output.open("wb") as file:
            lister = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield
            if lister.poll() is not None:
                raise BenchError(f"the listing ended: {self._output.read_text(errors='replace')}")
        finally:
            lister.terminate()
            lister.wait()
        self.duration_s += time.monotonic() - start
        for line in self._output.read_text().splitlines():
            self._note(line)

    def _note(self, line: str) -> None:
        keys, self._path = line.split()
        self.keys += int(keys)
        self._keys += int(keys)
        if self._path == FIRST_PAGE:
            self.whole.append(self._keys)
            self._keys = 0


def listing(bench: Bench) -> Figure:
    """The p99 of a calm load of GETs while all keys are listed, against the same load alone."""
    bench.stop_follower()
    leader = bench.leader(bench.cores.server)
    others = Listing(leader, bench.cluster.directory / "lister.out")

    def beside() -> Round:
        with others.under_way():
            return bench.load(leader, "calm GET", CALM_CONNECTIONS)

    rounds = bench.compare({"alone": lambda: bench.load(leader, "calm GET", CALM_CONNECTIONS), "beside": beside})
    if set(others.whole) != {bench.plan.keys}:
        raise BenchError(f"listings of {bench.plan.keys} keys had {others.whole or 'no end'}")
    samples = [b.p99_us / a.p99_us for a, b in zip(rounds["alone"], rounds["beside"], strict=True)]
    parts = {"keys/s listed": others.keys / others.duration_s, "whole listings": len(others.whole)}
    for name, measured in rounds.items():
        parts[f"{name} GETs/s"] = statistics.median(one.per_second for one in measured)
        parts[f"{name} p50 ms"] = statistics.median(one.p50_us for one in measured) / 1000
        parts[f"{name} p99 ms"] = statistics.median(one.p99_us for one in measured) / 1000
    method = f"{CALM_CONNECTIONS} connections that pause between GETs, wrk; pages of 10,000 keys, one after another"
    return Figure("listing", TARGETS["listing"], statistics.median(samples), samples, method, parts)
