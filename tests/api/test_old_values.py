"""What a key was: /get/KEY?revision= and /history/KEY, inside the window that is retained."""

import json
import re
from typing import Any

from cluster import Cluster, eventually
from wire import Connection, Reply, ask


def put(connection: Connection, key: str, value: bytes) -> int:
    return connection.ask("PUT", f"/set/{key}", value).revision


def at(connection: Connection, key: str, revision: int) -> Reply:
    return connection.ask("GET", f"/get/{key}?revision={revision}")


def history(reply: Reply) -> list[dict[str, Any]]:
    assert reply.status == 200
    return [json.loads(line) for line in reply.body.splitlines()]


def test_a_value_is_read_as_of_a_revision_on_any_node(pair: Cluster, connection: Connection) -> None:
    before = put(connection, "past/other", b"")
    first = put(connection, "past/k", b"1")
    between = put(connection, "past/other", b"")
    second = put(connection, "past/k", b"2")
    gone = connection.ask("DELETE", "/delete/past/k").revision
    last = put(connection, "past/k", b"3")
    pair.converge()
    for node in pair.nodes:
        with Connection(node) as reader:
            shown = {revision: at(reader, "past/k", revision) for revision in (first, between, second, last)}
            assert {revision: (reply.body, reply.revision) for revision, reply in shown.items()} == {
                first: (b"1", first), between: (b"1", first), second: (b"2", second), last: (b"3", last)
            }  # fmt: skip
            assert [at(reader, "past/k", revision).status for revision in (before, gone)] == [404, 404]
            known = reader.ask("GET", f"/get/past/k?revision={between}", headers={"If-None-Match": f'"{first}"'})
            assert known.status == 304


def test_a_history_is_told_from_the_newest_on_page_by_page(pair: Cluster, connection: Connection) -> None:
    revisions = [put(connection, "past/h%20h", b"%d" % n) for n in range(5)]
    put(connection, "past/h", b"another")
    gone = connection.ask("DELETE", "/delete/past/h%20h").revision
    binary = connection.ask("PUT", "/set/past/h%20h?ttl=1000", b"\xff", {"Content-Type": "x/y"}).revision
    pair.converge()
    for node in pair.nodes:
        with Connection(node) as reader:
            reply = reader.ask("GET", "/history/past/h%20h?values=true")
            newest, deleted, *older = history(reply)
            expires_at = newest.pop("expires_at")
            assert expires_at > 1_700_000_000
            assert newest == {
                "op": "set", "key": "past/h h", "revision": binary, "size": 1, "content_type": "x/y", "base64": "/w=="
            }  # fmt: skip
            assert deleted == {"op": "delete", "key": "past/h h", "revision": gone}
            assert [(line["revision"], line["value"]) for line in older] == [
                (revision, str(n)) for n, revision in reversed(list(enumerate(revisions)))
            ]
            assert reply.headers["Mehdb-Floor"] == "0"
            found, target = [], "/history/past/h%20h?limit=3"
            while target:
                page = reader.ask("GET", target)
                found += history(page)
                match = re.fullmatch(r'<(\S+)>; rel="next"', page.headers["Link"] or "")
                target = match[1] if match else ""
            assert [line["revision"] for line in found] == [binary, gone, *reversed(revisions)]
            assert not any("value" in line or "base64" in line for line in found)
    assert ask(pair.leader, "GET", "/history/past/never").status == 404


def test_a_history_begins_where_it_is_asked_for_however_far_ahead_or_early(connection: Connection) -> None:
    first = put(connection, "past/b", b"1")
    second = put(connection, "past/b", b"2")
    for before, found in ((1 << 62, [second, first]), (second, [first]), (first, []), (0, [])):
        lines = history(connection.ask("GET", f"/history/past/b?before={before}"))
        assert [line["revision"] for line in lines] == found, before


def test_what_is_no_longer_retained_is_410_with_the_floor(cluster: Cluster) -> None:
    cluster.start(1, MEHDB_RETAIN_CHANGES="100")
    with Connection(cluster.leader) as connection:
        put(connection, "still", b"live")
        put(connection, "early", b"1")
        for number in range(400):
            put(connection, "busy", b"%d" % number)
        eventually(lambda: cluster.leader.status().floor > 200, "a compaction")
        put(connection, "early", b"2")
        put(connection, "late", b"1")
        status = cluster.leader.status()
        behind = at(connection, "busy", 5)
        assert (behind.status, behind.error, behind.json["floor"]) == (410, "compacted", status.floor)
        assert at(connection, "busy", status.floor).status == 410  # written since: what it was then is gone
        inside = at(connection, "busy", 390)
        assert (inside.status, inside.body) == (200, b"387")
        assert at(connection, "still", status.floor).body == b"live"
        assert at(connection, "early", status.floor + 1).body == b"1"  # superseded since, and not swept away yet
        assert at(connection, "late", status.floor + 1).status == 410  # it cannot be told that there was none
        assert at(connection, "never", status.floor + 1).status == 404  # nothing has changed since
        told = connection.ask("GET", "/history/busy?limit=10000")
        assert int(told.headers["Mehdb-Floor"]) == status.floor
        revisions = [line["revision"] for line in history(told)]
        assert revisions == list(range(402, revisions[-1] - 1, -1))
        assert revisions[-1] <= status.floor + 1, "the window is whole"


def test_a_revision_that_is_none_is_refused(connection: Connection) -> None:
    for text in ("", "-1", "x", "1.5", str(1 << 63)):
        assert connection.ask("GET", f"/get/k?revision={text}").error == "bad_parameter"
        assert connection.ask("GET", f"/history/k?before={text}").error == "bad_parameter"
