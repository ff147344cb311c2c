"""The figures, one function each. `FIGURES` says in which order they are measured: each leaves the nodes to the next.

Here are those of single reads and writes and of replication; beside this, `bulk`, `beside`, `watching` and `cost`.
"""

import statistics
import time
from collections.abc import Callable
from typing import Final

from beside import listing
from bulk import batches, batches_to_puts, several
from cluster import BenchError
from cost import cost_gets, cost_metrics, cost_puts
from machine import MIB
from measuring import CONNECTIONS, Bench, catch_up_once, position, quantile, ratio, ratios
from results import Figure
from targets import TARGETS
from watching import watch
from writers import watch_passage, write_until_killed

LAG_WRITES_PER_SECOND: Final = 1000
LAG_RATE_LEAST: Final = 0.98  # of the pace: below it, the load was not the one that the figure is about
KILL_AFTER_S: Final = 1.5  # some ten thousand writes, so that there is a log to recover


def gets(bench: Bench) -> Figure:
    """GETs of random keys over 64 connections, against the bare server that answers a constant."""
    bench.stop_follower()
    leader = bench.leader(bench.cores.server)
    rounds = bench.compare(
        {
            "mehdb": lambda: bench.load(leader, "GET"),
            "bare": lambda: bench.load(bench.application, "GET"),
            "low-level": lambda: bench.load(bench.low_level, "GET"),
        }
    )
    return ratio(
        "gets", rounds, "mehdb", "bare", f"{CONNECTIONS} connections, {bench.plan.keys:,} keys, wrk",
        {"ratio to the low-level web.Server": statistics.median(ratios(rounds["mehdb"], rounds["low-level"]))},
    )  # fmt: skip


def put_batching(bench: Bench) -> Figure:
    """PUTs over 64 connections, against PUTs over one: what a commit that many writes share brings."""
    return ratio("put-batching", bench.puts, "mehdb", "mehdb, 1 connection", "acknowledged PUTs of random keys, wrk")


def puts(bench: Bench) -> Figure:
    """PUTs over 64 connections, against the bare server that reads the bodies and stores nothing."""
    return ratio("puts", bench.puts, "mehdb", "bare", f"{CONNECTIONS} connections, 128-byte bodies, wrk")


def catch_up(bench: Bench) -> Figure:
    """Changes per second at which a follower with an empty volume takes over all that the leader has."""
    bench.leader(bench.cores.load)
    rates, starts = [], []
    for _ in range(bench.plan.catch_ups):
        rate, started_s = catch_up_once(bench, bench.new_follower())
        rates.append(rate)
        starts.append(started_s)
    method = "from the follower's first answer to /position until it equals the leader's; both nodes have a core"
    parts = {"follower's start, not counted, s": statistics.median(starts)}
    return Figure("catch-up", TARGETS["catch-up"], statistics.median(rates), rates, method, parts)


def lag(bench: Bench) -> Figure:
    """Time from a write's acknowledgement by the leader to the first answer of a follower that shows it."""
    follower, leader = bench.follower(bench.cores.second), bench.leader(bench.cores.server)
    passage = watch_passage(
        leader, follower, keys=bench.plan.keys, rate=LAG_WRITES_PER_SECOND, duration_s=bench.plan.lag_s
    )
    if passage.rate < LAG_WRITES_PER_SECOND * LAG_RATE_LEAST:
        raise BenchError(f"the pace was {passage.rate:.0f} writes/s, not {LAG_WRITES_PER_SECOND}")
    lags_ms = [lag_s * 1000 for lag_s in passage.lags_s()]
    seconds = range(0, len(lags_ms), LAG_WRITES_PER_SECOND)
    each_second = [quantile(lags_ms[start : start + LAG_WRITES_PER_SECOND], 0.99) for start in seconds]
    method = (
        "both times as the client sees them; the follower's Mehdb-Revision is polled all the time; spread: by second"
    )
    parts = {
        "writes/s": passage.rate, "p50 ms": quantile(lags_ms, 0.5), "p99.9 ms": quantile(lags_ms, 0.999),
        "greatest ms": max(lags_ms),
        "time between polls, p99, ms": passage.resolution_s * 1000, "answers that went back": passage.went_back,
    }  # fmt: skip
    return Figure("lag", TARGETS["lag"], quantile(lags_ms, 0.99), each_second, method, parts)


def restart(bench: Bench) -> Figure:
    """Seconds from the start of a process, whose forerunner was killed while it wrote, until it is ready."""
    bench.stop_follower()
    leader = bench.leader(bench.cores.server)
    durations = []
    for _ in range(bench.plan.restarts):
        newest = write_until_killed(leader, leader.kill, keys=bench.plan.keys, duration_s=KILL_AFTER_S)
        start = time.monotonic()
        leader.start()
        leader.wait_ready()
        durations.append(time.monotonic() - start)
        recovered = position(leader)["revision"]
        if recovered < newest:
            raise BenchError(f"revision {newest} had been acknowledged, after kill -9 the head is {recovered}")
    method = "killed under PUTs over 64 connections; from the new process's start to 200 from /readyz, on one core"
    return Figure("restart", TARGETS["restart"], statistics.median(durations), durations, method)


def memory(bench: Bench) -> Figure:
    """The most memory that any node had resident during this run: the kernel's VmHWM, which misses nothing."""
    leader = bench.leader(bench.cores.server)
    for method in ("GET", "PUT"):
        bench.load(leader, method)  # so that there is a load if this figure alone is asked for
    leader.note_peak()
    nodes = [server for server in bench.cluster.servers if server.ready_path == "/readyz"]
    peaks = [node.peak_bytes / MIB for node in nodes]
    parts = {"leader MiB": leader.peak_bytes / MIB, "greatest of the followers MiB": max(peaks[1:], default=0.0)}
    method = "the most that any node had resident (VmHWM) in all of this run"
    return Figure("memory", TARGETS["memory"], max(peaks), peaks, method, parts)


FIGURES: Final[dict[str, Callable[[Bench], Figure]]] = {
    "catch-up": catch_up,  # first: the log must hold the keys and nothing else
    "lag": lag,  # goes on with the follower that has just caught up
    "gets": gets,
    "several": several,
    "listing": listing,
    "watch": watch,
    "put-batching": put_batching,
    "puts": puts,
    "batches": batches,
    "batches-to-puts": batches_to_puts,
    "restart": restart,
    "memory": memory,  # looks back on all nodes of this version
    "cost-gets": cost_gets,  # starts nodes of another version beside
    "cost-puts": cost_puts,
    "cost-metrics": cost_metrics,
}
