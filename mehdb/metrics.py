"""Prometheus metrics of one node, in a registry of their own: nothing here is global.

Requests are counted and timed in a dictionary, and all else is read from the status and the store's figures when
Prometheus asks, so that metrics cost next to nothing in between and cannot disagree with `/status`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from mehdb.errors import Forbidden, Unauthorized
from mehdb.figures import SECONDS, Distribution, Histogram, StoreFigures
from mehdb.model import NodeStatus, Role, State

HANDSHAKE: Final = "handshake"  # of TLS: no certificate, or none of ours
DENIALS: Final = (Unauthorized.code, Forbidden.code, HANDSHAKE)
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"  # the text format that every Prometheus reads


Requests = dict[tuple[str, str, int], Histogram]
"""How long requests took, by route, method and status."""


class Metrics:
    """All that one node counts. *status* and *figures* are asked at each scrape."""

    def __init__(self, status: Callable[[], NodeStatus], figures: Callable[[], StoreFigures]) -> None:
        self._registry = CollectorRegistry()
        self._requests: Requests = {}
        self._denied: Counter[str] = Counter()
        self._registry.register(_NodeCollector(status, self._requests, self._denied))
        self._registry.register(_StoreCollector(figures))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def count_request(self, route: str, method: str, status: int, duration_s: float) -> None:
        """Count an answer, and how long it took. *route* and *method* are of a fixed set, never what a client sent."""
        try:
            durations = self._requests[route, method, status]
        except KeyError:  # once in a node's life
            durations = self._requests[route, method, status] = Histogram(SECONDS)
        durations.observe(duration_s)

    def count_denied(self, reason: str) -> None:
        """Count a request that was denied. *reason* is an error's code."""
        self._denied[reason] += 1

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _NodeCollector(Collector):
    def __init__(self, status: Callable[[], NodeStatus], requests: Requests, denied: Counter[str]) -> None:
        self._status = status
        self._requests = requests
        self._denied = denied

    def describe(self) -> Iterator[Metric]:
        """Say nothing: a registry would otherwise collect once when this is registered, before the node exists."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        yield from _requests(self._requests)
        denied = CounterMetricFamily("mehdb_denied", "Requests that were denied.", labels=["reason"])
        for reason in DENIALS:
            denied.add_metric([reason], self._denied[reason])
        yield denied
        yield InfoMetricFamily("mehdb_build", "Which version this is.", {"version": status.version})
        yield _gauge("mehdb_ready", "1 if the node is ready.", status.ready)
        yield _gauge("mehdb_keys", "Live keys.", status.keys)
        yield _gauge("mehdb_revision", "The newest revision in the store.", status.revision)
        yield _gauge("mehdb_floor", "The revision up to which changes may have been compacted.", status.floor)
        yield _gauge("mehdb_epoch", "The highest epoch seen.", status.epoch)
        yield _gauge("mehdb_queue_bytes", "Bytes that wait to be written.", status.queue_bytes)
        yield _gauge("mehdb_volume_free_bytes", "Free bytes on the volume.", status.free_bytes)
        yield _gauge("mehdb_damaged", "1 if a damaged row or page was met.", status.damage is not None)
        yield _gauge("mehdb_watchers", "Clients that watch.", status.watchers)
        yield CounterMetricFamily(
            "mehdb_commits", "Transactions, each with one sync: batches, and steps of compaction.", status.commits
        )
        yield _one_of("mehdb_role", "1 for the node's role.", "role", Role, status.role)
        yield _one_of("mehdb_state", "1 for the node's state.", "state", State, status.state)
        if status.leader and status.leader.heard_seconds_ago is not None:
            yield _gauge(
                "mehdb_leader_heard_seconds", "Seconds since the leader last answered.", status.leader.heard_seconds_ago
            )
        if status.leader and status.leader.staleness_seconds is not None:
            yield _gauge(
                "mehdb_staleness_seconds", "Seconds since it last held all that the leader then had.",
                status.leader.staleness_seconds,
            )  # fmt: skip
        if status.leader and status.leader.lag_revisions is not None:
            yield _gauge("mehdb_lag_revisions", "Revisions behind the leader's head.", status.leader.lag_revisions)
        lag = GaugeMetricFamily("mehdb_follower_lag_revisions", "Revisions a follower is behind.", labels=["node"])
        lag_s = GaugeMetricFamily(
            "mehdb_follower_lag_seconds", "Seconds since a follower, as far as it has told, held all there was.",
            labels=["node"],
        )  # fmt: skip
        for follower in status.followers:
            lag.add_metric([follower.node], follower.lag_revisions)
            if follower.lag_seconds is not None:
                lag_s.add_metric([follower.node], follower.lag_seconds)
        yield lag
        yield lag_s


class _StoreCollector(Collector):
    def __init__(self, figures: Callable[[], StoreFigures]) -> None:
        self._figures = figures

    def describe(self) -> Iterator[Metric]:
        """Say nothing, for the same reason."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        figures = self._figures()
        yield _histogram(
            "mehdb_commit_seconds",
            "Batches of writes, from the first operation to the acknowledgement; their wait in the queue is not in it.",
            {(): figures.commit_seconds},
        )
        yield _histogram(
            "mehdb_commit_changes", "Changes in a batch: what shares one sync.", {(): figures.commit_changes}
        )
        yield _histogram(
            "mehdb_sync_seconds",
            "The COMMIT of each transaction: the write to the WAL, and its sync.",
            {(): figures.sync_seconds},
        )
        yield _gauge(
            "mehdb_compaction_backlog_changes",
            "Superseded changes behind the retained window, which compaction may remove. A sweep begins once they are "
            "half as many as must stay.",
            figures.compaction_backlog_changes,
        )
        yield CounterMetricFamily(
            "mehdb_compacted_changes", "Changes that compaction has removed.", figures.compacted_changes
        )
        yield _gauge("mehdb_volume_size_bytes", "What the volume holds, free or not.", figures.volume_size_bytes)
        yield _gauge("mehdb_store_size_bytes", "The database file.", figures.store_size_bytes)
        yield _gauge("mehdb_wal_size_bytes", "The write-ahead log beside it.", figures.wal_size_bytes)
        directions = {"sent": figures.sent, "taken": figures.taken}
        counter = CounterMetricFamily(
            "mehdb_snapshots", "Whole stores sent to others, or taken from others.", labels=["direction"]
        )
        for direction, transfers in directions.items():
            counter.add_metric([direction], transfers.completed)
        yield counter
        yield _by_label(
            "mehdb_snapshot_bytes", "How much of the snapshot under way has gone; 0 if there is none.", "direction",
            {direction: transfers.done_bytes for direction, transfers in directions.items()},
        )  # fmt: skip
        yield _by_label(
            "mehdb_snapshot_size_bytes", "How large the snapshot under way is; 0 if there is none.", "direction",
            {direction: transfers.size_bytes for direction, transfers in directions.items()},
        )  # fmt: skip


