"""Prometheus metrics of one node, in a registry of their own: nothing here is global.

Requests are counted in a dictionary, and all else is read from the status when Prometheus asks, so that metrics cost
next to nothing in between and cannot disagree with `/status`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from mehdb.errors import Forbidden, Unauthorized
from mehdb.model import NodeStatus, Role, State

HANDSHAKE: Final = "handshake"  # of TLS: no certificate, or none of ours
DENIALS: Final = (Unauthorized.code, Forbidden.code, HANDSHAKE)
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"  # the text format that every Prometheus reads


class Metrics:
    """All that one node counts. *status* is asked at each scrape."""

    def __init__(self, status: Callable[[], NodeStatus]) -> None:
        self._registry = CollectorRegistry()
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._denied: Counter[str] = Counter()
        self._registry.register(_NodeCollector(status, self._requests, self._denied))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def count_request(self, route: str, method: str, status: int) -> None:
        """Count an answer. *route* and *method* are of a fixed set, never what a client sent."""
        self._requests[route, method, status] += 1

    def count_denied(self, reason: str) -> None:
        """Count a request that was denied. *reason* is an error's code."""
        self._denied[reason] += 1

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _NodeCollector(Collector):
    def __init__(
        self, status: Callable[[], NodeStatus], requests: Counter[tuple[str, str, int]], denied: Counter[str]
    ) -> None:
        self._status = status
        self._requests = requests
        self._denied = denied

    def describe(self) -> Iterator[Metric]:
        """Say nothing: a registry would otherwise collect once when this is registered, before the node exists."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        requests = CounterMetricFamily("mehdb_requests", "Answered requests.", labels=["route", "method", "status"])
        for (route, method, code), count in sorted(self._requests.items()):
            requests.add_metric([route, method, str(code)], count)
        yield requests
        denied = CounterMetricFamily("mehdb_denied", "Requests that were denied.", labels=["reason"])
        for reason in DENIALS:
            denied.add_metric([reason], self._denied[reason])
        yield denied
        yield _gauge("mehdb_ready", "1 if the node is ready.", status.ready)
        yield _gauge("mehdb_keys", "Live keys.", status.keys)
        yield _gauge("mehdb_revision", "The newest revision in the store.", status.revision)
        yield _gauge("mehdb_floor", "The revision up to which changes may have been compacted.", status.floor)
        yield _gauge("mehdb_epoch", "The highest epoch seen.", status.epoch)
        yield _gauge("mehdb_queue_bytes", "Bytes that wait to be written.", status.queue_bytes)
        yield _gauge("mehdb_volume_free_bytes", "Free bytes on the volume.", status.free_bytes)
        yield _gauge("mehdb_damaged", "1 if a damaged row or page was met.", status.damage is not None)
        yield _gauge("mehdb_watchers", "Clients that watch.", status.watchers)
        yield CounterMetricFamily("mehdb_commits", "Transactions, each with one sync.", status.commits)
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
        for follower in status.followers:
            lag.add_metric([follower.node], follower.lag_revisions)
        yield lag


def _gauge(name: str, help_: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_, value)


def _one_of(name: str, help_: str, label: str, choices: type[Role] | type[State], chosen: str) -> Metric:
    family = GaugeMetricFamily(name, help_, labels=[label])
    for choice in choices:
        family.add_metric([choice], choice == chosen)
    return family
