"""/watch on the leader and a follower: lines, events, long polls, and how they end."""

import json

import pytest

from cluster import Cluster, Node, eventually
from mehdb.api.watch import EventCache
from mehdb.model import Change, Revision
from watching import watching
from wire import Connection, Reply, ask

EVENTS = {"Accept": "text/event-stream"}


def put(connection: Connection, key: str, value: bytes = b"v") -> int:
    return connection.ask("PUT", f"/set/{key}", value).revision


def lines(reply: Reply) -> list[dict[str, object]]:
    return [json.loads(line) for line in reply.body.splitlines()]


@pytest.fixture(params=["leader", "follower"])
def node(pair: Cluster, request: pytest.FixtureRequest) -> Node:
    """Either node, with all that has been written."""
    pair.converge()
    return pair.leader if request.param == "leader" else pair.followers[0]


def test_changes_come_as_they_are_made_with_all_that_is_known_of_them(node: Node, connection: Connection) -> None:
    with watching(node, "prefix=watch/") as watcher:
        assert watcher.answer.headers["Content-Type"] == "application/x-ndjson"
        first = watcher.event()
        assert first["op"] == "heartbeat"
        text = connection.ask("PUT", "/set/watch/a?ttl=1000", "é".encode(), {"Content-Type": "text/x"}).revision
        put(connection, "watched/not")
        binary = put(connection, "watch/b", b"\xff")
        gone = connection.ask("DELETE", "/delete/watch/a").revision
        made, second, deleted = watcher.changes(3)
        assert made.pop("expires_at") > 1_700_000_000
        assert made == {
            "op": "set", "key": "watch/a", "revision": text, "size": 2, "content_type": "text/x", "value": "é"
        }  # fmt: skip
        assert second == {
            "op": "set", "key": "watch/b", "revision": binary, "size": 1, "content_type": None, "base64": "/w=="
        }  # fmt: skip
        assert deleted == {"op": "delete", "key": "watch/a", "revision": gone}
        assert first["revision"] == text - 1


def test_a_watch_goes_on_from_where_it_is_told_to(node: Node, connection: Connection) -> None:
    revisions = [put(connection, f"watch/from/{number}") for number in range(300)]
    with watching(node, f"prefix=watch/from/&after={revisions[9]}") as watcher:
        assert watcher.event() == {"op": "heartbeat", "revision": revisions[9]}
        assert [change["revision"] for change in watcher.changes(290)] == revisions[10:]
        last = put(connection, "watch/from/last")
        assert watcher.change()["revision"] == last


def test_a_watch_may_begin_at_a_revision_that_this_node_has_not_reached(node: Node, connection: Connection) -> None:
    now = put(connection, "watch/now")
    with watching(node, f"after={now + 1}") as watcher:
        put(connection, "watch/next")
        after = put(connection, "watch/after")
        assert watcher.change()["revision"] == after


def test_a_quiet_watch_is_told_how_far_it_is(node: Node, connection: Connection) -> None:
    """By a heartbeat: nothing of the prefix has come, and a client that reconnects need not look at it all again."""
    with watching(node, "prefix=watch/never/") as watcher:
        begun = watcher.event()["revision"]
        last = put(connection, "watch/other")
        beat = watcher.event()
        assert beat["op"] == "heartbeat"
        assert beat["revision"] >= last > begun, "a key of another test may have expired meanwhile"


def test_events_of_a_browser_have_ids_to_go_on_from(node: Node, connection: Connection) -> None:
    with watching(node, "prefix=watch/events/", EVENTS) as watcher:
        assert watcher.answer.headers["Content-Type"] == "text/event-stream"
        assert watcher.sent() == {"retry": "1000"}
        begun = watcher.sent()
        assert begun == {
            "event": "heartbeat",
            "id": begun["id"],
            "data": f'{{"op":"heartbeat","revision":{begun["id"]}}}',
        }
        first, second = (put(connection, f"watch/events/{number}") for number in range(2))
        event = watcher.sent()
        assert (event["event"], event["id"]) == ("set", str(first))
        assert json.loads(event["data"])["key"] == "watch/events/0"
    # As a browser does it: the same URL again, with the ID of the last event.
    with watching(node, f"prefix=watch/events/&after={begun['id']}", EVENTS | {"Last-Event-ID": str(first)}) as watcher:
        watcher.sent()
        assert watcher.sent()["id"] == str(first)
        assert watcher.sent()["id"] == str(second)


