"""What cannot be meant is refused with a clear error, and changes nothing (promise 8)."""

import re
from collections.abc import Iterator

import pytest

from cluster import Cluster, Node
from wire import Connection, Reply, ask


@pytest.fixture(autouse=True)
def unchanged(leader: Node) -> Iterator[None]:
    """No test of this file changes anything."""
    before = leader.position()
    yield
    assert leader.position() == before


def assert_error(reply: Reply, status: int, code: str) -> None:
    assert reply.status == status
    assert reply.headers["Content-Type"] == "application/json"
    assert set(reply.json) == {"error", "message", "status"}
    assert (reply.json["error"], reply.json["status"]) == (code, status)
    assert len(reply.json["message"]) > len("no such key"), "says what to do"


BAD_KEYS = {
    "empty": "",
    "too long": "a" * 1025,
    "too long in bytes": "%C3%A9" * 513,
    "a lone percent sign": "%",
    "a half escape": "a%2",
    "no hexadecimal digits": "%zz",
    "not UTF-8": "%ff",
    "UTF-8 cut short": "%C3",
    "a surrogate": "%ED%A0%80",
    "overlong UTF-8": "%C0%AF",
    "NUL": "a%00b",
    "a fragment": "a#b",
}


@pytest.mark.parametrize("key", BAD_KEYS.values(), ids=BAD_KEYS)
def test_a_bad_key_is_refused_on_every_route_of_every_node(pair: Cluster, key: str) -> None:
    for node in pair.nodes:
        with Connection(node) as connection:
            for method, route in (("PUT", "set"), ("GET", "get"), ("DELETE", "delete")):
                assert_error(connection.ask(method, f"/{route}/{key}"), 400, "bad_key")
            assert connection.ask("HEAD", f"/get/{key}").status == 400


@pytest.mark.parametrize(
    "target",
    [
        "/get/a?version=1", "/get/a?x", "/keys?limt=1", "/status?full", "/livez?x=", "/readyz?verbose", "/metrics?x=1",
        "/position?x=1", "/replicate?limit=1",
    ],
)  # fmt: skip
def test_an_unknown_parameter_is_refused_and_named(leader: Node, target: str) -> None:
    reply = ask(leader, "GET", target)
    assert_error(reply, 400, "bad_parameter")
    assert f"'{target.partition('?')[2].partition('=')[0]}'" in reply.json["message"]


def test_an_unknown_parameter_of_a_write_is_refused(connection: Connection) -> None:
    assert_error(connection.ask("PUT", "/set/a?tll=60", b"1"), 400, "bad_parameter")
    assert_error(connection.ask("DELETE", "/delete/a?if=1"), 400, "bad_parameter")


@pytest.mark.parametrize(
    "query",
    [
        "limit=1&limit=2", "prefix=a&prefix=a",
        "limit=", "limit=0", "limit=-1", "limit=1.5", "limit=10001", "limit=ten", "limit=%FF",
        "limit=99999999999999999999999", "limit=" + "9" * 5000, "prefix=%FF", "after=%C3", "prefix=%", "prefix=%zz",
        "&".join(f"x{number}=" for number in range(100)),
    ],
)  # fmt: skip
def test_a_bad_parameter_of_a_listing_is_refused(leader: Node, query: str) -> None:
    assert_error(ask(leader, "GET", f"/keys?{query}"), 400, "bad_parameter")


@pytest.mark.parametrize("query", ["prefix=%FF", "after=%C3"])
def test_a_query_that_is_no_utf8_is_told_so(leader: Node, query: str) -> None:
    reply = ask(leader, "GET", f"/keys?{query}")
    assert_error(reply, 400, "bad_parameter")
    assert reply.json["message"] == "a query must be UTF-8, percent-encoded"


@pytest.mark.parametrize("query", ["level=", "level=FULL", "level=full&level=full"])
def test_a_bad_level_of_a_status_is_refused(leader: Node, query: str) -> None:
    assert_error(ask(leader, "GET", f"/status?{query}"), 400, "bad_parameter")


