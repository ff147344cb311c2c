"""Values as bodies: whole or not at all, in time, within bounds, and byte for byte."""

import gzip
import os
import re
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from time import monotonic

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import Cluster, Node, curl, eventually, running
from wire import Connection, ask, lines, request

VALUE_BYTES_MAX = 100_000
BODY_TIMEOUT_S = 0.5
QUEUE_BYTES = 1 << 20


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A leader that takes small values, and at any pace."""
    with running(tmp_path_factory.mktemp("strict")) as nodes:
        yield nodes.add(MEHDB_MAX_VALUE=str(VALUE_BYTES_MAX)).start()


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A leader that does not wait for slow bodies, and has a short queue."""
    with running(tmp_path_factory.mktemp("hasty")) as nodes:
        yield nodes.add(
            MEHDB_BODY_TIMEOUT=str(BODY_TIMEOUT_S), MEHDB_MAX_VALUE=str(QUEUE_BYTES), MEHDB_QUEUE_SIZE=str(QUEUE_BYTES)
        ).start()


def put_head(key: str, **headers: object) -> bytes:
    """Return the head of a PUT. Underscores in the names of *headers* stand for dashes."""
    return (
        f"PUT /set/{key} HTTP/1.1\r\n".encode() + lines({n.replace("_", "-"): v for n, v in headers.items()}) + b"\r\n"
    )


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def assert_not_written(node: Node, key: str) -> None:
    """*key* is not there, and a write right behind it takes the next revision: nothing else came between."""
    before = node.position()["revision"]
    assert ask(node, "GET", f"/get/{key}").status == 404
    assert ask(node, "PUT", "/set/marker", b"1").revision == before + 1


# Sizes.


@pytest.mark.parametrize("size_bytes", [0, 1, VALUE_BYTES_MAX - 1, VALUE_BYTES_MAX])
def test_a_value_up_to_the_limit_is_taken_however_it_is_framed(strict: Node, size_bytes: int) -> None:
    value = os.urandom(size_bytes)
    with Connection(strict) as connection:
        assert connection.ask("PUT", "/set/framed/length", value).status == 200
        connection.send(put_head("framed/chunked", Transfer_Encoding="chunked"))
        for start in range(0, size_bytes, 30_000):
            connection.send(chunk(value[start : start + 30_000]))
        connection.send(b"0\r\n\r\n")
        assert connection.reply().status == 200
        for framing in ("length", "chunked"):
            read = connection.ask("GET", f"/get/framed/{framing}")
            assert (read.body, read.headers["Content-Length"]) == (value, str(size_bytes))


@pytest.mark.parametrize("expect", [True, False])
@pytest.mark.parametrize("size_bytes", [VALUE_BYTES_MAX + 1, 1 << 40])
def test_a_body_over_the_limit_is_refused_before_it_is_sent(strict: Node, size_bytes: int, expect: bool) -> None:
    with Connection(strict) as connection:
        connection.send(put_head("large", Content_Length=size_bytes, **({"Expect": "100-continue"} if expect else {})))
        reply = connection.reply()  # the first there is: no 100 Continue
        assert (reply.status, reply.error) == (413, "value_too_large")
        assert str(VALUE_BYTES_MAX) in reply.json["message"]
    assert_not_written(strict, "large")