def _requests(requests: Requests) -> Iterator[Metric]:
    counter = CounterMetricFamily("mehdb_requests", "Answered requests.", labels=["route", "method", "status"])
    durations: dict[tuple[str, ...], Distribution] = {}
    for (route, method, status), histogram in sorted(requests.items()):
        found = histogram.distribution()
        counter.add_metric([route, method, str(status)], found.count)
        durations[route, method] = durations[route, method] + found if (route, method) in durations else found
    yield counter
    yield _histogram(
        "mehdb_request_seconds",
        "From a request's head to that of its answer, with the body that comes in between; without the time for which "
        "it waited for a change.",
        durations,
        ("route", "method"),
    )


def _histogram(
    name: str, help_: str, distributions: Mapping[tuple[str, ...], Distribution], labels: tuple[str, ...] = ()
) -> Metric:
    family = HistogramMetricFamily(name, help_, labels=labels)
    for values, distribution in distributions.items():
        so_far = accumulate(distribution.counts)
        bounds = (*map(floatToGoString, distribution.bounds), "+Inf")
        family.add_metric(values, list(zip(bounds, so_far, strict=True)), distribution.total)
    return family


def _by_label(name: str, help_: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, help_, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _gauge(name: str, help_: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_, value)


def _one_of(name: str, help_: str, label: str, choices: type[Role] | type[State], chosen: str) -> Metric:
    return _by_label(name, help_, label, {choice: choice == chosen for choice in choices})
