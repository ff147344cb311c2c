"""/status, /livez, /readyz and /metrics, as people, probes and Prometheus see them."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster import Cluster, Node, eventually
from mehdb import __version__
from wire import Connection, ask


def json_status(node: Node) -> dict[str, object]:
    reply = ask(node, "GET", "/status", headers={"Accept": "application/json"})
    assert reply.headers["Content-Type"] == "application/json"
    assert isinstance(reply.json, dict)
    return reply.json


def samples(node: Node) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return what Prometheus would store: each series with its value."""
    reply = ask(node, "GET", "/metrics")
    assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = text_string_to_metric_families(reply.body.decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def requests_of(node: Node) -> dict[frozenset[tuple[str, str]], float]:
    return {labels: value for (name, labels), value in samples(node).items() if name == "mehdb_requests_total"}


def series(route: str, method: str, status: int) -> frozenset[tuple[str, str]]:
    return frozenset({"route": route, "method": method, "status": str(status)}.items())


def test_a_status_is_plain_text_for_people(pair: Cluster) -> None:
    for node, role in zip(pair.nodes, (b"leader", b"follower"), strict=True):
        reply = ask(node, "GET", "/status")
        assert (reply.body, reply.headers["Content-Type"]) == (role, "text/plain; charset=utf-8")
        assert ask(node, "GET", "/status?level=brief").body == role
        assert ask(node, "GET", "/status?level=full").body.isdigit()


def test_a_json_status_tells_everything(pair: Cluster) -> None:
    ask(pair.leader, "PUT", "/set/status", b"1")
    position = pair.converge()
    for node, role in zip(pair.nodes, ("leader", "follower"), strict=True):
        status = json_status(node)
        assert set(status) == {
            "node", "role", "state", "ready", "reason", "history", "epoch", "revision", "chain", "floor", "keys",
            "queue_bytes", "leader", "followers", "uptime_seconds", "version", "commits", "free_bytes", "damage",
            "watchers", "size_bytes",
        }  # fmt: skip
        assert {name: status[name] for name in position} == position
        shown = {
            name: status[name]
            for name in (
                "node",
                "role",
                "state",
                "ready",
                "reason",
                "epoch",
                "floor",
                "queue_bytes",
                "version",
                "damage",
            )
        }
        assert shown == {
            "node": node.name, "role": role, "state": "serving", "ready": True, "reason": None, "epoch": 1, "floor": 0,
            "queue_bytes": 0, "version": __version__, "damage": None,
        }  # fmt: skip
        assert status["keys"] == len(ask(node, "GET", "/keys?limit=10000").json)
        assert isinstance(status["uptime_seconds"], float)
        assert isinstance(status["free_bytes"], int)
        assert status["free_bytes"] > 0
        assert status["size_bytes"] == sum(
            path.stat().st_size for path in node.volume.glob("store.db*") if path.suffix != ".db-shm"
        )


def test_a_follower_tells_of_its_leader_and_the_leader_of_its_followers(pair: Cluster) -> None:
    leader, follower = pair.nodes
    revision = pair.converge()["revision"]
    assert json_status(leader)["leader"] is None
    told = json_status(follower)["leader"]
    assert isinstance(told, dict)
    assert (told["url"], told["revision"], told["lag_revisions"]) == (leader.url, revision, 0)
    assert 0 <= told["heard_seconds_ago"] < 60
    assert json_status(follower)["followers"] == []

    def acknowledged() -> bool:
        """The follower's next request does it."""
        return any(
            (one.node, one.revision, one.lag_revisions) == ("mehdb-1", revision, 0) for one in leader.status().followers
        )

    eventually(acknowledged, "the leader to know what its follower holds")


@pytest.mark.parametrize(
    "accept", ["application/json", "application/json, text/plain;q=0.5", "text/html,application/json;q=0.9,*/*"]
)
def test_a_json_status_is_asked_for_with_accept(leader: Node, accept: str) -> None:
    for target in ("/status", "/status?level=full"):
        assert ask(leader, "GET", target, headers={"Accept": accept}).json["role"] == "leader"


@pytest.mark.parametrize("accept", ["*/*", "text/plain", ""])
def test_other_clients_get_text(leader: Node, accept: str) -> None:
    assert ask(leader, "GET", "/status", headers={"Accept": accept}).body == b"leader"


def test_probes_are_answered_with_a_line_for_each_check(pair: Cluster) -> None:
    for node, part in zip(pair.nodes, (b"leading", b"synced"), strict=True):
        assert ask(node, "GET", "/livez").body == b"event loop: ok\n"
        ready = ask(node, "GET", "/readyz")
        assert (ready.status, ready.body) == (200, b"store: ok\nrunning: ok\n%s: ok\n" % part)


def test_metrics_agree_with_the_status(pair: Cluster) -> None:
    pair.converge()
    for node in pair.nodes:
        status, shown = json_status(node), samples(node)
        gauges = {
            name: shown[f"mehdb_{name}", frozenset()]
            for name in ("ready", "keys", "revision", "floor", "epoch", "queue_bytes")
        }
        assert gauges == {name: status[name] for name in gauges}
        for label, choices in (
            ("role", {"leader", "follower"}),
            ("state", {"starting", "recovering", "syncing", "serving", "diverged", "failed", "draining", "stopped"}),
        ):
            told = {choice: shown[f"mehdb_{label}", frozenset({(label, choice)})] for choice in choices}
            assert {choice for choice, value in told.items() if value} == {status[label]}
    leader, follower = map(samples, pair.nodes)
    assert ("mehdb_follower_lag_revisions", frozenset({("node", "mehdb-1")})) in leader
    assert follower["mehdb_lag_revisions", frozenset()] == 0
    assert follower["mehdb_leader_heard_seconds", frozenset()] >= 0
    assert ("mehdb_lag_revisions", frozenset()) not in leader
    assert (shown["mehdb_damaged", frozenset()], shown["mehdb_volume_free_bytes", frozenset()] > 0) == (0, True)
    assert shown["process_resident_memory_bytes", frozenset()] > 1 << 20


def test_requests_are_counted_by_route_method_and_status(connection: Connection, leader: Node) -> None:
    before = requests_of(leader)
    for number in range(3):
        connection.ask("PUT", f"/set/counted/{number}", b"1")
    connection.ask("GET", "/get/counted/0")
    connection.ask("GET", "/get/counted/none")
    connection.ask("GET", "/get/%00")
    after = requests_of(leader)
    risen = {labels: value - before.get(labels, 0) for labels, value in after.items() if value != before.get(labels, 0)}
    assert {
        series("/set/", "PUT", 200): 3,
        series("/get/", "GET", 200): 1,
        series("/get/", "GET", 404): 1,
        series("/get/", "GET", 400): 1,
    }.items() <= risen.items()
    assert all(("route", "/set/") not in labels or count == 3 for labels, count in risen.items())


def test_clients_cannot_make_series(connection: Connection, leader: Node) -> None:
    connection.ask("GET", "/nowhere")
    connection.ask("POST", "/keys")
    before = set(requests_of(leader)) | {series("/metrics", "GET", 200)}
    for number in range(20):
        connection.ask("GET", f"/nowhere/{number}?x={number}")
        connection.ask("GET", f"/get/{number}/none")
        connection.ask(("POST", "PATCH", "OPTIONS", "PURGE", "MKCOL")[number % 5], "/keys")
    new = set(requests_of(leader)) - before
    assert new <= {series("/get/", "GET", 404)}
    assert series("unknown", "unknown", 404) in before
    assert series("/keys", "unknown", 405) in before
