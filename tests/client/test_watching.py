"""watch: each change once and in order, whatever happens to the nodes, and its end in words."""

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from client_command import arguments, environment, mehdb
from cluster import DEADLINE_S, Cluster, Node, eventually
from mehdb.client.http import Client
from mehdb.client.watch import Watch
from mehdb.errors import PeerRefused, PeerUnreachable
from scripted import CLOSE, answer, refusal, scripted

HISTORY = "0123456789abcdef" * 2


class Printed:
    """A watch that runs, and what it has printed so far."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)


@contextmanager
def watching(url: str, *command: object) -> Iterator[Printed]:
    process = subprocess.Popen(arguments("watch", *command), env=environment(url), stdout=subprocess.PIPE)
    printed = Printed(process)
    try:
        yield printed
    finally:
        printed.stop()
        assert process.stdout is not None
        process.stdout.close()


def write(node: Node, key: str) -> int:
    answered = node.put(key, key.encode())
    assert answered.is_success, answered.text
    return int(answered.headers["ETag"].strip('"'))


def test_each_change_is_printed_once_and_in_order_while_nodes_die(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    written = {write(leader, "w/0"): "w/0"}
    with watching(f"{leader.url},{follower.url}", "w/", "--after", 0, "--timeout", 30) as printed:
        for number, hit in enumerate([leader, follower, leader, follower], 1):
            eventually(lambda: len(printed.events) == len(written), "all that was written to be printed")
            hit.kill()
            hit.start()
            for key in (f"w/{number}", f"other/{number}", f"w/{number}/again"):
                revision = write(leader, key)
                if key.startswith("w/"):
                    written[revision] = key
        eventually(lambda: len(printed.events) >= len(written), "the last ones, too")
    assert [(event["revision"], event["key"]) for event in printed.events] == list(written.items())
    assert {event["op"] for event in printed.events} == {"set"}
    assert printed.events[0]["value"] == "w/0"


def test_a_watch_begins_now_and_shows_deletions(leader: Node) -> None:
    write(leader, "now/before")
    with watching(leader.url, "now/") as printed:
        # Whether it has begun only what it prints tells.
        eventually(lambda: [write(leader, "now/probe"), printed.events][1], "the watch to have begun")
        assert leader.request("DELETE", "/delete/now/probe").is_success
        eventually(lambda: printed.events[-1]["op"] == "delete", "the deletion")
    assert {event["key"] for event in printed.events} == {"now/probe"}


def lines(*events: dict[str, object], history: str = HISTORY) -> bytes:
    body = b"".join(json.dumps(event).encode() + b"\n" for event in events)
    return answer(200, body, Mehdb_History=history)


def change(revision: int) -> dict[str, object]:
    return {"op": "set", "key": "k", "revision": revision, "value": "v"}


def watched(url: str, after: int | None = None, timeout_s: float = 0.5) -> Iterator[int]:
    with Client((url,), timeout_s=timeout_s) as client:
        for line in Watch(client, "", after).lines():
            yield json.loads(line)["revision"]


def until_refused(url: str) -> list[int]:
    """Return what is yielded after revision 7 until a node refuses to go on."""
    found: list[int] = []

    def read() -> None:
        for revision in watched(url, 7):
            found.append(revision)  # noqa: PERF402  what has come before the error counts

    with pytest.raises(PeerRefused):
        read()
    return found


@pytest.mark.parametrize(
    "end",
    [
        lines(change(8), {"op": "error", "error": "stopping", "message": "", "revision": 8}),
        lines(change(8), {"op": "error", "error": "too_slow", "message": "", "revision": 8}),
        lines(change(8)),
        lines(change(8), change(9))[:-20],
        lines(change(8), {"op": "heartbeat", "revision": 8}),
    ],
)
def test_a_stream_that_ends_is_gone_on_with_where_it_ended(end: bytes) -> None:
    over = refusal(410, "compacted")
    with scripted(end, CLOSE, lines(change(8), change(9)), over) as server:
        assert until_refused(server.url) == [8, 9]
        assert b"after=7" in server.requests[0]
        assert HISTORY.encode() not in server.requests[0]
        for request in server.requests[1:3]:
            assert b"after=8" in request
            assert f"history={HISTORY}".encode() in request
        assert b"after=9" in server.requests[3]


def test_changes_are_yielded_once_even_by_a_node_that_repeats_itself() -> None:
    with scripted(lines(change(8)), lines(change(8), change(9)), refusal(410, "compacted")) as server:
        assert until_refused(server.url) == [8, 9]


@pytest.mark.parametrize(
    "end",
    [
        refusal(410, "compacted"),
        refusal(409, "diverged"),
        lines({"op": "error", "error": "compacted", "message": "because of compacted", "revision": 8}),
        lines({"op": "error", "error": "diverged", "message": "because of diverged", "revision": 8}),
    ],
)
def test_what_cannot_be_gone_on_with_ends_in_words_that_say_what_to_do(end: bytes) -> None:
    with scripted(end) as server:
        said = mehdb(server.url, "watch", "--after", 7).failed()
    assert "because of " in said
    assert "without --after" in said


def test_when_nobody_answers_any_more_it_says_where_to_go_on() -> None:
    with scripted(lines(change(8)), CLOSE) as server, pytest.raises(PeerUnreachable, match="--after 8"):
        list(watched(server.url, 7))


def test_a_watch_behind_the_floor_is_refused_by_a_real_node(cluster: Cluster) -> None:
    node = cluster.add(MEHDB_RETAIN_CHANGES="1").start()
    for _ in range(50):
        write(node, "k")
    eventually(lambda: node.status().floor > 1, "a compaction")
    assert "floor" in mehdb(node, "watch", "--after", 0).failed()
