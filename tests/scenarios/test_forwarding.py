"""A follower passes on what only the leader can do, and the leader's answer comes back. Nothing goes in circles."""

import asyncio
import itertools
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from aiohttp import web

from cluster import ADDRESS, DEADLINE_S, Cluster, Node, curl, eventually, free_port, running
from fake_leader import fake_leader, honest, leading
from mehdb.errors import OutcomeUnknown
from mehdb.peers import Peer, Relay
from wire import Connection, Reply, ask

LARGE = 8 << 20
NOT_JOINED = 1 << 20  # an answer that goes through piece by piece


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A leader and a follower that passes writes on. No test changes what they are."""
    with running(tmp_path_factory.mktemp("pair")) as nodes:
        nodes.start(1)
        nodes.add(MEHDB_FORWARD_WRITES="yes", MEHDB_ADVERTISE_URL="http://nobody.example").start()
        yield nodes


def from_leader(reply: Reply) -> Reply:
    """Check that an answer is the leader's, through the follower."""
    assert reply.headers.get_all("Mehdb-Node") == ["mehdb-0"]
    assert reply.headers.get_all("Mehdb-Role") == ["leader"]
    assert reply.headers.get_all("Via") == ["1.1 mehdb-1"]
    for once in ("Date", "Server", "Content-Type", "Mehdb-Revision"):
        assert len(reply.headers.get_all(once) or ()) == 1, once
    assert "Mehdb-Staleness" not in reply.headers
    return reply


@pytest.mark.parametrize("size_bytes", [0, 1, 100_000, LARGE])
@pytest.mark.parametrize("piped", [True, False], ids=["pipe", "file"])
def test_curl_writes_any_body_without_following_a_redirect(
    pair: Cluster, tmp_path: Path, size_bytes: int, piped: bool
) -> None:
    leader, follower = pair.nodes
    value = os.urandom(size_bytes)
    source = tmp_path / "value"
    source.write_bytes(value)
    for expect in ("Expect: 100-continue", "Expect:"):
        arguments = ("-XPUT", "-H", expect, "-T", "-" if piped else str(source), f"{follower.url}/set/value")
        assert curl(*arguments, stdin=value if piped else b"") == b"WRITE completed"
        assert leader.get("/get/value").content == value
        assert curl("-XDELETE", f"{follower.url}/delete/value") == b"WRITE completed"
        assert leader.get("/get/value").status_code == 404


def test_a_follower_says_100_continue_before_it_has_the_body_and_refuses_what_is_too_large(pair: Cluster) -> None:
    leader, follower = pair.nodes
    head = "PUT /set/asked HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n"
    with Connection(follower) as connection:
        connection.send(head.format(5).encode())
        assert connection.reply().status == 100
        connection.send(b"value")
        assert from_leader(connection.reply()).body == b"WRITE completed"
    with Connection(follower) as connection:
        connection.send(head.format(1 << 40).encode())
        assert connection.reply().error == "value_too_large"
    assert leader.get("/get/asked").content == b"value"


def test_the_answer_is_the_leaders_whatever_it_is(pair: Cluster) -> None:
    follower = pair.followers[0]
    written = from_leader(ask(follower, "PUT", "/set/k", b"v", {"Content-Type": "text/x"}))
    assert (written.status, written.body) == (200, b"WRITE completed")
    read = from_leader(ask(follower, "GET", "/get/k?consistency=leader&forward=true"))
    assert (read.status, read.body, read.headers["Content-Type"]) == (200, b"v", "text/x")
    assert (read.revision, read.headers["X-Content-Type-Options"]) == (written.revision, "nosniff")
    head = from_leader(ask(follower, "HEAD", "/get/k?consistency=leader&forward=true"))
    assert (head.status, head.headers["Content-Length"], head.body) == (200, "1", b"")
    listed = from_leader(ask(follower, "GET", "/keys?consistency=leader&forward=true&limit=1&prefix=k"))
    assert listed.json == ["k"]
    refused = from_leader(ask(follower, "PUT", "/set/k?acks=2&wait=0.1", b"v"))
    assert (refused.status, refused.error, refused.json["acks"]) == (504, "not_confirmed", refused.json["acks"])
    assert from_leader(ask(follower, "PUT", "/set/k?what=this", b"v")).error == "bad_parameter"
    assert from_leader(ask(follower, "DELETE", "/delete/none")).error == "key_not_found"


def test_a_large_value_goes_through_and_the_connection_lives_on(pair: Cluster) -> None:
    leader, follower = pair.nodes
    value = os.urandom(LARGE)
    assert leader.put("large", value).is_success
    with Connection(follower) as connection:
        for _ in range(2):
            reply = connection.ask("GET", "/get/large?consistency=leader&forward=true")
            assert from_leader(reply).body == value
    assert ask(follower, "HEAD", "/get/large?consistency=leader&forward=true").headers["Content-Length"] == str(LARGE)


