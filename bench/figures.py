"""The figures, one function each. `FIGURES` says in which order they are measured: each leaves the nodes to the next.

Every comparison is made in short rounds that alternate between what is compared, so that the machine's slow and fast
minutes fall on both sides; a figure is the median over the rounds, and its spread is printed beside it.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

from cluster import BenchError, Cluster, Server, until
from dataset import key, value
from load import Round, Wrk
from machine import MIB, Cores
from results import Figure, Target
from writers import watch_passage, write_until_killed

CONNECTIONS: Final = 64
LAG_WRITES_PER_SECOND: Final = 1000
LAG_RATE_LEAST: Final = 0.98  # of the pace: below it, the load was not the one that the figure is about
CATCH_UP_TIMEOUT_S: Final = 90.0  # a fifth of the target speed
CATCH_UP_POLL_S: Final = 0.02  # of seconds of catching up; each poll costs the follower far less than it waits
KILL_AFTER_S: Final = 1.5  # some ten thousand writes, so that there is a log to recover

TARGETS: Final = {
    "gets": Target("random GETs ÷ a bare aiohttp server", "x", 0.75),
    "put-batching": Target("PUTs over 64 connections ÷ over 1", "x", 6),
    "puts": Target("PUTs ÷ a bare aiohttp server that stores nothing", "x", 0.5),
    "catch-up": Target("a new follower catches up", "changes/s", 50_000),
    "lag": Target("acknowledged → readable on a follower, p99", "ms", 20, at_least=False),
    "restart": Target("kill -9 and restart until ready", "s", 1, at_least=False),
    "memory": Target("resident memory under load", "MiB", 300, at_least=False),
}


@dataclass(frozen=True)
class Plan:
    """How much is measured. Rounds are per side of a comparison, and come after one that is not counted."""

    keys: int
    rounds: int
    round_s: int
    catch_ups: int
    lag_s: int
    restarts: int


class Bench:
    """The nodes under measurement, started when the first figure needs them."""

    def __init__(self, plan: Plan, cores: Cores, cluster: Cluster, wrk: Wrk, leader: Server) -> None:
        """*leader* is not started yet, and holds the plan's keys."""
        self.plan, self.cores, self.cluster, self.wrk = plan, cores, cluster, wrk
        self._leader = leader
        self._follower: Server | None = None

    def leader(self, core: int) -> Server:
        """Return the leader, ready, on *core*."""
        if self._leader.process is None:
            self._leader.start()
            self._leader.wait_ready()
            self._check_data(self._leader)
        self._leader.move(core)
        return self._leader

    def new_follower(self) -> Server:
        """Return a follower that is not started and has nothing yet, in place of the one before."""
        if self._follower is not None:
            self.cluster.drop(self._follower)
        name = f"follower-{len(self.cluster.servers)}"
        self._follower = self.cluster.follower(self._leader, name, self.cores.server)
        return self._follower

    def follower(self, core: int) -> Server:
        """Return a follower that has caught up, on *core*."""
        if self._follower is None:
            self.leader(self.cores.load)
            catch_up_once(self, self.new_follower())
        assert self._follower is not None  # noqa: S101  made above
        self._follower.move(core)
        return self._follower

    def stop_follower(self) -> None:
        """Stop the follower, whose pulls would weigh on what follows, and keep its peak of memory."""
        if self._follower is not None:
            self.cluster.drop(self._follower)
            self._follower = None

    @cached_property
    def application(self) -> Server:
        """The bare `web.Application`, ready."""
        return self._reference("application")

    @cached_property
    def low_level(self) -> Server:
        """The bare `web.Server`, ready."""
        return self._reference("low-level")

    @cached_property
    def puts(self) -> dict[str, list[Round]]:
        """The rounds of PUTs, for the two figures that are made of them. They change values, and leave the keys."""
        self.stop_follower()
        leader = self.leader(self.cores.server)
        return self.compare(
            {
                "mehdb": lambda: self._acknowledged_puts(leader, CONNECTIONS),
                "mehdb, 1 connection": lambda: self._acknowledged_puts(leader, 1),
                "bare": lambda: self.load(self.application, "PUT"),
            }
        )

    def load(self, server: Server, method: Literal["GET", "PUT"], connections: int = CONNECTIONS) -> Round:
        """Run one round of wrk."""
        return self.wrk.run(server, method, connections, self.plan.round_s)

    def compare(self, sides: dict[str, Callable[[], Round]]) -> dict[str, list[Round]]:
        """Run the rounds, every second time in reverse order. The first one, which warms up, is dropped."""
        rounds: dict[str, list[Round]] = {name: [] for name in sides}
        for number in range(1 + self.plan.rounds):
            for name in sorted(sides, reverse=bool(number % 2)):
                rounds[name].append(sides[name]())
        return {name: all_rounds[1:] for name, all_rounds in rounds.items()}

    def _acknowledged_puts(self, leader: Server, connections: int) -> Round:
        """Run a round of PUTs, and refuse it if the leader has not taken every one that it acknowledged."""
        before = position(leader)["revision"]
        measured = self.load(leader, "PUT", connections)
        taken = position(leader)["revision"] - before
        if taken < measured.answers:
            raise BenchError(f"{measured.answers} PUTs were acknowledged, {taken} changes were made")
        return measured

    def _reference(self, kind: str) -> Server:
        server = self.cluster.reference(kind, self.cores.server)
        server.start()
        server.wait_ready()
        return server

    def _check_data(self, leader: Server) -> None:
        """Refuse to measure a store that does not hold the plan's keys with their values."""
        for number in (0, self.plan.keys // 2, self.plan.keys - 1):
            answer = leader.get("/get/" + key(number).decode())
            if answer is None or answer.content != value(number):
                raise BenchError(f"the leader does not hold {key(number).decode()!r} as it was filled in")


def position(server: Server) -> dict[str, Any]:
    """Return what `/position` says."""
    return until(lambda: server.json("/position"), f"{server.name} answers /position", 10.0)


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
    return _ratio(
        "gets", rounds, "mehdb", "bare", f"{CONNECTIONS} connections, {bench.plan.keys:,} keys, wrk",
        {"ratio to the low-level web.Server": statistics.median(_ratios(rounds["mehdb"], rounds["low-level"]))},
    )  # fmt: skip


def put_batching(bench: Bench) -> Figure:
    """PUTs over 64 connections, against PUTs over one: what a commit that many writes share brings."""
    return _ratio("put-batching", bench.puts, "mehdb", "mehdb, 1 connection", "acknowledged PUTs of random keys, wrk")


def puts(bench: Bench) -> Figure:
    """PUTs over 64 connections, against the bare server that reads the bodies and stores nothing."""
    return _ratio("puts", bench.puts, "mehdb", "bare", f"{CONNECTIONS} connections, 128-byte bodies, wrk")


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


def catch_up_once(bench: Bench, follower: Server) -> tuple[float, float]:
    """Let *follower* catch up. Return changes per second, and the seconds that its process took to answer at all."""
    goal = position(bench.leader(bench.cores.load))
    spawned = time.monotonic()
    follower.start()
    first = position(follower)
    answering = time.monotonic()

    def caught_up() -> bool | None:
        now = follower.json("/position")
        return True if now is not None and now["revision"] >= goal["revision"] else None

    until(caught_up, "the follower has caught up", CATCH_UP_TIMEOUT_S, CATCH_UP_POLL_S)
    duration_s = time.monotonic() - answering
    reached = position(follower)
    for name in ("history", "revision", "chain"):
        if reached[name] != goal[name]:
            raise BenchError(f"the follower's {name} is {reached[name]}, the leader's {goal[name]}")
    follower.wait_ready()
    return (goal["revision"] - first["revision"]) / duration_s, answering - spawned


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
    each_second = [_quantile(lags_ms[start : start + LAG_WRITES_PER_SECOND], 0.99) for start in seconds]
    method = (
        "both times as the client sees them; the follower's Mehdb-Revision is polled all the time; spread: by second"
    )
    parts = {
        "writes/s": passage.rate, "p50 ms": _quantile(lags_ms, 0.5), "p99.9 ms": _quantile(lags_ms, 0.999),
        "greatest ms": max(lags_ms),
        "time between polls, p99, ms": passage.resolution_s * 1000, "answers that went back": passage.went_back,
    }  # fmt: skip
    return Figure("lag", TARGETS["lag"], _quantile(lags_ms, 0.99), each_second, method, parts)


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


def _quantile(values: list[float], part: float) -> float:
    """Return the value that *part* of *values* do not exceed."""
    return sorted(values)[math.ceil(len(values) * part) - 1]


def _ratios(one: list[Round], other: list[Round]) -> list[float]:
    """Return the ratio of speeds, round by round."""
    return [a.per_second / b.per_second for a, b in zip(one, other, strict=True)]


def _ratio(
    name: str, rounds: dict[str, list[Round]], one: str, other: str, method: str, parts: dict[str, float] | None = None
) -> Figure:
    """Return the figure *name*: the median ratio between the rounds of *one* and of *other*."""
    ratios = _ratios(rounds[one], rounds[other])
    numbers = dict(parts or {})
    for side in (one, other):
        numbers[f"{side} /s"] = statistics.median(measured.per_second for measured in rounds[side])
        numbers[f"{side} CPU us each"] = statistics.median(measured.processor_us_each for measured in rounds[side])
    # Once both are bound by their core, the same ratio without what other processes took of it.
    numbers["ratio by CPU time"] = numbers[f"{other} CPU us each"] / numbers[f"{one} CPU us each"]
    numbers[f"{one} p99 ms"] = statistics.median(measured.p99_us for measured in rounds[one]) / 1000
    return Figure(name, TARGETS[name], statistics.median(ratios), ratios, method, numbers)


FIGURES: Final[dict[str, Callable[[Bench], Figure]]] = {
    "catch-up": catch_up,  # first: the log must hold the keys and nothing else
    "lag": lag,  # goes on with the follower that has just caught up
    "gets": gets,
    "put-batching": put_batching,
    "puts": puts,
    "restart": restart,
    "memory": memory,  # last: it looks back on all nodes
}
