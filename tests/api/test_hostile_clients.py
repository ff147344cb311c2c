"""Clients that hold connections, and send or read slowly or never: the probes still answer, and memory is bounded."""

import os
import re
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from time import monotonic
from typing import Final

import apsw
import pytest

from cluster import Cluster, Node, clean_environment, eventually
from wire import Connection, ask, lines, request

MIB: Final = 1 << 20
PROBES: Final = ("/readyz", "/livez")
PROBE_S_MAX: Final = 1.0  # the promise, and the timeout of a probe if a manifest sets none
FEW: Final = 16  # the smallest --max-connections
CLOCK_TICK_S: Final = 0.01  # more than one
HEADER_TIMEOUT_S: Final = 1.0
HEADERS: Final = 40  # each is fine, and so is their number
DESCRIPTORS: Final = 200
LOCKED_S: Final = 8

SLOW: Final = 500
AT_ONCE_LEAST: Final = 490  # of them: the odd one may be gone before the last has come
TIMEOUT_S: Final = 20  # for each of the three: so long all that have come stay, even on a busy machine
QUEUE_BYTES: Final = 16 * MIB
LARGE_BYTES: Final = 8 * MIB  # more than the kernel takes for a client that does not read
SMALL_BYTES: Final = 60_000  # goes out in one piece with its head
HALF_BYTES: Final = 200 << 10  # of each body: all together just below --queue-size, so that none is refused
READERS: Final = min(32, (os.cpu_count() or 1) + 4)  # the threads of asyncio's executor
# Bodies that arrive have a bound of --queue-size together, and so have large answers that leave. Beside these there is
# what each thread reads (SQLite's copy, Python's, and what the allocator keeps of the last), and what each connection
# has in objects and buffers. None of it grows with what clients ask for.
GROWTH_BYTES_MAX: Final = 2 * QUEUE_BYTES + READERS * 3 * LARGE_BYTES + SLOW * (128 << 10)


def head(method: str, target: str, length: int = 0, **headers: str) -> bytes:
    return f"{method} {target} HTTP/1.1\r\n".encode() + lines({"Content-Length": length} | headers) + b"\r\n"


POLL: Final = b"GET /replicate?wait=20 HTTP/1.0\r\n\r\n"  # is under way for that long; of 1.0, so that no 102 comes
HALF: Final = head("PUT", "/set/half", 4, Expect="100-continue")


# What each kind sends at once, and what then byte by byte. None of them reads anything.
KINDS: Final = {
    "nothing": (b"", b""),
    "half a head, byte by byte": (b"GET /livez HTTP/1.1\r\nX: ", b"x" * 1000),
    "half a body": (head("PUT", "/set/slow", MIB) + bytes(HALF_BYTES), b""),
    "a body, byte by byte": (head("PUT", "/set/slow", 1000), bytes(1000)),
    "a question whose large answer it does not read": (head("GET", "/get/large"), b""),
    "many questions whose answers it does not read": (head("GET", "/get/small") * 100, b""),
    "one request": (head("GET", "/livez"), b""),
}


