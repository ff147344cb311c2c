"""What Prometheus reads: every metric of a node, from its status and its counters."""

import re
from collections.abc import Callable
from math import inf
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mehdb.figures import CHANGES, SECONDS, Histogram, StoreFigures, Transfers
from mehdb.metrics import CONTENT_TYPE, Metrics
from mehdb.model import Epoch, FollowerStatus, History, LeaderStatus, NodeStatus, Revision, Role, State

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def status(**fields: object) -> NodeStatus:
    """Return the status of a leader, but for *fields*."""
    usual = {
        "node": "mehdb-0", "role": Role.LEADER, "state": State.SERVING, "ready": True, "reason": None,
        "history": History("aa" * 16), "epoch": Epoch(3), "revision": Revision(7), "chain": "00" * 16,
        "floor": Revision(2),
        "keys": 5, "queue_bytes": 11, "leader": None, "followers": (), "uptime_seconds": 1.5, "version": "0",
        "commits": 4, "free_bytes": 1 << 33,
    }  # fmt: skip
    return NodeStatus(**usual | fields)  # type: ignore[arg-type]


def figures(**fields: object) -> StoreFigures:
    """Return the figures of a store that has done nothing, but for *fields*."""
    nothing = {
        "commit_seconds": Histogram(SECONDS).distribution(), "commit_changes": Histogram(CHANGES).distribution(),
        "sync_seconds": Histogram(SECONDS).distribution(), "compaction_backlog_changes": 0, "compacted_changes": 0,
        "volume_size_bytes": 1 << 34, "store_size_bytes": 1 << 20, "wal_size_bytes": 1 << 16,
        "sent": Transfers(), "taken": Transfers(),
    }  # fmt: skip
    return StoreFigures(**nothing | fields)  # type: ignore[arg-type]


def metrics_of(look: Callable[[], NodeStatus] = status, work: Callable[[], StoreFigures] = figures) -> Metrics:
    return Metrics(look, work)


def samples(metrics: Metrics) -> Samples:
    families = list(text_string_to_metric_families(metrics.render().decode()))
    assert len({family.name for family in families}) == len(families), "each family once"
    assert all(family.documentation for family in families)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def of(found: Samples, name: str) -> dict[str, float]:
    """Return the values of the metric *name* by its only label."""
    return {labels[0][1]: value for (sample, labels), value in found.items() if sample == name}


def buckets(found: Samples, name: str, labels: tuple[tuple[str, str], ...] = ()) -> dict[float, float]:
    """Return how many values of the histogram *name* there are up to each bound."""
    return {
        float(dict(of_sample)["le"]): value
        for (sample, of_sample), value in found.items()
        if sample == f"{name}_bucket" and set(labels) <= set(of_sample)
    }


def test_a_status_becomes_gauges() -> None:
    found = samples(metrics_of())
    gauges = {
        "ready": 1, "keys": 5, "revision": 7, "floor": 2, "epoch": 3, "queue_bytes": 11, "volume_free_bytes": 1 << 33,
        "damaged": 0,
    }  # fmt: skip
    assert {name: found[f"mehdb_{name}", ()] for name in gauges} == gauges


def test_damage_is_told_by_a_1_whatever_it_is() -> None:
    assert (
        samples(metrics_of(lambda: status(damage="revision 7 does not match its checksum")))["mehdb_damaged", ()] == 1
    )


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("role", Role)
def test_exactly_one_role_and_one_state_is_1(role: Role, state: State) -> None:
    found = samples(metrics_of(lambda: status(role=role, state=state, ready=state is State.SERVING)))
    assert of(found, "mehdb_role") == {one: float(one == role) for one in Role}
    assert of(found, "mehdb_state") == {one: float(one == state) for one in State}
    assert found["mehdb_ready", ()] == (state is State.SERVING)


def test_the_status_is_asked_at_each_scrape_and_not_before() -> None:
    asked: list[int] = []

    def look() -> NodeStatus:
        asked.append(1)
        return status(revision=Revision(len(asked)))

    metrics = metrics_of(look)
    assert not asked
    assert [samples(metrics)["mehdb_revision", ()] for _ in range(3)] == [1, 2, 3]


def test_a_leader_tells_the_lag_of_each_follower() -> None:
    followers = (FollowerStatus("mehdb-1", Revision(7), 0, 0.1), FollowerStatus("mehdb-2", Revision(4), 3, 0.1))
    found = samples(metrics_of(lambda: status(followers=followers)))
    assert of(found, "mehdb_follower_lag_revisions") == {"mehdb-1": 0, "mehdb-2": 3}
    assert ("mehdb_lag_revisions", ()) not in found


def test_a_follower_tells_its_own_lag_once_it_knows() -> None:
    unheard = LeaderStatus("http://mehdb-0:9876", None, None, None)
    found = samples(metrics_of(lambda: status(role=Role.FOLLOWER, leader=unheard)))
    unknown = {"mehdb_lag_revisions", "mehdb_leader_heard_seconds", "mehdb_staleness_seconds"}
    assert not unknown & {name for name, _ in found}
    heard = LeaderStatus("http://mehdb-0:9876", Revision(9), 2, 0.25, staleness_seconds=0.5)
    found = samples(metrics_of(lambda: status(role=Role.FOLLOWER, leader=heard)))
    assert (found["mehdb_lag_revisions", ()], found["mehdb_leader_heard_seconds", ()]) == (2, 0.25)
    assert found["mehdb_staleness_seconds", ()] == 0.5