def test_a_chunked_body_over_the_limit_is_refused_while_it_streams(strict: Node) -> None:
    with Connection(strict) as connection:
        connection.send(put_head("large", Transfer_Encoding="chunked"))
        for _ in range(VALUE_BYTES_MAX // 10_000):
            connection.send(chunk(bytes(10_000)))
        connection.send(chunk(b"1"))  # and there is no end in sight
        assert connection.reply().error == "value_too_large"
    assert_not_written(strict, "large")


def test_a_whole_chunked_body_over_the_limit_is_refused_as_well(strict: Node) -> None:
    with Connection(strict) as connection:
        connection.send(
            put_head("large", Transfer_Encoding="chunked") + chunk(bytes(VALUE_BYTES_MAX + 1)) + b"0\r\n\r\n"
        )
        assert connection.reply().error == "value_too_large"
        assert connection.ask("GET", "/status").body == b"leader", "in sync behind the refused body"
    assert_not_written(strict, "large")


# Time.


def test_a_body_that_stalls_is_given_up(hasty: Node) -> None:
    with Connection(hasty) as connection:
        started_s = monotonic()
        connection.send(put_head("stalled", Content_Length=10) + b"half")
        reply = connection.reply()
        assert monotonic() - started_s >= BODY_TIMEOUT_S
        assert (reply.status, reply.error) == (408, "body_too_slow")
        assert reply.headers["Connection"] == "close", "the rest of the body must not be read as a request"
    assert_not_written(hasty, "stalled")


def test_a_body_that_never_begins_is_given_up(hasty: Node) -> None:
    with Connection(hasty) as connection:
        connection.send(put_head("stalled", Content_Length=10, Expect="100-continue"))
        assert connection.reply().status == 100
        assert connection.reply().error == "body_too_slow"
    assert_not_written(hasty, "stalled")


def test_a_body_that_trickles_is_given_up(hasty: Node) -> None:
    """It never stalls: only its rate is too low."""
    with Connection(hasty) as connection:
        connection.send(put_head("trickled", Content_Length=1000))
        connection.socket.settimeout(BODY_TIMEOUT_S / 10)
        answer = b""

        def answered() -> bool:
            nonlocal answer
            connection.send(b"x")
            try:
                answer += connection.socket.recv(4096)
            except TimeoutError:
                return False
            return True

        eventually(answered, "an answer to a body of ten bytes a second")
        assert answer.startswith(b"HTTP/1.1 408 ")
    assert_not_written(hasty, "trickled")


# Framing.


BROKEN = [b"zz\r\nabc\r\n0\r\n\r\n", b"3\r\nabcdef\r\n0\r\n\r\n", b"-1\r\na\r\n0\r\n\r\n", b"f" * 17 + b"\r\n"]


@pytest.mark.parametrize("body", BROKEN)
def test_a_body_whose_chunks_are_broken_is_refused(strict: Node, body: bytes) -> None:
    with Connection(strict) as connection:
        connection.send(put_head("broken", Transfer_Encoding="chunked") + body)
        assert re.match(rb"HTTP/1\.[01] 400 ", connection.rest())
    assert_not_written(strict, "broken")


@pytest.mark.parametrize("body", BROKEN)
def test_a_body_whose_chunks_break_on_the_way_is_given_up(hasty: Node, body: bytes) -> None:
    """The parser of aiohttp does not tell the reader of the body, which sees it stall: 408 and not 400."""
    with Connection(hasty) as connection:
        connection.send(put_head("broken", Transfer_Encoding="chunked", Expect="100-continue"))
        assert connection.reply().status == 100
        connection.send(chunk(b"whole") + body)
        assert connection.reply().status in (400, 408)
    assert_not_written(hasty, "broken")


@pytest.mark.parametrize(
    "framing", [{"Content_Length": 10}, {"Transfer_Encoding": "chunked"}], ids=["length", "chunked"]
)
def test_a_body_that_ends_early_is_not_written(strict: Node, framing: dict[str, object]) -> None:
    with Connection(strict) as connection:
        connection.send(put_head("half", **framing) + chunk(b"ab"))
        assert b"200" not in connection.end()[:15]
    assert_not_written(strict, "half")


def test_a_client_that_resets_the_connection_writes_nothing(strict: Node) -> None:
    for _ in range(20):
        with Connection(strict) as connection:
            connection.send(put_head("reset", Content_Length=10) + b"half")
            # Zero seconds of lingering: closing sends a reset.
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert_not_written(strict, "reset")


# Contents.


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=3000)
    | st.sampled_from([bytes(range(256)), b"\r\n\r\n", b"0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", bytes(70_000)])
)
def test_a_value_is_read_byte_for_byte(connection: Connection, value: bytes) -> None:
    assert connection.ask("PUT", "/set/binary", value).status == 200
    assert connection.ask("GET", "/get/binary").body == value


def test_a_value_is_stored_as_it_was_sent_compressed_or_not(leader: Node) -> None:
    packed = gzip.compress(bytes(10_000))
    for encoding in ("gzip", "deflate", "br", "zstd"):
        ask(leader, "PUT", "/set/packed", packed, {"Content-Encoding": encoding})
        read = ask(leader, "GET", "/get/packed", headers={"Accept-Encoding": "gzip"})
        assert (read.body, read.headers["Content-Encoding"]) == (packed, None)


@pytest.mark.parametrize(
    "content_type",
    ["text/plain; charset=utf-8", "image/png", "x", "é".encode("punycode").decode(), 'a/b; c="d e"', "x" * 255],
)
def test_the_content_type_is_kept(pair: Cluster, content_type: str) -> None:
    ask(pair.leader, "PUT", "/set/typed", b"1", {"Content-Type": content_type})
    pair.converge()
    for node in pair.nodes:
        assert ask(node, "GET", "/get/typed").headers["Content-Type"] == content_type


