"""How long requests take is told by route, and what they wait for of their own will is not in it."""

import re
import time

from cluster import Node, eventually
from wire import Connection, ask

WAIT_S = 1.5
LARGE = 8 << 20


def told(node: Node, name: str, route: str, method: str = "GET") -> float:
    """Return a sample of a route; 0 while there is none."""
    text = ask(node, "GET", "/metrics").body.decode()
    match = re.search(rf'^{name}{{method="{method}",route="{route}"}} (\S+)$', text, re.MULTILINE)
    return float(match[1]) if match else 0.0


def figure(node: Node, name: str) -> float:
    match = re.search(rf"^{re.escape(name)} (\S+)$", ask(node, "GET", "/metrics").body.decode(), re.MULTILINE)
    assert match is not None, name
    return float(match[1])


def test_each_request_is_timed_once(leader: Node, connection: Connection) -> None:
    before = told(leader, "mehdb_request_seconds_count", "/get/"), told(leader, "mehdb_request_seconds_sum", "/get/")
    for number in range(7):
        connection.ask("GET", f"/get/timed/{number}")
    assert told(leader, "mehdb_request_seconds_count", "/get/") == before[0] + 7
    assert told(leader, "mehdb_request_seconds_sum", "/get/") > before[1]


def test_a_long_poll_is_not_slow(leader: Node, connection: Connection) -> None:
    """It asks to wait: a page of changes, a watch, or a revision that is still to come."""
    assert connection.ask("PUT", "/set/polled", b"1").status == 200
    at = leader.position()
    place = f"history={at['history']}&after={at['revision']}&chain={at['chain']}&snapshot=no"
    polls = {
        "/replicate": f"/replicate?{place}&wait={WAIT_S}",
        "/watch": f"/watch?after={at['revision']}&wait={WAIT_S}",
        "/get/": f"/get/polled?min_revision={at['revision'] + 1000}&wait={WAIT_S}",
    }
    for route, target in polls.items():
        before = told(leader, "mehdb_request_seconds_sum", route)
        started_s = time.monotonic()
        assert connection.ask("GET", target).status in (200, 204, 504)
        assert time.monotonic() - started_s >= WAIT_S, "it did wait"
        assert 0 < told(leader, "mehdb_request_seconds_sum", route) - before < WAIT_S


def test_the_time_that_a_client_takes_for_its_body_is_in_it(leader: Node, connection: Connection) -> None:
    """The node cannot tell a slow client from a slow way to it: both are slow for the client."""
    before = told(leader, "mehdb_request_seconds_sum", "/set/", "PUT")
    connection.send(b"PUT /set/slow HTTP/1.1\r\nHost: m\r\nContent-Length: 2\r\n\r\n1")
    time.sleep(0.3)  # a client that is slow
    connection.send(b"2")
    assert connection.reply().status == 200
    assert told(leader, "mehdb_request_seconds_sum", "/set/", "PUT") - before >= 0.3


def test_a_snapshot_says_how_far_it_is_until_it_is_sent(leader: Node) -> None:
    for number in range(3):
        assert ask(leader, "PUT", f"/set/large/{number}", bytes(LARGE)).status == 200
    done = figure(leader, 'mehdb_snapshots_total{direction="sent"}')
    size_bytes, sent_bytes = (f'mehdb_snapshot{kind}_bytes{{direction="sent"}}' for kind in ("_size", ""))
    assert (figure(leader, size_bytes), figure(leader, sent_bytes)) == (0, 0)
    with Connection(leader) as reading:
        reading.send(b"GET /snapshot HTTP/1.1\r\nHost: m\r\n\r\n")
        eventually(lambda: figure(leader, sent_bytes), "some of it to be on its way")
        assert figure(leader, size_bytes) > 3 * LARGE
        assert figure(leader, sent_bytes) < figure(leader, size_bytes), "the client has not read it"
        assert figure(leader, 'mehdb_snapshots_total{direction="sent"}') == done
        assert reading.reply().status == 200
    eventually(lambda: figure(leader, 'mehdb_snapshots_total{direction="sent"}') == done + 1, "it to be counted")
    assert (figure(leader, size_bytes), figure(leader, sent_bytes)) == (0, 0)


def test_a_snapshot_that_nobody_reads_to_its_end_is_not_counted(leader: Node) -> None:
    ask(leader, "PUT", "/set/large/0", bytes(LARGE))
    done = figure(leader, 'mehdb_snapshots_total{direction="sent"}')
    with Connection(leader) as reading:
        reading.send(b"GET /snapshot HTTP/1.1\r\nHost: m\r\n\r\n")
        eventually(lambda: figure(leader, 'mehdb_snapshot_bytes{direction="sent"}'), "some of it to be on its way")
    eventually(lambda: figure(leader, 'mehdb_snapshot_size_bytes{direction="sent"}') == 0, "it to be given up")
    assert figure(leader, 'mehdb_snapshots_total{direction="sent"}') == done