def test_requests_are_counted_by_route_method_and_status() -> None:
    metrics = metrics_of()
    for _ in range(3):
        metrics.count_request("/get/", "GET", 200, 0.001)
    metrics.count_request("/get/", "GET", 404, 0.001)
    metrics.count_request("unknown", "unknown", 404, 0.001)
    found = {labels: value for (name, labels), value in samples(metrics).items() if name == "mehdb_requests_total"}
    assert found == {
        (("method", "GET"), ("route", "/get/"), ("status", "200")): 3,
        (("method", "GET"), ("route", "/get/"), ("status", "404")): 1,
        (("method", "unknown"), ("route", "unknown"), ("status", "404")): 1,
    }


def test_the_process_and_its_python_are_told_too() -> None:
    names = {name for name, _ in samples(metrics_of())}
    assert {"process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds_total", "python_info"} <= names


def test_nodes_of_one_process_share_nothing() -> None:
    first, second = metrics_of(), metrics_of()
    first.count_request("/get/", "GET", 200, 0.001)
    assert not any(name == "mehdb_requests_total" for name, _ in samples(second))


def test_a_request_is_timed_by_route_and_method_whatever_came_of_it() -> None:
    metrics = metrics_of()
    for code, duration_s in ((200, 0.0002), (200, 0.003), (404, 0.0001), (200, 99.0)):
        metrics.count_request("/get/", "GET", code, duration_s)
    metrics.count_request("/set/", "PUT", 200, 0.01)
    found = samples(metrics)
    get = (("method", "GET"), ("route", "/get/"))
    assert found["mehdb_request_seconds_count", get] == 4
    assert found["mehdb_request_seconds_sum", get] == pytest.approx(99.0033)
    assert buckets(found, "mehdb_request_seconds", get) == {
        bound: sum(value <= bound for value in (0.0002, 0.003, 0.0001, 99.0)) for bound in (*SECONDS, inf)
    }
    assert found["mehdb_requests_total", (*get, ("status", "200"))] == 3


def test_the_stores_figures_are_told_as_they_are() -> None:
    commits, changes, syncs = Histogram(SECONDS), Histogram(CHANGES), Histogram(SECONDS)
    for histogram, value in ((commits, 0.004), (changes, 7), (syncs, 0.003), (syncs, 0.0001)):
        histogram.observe(value)
    work = figures(
        commit_seconds=commits.distribution(), commit_changes=changes.distribution(),
        sync_seconds=syncs.distribution(), compaction_backlog_changes=12, compacted_changes=34,
        sent=Transfers(2, 30, 100), taken=Transfers(1, 0, 0),
    )  # fmt: skip
    found = samples(metrics_of(work=lambda: work))
    assert (found["mehdb_commit_seconds_sum", ()], found["mehdb_commit_seconds_count", ()]) == (0.004, 1)
    assert (found["mehdb_commit_changes_sum", ()], buckets(found, "mehdb_commit_changes")[10]) == (7, 1)
    assert buckets(found, "mehdb_commit_changes")[5] == 0
    assert (found["mehdb_sync_seconds_count", ()], buckets(found, "mehdb_sync_seconds")[0.0001]) == (2, 1)
    assert found["mehdb_compaction_backlog_changes", ()] == 12
    assert found["mehdb_compacted_changes_total", ()] == 34
    assert of(found, "mehdb_snapshots_total") == {"sent": 2, "taken": 1}
    assert of(found, "mehdb_snapshot_bytes") == {"sent": 30, "taken": 0}
    assert of(found, "mehdb_snapshot_size_bytes") == {"sent": 100, "taken": 0}
    assert found["mehdb_volume_size_bytes", ()] == 1 << 34
    assert (found["mehdb_store_size_bytes", ()], found["mehdb_wal_size_bytes", ()]) == (1 << 20, 1 << 16)


def test_the_version_is_a_label() -> None:
    assert samples(metrics_of(lambda: status(version="1.2.3")))["mehdb_build_info", (("version", "1.2.3"),)] == 1


def test_the_lag_of_a_follower_is_told_in_seconds_where_it_is_known() -> None:
    followers = (
        FollowerStatus("mehdb-1", Revision(7), 0, 0.1, 0.0), FollowerStatus("mehdb-2", Revision(4), 3, 0.1, 12.5),
        FollowerStatus("mehdb-3", Revision(4), 3, 0.1),
    )  # fmt: skip
    found = samples(metrics_of(lambda: status(followers=followers)))
    assert of(found, "mehdb_follower_lag_seconds") == {"mehdb-1": 0, "mehdb-2": 12.5}
    gone = samples(metrics_of(lambda: status(followers=())))
    assert of(gone, "mehdb_follower_lag_seconds") == of(gone, "mehdb_follower_lag_revisions") == {}


def test_every_metric_is_in_the_table_of_what_to_watch_with_its_labels_and_no_other() -> None:
    metrics = metrics_of(
        lambda: status(
            leader=LeaderStatus("http://mehdb-0:9876", Revision(9), 2, 0.25, staleness_seconds=0.5),
            followers=(FollowerStatus("mehdb-1", Revision(7), 0, 0.1, 0.0),),
        )
    )
    metrics.count_request("/get/", "GET", 200, 0.001)
    told = set()
    for family in text_string_to_metric_families(metrics.render().decode()):
        if family.name.startswith("mehdb_"):
            [labels] = {tuple(name for name in one.labels if name != "le") for one in family.samples}
            suffix = "_total" if family.type == "counter" else ""
            told.add((family.name + suffix, frozenset(labels)))
    page = (Path(__file__).parents[1] / "docs" / "OPERATIONS.md").read_text()
    table = page.partition("\n## What to watch\n")[2].partition("\n## ")[0]
    documented = {
        (name, frozenset(labels.split(",")) if labels else frozenset())
        for name, labels in re.findall(r"`(mehdb_[a-z_]+)(?:\{([a-z,]+)\})?`", table)
    }
    assert documented == told


def test_the_content_type_is_that_of_the_text_format() -> None:
    assert CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"
