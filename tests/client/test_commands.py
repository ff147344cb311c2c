"""get, set, delete and keys: what they print, and what they end with."""

import http.server
import json
import os
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from client_command import arguments, environment, mehdb
from client_keys import KEYS
from cluster import ADDRESS, DEADLINE_S, Cluster, Node, free_port
from mehdb.client.http import Client, Request, key_in_url
from mehdb.client.lines import list_keys
from mehdb.client.writes import Conditions, delete_key, set_key

BYTES = bytes(range(256)) * 4


def test_a_value_comes_back_byte_for_byte(leader: Node, tmp_path: Path) -> None:
    revision = mehdb(leader, "set", "bytes", stdin=BYTES).number
    assert leader.get("/get/bytes").headers["ETag"] == f'"{revision}"'
    assert mehdb(leader, "get", "bytes").out == BYTES
    (tmp_path / "in").write_bytes(BYTES)
    assert mehdb(leader, "set", "bytes", "--file", tmp_path / "in").number == revision + 1
    assert mehdb(leader, "get", "bytes", "--output", tmp_path / "out").out == b""
    assert (tmp_path / "out").read_bytes() == BYTES


def test_a_value_is_an_argument_a_file_or_standard_input(leader: Node) -> None:
    for given_as, stdin, value in (
        (["ümläut"], b"not this", "ümläut".encode()),
        ([""], b"not this", b""),
        (["-"], b"a dash", b"a dash"),
    ):
        assert mehdb(leader, "set", "value", *given_as, stdin=stdin).number
        assert leader.get("/get/value").content == value


def test_a_key_that_a_url_cannot_hold_is_written_read_and_deleted(leader: Node) -> None:
    key = "dots/../per%20cent//ünï?#"
    assert mehdb(leader, "set", key, key).number
    assert mehdb(leader, "get", key).out == key.encode()
    assert json.loads(mehdb(leader, "keys", key, "--json").out) == [key]
    assert mehdb(leader, "delete", key).number
    assert "`mehdb keys`" in mehdb(leader, "get", key).failed()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # nothing of the node is shared but its life
@given(KEYS)
def test_every_key_can_be_written_read_and_deleted(leader: Node, key: str) -> None:
    with Client((leader.url,)) as client:
        assert set_key(client, key, key.encode(), conditions=Conditions()).revision
        assert client.ask(Request("GET", f"/get/{key_in_url(key)}")).body == key.encode()
        assert key in list_keys(client, key)
        assert delete_key(client, key, conditions=Conditions()).revision


def test_a_write_to_a_follower_goes_to_the_leader_however_large_it_is(leader: Node, follower: Node) -> None:
    value = os.urandom(7 << 20)
    revision = mehdb(follower, "set", "through", stdin=value).number
    assert leader.get("/get/through").content == value
    follower.get(f"/get/through?min_revision={revision}")
    assert mehdb(follower, "get", "through").out == value
    assert mehdb(follower, "delete", "through").number == revision + 1


def test_conditions_decide(leader: Node) -> None:
    first = mehdb(leader, "set", "owner", "me", "--if-none-match", "*").number
    assert f"revision {first}" in mehdb(leader, "set", "owner", "you", "--if-none-match", "*").failed()
    second = mehdb(leader, "set", "owner", "you", "--if-match", first).number
    assert f"revision {second}" in mehdb(leader, "delete", "owner", "--if-match", first).failed()
    assert mehdb(leader, "get", "owner", "--revision", first).out == b"me"
    assert mehdb(leader, "delete", "owner", "--if-match", second).number == second + 1
    assert "nothing was deleted" in mehdb(leader, "delete", "owner").failed()


def test_what_a_write_asks_for_reaches_the_node(leader: Node) -> None:
    assert mehdb(leader, "set", "with", "v", "--ttl", "600", "--content-type", "text/css", "--acks", "1").number
    headers = leader.get("/get/with").headers
    assert headers["Content-Type"] == "text/css"
    assert 590 < float(headers["Mehdb-TTL"]) <= 600
    said = mehdb(leader, "set", "with", "v", "--acks", "9", "--timeout", "1").failed()
    assert "1 of 9 followers" in said