@pytest.mark.parametrize(
    "target", ["/", "/set", "/GET/a", "/keys/", "/keys/a", "/status/", "/favicon.ico", "//get/a", "/g%65t/a"]
)
def test_an_unknown_route_is_answered_with_those_there_are(leader: Node, target: str) -> None:
    reply = ask(leader, "GET", target)
    assert_error(reply, 404, "route_not_found")
    for route in (
        "/get/",
        "/set/",
        "/delete/",
        "/keys",
        "/status",
        "/livez",
        "/readyz",
        "/metrics",
        "/position",
        "/replicate",
    ):
        assert route in reply.json["message"]


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("/get/a", "GET, HEAD"), ("/set/a", "PUT"), ("/delete/a", "DELETE"), ("/keys", "GET, HEAD"),
        ("/status", "GET, HEAD"), ("/livez", "GET, HEAD"), ("/readyz", "GET, HEAD"), ("/metrics", "GET, HEAD"),
        ("/position", "GET, HEAD"), ("/replicate", "GET"),
    ],
)  # fmt: skip
def test_a_wrong_method_is_answered_with_the_right_ones(pair: Cluster, target: str, allowed: str) -> None:
    for node in pair.nodes:
        for method in {"GET", "HEAD", "PUT", "POST", "DELETE", "PATCH", "OPTIONS"} - set(allowed.split(", ")):
            reply = ask(node, method, target)
            assert (reply.status, reply.headers["Allow"]) == (405, allowed)
            if method != "HEAD":
                assert_error(reply, 405, "method_not_allowed")


@pytest.mark.parametrize("content_type", ["é", "text/plain;\tx", "x" * 256])
def test_a_content_type_that_no_header_can_bear_is_refused(leader: Node, content_type: str) -> None:
    assert_error(ask(leader, "PUT", "/set/a", b"1", {"Content-Type": content_type}), 400, "bad_parameter")


@pytest.mark.parametrize("expectation", ["more", "200-ok", "100-continue, more"])
@pytest.mark.parametrize("body", [b"", b"1"], ids=["empty", "with the head"])
def test_an_expectation_other_than_100_continue_fails_whenever_the_body_comes(
    leader: Node, expectation: str, body: bytes
) -> None:
    assert_error(ask(leader, "PUT", "/set/a", body, {"Expect": expectation}), 417, "expectation_failed")
    reply = ask(leader, "PUT", "/set/a", b"", {"Expect": expectation, "Content-Length": "1"})
    assert_error(reply, 417, "expectation_failed")
    assert reply.headers["Connection"] == "close", "a body may follow or not"


@pytest.mark.parametrize(
    "head",
    [
        b"hello",
        b"PUT /set/a HTTP/9.9\r\nHost: x\r\nContent-Length: 1",
        b"PUT /set/\xff HTTP/1.1\r\nHost: x\r\nContent-Length: 1",
        b"PUT /set/a b HTTP/1.1\r\nHost: x\r\nContent-Length: 1",
        b"PUT set/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1",
        b"PUT /set/a HTTP/1.1\r\nContent-Length: 1",
        b"PUT /set/a HTTP/1.1\r\nHost: x\r\nHost: y\r\nContent-Length: 1",
        b"PUT /set/a HTTP/1.1\r\nHost: x\r\nContent-Length: -1",
        b"PUT /set/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2",
        b"PUT /set/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked",
        b"PUT /set/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Type: text/\x7f",
        b"PUT /set/a HTTP/1.1\r\nHost: x\r\nX: folded\r\n line\r\nContent-Length: 1",
        b"PUT /set/" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 1",
        b"PUT /set/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nX: " + b"a" * 9000,
        b"PUT /set/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1" + b"\r\nX: 1" * 1000,
    ],
)
def test_what_is_no_http_ends_the_connection_with_400(connection: Connection, head: bytes) -> None:
    """The parser of aiohttp answers these, before mehdb sees a request."""
    connection.send(head + b"\r\n\r\na")
    answer = connection.rest()
    assert re.findall(rb"^HTTP/1\.. (\d+)", answer, re.MULTILINE) == [b"400"], "one answer: what follows is no request"
