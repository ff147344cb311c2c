"""status: the whole cluster, from whatever node it is asked of; and its exit code, which scripts go by."""

import json
import re

from client_command import Done, mehdb
from cluster import ADDRESS, Cluster, Node, eventually, free_port
from mehdb.client.overview import overview
from mehdb.credentials import ANONYMOUS
from scripted import answer, scripted


def rows(done: Done) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in json.loads(done.out)["nodes"]}


def test_a_table_shows_every_node(pair: Cluster) -> None:
    pair.leader.put("status", b"v")
    head = pair.converge()["revision"]
    done = mehdb(f"{pair.leader.url},{pair.followers[0].url}", "status")
    assert (done.code, done.said) == (0, "")
    header, *nodes = done.out.decode().splitlines()
    assert re.split(r"  +", header) == ["name", "role", "ready", "revision", "lag", "keys", "size", "last contact"]
    keys = str(pair.leader.status().keys)
    size, seconds = r"[0-9.]+ [KM]iB", r"\d+\.\d s ago"
    for line, row in zip(
        nodes, (["mehdb-0", "leader", "yes", str(head), "-", keys, size, "-"],
                ["mehdb-1", "follower", "yes", str(head), "0", keys, size, seconds]), strict=True,
    ):  # fmt: skip
        assert re.fullmatch("  +".join(row), line), line


def test_a_follower_leads_to_its_leader_and_that_to_the_others(pair: Cluster) -> None:
    done = mehdb(pair.followers[0], "status", "--json")
    found = rows(done)
    assert done.code == 0
    assert json.loads(done.out)["healthy"] is True
    assert {name: (row["role"], row["url"], row["asked"]) for name, row in found.items()} == {
        "mehdb-0": ("leader", pair.leader.url, True),
        "mehdb-1": ("follower", pair.followers[0].url, True),
    }
    found = rows(mehdb(pair.leader, "status", "--json"))
    assert found["mehdb-1"]["asked"] is False
    assert found["mehdb-1"]["problem"] == "not asked: no URL given"
    assert found["mehdb-1"]["ready"] is None, "nobody but itself can say"
    assert found["mehdb-1"]["lag_revisions"] == 0


def test_a_node_that_does_not_answer_is_unhealthy(pair: Cluster) -> None:
    nobody = f"http://{ADDRESS}:{free_port()}"
    done = mehdb(f"{pair.leader.url},{nobody}", "status", "--timeout", "0.5")
    assert done.code == 1
    assert re.search(rf"^{nobody} +- +no ", done.out.decode(), re.MULTILINE)
    assert "Connection refused" in done.said


def test_a_cluster_without_its_leader_is_unhealthy(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    leader.stop()
    found = overview((follower.url,), ANONYMOUS, 0.5)
    assert not found.healthy
    rows = {row.name: row for row in found.nodes}
    assert rows["mehdb-1"].ready
    assert (rows[leader.url].ready, rows[leader.url].asked) == (False, True)


def test_a_node_that_is_not_ready_is_unhealthy_and_says_why(cluster: Cluster, leader: Node) -> None:
    cluster.add()
    node = cluster.add(MEHDB_PEERS=f"http://{ADDRESS}:{free_port()}").start(ready=False)
    done = mehdb(f"{leader.url},{node.url}", "status", "--timeout", "1")
    assert done.code == 1
    assert re.search("^mehdb-1 +follower +no ", done.out.decode(), re.MULTILINE)
    assert re.search("^mehdb-1: synced: ", done.said, re.MULTILINE)


def test_two_leaders_are_unhealthy_and_two_urls_of_one_are_not(cluster: Cluster, pair: Cluster) -> None:
    leader, other = pair.leader, cluster.start(1).leader
    assert not overview((leader.url, other.url), ANONYMOUS, 3).healthy
    found = overview((other.url, other.url.replace(ADDRESS, "localhost")), ANONYMOUS, 3)
    assert found.healthy
    assert len(found.nodes) == 1
    found = overview((other.url, pair.followers[0].url), ANONYMOUS, 3)
    assert not found.healthy
    assert {row.url for row in found.nodes if row.role == "leader"} == {other.url, leader.url}, (
        "the one that it follows"
    )


def test_an_answer_that_is_no_status_is_told(leader: Node) -> None:
    with scripted(answer(200, b"{}")) as server:
        found = overview((leader.url, server.url), ANONYMOUS, 3)
    assert not found.healthy
    assert any("not a node's status" in (row.problem or "") for row in found.nodes)


def test_the_size_is_that_of_the_stores_files(leader: Node) -> None:
    before = leader.status().size_bytes
    assert before == overview((leader.url,), ANONYMOUS, 3).nodes[0].size_bytes
    leader.put("large", b"v" * (1 << 20))
    eventually(lambda: leader.status().size_bytes > before + (1 << 19), "the store to have grown")