@pytest.mark.parametrize("path", ["a%2Fb", "a/b", "a%2fb", "%C3%A9", "a+b%20c", "%25%3F", "..", "a//b", "a;b=c"])
def test_a_key_arrives_as_it_was_sent(pair: Cluster, path: str) -> None:
    leader, follower = pair.nodes
    assert ask(follower, "PUT", f"/set/{path}", path.encode()).status == 200
    assert ask(leader, "GET", f"/get/{path}").body == path.encode()


def test_the_parameter_beats_the_setting_and_both_need_no_more_than_the_leaders_address(pair: Cluster) -> None:
    leader, follower = pair.nodes
    redirect = ask(follower, "PUT", "/set/k?forward=false", b"v")
    assert (redirect.status, redirect.headers["Location"]) == (307, "http://nobody.example/set/k?forward=false")
    assert ask(follower, "GET", "/get/k?consistency=leader").status == 307, "the setting is of writes"
    assert ask(follower, "PUT", "/set/k?forward=perhaps", b"v").error == "bad_parameter"
    for value in (b"true", b"false"):
        assert ask(leader, "PUT", f"/set/k?forward={value.decode()}", value).status == 200
        assert ask(leader, "GET", f"/get/k?forward={value.decode()}").body == value


def test_without_the_setting_only_who_asks_is_passed_on(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    assert ask(follower, "PUT", "/set/k", b"v").status == 307
    assert ask(follower, "DELETE", "/delete/k").status == 307
    assert from_leader(ask(follower, "PUT", "/set/k?forward=true", b"v")).status == 200
    assert leader.get("/get/k").content == b"v"


# What goes wrong.


def test_what_never_reached_the_leader_was_certainly_not_written(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    assert ask(follower, "PUT", "/set/k?forward=true", b"v").status == 200  # there is a connection to reuse
    leader.kill()
    for method, target in (("PUT", "/set/k?forward=true"), ("GET", "/get/k?forward=true&consistency=leader")):
        reply = ask(follower, method, target, b"w" if method == "PUT" else b"")
        assert (reply.status, reply.error) == (503, "leader_unreachable")
        assert reply.headers["Retry-After"]
        assert reply.headers["Mehdb-Node"] == "mehdb-1", "it is the follower's own answer"
    leader.start()
    assert leader.get("/get/k").content == b"v"


def test_a_leader_that_dies_before_it_answers_leaves_the_outcome_unknown(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, follower, "PUT", "/set/k?forward=true&acks=2&wait=60", b"v")
        eventually(lambda: ask(leader, "GET", "/get/k").status == 200, "the write to be on the leader")
        leader.kill()
        reply = waiting.result(DEADLINE_S)
    assert (reply.status, reply.error) == (504, "outcome_unknown")
    leader.start()
    assert leader.get("/get/k").content == b"v", "it was written"


async def test_a_leader_that_stands_still_is_given_up() -> None:
    """The kernel takes the request for it."""
    with socket.create_server((ADDRESS, 0)) as deaf:
        async with Peer(f"http://{ADDRESS}:{deaf.getsockname()[1]}") as leader:
            with pytest.raises(OutcomeUnknown):
                await leader.forward(Relay("PUT", b"/set/k", [], b"v"), 0.2)


def test_a_leader_that_is_about_to_leave_is_sent_nothing(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    assert leader.process is not None
    leader.process.send_signal(signal.SIGUSR1)
    eventually(lambda: ask(follower, "PUT", "/set/k", b"v").status == 503, "the follower to learn of it")
    for target in ("/set/k?forward=true", "/set/k?forward=false"):
        reply = ask(follower, "PUT", target, b"v")
        assert (reply.status, reply.error, reply.headers["Mehdb-Node"]) == (503, "draining", "mehdb-1")


def test_nodes_that_take_each_other_for_the_leader_send_nothing_around(cluster: Cluster) -> None:
    """Each passes a request on once, and the other says that it does not lead."""
    ports = [free_port(), free_port()]
    for name, own, other in (("mehdb-1", *ports), ("mehdb-2", *reversed(ports))):
        environment = {
            "MEHDB_HOST": name, "MEHDB_PORT": str(own), "MEHDB_LISTEN": ADDRESS, "MEHDB_LAME_DUCK": "0",
            "MEHDB_PEERS": f"http://{ADDRESS}:{other}", "MEHDB_DATADIR": str(cluster.directory / name),
            "MEHDB_FORWARD_WRITES": "yes",
        }  # fmt: skip
        cluster.nodes.append(Node(name, own, cluster.directory / name, environment).start(ready=False))
    first, second = cluster.nodes
    for method, target in (
        ("PUT", "/set/k"),
        ("DELETE", "/delete/k"),
        ("GET", "/get/k?consistency=leader&forward=true"),
    ):
        reply = ask(first, method, target)
        assert (reply.status, reply.error) == (503, "not_leader")
        assert "Location" not in reply.headers
        assert (reply.headers["Mehdb-Node"], reply.headers.get_all("Via")) == ("mehdb-2", ["1.1 mehdb-1"])
    for node in (first, second):
        assert re.findall(r'mehdb_requests_total{.*route="/set/",status="(\d+)"} (.*)', node.get("/metrics").text) == [
            ("503", "1.0")
        ]


# What goes over the wire.


async def test_the_leader_gets_what_counts_of_a_request_and_nothing_else(cluster: Cluster, tmp_path: Path) -> None:
    async with leading(tmp_path / "store", 1) as store, fake_leader(honest(store)) as leader:
        pages, asked = leader.answer, []

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            if request.path == "/replicate":
                return await pages(request)
            asked.append((request.method, request.raw_path, request.headers.copy(), await request.read()))
            return web.Response(text="fine", headers={"ETag": '"7"', "Mehdb-New": "x", "Set-Cookie": "a=b"})

        leader.answer = answer
        node = cluster.add(MEHDB_HOST="mehdb-1", MEHDB_PEERS=leader.url)
        await asyncio.to_thread(node.start)
        sent = {
            "Content-Type": "text/x", "If-Match": '"1", "2"', "If-None-Match": "*", "Accept": "text/y",
            "Authorization": "secret", "Cookie": "c=d", "X-Else": "x", "Connection": "keep-alive",
        }  # fmt: skip
        target = "/set/a%2fb//%C3%A9/../{|}^'?forward=true&x=%20y&z='{|}^"
        reply = await asyncio.to_thread(ask, node, "PUT", target, b"value", sent)
        await asyncio.to_thread(node.stop)
    [(method, raw, headers, body)] = asked
    assert (method, raw, body) == ("PUT", target, b"value")
    for name in ("Content-Type", "If-Match", "If-None-Match", "Accept", "Authorization"):
        assert headers.getall(name) == [sent[name]]
    assert headers.getall("Mehdb-Forwarded") == ["mehdb-1"]
    assert not {"Cookie", "X-Else", "Expect"} & set(headers)
    assert (reply.status, reply.body, reply.headers["ETag"], reply.headers["Mehdb-New"]) == (200, b"fine", '"7"', "x")
    assert "Set-Cookie" not in reply.headers


async def test_half_an_answer_is_none(cluster: Cluster, tmp_path: Path) -> None:
    """Where it is short, an error says so; else the end of the connection."""
    async with leading(tmp_path / "store", 1) as store, fake_leader(honest(store)) as leader:
        pages, value, chunked, whole = leader.answer, b"", False, False

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            if request.path == "/replicate":
                return await pages(request)
            response = web.StreamResponse(headers={} if chunked else {"Content-Length": str(len(value))})
            await response.prepare(request)
            await response.write(value if whole else value[: len(value) // 2])
            if not whole and request.transport is not None:
                request.transport.close()
            return response

        leader.answer = answer
        node = cluster.add(MEHDB_HOST="mehdb-1", MEHDB_PEERS=leader.url)
        await asyncio.to_thread(node.start)
        for size_bytes, chunked, whole in itertools.product((10, NOT_JOINED), (False, True), (False, True)):
            value = os.urandom(size_bytes)
            told, body = await asyncio.to_thread(curl_status, f"{node.url}/get/k?consistency=leader&forward=true")
            case = f"size_bytes={size_bytes} chunked={chunked} whole={whole}"
            if whole:
                assert (told, body) == ("200 0", value), case
            elif size_bytes == 10 and not chunked:
                assert told == "504 0", case
                assert b'"outcome_unknown"' in body
            else:
                # A connection that is reset may take with it what curl has not read yet, the status too.
                assert told in ("200 18", "200 56", "000 56"), f"{case}: {told}: curl must see that the end is missing"
                assert value.startswith(body)
        await asyncio.to_thread(node.stop)


def curl_status(url: str) -> tuple[str, bytes]:
    """Return the status and curl's exit code, and the body as far as it came."""
    done = subprocess.run(
        ["curl", "-s", "--noproxy", "*", "-o", "-", "-w", "%{stderr}%{http_code}", url],
        capture_output=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    return f"{done.stderr.decode()} {done.returncode}", done.stdout
