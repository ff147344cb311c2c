"""The figure of watches: how long after its acknowledgement a change reaches who watches."""

import http.client
import random
import threading
import time
from typing import Final

import msgspec

from cluster import BenchError, Server
from dataset import key, value
from measuring import Bench, quantile
from results import Figure
from targets import TARGETS

WRITES_PER_SECOND: Final = 200  # light: what is measured is the way, not the wait for others
RATE_LEAST: Final = 0.95  # of the pace: below it, the load was not the one that the figure is about
TIMEOUT_S: Final = 10.0  # twice the time between two heartbeats


class Event(msgspec.Struct):
    """A line of a watch, as far as it matters here."""

    op: str
    revision: int
    key: str = ""


class Watcher:
    """A watch in a thread of its own, from the moment it is made."""

    def __init__(self, server: Server) -> None:
        """Raises `BenchError` if the watch does not begin."""
        self.seen: list[tuple[int, str, float]] = []
        """Revision and key of each change, and when its line had come."""
        self.problem: str | None = None
        self._last: int | None = None
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
        self._connection.request("GET", "/watch?prefix=key/")
        self._answer = self._connection.getresponse()
        if self._answer.status != http.client.OK:
            raise BenchError(f"/watch answered {self._answer.status}: {self._answer.read()[:200]!r}")
        self._next()  # the first line is a heartbeat: from here on nothing is missed
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        self._thread.start()

    def finish(self, last: int) -> None:
        """Wait until revision *last* has been seen, and end the watch. Raises `BenchError` if it is not."""
        self._last = last
        self._thread.join(2 * TIMEOUT_S)
        self._connection.close()
        if self.problem or self._thread.is_alive():
            raise BenchError(f"the watch ended before revision {last}: {self.problem or 'it is silent'}")

    def _run(self) -> None:
        try:
            reached = 0
            while self._last is None or reached < self._last:
                event = self._next()
                at_s = time.perf_counter()
                reached = event.revision
                if event.op != "heartbeat":
                    self.seen.append((event.revision, event.key, at_s))
        except (OSError, BenchError, msgspec.DecodeError) as error:
            self.problem = f"{type(error).__name__}: {error}"

    def _next(self) -> Event:
        line = self._answer.readline()
        event = msgspec.json.decode(line, type=Event) if line else None
        if event is None or event.op == "error":
            raise BenchError(f"the server ended the watch: {line!r}")
        return event


def watch(bench: Bench) -> Figure:
    """Time from a write's acknowledgement to the arrival of its line at a client that watches."""
    bench.stop_follower()
    leader = bench.leader(bench.cores.server)
    watcher = Watcher(leader)
    written = _write(leader, bench.plan.keys, bench.plan.lag_s)
    watcher.finish(written[-1][0])
    if [(revision, name) for revision, name, _ in written] != [(revision, name) for revision, name, _ in watcher.seen]:
        raise BenchError(f"{len(written)} changes were made, and the watcher saw {len(watcher.seen)}, or others")
    times = [at_s for _, _, at_s in written]
    rate = (len(times) - 1) / (times[-1] - times[0])
    if rate < WRITES_PER_SECOND * RATE_LEAST:
        raise BenchError(f"the pace was {rate:.0f} writes/s, not {WRITES_PER_SECOND}")
    lags_ms = [max(0.0, seen[2] - wrote[2]) * 1000 for wrote, seen in zip(written, watcher.seen, strict=True)]
    seconds = range(0, len(lags_ms), WRITES_PER_SECOND)
    each_second = [quantile(lags_ms[start : start + WRITES_PER_SECOND], 0.99) for start in seconds]
    parts = {
        "writes/s": rate, "p50 ms": quantile(lags_ms, 0.5), "greatest ms": max(lags_ms),
        "seen before acknowledged, %": 100 * sum(not lag_ms for lag_ms in lags_ms) / len(lags_ms),
    }  # fmt: skip
    method = f"{WRITES_PER_SECOND} PUTs/s over one connection, one watcher; spread: by second"
    return Figure("watch", TARGETS["watch"], quantile(lags_ms, 0.99), each_second, method, parts)


def _write(server: Server, keys: int, duration_s: int) -> list[tuple[int, str, float]]:
    """PUT random keys at the pace. Return each one's revision and key, and when its acknowledgement had come."""
    written = []
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    start_s = time.perf_counter()
    for count in range(WRITES_PER_SECOND * duration_s):
        time.sleep(max(0.0, start_s + count / WRITES_PER_SECOND - time.perf_counter()))
        number = random.randrange(keys)  # noqa: S311  a key, not a secret
        name = key(number).decode()
        connection.request("PUT", f"/set/{name}", body=value(number))
        answer = connection.getresponse()
        body = answer.read()
        at_s = time.perf_counter()
        if answer.status != http.client.OK:
            raise BenchError(f"a PUT answered {answer.status}: {body[:200]!r}")
        written.append((int(answer.getheader("ETag", "").strip('"')), name, at_s))
    connection.close()
    return written
