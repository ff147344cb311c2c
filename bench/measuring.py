"""What figures are measured with: the nodes, the plan, and rounds of load.

Every comparison is made in short rounds that alternate between what is compared, so that the machine's slow and fast
minutes fall on both sides; a figure is the median over the rounds, and its spread is printed beside it.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from cluster import BenchError, Cluster, Server, until
from dataset import key, value
from load import KEYS_EACH, Load, Round, Wrk
from machine import Cores
from results import Figure
from targets import TARGETS

CONNECTIONS: Final = 64
BATCH_CONNECTIONS: Final = 16  # so many batches wait while others are written: more only wait longer
CATCH_UP_TIMEOUT_S: Final = 90.0  # a fifth of the target speed
CATCH_UP_POLL_S: Final = 0.02  # of seconds of catching up; each poll costs the follower far less than it waits


@dataclass(frozen=True)
class Plan:
    """How much is measured. Rounds are per side of a comparison, and come after one that is not counted."""

    keys: int
    rounds: int
    round_s: int
    catch_ups: int
    lag_s: int
    restarts: int
    cost_rounds: int
    """A cost of a few hundredths takes more rounds, shorter ones: a second each."""


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
            self.check_data(self._leader)
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
                "mehdb": lambda: self.acknowledged(leader, "PUT"),
                "mehdb, 1 connection": lambda: self.acknowledged(leader, "PUT", 1),
                "bare": lambda: self.load(self.application, "PUT"),
            }
        )

    @cached_property
    def batches(self) -> dict[str, list[Round]]:
        """The rounds of batches and of PUTs, for the two figures that are made of them."""
        self.stop_follower()
        leader = self.leader(self.cores.server)
        return self.compare(
            {
                "batches": lambda: self.acknowledged(leader, "batch", BATCH_CONNECTIONS),
                "PUTs": lambda: self.acknowledged(leader, "PUT"),
            }
        )

    def load(self, server: Server, load: Load, connections: int = CONNECTIONS, duration_s: int | None = None) -> Round:
        """Run one round of wrk."""
        return self.wrk.run(server, load, connections, duration_s or self.plan.round_s)

    def acknowledged(
        self, leader: Server, load: Load, connections: int = CONNECTIONS, duration_s: int | None = None
    ) -> Round:
        """Run a round of writes, and refuse it if the leader has not taken every one that it acknowledged."""
        before = position(leader)["revision"]
        measured = self.load(leader, load, connections, duration_s)
        written, taken = measured.answers * KEYS_EACH[load], position(leader)["revision"] - before
        if taken < written:
            raise BenchError(f"{written} writes were acknowledged, {taken} changes were made")
        return measured

    def compare(self, sides: dict[str, Callable[[], Round]], rounds: int | None = None) -> dict[str, list[Round]]:
        """Run the rounds, every second time in reverse order. The first one, which warms up, is dropped."""
        measured: dict[str, list[Round]] = {name: [] for name in sides}
        for number in range(1 + (rounds or self.plan.rounds)):
            for name in sorted(sides, reverse=bool(number % 2)):
                measured[name].append(sides[name]())
        return {name: all_rounds[1:] for name, all_rounds in measured.items()}

    def _reference(self, kind: str) -> Server:
        server = self.cluster.reference(kind, self.cores.server)
        server.start()
        server.wait_ready()
        return server

    def check_data(self, leader: Server) -> None:
        """Refuse to measure a store that does not hold the plan's keys with their values."""
        for number in (0, self.plan.keys // 2, self.plan.keys - 1):
            answer = leader.get("/get/" + key(number).decode())
            if answer is None or answer.content != value(number):
                raise BenchError(f"the leader does not hold {key(number).decode()!r} as it was filled in")


def position(server: Server) -> dict[str, Any]:
    """Return what `/position` says."""
    return until(lambda: server.json("/position"), f"{server.name} answers /position", 10.0)


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


def quantile(values: list[float], part: float) -> float:
    """Return the value that *part* of *values* do not exceed."""
    return sorted(values)[math.ceil(len(values) * part) - 1]


def ratios(one: list[Round], other: list[Round]) -> list[float]:
    """Return the ratio of speeds, round by round."""
    return [a.per_second / b.per_second for a, b in zip(one, other, strict=True)]


def ratio(
    name: str, rounds: dict[str, list[Round]], one: str, other: str, method: str, parts: dict[str, float] | None = None
) -> Figure:
    """Return the figure *name*: the median ratio between the rounds of *one* and of *other*."""
    samples = ratios(rounds[one], rounds[other])
    numbers = dict(parts or {})
    for side in (one, other):
        numbers[f"{side} /s"] = statistics.median(measured.per_second for measured in rounds[side])
        numbers[f"{side} CPU us each"] = statistics.median(measured.processor_us_each for measured in rounds[side])
    # Once both are bound by their core, the same ratio without what other processes took of it.
    numbers["ratio by CPU time"] = numbers[f"{other} CPU us each"] / numbers[f"{one} CPU us each"]
    numbers[f"{one} p99 ms"] = statistics.median(measured.p99_us for measured in rounds[one]) / 1000
    return Figure(name, TARGETS[name], statistics.median(samples), samples, method, numbers)
