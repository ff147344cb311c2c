"""Requests that no client with manners sends: refused, or answered once. What hides behind them is never a request."""

import re
from contextlib import ExitStack, suppress
from typing import Final, NamedTuple

from cluster import Cluster, Node
from wire import Connection, request

STATUS: Final = re.compile(rb"HTTP/1\.[01] (?!100)([0-9]{3}) ")
LOCATION: Final = re.compile(rb"^Location: (.*)\r$", re.MULTILINE)
HIDDEN: Final = b"@hidden@"  # stands for a whole PUT, which nothing but smuggling makes a request


def hidden(number: int) -> bytes:
    return request("PUT", f"/set/smuggled-{number:03}", b"1")


def put(
    *headers: bytes, method: bytes = b"PUT", target: bytes = b"/set/odd", version: bytes = b"HTTP/1.1",
    body: bytes = HIDDEN,
) -> bytes:  # fmt: skip
    """Return a request with *headers* as they are, and the hidden one behind its head."""
    return b"\r\n".join([b"%s %s %s" % (method, target, version), b"Host: evil.example", *headers, b"", body])


def chunks(body: bytes) -> bytes:
    return put(CHUNKED, body=body)


HIDDEN_BYTES: Final = len(hidden(0))
LARGE_BYTES: Final = 10_000
# Long enough for all connections to be served on a busy machine: each is closed by one of them.
TIMEOUTS: Final = dict.fromkeys(("MEHDB_HEADER_TIMEOUT", "MEHDB_BODY_TIMEOUT", "MEHDB_KEEPALIVE_TIMEOUT"), "3")
LENGTH: Final = b"Content-Length: %d" % HIDDEN_BYTES
CHUNKED: Final = b"Transfer-Encoding: chunked"
END: Final = b"0\r\n\r\n" + HIDDEN  # a body that ends at once for who believes the chunks
CHUNK: Final = b"%x\r\n%s\r\n" % (HIDDEN_BYTES, HIDDEN)
UPGRADE: Final = (b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")

# What is no HTTP, or not for sure: 400, and the end of the connection. What follows is never read.
REFUSED: Final = {
    # Two framings, or none that is sure.
    "length, then chunks": put(b"Content-Length: 5", CHUNKED, body=END),
    "chunks, then length": put(CHUNKED, b"Content-Length: 5", body=END),
    "chunks of HTTP/1.0": put(CHUNKED, body=END, version=b"HTTP/1.0"),
    "two lengths": put(b"Content-Length: 0", LENGTH),
    "the same length twice": put(b"Content-Length: 0", b"Content-Length: 0"),
    "a list of lengths": put(b"Content-Length: 0, %d" % HIDDEN_BYTES),
    "a list of equal lengths": put(b"Content-Length: 0, 0"),
    "a negative length": put(b"Content-Length: -1"),
    "a length with a plus": put(b"Content-Length: +0"),
    "a hexadecimal length": put(b"Content-Length: 0x0"),
    "a length with an underscore": put(b"Content-Length: 0_0"),
    "a length with a point": put(b"Content-Length: 0.0"),
    "a length in words": put(b"Content-Length: none"),
    "an empty length": put(b"Content-Length:"),
    "a length beyond 64 bits": put(b"Content-Length: 18446744073709551616"),
    "a length with a tab inside": put(b"Content-Length: 0\t0"),
    "a length in Arabic digits": put("Content-Length: \N{ARABIC-INDIC DIGIT ZERO}".encode()),
    "an unknown coding": put(b"Transfer-Encoding: xchunked", body=END),
    "chunked, but not last": put(b"Transfer-Encoding: chunked, identity", body=END),
    "chunked twice": put(b"Transfer-Encoding: chunked, chunked", body=END),
    "two codings, chunked first": put(CHUNKED, b"Transfer-Encoding: identity", body=END),
    "two codings, chunked last": put(b"Transfer-Encoding: identity", CHUNKED, body=END),
    "chunked in quotes": put(b'Transfer-Encoding: "chunked"', body=END),
    "chunked behind a vertical tab": put(b"Transfer-Encoding: \x0bchunked", body=END),
    "an empty coding": put(b"Transfer-Encoding:", body=END),
    "a coding beside a length": put(b"Transfer-Encoding: gzip", b"Content-Length: 0"),
    # Chunks.
    "a chunk size that is none": chunks(b"zz\r\n" + END),
    "a negative chunk size": chunks(b"-1\r\n" + END),
    "a chunk size with a plus": chunks(b"+0\r\n\r\n" + HIDDEN),
    "a chunk size with 0x": chunks(b"0x0\r\n\r\n" + HIDDEN),
    "a chunk size with an underscore": chunks(b"0_0\r\n\r\n" + HIDDEN),
    "a chunk size beyond 64 bits": chunks(b"10000000000000000\r\n" + END),
    "an empty chunk size": chunks(b"\r\n\r\n" + HIDDEN),
    "a space before the chunk size": chunks(b" 0\r\n\r\n" + HIDDEN),
    "a chunk longer than its size": chunks(b"1\r\nab\r\n" + END),
    "chunks with bare line feeds": chunks(b"0\n\n" + HIDDEN),
    "a chunk size ended by CR alone": chunks(b"0\r\r\n" + HIDDEN),
    "a chunk extension with a line feed": chunks(b"0;a=\n\r\n\r\n" + HIDDEN),
    "a trailer that is no header": chunks(b"0\r\nno header\r\n\r\n" + HIDDEN),
    # Heads.
    "no Host": b"PUT /set/odd HTTP/1.1\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
    "two Hosts": put(b"Host: other.example", b"Content-Length: 0"),
    "a folded header": put(b"X: a\r\n b", b"Content-Length: 0"),
    "a folded coding": put(b"Transfer-Encoding:\r\n chunked", body=END),
    "a space before the first header": b"PUT /set/odd HTTP/1.1\r\n Host: a\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
    "a space before the colon": put(b"Content-Length : 0"),
    "a tab before the colon": put(b"Transfer-Encoding\t: chunked", body=END),
    "a header without a colon": put(b"Content-Length", b"X: 1"),
    "a header without a name": put(b": 1", b"Content-Length: 0"),
    "a name that is no token": put(b"Content(Length): 0", b"Content-Length: 0"),
    "a NUL in a name": put(b"Content-Length\0: 0"),
    "a NUL in a value": put(b"X: a\0b", b"Content-Length: 0"),
    "a CR in a value": put(b"X: a\rContent-Length: 0"),
    "lines ended by LF alone": put(b"Content-Length: 0").replace(b"\r\n", b"\n"),
    "lines ended by CR alone": put(b"Content-Length: 0").replace(b"\r\n", b"\r"),
    "a line ended by LF alone": put(b"X: a\nContent-Length: 0"),
    "a huge header": put(b"X: " + b"a" * 70_000, b"Content-Length: 0"),
    "a huge name": put(b"X" * 70_000 + b": a", b"Content-Length: 0"),
    "too many headers": put(*[b"X: a"] * 5_000, b"Content-Length: 0"),
    # Request lines.
    "a huge target": put(b"Content-Length: 0", target=b"/set/" + b"a" * 70_000),
    "a space in the target": put(b"Content-Length: 0", target=b"/set/a b"),
    "a NUL in the target": put(b"Content-Length: 0", target=b"/set/a\0b"),
    "a target that is not ASCII": put(b"Content-Length: 0", target="/set/é".encode()),
    "a target without a slash": put(b"Content-Length: 0", target=b"set/a"),
    "authority-form": put(b"Content-Length: 0", target=b"evil.example:80"),
    "no target": b"PUT HTTP/1.1\r\nHost: a\r\n\r\n" + HIDDEN,
    "a method that is no token": put(b"Content-Length: 0", method=b"P(T"),
    "a method in lower case": put(b"Content-Length: 0", method=b"put"),
    "HTTP/0.9": b"GET /get/none\r\n" + HIDDEN,
    "HTTP/1.2": put(b"Content-Length: 0", version=b"HTTP/1.2"),
    "HTTP/2.0": put(b"Content-Length: 0", version=b"HTTP/2.0"),
    "HTTP/11": put(b"Content-Length: 0", version=b"HTTP/11"),
    "HTTP/1.1 in lower case": put(b"Content-Length: 0", version=b"http/1.1"),
    "an unknown method": put(b"Content-Length: 0", method=b"BREW"),
    "no coding": put(b"Transfer-Encoding: identity"),
    "chunked and a space": put(b"Transfer-Encoding: chunked \t", body=END),
    "a length in a trailer": chunks(b"0\r\nContent-Length: 5\r\n\r\n" + HIDDEN),
    "a PUT of all": put(b"Content-Length: 0", target=b"*"),
    "two types": put(b"Content-Type: a/b", b"Content-Type: c/d", b"Content-Length: 0"),
    "a request behind the last": put(b"Connection: close", b"Content-Length: 0"),
    "garbage behind a request": put(b"Content-Length: 0", body=b"\0garbage\r\n\r\n" + HIDDEN),
    "ICY": put(b"Content-Length: 0", version=b"ICY/1.1"),
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HIDDEN,
    "an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + HIDDEN,
    "nothing but NUL": bytes(1_000) + HIDDEN,
    "an address of a proxy": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + HIDDEN,
}
# What is HTTP, however odd, by the answers of a leader and of a follower. The hidden request is a body here.
ODD: Final = {
    (200, 307): {
        "chunk extensions": put(CHUNKED, body=b'%x;a=b;c="d"\r\n%s\r\n0;e\r\n\r\n' % (HIDDEN_BYTES, HIDDEN)),
        "chunk sizes with zeros in front": put(CHUNKED, body=b"000" + CHUNK + b"000\r\n\r\n"),
        "chunked in capitals": put(b"transfer-encoding: CHUNKED", body=CHUNK + b"0\r\n\r\n"),
        "a length with zeros in front": put(b"Content-Length: 000%d" % HIDDEN_BYTES),
        "a length behind a tab": put(b"Content-Length:\t%d" % HIDDEN_BYTES),
        "a length named by Connection": put(b"Connection: Content-Length, Host", LENGTH),
        "empty lines first": b"\r\n\r\n" + put(LENGTH),
        "two spaces": put(LENGTH).replace(b"PUT ", b"PUT  "),
        "absolute-form with a foreign authority": put(LENGTH, target=b"http://evil.example/set/odd"),
        "absolute-form with a user and a port": put(LENGTH, target=b"https://me:secret@evil.example:99/set/odd"),
        "absolute-form with another scheme": put(LENGTH, target=b"gopher://evil.example/set/odd"),
        "segments with two dots": put(LENGTH, target=b"/set/../../etc/passwd"),
        "encoded segments with two dots": put(LENGTH, target=b"/set/%2e%2e%2fodd"),
        "an encoded end of line": put(LENGTH, target=b"/set/odd%0d%0aLocation:%20http://evil.example/"),
        "what no URL has": put(LENGTH, target=b'/set/"<>\\^`{|}'),
        "an empty Host": put(LENGTH).replace(b"Host: evil.example", b"Host:"),
        "a Host that is a URL": put(LENGTH).replace(b"Host: ", b"Host: http://"),
        "a Host that is none": put(LENGTH).replace(b"Host: evil.example", b"Host: a b, c?#@:99999"),
        "a forwarded Host": put(b"X-Forwarded-Host: evil.example", b"Forwarded: host=evil.example", LENGTH),
        "an overridden method": put(b"X-HTTP-Method-Override: DELETE", b"X-Original-URL: /set/odd", LENGTH),
        "HTTP/1.0 without a Host": b"PUT /set/odd HTTP/1.0\r\n" + LENGTH + b"\r\n\r\n" + HIDDEN,
        "100-continue of HTTP/1.0": put(b"Expect: 100-continue", LENGTH, version=b"HTTP/1.0"),
        "100-continue twice": put(b"Expect: 100-continue", b"Expect: 100-Continue", LENGTH),
        "an upgrade to WebSocket": put(*UPGRADE, LENGTH),
        "an upgrade to HTTP/2": put(b"Connection: Upgrade", b"Upgrade: h2c", b"HTTP2-Settings: AA", LENGTH),
    },
    (404, 404): {
        "a GET with a body": put(LENGTH, method=b"GET", target=b"/get/none"),
        "a GET with chunks": put(CHUNKED, method=b"GET", target=b"/get/none", body=CHUNK + b"0\r\n\r\n"),
        "a HEAD with a body": put(LENGTH, method=b"HEAD", target=b"/get/none"),
        "asterisk-form": put(LENGTH, method=b"OPTIONS", target=b"*"),
        "absolute-form without a path": put(LENGTH, target=b"http://evil.example"),
        "a path that begins as an authority": put(LENGTH, target=b"//evil.example/set/odd"),
        "a path with a backslash": put(LENGTH, target=b"/\\evil.example/set/odd"),
        "a path with a parameter": put(LENGTH, target=b"/set;x/odd"),
        "CONNECT": put(method=b"CONNECT", target=b"evil.example:80"),
    },
    (405, 405): {
        "TRACE": put(LENGTH, method=b"TRACE"),
        "CONNECT with a path": put(method=b"CONNECT"),
        "a route behind two dots": put(LENGTH, target=b"/get/../set/odd"),
    },
    (400, 400): {
        "a percent sign alone": put(LENGTH, target=b"/set/%"),
        "an escape that is none": put(LENGTH, target=b"/set/%zz"),
        "an encoded NUL": put(LENGTH, target=b"/set/%00"),
        "an encoded byte that is no UTF-8": put(LENGTH, target=b"/set/%ff"),
        "an overlong encoding": put(LENGTH, target=b"/set/%c0%af"),
        "a fragment": put(LENGTH, target=b"/set/odd#evil"),
        "a broken query": put(LENGTH, method=b"GET", target=b"/keys?prefix=%zz"),
        "500 parameters": put(LENGTH, method=b"GET", target=b"/keys?" + b"a=1&" * 500),
    },
    # A follower sends a writer away before it looks at the body.
    (400, 307): {
        "a body compressed on the way": put(b"Transfer-Encoding: gzip, chunked", body=CHUNK + b"0\r\n\r\n"),
        "a type that no header can bear": put(b"Content-Type: \xff", LENGTH),
    },
    (408, 307): {"a length that the body never has": put(b"Content-Length: 1000")},
    (413, 307): {"a length of 63 bits": put(b"Content-Length: 9223372036854775807")},
    (417, 307): {
        "an expectation of an answer": put(b"Expect: 200-ok", LENGTH),
        "an empty expectation": put(b"Expect:", LENGTH),
        "a list of expectations": put(b"Expect: 100-continue, 100-continue", LENGTH),
    },
}  # fmt: skip


class Case(NamedTuple):
    """A raw request, and the statuses that a leader and a follower answer it with."""

    name: str
    raw: bytes
    statuses: tuple[int, int]


CASES: Final = [
    Case(name, raw, statuses)
    for statuses, group in [((400, 400), REFUSED), *ODD.items()]
    for name, raw in group.items()
]


def answers(connection: Connection) -> bytes:
    """Return all that the node answers until it closes the connection."""
    heard = b""
    with suppress(ConnectionResetError):  # it closed before all was sent
        while more := connection.socket.recv(1 << 16):
            heard += more
    return heard


def ask_all(node: Node, cases: list[Case]) -> list[bytes]:
    """Send each of *cases* on a connection of its own, all at once, and return what is answered to each."""
    with ExitStack() as stack:
        connections = []
        for number, case in enumerate(cases):
            connections.append(stack.enter_context(Connection(node)))
            with suppress(ConnectionError):
                connections[-1].send(case.raw.replace(HIDDEN, hidden(number)))
        return [answers(connection) for connection in connections]


def smuggled(node: Node) -> list[str]:
    """Return the keys that hidden requests have written."""
    keys: list[str] = node.get("/keys?prefix=smuggled-").json()
    return keys


def test_malformed_requests_are_refused_and_nothing_is_smuggled(cluster: Cluster) -> None:
    cluster.start(2, **TIMEOUTS)
    leader_url = cluster.leader.url.encode() + b"/"
    wrong, hidden_answers, server_errors = [], 0, 0
    for ordinal, node in enumerate(cluster.nodes):
        for case, heard in zip(CASES, ask_all(node, CASES), strict=True):
            statuses = [int(status) for status in STATUS.findall(heard)]
            urls = LOCATION.findall(heard)
            # A reset may overtake the refusal of what is still being sent.
            fine = statuses == [case.statuses[ordinal]] or (not statuses and len(case.raw) > LARGE_BYTES)
            honest = len(urls) == statuses.count(307) and all(url.startswith(leader_url) for url in urls)
            if not fine or not honest:
                wrong.append((node.name, case.name, statuses, urls))
            hidden_answers += max(0, len(statuses) - 1)
            server_errors += sum(status >= 500 for status in statuses)
    assert (wrong, smuggled(cluster.leader), hidden_answers, server_errors) == ([], [], 0, 0)
    for node in cluster.nodes:
        assert node.get("/readyz").is_success
    cluster.converge()
    print(f"malformed HTTP: {len(CASES)} requests, {hidden_answers} smuggled, {server_errors} 5xx")


def test_a_request_that_hides_behind_another_would_be_seen(cluster: Cluster) -> None:
    """The control: here it is a request of its own, as it would be for a node that is deceived."""
    node = cluster.add(**TIMEOUTS).start()
    [heard] = ask_all(node, [Case("no body", put(b"Content-Length: 0"), (200, 307))])
    assert STATUS.findall(heard) == [b"200", b"200"]
    assert smuggled(node) == ["smuggled-000"]