def test_a_long_poll_answers_with_what_comes_first(node: Node, connection: Connection) -> None:
    first = put(connection, "watch/poll/1")
    second = put(connection, "watch/poll/2")
    with Connection(node) as poller:
        reply = poller.ask("GET", f"/watch?prefix=watch/poll/&after={first - 1}&wait=20")
        if len(lines(reply)) == 1:  # a follower may have had the first of them only
            reply = poller.ask("GET", f"/watch?prefix=watch/poll/&after={first}&wait=20")
        assert lines(reply)[-1]["revision"] == second
        onward = f"/watch?prefix=watch%2Fpoll%2F&after={second}&wait=20&history={reply.headers['Mehdb-History']}"
        assert reply.headers["Link"] == f'<{onward}>; rel="next"'
        poller.send(f"GET /watch?prefix=watch/poll/&after={second}&wait=20 HTTP/1.1\r\nHost: n\r\n\r\n".encode())
        third = put(connection, "watch/poll/3")
        assert [line["revision"] for line in lines(poller.reply())] == [third]


def test_a_long_poll_that_nothing_comes_for_is_empty_and_goes_on(node: Node, connection: Connection) -> None:
    last = put(connection, "watch/other")
    eventually(lambda: node.position()["revision"] == last, "the node to be there")
    for wait in ("0", "0.1"):
        reply = ask(node, "GET", f"/watch?prefix=watch/nothing/&after=0&wait={wait}")
        assert (reply.status, reply.body) == (200, b"")
        assert reply.headers["Link"] is not None
    assert f"after={last}&" in ask(node, "GET", f"/watch?prefix=no&after={last}&wait=0").headers["Link"]


def test_what_a_client_asks_after_is_never_told_as_the_revision_of_the_node(node: Node) -> None:
    far = 10**12
    reply = ask(node, "GET", f"/watch?after={far}&wait=0")
    assert f"after={far}&" in reply.headers["Link"]
    for answer in (reply, ask(node, "GET", "/livez")):
        assert int(answer.headers["Mehdb-Revision"]) < far


def test_what_was_compacted_cannot_be_watched(cluster: Cluster) -> None:
    cluster.start(1, MEHDB_RETAIN_CHANGES="100")
    with Connection(cluster.leader) as connection:
        for number in range(400):
            put(connection, "busy", b"%d" % number)
        eventually(lambda: cluster.leader.status().floor > 200, "a compaction")
        floor = cluster.leader.status().floor
        for query in (f"after={floor - 1}", "after=0&wait=1"):
            reply = connection.ask("GET", f"/watch?{query}")
            assert (reply.status, reply.error, reply.json["floor"]) == (410, "compacted", floor)
        with watching(cluster.leader, f"after={floor}") as watcher:
            assert [change["revision"] for change in watcher.changes(400 - floor)] == list(range(floor + 1, 401))


def test_another_history_is_refused(node: Node) -> None:
    own = node.position()["history"]
    with watching(node, f"history={own}") as watcher:
        assert watcher.event()["op"] == "heartbeat"
    reply = ask(node, "GET", f"/watch?history={'0' * 32}")
    assert (reply.status, reply.error) == (409, "diverged")


@pytest.mark.parametrize("query", ["after=x", "after=-1", "wait=61", "wait=x", "history=1", "revision=1"])
def test_a_watch_that_cannot_be_understood_is_refused(connection: Connection, query: str) -> None:
    assert connection.ask("GET", f"/watch?{query}").error == "bad_parameter"


def test_an_event_id_that_is_none_is_refused(connection: Connection) -> None:
    assert connection.ask("GET", "/watch", headers={"Last-Event-ID": "x"}).error == "bad_parameter"


def test_a_client_of_http_1_0_gets_the_stream_until_the_connection_ends(leader: Node, connection: Connection) -> None:
    with Connection(leader) as old:
        old.send(b"GET /watch?prefix=watch/old HTTP/1.0\r\n\r\n")
        assert b"HTTP/1.1 200" in old.socket.recv(12)
        received = b""
        put(connection, "watch/old")
        while b'"watch/old"' not in received:
            received += old.socket.recv(4096)
        head, _, body = received.partition(b"\r\n\r\n")
        assert b"Transfer-Encoding" not in head
        assert body.startswith(b'{"op":"heartbeat"')


def test_a_line_is_encoded_once_and_never_mistaken_for_that_of_another_history() -> None:
    cache, change = EventCache(), Change(Revision(7), b"k", b"v")
    assert cache.event(change) is cache.event(change)
    assert b'"other"' in cache.event(Change(Revision(7), b"k", b"other")).line