def test_the_content_type_is_that_of_the_last_write(connection: Connection) -> None:
    connection.ask("PUT", "/set/retyped", b"1", {"Content-Type": "text/html"})
    connection.ask("PUT", "/set/retyped", b"1")
    assert connection.ask("GET", "/get/retyped").headers["Content-Type"] == "application/octet-stream"


# Connections.


def test_a_connection_stays_in_sync_behind_every_refused_body(leader: Node, follower: Node) -> None:
    body = b"GET /get/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    for node, target, status in (
        (leader, "/set/%00", 400),
        (leader, "/set/a?x=1", 400),
        (leader, "/get/a", 405),
        (leader, "/nowhere", 404),
        (follower, "/set/a", 307),
    ):
        with Connection(node) as connection:
            for _ in range(3):
                assert connection.ask("PUT", target, body).status == status
                connection.send(
                    b"PUT %s HTTP/1.1\r\n%s\r\n" % (target.encode(), lines({"Transfer-Encoding": "chunked"}))
                )
                connection.send(chunk(body) + b"0\r\n\r\n")
                assert connection.reply().status == status
            assert connection.ask("GET", "/livez").status == 200


def test_a_get_may_have_a_body_that_nobody_reads(connection: Connection) -> None:
    for _ in range(2):
        assert connection.ask("GET", "/livez", bytes(100_000)).status == 200


def test_pipelined_requests_are_answered_in_order(connection: Connection) -> None:
    numbers = range(50)
    connection.send(
        b"".join(
            request("PUT", f"/set/piped/{n % 3}", b"%d" % n) + request("GET", f"/get/piped/{n % 3}") for n in numbers
        )
    )
    revisions = []
    for number in numbers:
        revisions.append(connection.reply().revision)
        assert connection.reply().body == b"%d" % number
    assert revisions == list(range(revisions[0], revisions[0] + len(numbers)))


def test_clients_of_http_1_0_are_served(leader: Node) -> None:
    with Connection(leader) as connection:
        connection.send(b"PUT /set/old HTTP/1.0\r\nContent-Length: 3\r\n\r\nold")
        reply = connection.reply()
        assert (reply.status, reply.headers["Connection"]) == (200, "close")
        assert connection.rest() == b""
    with Connection(leader) as connection:
        for _ in range(2):
            connection.send(b"GET /get/old HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            reply = connection.reply()
            assert (reply.body, reply.headers["Connection"]) == (b"old", "keep-alive")
        connection.send(b"GET /get/old HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert connection.reply().headers["Connection"] == "close"
        assert connection.rest() == b""


def test_curl_sends_a_large_value_and_gets_it_back(leader: Node) -> None:
    value = os.urandom(8 << 20)
    assert curl("-T", "-", "-XPUT", f"{leader.url}/set/large", stdin=value) == b"WRITE completed"
    assert curl(f"{leader.url}/get/large") == value


# The queue.


def test_writes_beyond_the_queue_are_told_to_come_back(cluster: Cluster) -> None:
    """The node is stopped while the ends of all bodies arrive, so that it has all of them at once when it goes on."""
    node = cluster.add(MEHDB_MAX_VALUE=str(QUEUE_BYTES), MEHDB_QUEUE_SIZE=str(QUEUE_BYTES)).start()
    size_bytes = QUEUE_BYTES // 2 - 1000
    assert node.process is not None
    with ExitStack() as stack:
        writers = [stack.enter_context(Connection(node)) for _ in range(8)]
        for number, writer in enumerate(writers):
            writer.send(put_head(f"queued/{number}", Content_Length=size_bytes) + bytes(size_bytes - 1))
        node.process.send_signal(signal.SIGSTOP)
        try:
            for writer in writers:
                writer.send(b"\n")
        finally:
            node.process.send_signal(signal.SIGCONT)
        replies = [writer.reply() for writer in writers]
        refused = [reply for reply in replies if reply.status == 503]
        assert refused
        assert {reply.status for reply in replies} == {200, 503}
        for reply in refused:
            assert (reply.error, reply.headers["Retry-After"]) == ("queue_full", "1")
        for number, (writer, reply) in enumerate(zip(writers, replies, strict=True)):
            there = writer.ask("GET", f"/get/queued/{number}")
            assert (there.status == 200) == (reply.status == 200), "written exactly if acknowledged"
            if reply.status == 503:
                assert writer.ask("PUT", f"/set/queued/{number}", bytes(size_bytes)).status == 200
    assert node.status().queue_bytes == 0