def test_keys_are_listed_over_all_pages(leader: Node) -> None:
    names = [f"page/{number:05}" for number in range(10_500)]
    for begin in range(0, len(names), 1000):
        lines = "".join(
            json.dumps({"op": "set", "key": key, "value": ""}) + "\n" for key in names[begin : begin + 1000]
        )
        assert leader.request("POST", "/batch", content=lines).is_success
    assert mehdb(leader, "keys", "page/").out.decode().splitlines() == names
    assert json.loads(mehdb(leader, "keys", "page/", "--json").out) == names
    assert "page/" in mehdb(leader, "keys", "--delimiter", "/").out.decode().splitlines()
    assert json.loads(mehdb(leader, "keys", "there is none", "--json").out) == []
    assert mehdb(leader, "keys", "there is none").out == b""


def test_the_next_url_is_tried_where_one_cannot_be_reached(pair: Cluster) -> None:
    nobody = f"http://{ADDRESS}:{free_port()}"
    assert mehdb(f"{nobody},{pair.followers[0].url}", "set", "next", "v").number
    assert mehdb(f"{nobody},{pair.leader.url}", "get", "next").out == b"v"


def test_nobody_there_is_told_in_one_line_and_in_time() -> None:
    nobody = f"http://{ADDRESS}:{free_port()}"
    for command in (["set", "k", "v"],):
        said = mehdb(nobody, *command, "--timeout", "0.3").failed()
        assert "Connection refused" in said
        assert nobody in said
        assert "`mehdb status`" in said


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["get", "k", "--url", "localhost"], "--url"),
        (["set", "k", "v", "--file", "/dev/null"], "VALUE or --file"),
        (["set", "k", "--file", "/does/not/exist"], "--file"),
        (["get", "k", "--token-file", "/dev/null"], "--token-file"),
        (["set", "k", "v", "--content-type", "a\nb"], "Content-Type"),
    ],
)
def test_what_is_given_wrongly_is_told_before_anybody_is_asked(command: list[str], why: str) -> None:
    assert why in mehdb("http://127.0.0.1:1", *command).failed(code=2)


def test_a_server_that_is_no_node_is_not_believed() -> None:
    with http.server.ThreadingHTTPServer((ADDRESS, 0), http.server.SimpleHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://{ADDRESS}:{server.server_port}"
            assert "is no mehdb node" in mehdb(url, "get", "k").failed()
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("command", [["get", "full"], ["keys"], ["status"]])
def test_output_that_cannot_be_written_is_told_in_one_line(leader: Node, command: list[str]) -> None:
    leader.put("full", b"v")
    assert onto_full(leader, *command) == "mehdb: standard output cannot be written: No space left on device\n"


def test_a_write_whose_revision_cannot_be_printed_is_told_as_one(leader: Node) -> None:
    said = onto_full(leader, "set", "full/written", "v")
    revision = leader.get("/get/full/written").headers["ETag"].strip('"')
    assert said.startswith(f"mehdb: it was written, at revision {revision}, but standard output")


def onto_full(node: Node, *command: str) -> str:
    """Return what a command says whose output goes where there is no room. Python buffers it, as it usually does."""
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            arguments(*command), env=environment(node, PYTHONUNBUFFERED=""), stdout=full, stderr=subprocess.PIPE,
            timeout=DEADLINE_S, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    return done.stderr.decode()


def test_a_file_without_room_is_a_failure_and_no_wrong_flag(leader: Node) -> None:
    leader.put("full", b"v")
    assert mehdb(leader, "get", "full", "-o", "/dev/full").failed() == "mehdb: --output: No space left on device\n"


def test_a_token_that_no_header_holds_is_not_cut_short(leader: Node, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("t" * 8000)
    leader.put("token", b"v")
    assert mehdb(leader, "get", "token", "--token-file", token).out == b"v"
    token.write_text("t" * 8001)
    assert "at most 8000" in mehdb(leader, "get", "token", "--token-file", token).failed(code=2)


def test_a_reader_that_has_gone_is_no_error(leader: Node) -> None:
    with subprocess.Popen(
        ["bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "bash", *arguments("keys")], env=environment(leader),
        stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
