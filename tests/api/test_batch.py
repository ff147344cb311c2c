"""POST /batch and POST /get: many keys at once, all or nothing, of one state."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest

from cluster import Cluster, Node, curl, eventually
from wire import Connection, Reply, ask

MIB = 1 << 20


def lines(*operations: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(operation).encode() + b"\n" for operation in operations)


def batch(connection: Connection, *operations: dict[str, Any]) -> Reply:
    return connection.ask("POST", "/batch", lines(*operations))


def parsed(reply: Reply) -> list[dict[str, Any]]:
    assert reply.headers["Content-Type"] == "application/x-ndjson"
    return [json.loads(line) for line in reply.body.splitlines()]


def put(key: str, value: str = "v", **more: Any) -> dict[str, Any]:
    return {"op": "set", "key": key, "value": value, **more}


def check(key: str, revision: int) -> dict[str, Any]:
    return {"op": "check", "key": key, "revision": revision}


def assert_refused(reply: Reply, status: int, code: str, *words: str) -> None:
    assert (reply.status, reply.error) == (status, code)
    for word in words:
        assert word in reply.json["message"]


def test_a_batch_is_one_run_of_revisions_with_an_outcome_for_each(connection: Connection) -> None:
    old = connection.ask("PUT", "/set/batch/old", b"1").revision
    reply = batch(
        connection,
        check("batch/old", old), put("batch/a"), {"op": "delete", "key": "batch/old"},
        {"op": "delete", "key": "batch/never"}, put("batch/a", "again"), check("batch/a", old + 3),
    )  # fmt: skip
    assert (reply.status, reply.revision) == (200, old + 3)
    assert parsed(reply) == [
        {"op": "check", "key": "batch/old", "revision": old},
        {"op": "set", "key": "batch/a", "revision": old + 1},
        {"op": "delete", "key": "batch/old", "revision": old + 2},
        {"op": "delete", "key": "batch/never", "revision": 0},
        {"op": "set", "key": "batch/a", "revision": old + 3},
        {"op": "check", "key": "batch/a", "revision": old + 3},
    ]
    assert connection.ask("GET", "/get/batch/a").body == b"again"
    assert connection.ask("GET", "/get/batch/old").status == 404


def test_a_batch_whose_check_fails_writes_nothing(leader: Node, connection: Connection) -> None:
    at = connection.ask("PUT", "/set/batch/checked", b"1").revision
    head = leader.position()
    reply = batch(connection, put("batch/none"), check("batch/checked", at + 9), check("batch/absent", 4))
    assert_refused(reply, 412, "precondition_failed", "nothing was written")
    assert reply.json["failed"] == [
        {"operation": 2, "key": "batch/checked", "revision": at},
        {"operation": 3, "key": "batch/absent", "revision": 0},
    ]
    assert leader.position() == head
    assert connection.ask("GET", "/get/batch/none").status == 404


def test_values_of_a_batch_are_bytes_with_their_content_type(pair: Cluster, connection: Connection) -> None:
    value = bytes(range(256))
    reply = batch(
        connection,
        {"op": "set", "key": "batch/bytes", "base64": base64.b64encode(value).decode(), "content_type": "image/x"},
        put("batch/ключ", "значение\0", content_type=None), put("batch/empty", ""),
    )  # fmt: skip
    assert reply.status == 200
    pair.converge()
    for node in pair.nodes:
        stored = ask(node, "GET", "/get/batch/bytes")
        assert (stored.body, stored.headers["Content-Type"]) == (value, "image/x")
        assert ask(node, "GET", "/get/batch/%D0%BA%D0%BB%D1%8E%D1%87").body == "значение\0".encode()
        assert ask(node, "GET", "/get/batch/empty").body == b""


BAD_LINES = [
    (b"", "operations"),
    (b"garbage", "operation 1"),
    (b"[]", "operation 1"),
    (lines(put("a"), {"op": "put", "key": "a", "value": "b"}), "operation 2"),
    (lines(put("a"), put("b"), {"op": "set", "key": "c"}), "operation 3"),
    (lines(put("a", base64="YQ==")), "operation 1"),
    (lines({"op": "set", "key": "a", "base64": "a"}), "base64"),
    (lines({"op": "set", "key": "a", "base64": "é"}), "base64"),
    (lines(put("a", size=1)), "size"),
    (lines(put("a", ttl=-1)), "ttl"),
    (lines(put("a", ttl=0)), "ttl"),
    (lines(put("a", ttl=1e12)), "ttl"),
    (lines(put("a", content_type="é")), "content_type"),
    (lines({"op": "check", "key": "a"}), "revision"),
    (lines({"op": "check", "key": "a", "revision": -1}), "revision"),
    (lines({"op": "check", "key": "a", "revision": 1 << 63}), "revision"),
    (b'{"op":"set","key":"a","value":"\xff"}\n', "operation 1"),
    (b'{"op":"delete","key":"a"}\n{"key":' + b"[" * 100_000, "operation 2"),
]


@pytest.mark.parametrize(("body", "word"), BAD_LINES)
def test_a_line_that_cannot_be_read_is_named_and_nothing_is_written(
    leader: Node, connection: Connection, body: bytes, word: str
) -> None:
    head = leader.position()
    assert_refused(connection.ask("POST", "/batch", body), 400, "bad_body", word)
    assert leader.position() == head


@pytest.mark.parametrize("key", ["", "a\0", "k" * 1025, "é" * 513])
def test_a_key_that_is_none_is_named(connection: Connection, key: str) -> None:
    assert_refused(batch(connection, put("fine"), put(key)), 400, "bad_key", "operation 2")
    assert_refused(connection.ask("POST", "/get", json.dumps(["fine", key]).encode()), 400, "bad_key")


def test_half_a_surrogate_is_no_key(connection: Connection) -> None:
    assert connection.ask("POST", "/batch", b'{"op":"set","key":"\\ud800","value":""}').status == 400
    assert connection.ask("POST", "/get", b'["\\ud800"]').status == 400


def test_a_batch_has_a_bound_on_its_number_and_its_size(leader: Node, connection: Connection) -> None:
    most = [put(f"batch/many/{n}") for n in range(1000)]
    assert len(parsed(batch(connection, *most))) == 1000
    head = leader.position()
    assert_refused(batch(connection, *most, put("one")), 413, "batch_too_large", "1000")
    assert_refused(connection.ask("POST", "/batch", b"\n" * MIB + b"?"), 413, "batch_too_large")
    assert_refused(connection.ask("POST", "/batch", lines(put("a")).strip() * 2000), 413, "batch_too_large")
    with Connection(leader) as another:
        assert_refused(another.ask("POST", "/batch", lines(put("a", "x" * (9 * MIB)))), 413, "batch_too_large")
    assert leader.position() == head


def test_a_value_in_a_batch_has_the_bound_that_a_value_has(cluster: Cluster) -> None:
    node = cluster.start(1, MEHDB_MAX_VALUE="1000").leader
    with Connection(node) as connection:
        assert batch(connection, put("a", "x" * 1000)).status == 200
        assert_refused(batch(connection, put("b"), put("a", "x" * 1001)), 413, "value_too_large", "operation 2")
        assert connection.ask("GET", "/get/b").status == 404


def test_a_follower_sends_a_batch_to_the_leader(pair: Cluster) -> None:
    url = f"{pair.followers[0].url}/batch"
    reply = curl("-s", "-L", "--data-binary", lines(put("batch/redirected")).decode(), url)
    assert json.loads(reply)["op"] == "set"
    with Connection(pair.followers[0]) as connection:
        assert connection.ask("POST", "/batch", lines(put("batch/not"))).status == 307


def test_batches_of_many_clients_are_never_mixed(pair: Cluster) -> None:
    """Each sets both keys to one value: no state, on any node, has them differ."""
    node, other = pair.nodes
    with Connection(node) as first, Connection(node) as second, Connection(other) as reader:
        for round_ in range(40):
            for number, connection in enumerate((first, second)):
                text = f"{round_}-{number}"
                body = lines(put("batch/left", text), put("batch/right", text))
                connection.send(b"POST /batch HTTP/1.1\r\nHost: n\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            seen = reader.ask("POST", "/get", b'["batch/left","batch/right"]')
            left, right = parsed(seen)
            assert left.get("value") == right.get("value")
            revisions = [parsed(connection.reply())[0]["revision"] for connection in (first, second)]
            assert abs(revisions[0] - revisions[1]) == 2


# POST /get


@pytest.fixture(params=["leader", "follower"])
def reader(pair: Cluster, connection: Connection, request: pytest.FixtureRequest) -> Iterator[Connection]:
    """A connection to either node, both of which have some keys."""
    batch(
        connection,
        put("several/a", "1", content_type="x/y"),
        put("several/b", "2"),
        put("several/large", "x" * 100_000),
    )
    pair.converge()
    with Connection(pair.leader if request.param == "leader" else pair.followers[0]) as connected:
        yield connected


def test_many_keys_are_answered_in_the_order_asked(reader: Connection) -> None:
    keys = ["several/b", "several/none", "several/a", "several/b"]
    reply = reader.ask("POST", "/get", json.dumps(keys).encode())
    found = parsed(reply)
    assert [line["key"] for line in found] == keys
    b, none, a, again = found
    assert (none, again) == ({"key": "several/none", "revision": 0}, b)
    assert a == {"key": "several/a", "revision": b["revision"] - 1, "size": 1, "content_type": "x/y", "value": "1"}
    assert reply.revision >= b["revision"]


def test_large_values_and_many_keys_are_read_as_well(reader: Connection) -> None:
    keys = [*(f"several/none/{n}" for n in range(997)), "several/large", "several/a", "several/b"]
    found = parsed(reader.ask("POST", "/get", json.dumps(keys).encode()))
    assert [line["revision"] > 0 for line in found] == [False] * 997 + [True] * 3
    assert found[-3]["value"] == "x" * 100_000
    assert parsed(reader.ask("POST", "/get", b'["several/large"]'))[0]["size"] == 100_000


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"[1]", b'["a"', b'"a"', b'["\xff"]'])
def test_what_is_no_list_of_keys_is_refused(connection: Connection, body: bytes) -> None:
    assert_refused(connection.ask("POST", "/get", body), 400, "bad_body")


def test_more_than_one_answer_holds_is_refused(connection: Connection) -> None:
    assert_refused(connection.ask("POST", "/get", json.dumps(["k"] * 1001).encode()), 413, "batch_too_large", "1000")
    for number in range(3):
        assert connection.ask("PUT", f"/set/several/huge/{number}", bytes(6 * MIB)).status == 200
    keys = [f"several/huge/{number}" for number in range(3)]
    assert_refused(connection.ask("POST", "/get", json.dumps(keys).encode()), 413, "answer_too_large", "fewer")
    assert len(parsed(connection.ask("POST", "/get", json.dumps(keys[:2]).encode()))) == 2
    often = json.dumps([keys[0]] * 3).encode()  # one value, three times in the answer
    assert_refused(connection.ask("POST", "/get", often), 413, "answer_too_large", "fewer")
    for number in range(3):
        assert connection.ask("DELETE", f"/delete/several/huge/{number}").status == 200


def test_a_batch_survives_the_death_of_its_node(cluster: Cluster) -> None:
    node = cluster.start(1).leader
    with Connection(node) as connection:
        assert batch(connection, *(put(f"k{n}") for n in range(500))).status == 200
    node.kill()
    node.start()
    eventually(lambda: ask(node, "GET", "/status?level=full").body == b"500", "all of the batch to be there")
