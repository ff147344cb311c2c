"""What every answer bears, and what the answers to reads and writes say in their heads."""

import pytest

from cluster import Cluster, Node
from mehdb import __version__
from wire import Connection, Reply, ask

LARGE = str(1 << 40)
ANSWERS = [
    ("PUT", "/set/headers", 200, 307),
    ("GET", "/get/headers/read", 200, 200),
    ("HEAD", "/get/headers/read", 200, 200),
    ("GET", "/get/no/such/key", 404, 404),
    ("GET", "/get/%00", 400, 400),
    ("DELETE", "/delete/no/such/key", 404, 307),
    ("GET", "/keys", 200, 200),
    ("GET", "/keys?limit=0", 400, 400),
    ("GET", "/status", 200, 200),
    ("GET", "/status?level=full", 200, 200),
    ("GET", "/livez", 200, 200),
    ("HEAD", "/readyz", 200, 200),
    ("GET", "/metrics", 200, 200),
    ("GET", "/position", 200, 200),
    ("GET", "/replicate?history=00000000000000000000000000000000&after=1", 409, 409),
    ("GET", "/replicate", 410, 410),
    ("GET", "/nowhere", 404, 404),
    ("POST", "/set/headers", 405, 405),
]


def assert_node_headers(reply: Reply, node: Node) -> None:
    position = node.position()
    shown = {name: reply.headers[f"Mehdb-{name}"] for name in ("Node", "Role", "State", "Revision", "History")}
    assert shown == {
        "Node": node.name,
        "Role": "leader" if node.name == "mehdb-0" else "follower",
        "State": "serving",
        "Revision": str(position["revision"]),
        "History": position["history"],
    }


@pytest.fixture(scope="module")
def written(pair: Cluster) -> Cluster:
    """The pair, with a key on both."""
    ask(pair.leader, "PUT", "/set/headers/read", b"1", {"Content-Type": "text/html"})
    pair.converge()
    return pair


@pytest.mark.parametrize(("method", "target", "by_leader", "by_follower"), ANSWERS)
def test_every_answer_says_who_gave_it_and_from_which_revision(
    written: Cluster, method: str, target: str, by_leader: int, by_follower: int
) -> None:
    for node, status in zip(written.nodes, (by_leader, by_follower), strict=True):
        reply = ask(node, method, target)
        assert reply.status == status
        written.converge()
        assert_node_headers(reply, node)
        assert reply.headers["Server"] == f"mehdb/{__version__}"
        assert reply.headers["Date"].endswith(" GMT")
        assert all(len(reply.headers.get_all(name, [])) == 1 for name in reply.headers), "each header once"


def test_a_refused_body_has_these_headers_too(leader: Node) -> None:
    for headers, status in (({"Content-Length": LARGE}, 413), ({"Expect": "more"}, 417), ({"Content-Type": "é"}, 400)):
        reply = ask(leader, "PUT", "/set/headers", b"", headers)
        assert reply.status == status
        assert_node_headers(reply, leader)


def test_a_write_is_answered_with_its_revision_and_revisions_rise_by_one(connection: Connection) -> None:
    first = connection.ask("PUT", "/set/revisions/a", b"1")
    assert (first.body, first.headers["ETag"]) == (b"WRITE completed", f'"{first.revision}"')
    changes = [
        ("PUT", "/set/revisions/b"),
        ("PUT", "/set/revisions/a"),
        ("DELETE", "/delete/revisions/b"),
        ("PUT", "/set/revisions/b"),
    ]
    for number, (method, target) in enumerate(changes, 1):
        reply = connection.ask(method, target, b"1" if method == "PUT" else b"")
        assert (reply.status, reply.revision) == (200, first.revision + number)
        assert reply.headers["Mehdb-Revision"] == str(reply.revision)


def test_a_value_bears_the_revision_it_was_written_at(connection: Connection) -> None:
    written = connection.ask("PUT", "/set/etag", b"1")
    connection.ask("PUT", "/set/etag/other", b"1")
    read = connection.ask("GET", "/get/etag")
    assert read.revision == written.revision
    assert int(read.headers["Mehdb-Revision"]) > read.revision


def test_a_value_is_never_sniffed(connection: Connection) -> None:
    connection.ask("PUT", "/set/sniffed", b"<script>")
    reply = connection.ask("GET", "/get/sniffed")
    assert (reply.headers["Content-Type"], reply.headers["X-Content-Type-Options"]) == (
        "application/octet-stream",
        "nosniff",
    )


def test_a_deletion_says_whether_there_was_something(connection: Connection) -> None:
    connection.ask("PUT", "/set/deleted", b"1")
    first, second = (connection.ask("DELETE", "/delete/deleted") for _ in range(2))
    assert (first.status, first.body) == (200, b"WRITE completed")
    assert (second.status, second.error) == (404, "key_not_found")
    assert second.headers["Mehdb-Revision"] == first.headers["Mehdb-Revision"], "a deletion of nothing is no change"


@pytest.mark.parametrize(
    "target",
    [
        "/get/headers/read",
        "/get/no/such/key",
        "/get/%ff",
        "/keys",
        "/status",
        "/status?level=full",
        "/livez",
        "/readyz",
        "/position",
    ],
)
def test_head_answers_as_get_does_but_without_the_body(written: Cluster, target: str) -> None:
    with Connection(written.leader) as connection:
        get, head = connection.ask("GET", target), connection.ask("HEAD", target)
        assert (head.status, head.body) == (get.status, b"")
        assert get.headers["Content-Length"] == str(len(get.body)) != "0"
        unlike = {name for name in get.headers if head.headers[name] != get.headers[name]}
        assert unlike <= {"Date"}
        assert set(head.headers) == set(get.headers)
        assert connection.ask("GET", "/status").body == b"leader", "in sync: the answer to HEAD had no body"


def test_a_redirect_bears_its_reason(follower: Node) -> None:
    reply = ask(follower, "DELETE", "/delete/x")
    assert (reply.status, reply.error, reply.json["status"]) == (307, "not_leader", 307)
    assert reply.headers["Content-Type"] == "application/json"
    assert "nothing was written" in reply.json["message"]
