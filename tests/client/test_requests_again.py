"""Which requests are made again, which must not be, and what is said when nobody can know."""

from pathlib import Path

import pytest

from client_command import mehdb
from cluster import ADDRESS, free_port
from mehdb.client.http import Client, Request
from mehdb.client.writes import Conditions, Written, delete_key, set_key
from mehdb.credentials import Credentials
from mehdb.errors import OutcomeUnknown, PeerAnswerInvalid, PeerRefused, PeerUnreachable
from scripted import CLOSE, answer, refusal, scripted

BUSY = refusal(503, "queue_full", Retry_After="0")
DONE = answer(200, b"WRITE completed", ETag='"8"')
UNKNOWN = refusal(504, "outcome_unknown")
GATEWAY = answer(502, b"<html>", node=None)
READ = Request("GET", "/get/k")


def write(url: str, conditions: Conditions | None = None, timeout_s: float = 5.0) -> Written:
    with Client((url,), timeout_s=timeout_s) as client:
        return set_key(client, "k", b"ours", conditions=conditions or Conditions())


@pytest.mark.parametrize("first", [CLOSE, BUSY, GATEWAY, UNKNOWN, answer(200, b"whole")[:-1]])
def test_a_read_is_made_again(first: bytes) -> None:
    with scripted(first, answer(200, b"whole")) as server, Client((server.url,)) as client:
        assert client.ask(READ).body == b"whole"
        assert len(server.requests) == 2


def test_a_read_ends_in_time() -> None:
    with scripted(BUSY) as server, Client((server.url,), timeout_s=0.5) as client:
        with pytest.raises(PeerUnreachable, match="because of queue_full"):
            client.ask(READ)
        assert 2 <= len(server.requests) <= 5


def test_a_write_that_was_certainly_not_taken_is_made_again() -> None:
    with scripted(BUSY, BUSY, DONE) as server:
        assert write(server.url) == Written(8)
        assert len(server.requests) == 3
    with scripted(DONE) as server, Client((f"http://{ADDRESS}:{free_port()}", server.url)) as client:
        assert set_key(client, "k", b"ours", conditions=Conditions()).revision == 8


@pytest.mark.parametrize("lost", [CLOSE, UNKNOWN, GATEWAY, DONE[:-1]])
@pytest.mark.parametrize("conditions", [Conditions(), Conditions(if_match="*"), Conditions(if_none_match="7")])
def test_a_write_that_may_have_been_made_is_not_made_again(lost: bytes, conditions: Conditions) -> None:
    with scripted(lost, DONE) as server:
        with pytest.raises(OutcomeUnknown, match="unknown"):
            write(server.url, conditions)
        assert len(server.requests) == 1


def test_a_write_is_not_made_again_unless_its_sender_says_so() -> None:
    with scripted(CLOSE, DONE) as server, Client((server.url,)) as client:
        with pytest.raises(OutcomeUnknown):
            client.ask(Request("POST", "/batch", b"{}"))
        assert len(server.requests) == 1


def test_an_unknown_outcome_is_told_as_one_and_is_no_success() -> None:
    with scripted(CLOSE) as server:
        assert "whether anything was written is unknown" in mehdb(server.url, "set", "k", "v").failed()


@pytest.mark.parametrize("conditions", [Conditions(if_match="7"), Conditions(if_none_match="*")])
@pytest.mark.parametrize("lost", [CLOSE, UNKNOWN, GATEWAY])
def test_a_write_whose_condition_holds_once_is_made_again(lost: bytes, conditions: Conditions) -> None:
    with scripted(lost, DONE) as server:
        assert write(server.url, conditions) == Written(8)
        assert server.requests[0] == server.requests[1]
    with scripted(lost) as server, pytest.raises(OutcomeUnknown):
        write(server.url, conditions, timeout_s=0.3)


def test_a_condition_that_fails_after_a_lost_answer_is_looked_into() -> None:
    once, failed = Conditions(if_match="7"), refusal(412, "precondition_failed")
    with scripted(CLOSE, failed, answer(200, b"ours", ETag='"8"')) as server:
        written = write(server.url, once)
        assert written.revision == 8
        assert "lost" in written.note
    with scripted(CLOSE, failed, answer(200, b"theirs", ETag='"9"')) as server:
        why = r"because of precondition_failed.*may have been made"
        with pytest.raises(PeerRefused, match=why):
            write(server.url, once)
        assert b"consistency=leader" in server.requests[2]
    with scripted(failed) as server:
        with pytest.raises(PeerRefused, match=r"because of precondition_failed$"):
            write(server.url, once)
        assert len(server.requests) == 1


def test_a_deletion_that_fails_after_a_lost_answer_is_looked_into() -> None:
    once, failed = Conditions(if_match="7"), refusal(412, "precondition_failed")
    with scripted(CLOSE, failed, refusal(404, "key_not_found")) as server, Client((server.url,)) as client:
        assert "gone" in delete_key(client, "k", conditions=once).note
    new = answer(200, b"new")
    with scripted(CLOSE, failed, new) as server, Client((server.url,)) as client, pytest.raises(PeerRefused):
        delete_key(client, "k", conditions=once)


def test_a_token_goes_along_with_a_nodes_redirect(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    with scripted(DONE) as leader, scripted(answer(307, Location=f"{leader.url}/set/k")) as follower:
        variables = {"MEHDB_TOKEN_FILE": str(tmp_path / "token")}
        assert mehdb(follower.url, "set", "k", "v", **variables).number == 8
        for request in (*leader.requests, *follower.requests):
            assert b"\r\nAuthorization: Bearer s3cret\r\n" in request
            assert request.endswith(b"\r\n\r\nv")


def test_nobody_but_a_node_may_send_a_token_on(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret")
    with (
        scripted(DONE) as thief,
        scripted(answer(307, node=None, Location=f"{thief.url}/set/k")) as stranger,
        Client((stranger.url,), Credentials(tmp_path / "token")) as client,
    ):
        with pytest.raises(PeerAnswerInvalid, match="is no mehdb node"):
            client.ask(READ)
        assert thief.requests == []


def test_a_circle_of_redirects_is_left() -> None:
    with scripted(CLOSE) as server, Client((server.url,)) as client:
        server.answers = [answer(307, Location=f"{server.url}/get/k")]
        with pytest.raises(PeerAnswerInvalid, match="circle"):
            client.ask(READ)
        assert len(server.requests) == 5


@pytest.mark.parametrize("location", ["", "elsewhere", "file:///etc/passwd", "http://[", "http://a b/"])
def test_a_location_that_is_none_is_an_error_in_words(location: str) -> None:
    circle = answer(307, Location=location)
    with (
        scripted(circle) as server,
        Client((server.url,), timeout_s=0.5) as client,
        pytest.raises((PeerAnswerInvalid, PeerUnreachable)),
    ):
        client.ask(READ)


def test_a_node_is_given_the_time_that_it_asks_for() -> None:
    busy = refusal(503, "queue_full", Retry_After="2")
    with scripted(busy) as server, Client((server.url,), timeout_s=0.9) as client:
        with pytest.raises(PeerUnreachable):
            client.ask(READ)
        assert len(server.requests) == 1


def test_a_write_waits_for_a_leader_that_restarts() -> None:
    with scripted(BUSY, answer(307, Location=f"http://{ADDRESS}:{free_port()}/set/k"), DONE) as server:
        assert write(server.url) == Written(8)
