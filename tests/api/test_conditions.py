"""Conditional requests: compare-and-set by `If-Match` and `If-None-Match`, decided inside the commit."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster import Cluster, Node, curl
from wire import Connection, Reply, ask

INCREMENTERS = 20
INCREMENTS_EACH = 10


def put(connection: Connection, key: str, value: bytes, **conditions: str) -> Reply:
    headers = {name.replace("_", "-"): text for name, text in conditions.items()}
    return connection.ask("PUT", f"/set/conditions/{key}", value, headers)


def value_of(connection: Connection, key: str) -> bytes:
    return connection.ask("GET", f"/get/conditions/{key}").body


def assert_not_met(reply: Reply, revision: int) -> None:
    """It is refused, and says where the key is."""
    assert (reply.status, reply.error, reply.json["revision"]) == (412, "precondition_failed", revision)
    assert reply.headers["ETag"] == (f'"{revision}"' if revision else None)


def test_a_value_is_replaced_only_at_the_revision_that_was_named(connection: Connection) -> None:
    first = put(connection, "named", b"1").revision
    assert_not_met(put(connection, "named", b"no", If_Match=f'"{first + 1000}"'), first)
    second = put(connection, "named", b"2", If_Match=f'"{first}"')
    assert second.status == 200
    assert_not_met(put(connection, "named", b"no", If_Match=f'"{first}"'), second.revision)
    assert value_of(connection, "named") == b"2"


def test_a_key_is_made_only_once(connection: Connection) -> None:
    made = put(connection, "once", b"1", If_None_Match="*")
    assert made.status == 200
    assert_not_met(put(connection, "once", b"2", If_None_Match="*"), made.revision)
    assert value_of(connection, "once") == b"1"


def test_a_key_that_is_not_there_is_at_revision_0(connection: Connection) -> None:
    assert_not_met(put(connection, "absent", b"no", If_Match="*"), 0)
    assert_not_met(put(connection, "absent", b"no", If_Match='"1"'), 0)
    assert connection.ask("GET", "/get/conditions/absent").status == 404


def test_a_deletion_has_conditions_too(connection: Connection) -> None:
    revision = put(connection, "delete", b"1").revision
    delete = "/delete/conditions/delete"
    assert_not_met(connection.ask("DELETE", delete, headers={"If-Match": f'"{revision - 1}"'}), revision)
    assert_not_met(connection.ask("DELETE", delete, headers={"If-None-Match": "*"}), revision)
    assert connection.ask("DELETE", delete, headers={"If-Match": f'"{revision}"'}).status == 200
    assert_not_met(connection.ask("DELETE", delete, headers={"If-Match": "*"}), 0)


def test_conditions_are_lists_and_tags_compare_as_rfc_9110_has_it(connection: Connection) -> None:
    at = put(connection, "list", b"1").revision
    assert_not_met(put(connection, "list", b"no", If_Match='"nine", "0"'), at)
    assert_not_met(put(connection, "list", b"no", If_Match=f'W/"{at}"'), at)
    assert_not_met(put(connection, "list", b"no", If_None_Match=f'W/"{at}"'), at)
    assert_not_met(put(connection, "list", b"no", If_Match=f'"{at}"', If_None_Match="*"), at)
    assert put(connection, "list", b"yes", If_Match=f'"nine" , "{at}"', If_None_Match=f'"{at + 1}"').status == 200


def test_a_comma_may_stand_in_a_tag_and_a_get_may_have_two_lines(connection: Connection) -> None:
    at = put(connection, "comma", b"1").revision
    assert put(connection, "comma", b"2", If_Match=f'"x,y", "{at}"').revision == at + 1
    lines = f'If-None-Match: "7,8"\r\nIf-None-Match: "{at + 1}"'
    connection.send(f"GET /get/conditions/comma HTTP/1.1\r\nHost: n\r\n{lines}\r\n\r\n".encode())
    assert connection.reply().status == 304


def test_a_batch_takes_no_condition_in_its_head(connection: Connection) -> None:
    body = b'{"op":"set","key":"conditions/batch","value":""}'
    assert connection.ask("POST", "/batch", body, {"If-Match": '"7"'}).error == "bad_parameter"
    assert connection.ask("GET", "/get/conditions/batch").status == 404


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
@pytest.mark.parametrize("text", ["7", "'7'", '"7', '"7" "8"', "", ",", "**", ", ".join(['"7"'] * 70)])
def test_a_condition_that_cannot_be_read_is_refused(connection: Connection, header: str, text: str) -> None:
    reply = connection.ask("PUT", "/set/conditions/unread", b"1", {header: text})
    assert (reply.status, reply.error) == (400, "bad_parameter")
    assert connection.ask("GET", "/get/conditions/unread").status == 404


def test_two_lines_of_one_condition_are_one_list(leader: Node, connection: Connection) -> None:
    at = put(connection, "lines", b"1").revision
    url = f"{leader.url}/set/conditions/lines"
    lines = ["-H", 'If-Match: "nine"', "-H", f'If-Match: "{at}"']
    assert curl("-o", "/dev/null", "-w", "%{http_code}", "-XPUT", "-d", "2", *lines, url) == b"200"


def test_a_get_says_that_the_client_has_it_already(pair: Cluster, connection: Connection) -> None:
    at = put(connection, "known", b"1").revision
    pair.converge()
    for node in pair.nodes:
        with Connection(node) as reader:
            for tags in (f'"{at}"', f'W/"{at}"', f'"nine", "{at}"', "*"):
                for method in ("GET", "HEAD"):
                    reply = reader.ask(method, "/get/conditions/known", headers={"If-None-Match": tags})
                    assert (reply.status, reply.revision, reply.body) == (304, at, b"")
            reply = reader.ask("GET", "/get/conditions/known", headers={"If-None-Match": f'"{at + 1}"'})
            assert (reply.status, reply.body) == (200, b"1")
            reply = reader.ask("GET", "/get/conditions/no/such/key", headers={"If-None-Match": "*"})
            assert reply.status == 404


def test_a_follower_sends_a_conditional_write_to_the_leader_with_its_condition(pair: Cluster) -> None:
    made = ask(pair.leader, "PUT", "/set/conditions/redirected", b"1").revision
    url = f"{pair.followers[0].url}/set/conditions/redirected"
    for tag, status in ((made + 1, b"412"), (made, b"200")):
        said = curl("-L", "-o", "/dev/null", "-w", "%{http_code}", "-XPUT", "-d", "2", "-H", f'If-Match: "{tag}"', url)
        assert said == status


def test_no_increment_of_many_clients_is_lost(pair: Cluster) -> None:
    """They read from either node, which may be behind: compare-and-set tells."""
    assert ask(pair.leader, "PUT", "/set/conditions/counter", b"0").status == 200
    pair.converge()

    def increment_often(client: int) -> int:
        conflicts = 0
        with Connection(pair.leader) as writer, Connection(pair.nodes[client % 2]) as reader:
            done = 0
            while done < INCREMENTS_EACH:
                read = reader.ask("GET", "/get/conditions/counter")
                wrote = put(writer, "counter", b"%d" % (int(read.body) + 1), If_Match=read.headers["ETag"])
                assert wrote.status in (200, 412)
                done += wrote.status == 200
                conflicts += wrote.status == 412
        return conflicts

    with ThreadPoolExecutor(INCREMENTERS) as clients:
        conflicts = sum(clients.map(increment_often, range(INCREMENTERS)))
    value = ask(pair.leader, "GET", "/get/conditions/counter").body
    assert value == b"%d" % (INCREMENTERS * INCREMENTS_EACH)
    assert conflicts, "nobody was ever in another's way: nothing was shown"
    print(f"compare-and-set: {INCREMENTERS} clients, {value.decode()} increments, {conflicts} conflicts, 0 lost")
