"""/debug/tasks and /debug/threads: where the process stands, and nothing of what it works with."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cluster import Cluster, Node
from wire import Connection, ask

MARKER = "sesame-4711"
LOOKS = 100
PLACE = re.compile(r"([A-Za-z0-9_./-]+|<frozen [a-z.]+>):\d+ [A-Za-z0-9_.<>]+")


@contextmanager
def busy(node: Node) -> Iterator[None]:
    """Have clients write, read, list and watch keys and values with the marker in them, all the time."""
    over = threading.Event()
    value = (MARKER * 20_000).encode()  # large: pieces of it are on their way in and out

    def work(method: str, target: str, body: bytes) -> None:
        with Connection(node) as connection:
            while not over.is_set():
                assert connection.ask(method, target, body).status in (200, 404)

    batch = b'{"op":"set","key":"%s/b","value":"%s"}\n' % ((MARKER.encode(),) * 2)
    kinds = [
        ("PUT", f"/set/{MARKER}/k", value), ("GET", f"/get/{MARKER}/k", b""), ("POST", "/batch", batch),
        ("GET", f"/keys?prefix={MARKER}", b""), ("GET", f"/history/{MARKER}/k?values=true&limit=1", b""),
    ]  # fmt: skip
    threads = [threading.Thread(target=work, args=kind) for kind in kinds]
    with Connection(node) as watching:
        watching.send(f"GET /watch?prefix={MARKER} HTTP/1.1\r\nHost: m\r\n\r\n".encode())
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()


def test_no_key_or_value_shows_while_they_are_written_and_read(leader: Node) -> None:
    with busy(leader):
        shown = b"".join(
            ask(leader, "GET", f"/debug/{what}").body for _ in range(LOOKS) for what in ("tasks", "threads")
        )
    assert shown.count(b"mehdb/api/") > LOOKS, "requests were under way"
    assert b"sesame" not in shown
    assert b"4711" not in shown


def test_tasks_that_stand_in_one_place_are_counted_together(leader: Node) -> None:
    idle = [Connection(leader) for _ in range(30)]
    try:
        for connection in idle:
            connection.ask("GET", "/livez")
        tasks = ask(leader, "GET", "/debug/tasks").json
        assert max(one["count"] for one in tasks) >= 30
        assert tasks == sorted(tasks, key=lambda one: -one["count"])
        assert all(1 <= len(one["names"]) <= min(10, one["count"]) for one in tasks)
        assert all(PLACE.fullmatch(place) for one in tasks for place in one["stack"])
    finally:
        for connection in idle:
            connection.socket.close()


def test_what_runs_all_the_time_is_there_by_name(pair: Cluster) -> None:
    for node, role in zip(pair.nodes, ("leader", "follower"), strict=True):
        tasks = {name: one["stack"] for one in ask(node, "GET", "/debug/tasks").json for name in one["names"]}
        assert {"watch", "leave", role, f"{role} at work"} <= set(tasks)
        assert any(place.startswith("mehdb/life.py:") for place in tasks["watch"])
        assert tasks["watch"][-1].startswith("asyncio/"), "to where it waits"
        threads = {one["name"]: one["stack"] for one in ask(node, "GET", "/debug/threads").json}
        assert threads["mehdb-writer"][-1].startswith("mehdb/store/writer.py:")
        assert threads["MainThread"][-1].endswith(" DebugRoutes.threads")
        assert all(PLACE.fullmatch(place) for stack in threads.values() for place in stack)


@pytest.mark.parametrize("target", ["/debug/", "/debug/tasks/", "/debug/pprof", "/debug/tasks/x"])
def test_there_is_nothing_else(leader: Node, target: str) -> None:
    assert ask(leader, "GET", target).error == "route_not_found"


def test_they_take_no_parameters(leader: Node) -> None:
    assert ask(leader, "GET", "/debug/tasks?locals=1").error == "bad_parameter"