class Crowd:
    """Slow connections to one node, and probes between them."""

    def __init__(self, node: Node, stack: ExitStack) -> None:
        assert node.process is not None
        self._node = node
        self._stack = stack
        self._proc = Path(f"/proc/{node.process.pid}")
        self._trickles: list[tuple[Connection, Iterator[int]]] = []
        self.probes_s: dict[str, list[float]] = {route: [] for route in PROBES}

    @property
    def sockets(self) -> int:
        """How many the node has."""
        count = 0
        for descriptor in (self._proc / "fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                count += str(descriptor.readlink()).startswith("socket:")
        return count

    @property
    def resident_bytes(self) -> int:
        return self._memory_bytes("VmRSS")

    @property
    def peak_bytes(self) -> int:
        """The most that has ever been resident, as the kernel knows it."""
        return self._memory_bytes("VmHWM")

    def _memory_bytes(self, name: str) -> int:
        match = re.search(rf"^{name}:\s+(\d+) kB", (self._proc / "status").read_text(), re.MULTILINE)
        assert match is not None
        return int(match[1]) << 10

    def p99_s(self, route: str) -> float:
        took_s = sorted(self.probes_s[route])
        return took_s[len(took_s) * 99 // 100]

    def come(self, count: int) -> None:
        """Open that many connections, of all kinds in turn."""
        kinds = list(KINDS.values())
        for number in range(count):
            at_once, slowly = kinds[number % len(kinds)]
            connection = self._stack.enter_context(Connection(self._node))
            self._trickles.append((connection, iter(slowly)))
            with suppress(ConnectionError):  # the node has closed it already, to make room
                connection.send(at_once)
            if number % 10 == 0:
                self.probe()

    def go_on(self) -> None:
        """Send the next byte of each that has one left."""
        for connection, left in self._trickles:
            with suppress(ConnectionError, StopIteration):
                connection.send(bytes([next(left)]))
        self.probe()

    def probe(self) -> None:
        """Ask as the kubelet does, on new connections."""
        for route, took_s in self.probes_s.items():
            started_s = monotonic()
            assert ask(self._node, "GET", route).status == 200
            took_s.append(monotonic() - started_s)


def test_the_probes_answer_and_memory_is_bounded_under_500_slow_connections(cluster: Cluster) -> None:
    timeouts = dict.fromkeys(("MEHDB_HEADER_TIMEOUT", "MEHDB_BODY_TIMEOUT", "MEHDB_KEEPALIVE_TIMEOUT"), str(TIMEOUT_S))
    node = cluster.add(MEHDB_QUEUE_SIZE=str(QUEUE_BYTES), **timeouts).start()
    node.put("large", os.urandom(LARGE_BYTES))
    node.put("small", os.urandom(SMALL_BYTES))
    with ExitStack() as stack:
        crowd = Crowd(node, stack)
        sockets, resident_bytes, log = crowd.sockets, crowd.resident_bytes, node.log

        def all_closed() -> bool:
            crowd.go_on()
            return crowd.sockets <= sockets

        crowd.come(SLOW)
        eventually(lambda: crowd.sockets >= sockets + AT_ONCE_LEAST, "all of them to be open at once")
        # A body has a second for each 64 KiB beside.
        eventually(all_closed, "all slow connections to be closed", 5 * TIMEOUT_S)
        growth_bytes = crowd.peak_bytes - resident_bytes
        assert all(crowd.p99_s(route) < PROBE_S_MAX for route in PROBES)
        assert growth_bytes < GROWTH_BYTES_MAX
        assert node.log == log, "no line for any of them"
        took_s = crowd.probes_s["/readyz"]
        print(
            f"hostile clients: {SLOW} slow connections, {AT_ONCE_LEAST} or more at once, {len(took_s)} times /readyz: "
            f"p99 {crowd.p99_s('/readyz') * 1000:.1f} ms, slowest {max(took_s) * 1000:.1f} ms, memory at its peak "
            f"+{growth_bytes / MIB:.0f} MiB (at most {GROWTH_BYTES_MAX / MIB:.0f})"
        )


def test_probes_and_clients_get_through_when_there_are_more_connections_than_allowed(cluster: Cluster) -> None:
    node = cluster.add(MEHDB_MAX_CONNECTIONS="64").start()
    node.put("large", os.urandom(LARGE_BYTES))
    node.put("small", os.urandom(SMALL_BYTES))
    with ExitStack() as stack:
        crowd = Crowd(node, stack)
        sockets, log_lines = crowd.sockets, len(node.log.splitlines())
        for number in range(10):
            crowd.come(SLOW // 10)
            assert ask(node, "PUT", f"/set/{number}", b"1").status == 200
            assert ask(node, "GET", f"/get/{number}").body == b"1"
            assert crowd.sockets <= sockets + 64 + FEW, "and a few that are being closed"
        for _ in range(200):  # the slowest of a few would be the machine's slowest moment
            crowd.probe()
        assert all(crowd.p99_s(route) < PROBE_S_MAX for route in PROBES)
        told = node.log.splitlines()[log_lines:]
        assert len(told) == 1, "once, not for each"
        assert "max_connections=64" in told[0]


# Which connection makes room.


@pytest.fixture
def narrow(cluster: Cluster) -> Node:
    """A leader with the fewest connections that may be set."""
    return cluster.add(MEHDB_MAX_CONNECTIONS=str(FEW)).start()


def is_closed(connection: Connection) -> bool:
    """Tell whether the node has closed a connection that it owes nothing."""
    readable, _, _ = select.select([connection.socket], [], [], 0)
    return bool(readable) and not connection.socket.recv(1)


def ask_all(connections: list[Connection]) -> None:
    """Ask one after the other, and none in the same tick of the node's clock as what comes next."""
    for connection in connections:
        assert connection.ask("GET", "/livez").status == 200
    now_s = monotonic()
    eventually(lambda: monotonic() > now_s + CLOCK_TICK_S, "the next tick")


def test_the_connection_that_has_waited_longest_makes_room(narrow: Node) -> None:
    with ExitStack() as stack:
        *others, longest = [stack.enter_context(Connection(narrow)) for _ in range(FEW)]
        ask_all([longest])
        ask_all(others)
        assert ask(narrow, "GET", "/livez").status == 200
        eventually(lambda: is_closed(longest), "the one that has waited longest to be closed")
        ask_all(others)


def test_half_a_head_makes_room_and_a_request_that_waits_for_a_change_does_not(narrow: Node) -> None:
    with ExitStack() as stack:
        waiting = stack.enter_context(Connection(narrow))
        waiting.send(POLL)
        for _ in range(3 * FEW):
            stack.enter_context(Connection(narrow)).send(b"GET /livez HTTP/1.1\r\n")
        assert ask(narrow, "PUT", "/set/key", b"1").status == 200
        assert waiting.reply().status == 200


def test_half_a_body_makes_room_only_where_no_connection_is_idle(narrow: Node) -> None:
    with ExitStack() as stack:
        *halves, idle = [stack.enter_context(Connection(narrow)) for _ in range(FEW)]
        for connections in halves[:1], halves[1:], [idle]:
            ask_all(connections)
        for connection in halves:
            connection.send(HALF)
            assert connection.reply().status == 100, "the body is waited for"
        another = stack.enter_context(Connection(narrow))
        ask_all([another])
        eventually(lambda: is_closed(idle), "the idle one to be closed")
        another.send(HALF)
        assert another.reply().status == 100
        assert ask(narrow, "GET", "/livez").status == 200
        eventually(lambda: is_closed(halves[0]), "the one that has waited longest to be closed")
        for connection in [*halves[1:], another]:
            connection.send(b"body")
            assert connection.reply().status == 200


def test_a_new_connection_is_closed_at_once_where_requests_are_under_way_on_all_others(narrow: Node) -> None:
    """Writes, each of which waits a second for a lock that somebody else holds."""
    with ExitStack() as stack:
        other = stack.enter_context(closing(apsw.Connection(str(narrow.volume / "store.db"))))
        other.execute("BEGIN IMMEDIATE")
        busy = [stack.enter_context(Connection(narrow)) for _ in range(FEW)]
        for connection in busy:
            connection.send(request("GET", "/livez") + request("PUT", "/set/key", b"1") * LOCKED_S)
            assert connection.reply().status == 200, "so that the writes are there too"
        begun_s = monotonic()
        for _ in range(3):
            assert stack.enter_context(Connection(narrow)).rest() == b""
        assert monotonic() - begun_s < LOCKED_S / 2
        busy[0].socket.shutdown(socket.SHUT_RDWR)
        eventually(narrow.answers, "room for another")


# File descriptors.


def test_the_soft_limit_of_file_descriptors_is_raised_to_what_the_connections_need(cluster: Cluster) -> None:
    node = start_with_limit(cluster.add(MEHDB_MAX_CONNECTIONS="1000"), "-S")
    assert node.process is not None
    limits = Path(f"/proc/{node.process.pid}/limits").read_text()
    match = re.search(r"^Max open files +(\d+)", limits, re.MULTILINE)
    assert match is not None
    assert int(match[1]) > 1000
    assert "fewer connections" not in node.log


def test_there_are_no_more_connections_than_the_hard_limit_of_file_descriptors_allows(cluster: Cluster) -> None:
    node = start_with_limit(cluster.add(), "")
    assert f"file_descriptors={DESCRIPTORS}" in node.log
    log_lines = len(node.log.splitlines())
    with ExitStack() as stack:
        for _ in range(2 * DESCRIPTORS):
            stack.enter_context(Connection(node))
        assert ask(node, "GET", "/readyz").status == 200
        assert ask(node, "PUT", "/set/key", b"1").status == 200
    assert len(node.log.splitlines()) == log_lines + 1, "too many connections"


def start_with_limit(node: Node, which: str) -> Node:
    """Start *node* with a low limit of file descriptors, as the shell's `ulimit` sets *which*."""
    command = f'ulimit {which} -n {DESCRIPTORS} && exec "$0" -m mehdb serve'
    with node.volume.with_suffix(".log").open("ab") as log:
        node.process = subprocess.Popen(
            ["sh", "-c", command, sys.executable],
            env=clean_environment() | node.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    eventually(node.ready, f"{node.name} to be up")
    return node


# Heads.


@pytest.fixture
def hasty(cluster: Cluster) -> Node:
    """A leader that does not wait for slow heads, but for idle connections."""
    return cluster.add(MEHDB_HEADER_TIMEOUT=str(HEADER_TIMEOUT_S)).start()


def test_a_connection_on_which_nothing_comes_is_closed_without_a_word(hasty: Node) -> None:
    started_s = monotonic()
    with Connection(hasty) as connection:
        assert connection.rest() == b""
    assert monotonic() - started_s > HEADER_TIMEOUT_S / 2


def test_a_head_that_stalls_is_answered_like_every_other_error(hasty: Node) -> None:
    with Connection(hasty) as connection:
        connection.send(b"PUT /set/key HTTP/1.1\r\nHost: x\r\nContent-Le")
        reply = connection.reply()
        assert (reply.status, reply.error) == (408, "head_too_slow")
        assert (reply.headers["Connection"], reply.headers["Mehdb-Node"]) == ("close", hasty.name)
        assert connection.rest() == b""


def test_a_head_that_trickles_is_given_up_however_often_a_byte_comes(hasty: Node) -> None:
    with Connection(hasty) as connection:

        def answered() -> bool:
            connection.send(b"x")
            return bool(select.select([connection.socket], [], [], 0)[0])

        connection.send(b"GET /livez HTTP/1.1\r\nX: ")
        eventually(answered, "an answer")
        assert connection.socket.recv(12) == b"HTTP/1.1 408"


def test_a_further_head_has_its_time_from_its_first_byte(hasty: Node) -> None:
    """The time between requests is not its own, and an empty line is no request (RFC 9112, 2.2)."""
    with Connection(hasty) as connection:
        idle_since_s = monotonic()
        assert connection.ask("GET", "/livez").status == 200
        connection.send(b"\r\n")
        eventually(lambda: monotonic() - idle_since_s > 1.5 * HEADER_TIMEOUT_S, "a while to pass")
        for _ in range(3):
            connection.send(b"GET /livez HTTP/1.1\r\n")
            connection.send(b"Host: x\r\n\r\n")
            assert connection.reply().status == 200
        begun_s = monotonic()
        connection.send(b"GET /li")
        assert connection.reply().error == "head_too_slow"
        assert monotonic() - begun_s > HEADER_TIMEOUT_S / 2


def test_a_head_behind_a_request_that_takes_longer_is_refused_after_its_answer(hasty: Node) -> None:
    with Connection(hasty) as connection:
        wait_s = 2 * HEADER_TIMEOUT_S
        poll = b"GET /replicate?wait=%g HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" % wait_s
        connection.send(request("GET", "/livez") + poll)
        assert connection.reply().status == 200, "so that the other request is there too"
        connection.send(b"GET /li")
        assert connection.reply().status == 204
        assert connection.reply().error == "head_too_slow"


def test_the_pieces_of_a_head_are_bounded_all_together(hasty: Node) -> None:
    with Connection(hasty) as connection:
        connection.send(b"GET /livez HTTP/1.1\r\n")
        with suppress(ConnectionError):
            for _ in range(HEADERS):
                connection.send(b"X: " + b"x" * 4000 + b"\r\n")
        assert connection.socket.recv(12) == b"HTTP/1.1 400", "not 408: it was refused before its time was over"


# Answers.


def test_a_client_that_asks_on_and_never_reads_is_not_answered_on(cluster: Cluster) -> None:
    """What waits for it is bounded by the kernel's buffers and one answer, not by what it asks for."""
    node = cluster.add(MEHDB_BODY_TIMEOUT="1").start()
    node.put("small", os.urandom(SMALL_BYTES))
    with ExitStack() as stack:
        crowd = Crowd(node, stack)
        before_bytes, sockets = crowd.resident_bytes, crowd.sockets
        connection = stack.enter_context(Connection(node))
        connection.send(head("GET", "/get/small") * 3000)

        def given_up() -> bool:
            crowd.probe()
            return crowd.sockets <= sockets

        eventually(given_up, "the connection to be closed")
        assert crowd.peak_bytes - before_bytes < 16 * MIB, f"of {3000 * SMALL_BYTES / MIB:.0f}"


def test_large_answers_that_are_not_read_make_room_for_one_that_is(cluster: Cluster) -> None:
    node = cluster.add(MEHDB_QUEUE_SIZE=str(2 * LARGE_BYTES)).start()
    value = os.urandom(LARGE_BYTES)
    node.put("large", value)
    with ExitStack() as stack:
        stalled = [stack.enter_context(Connection(node)) for _ in range(2)]
        for connection in stalled:
            connection.send(head("GET", "/get/large"))
            assert connection.socket.recv(12) == b"HTTP/1.1 200"
        refused = ask(node, "GET", "/get/large")
        assert (refused.status, refused.error) == (503, "queue_full")
        assert ask(node, "GET", "/livez").status == 200
        eventually(lambda: node.get("/get/large").content == value, "room")
