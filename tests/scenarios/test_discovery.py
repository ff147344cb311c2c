"""Pods that have no name in DNS: followers find the leader, and a leader its followers, behind `mehdb-peers`.

All pods of these tests share one machine, so that whoever connects to a leader comes from the leader's own address: it
learns nothing of guests.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster import eventually
from dns_server import Mood
from guards import Authority, Tokens
from pods import DOMAIN, PORT, Pod, Pods, deaf, pods

LEADER = f"mehdb-0.mehdb.{DOMAIN}"
PEERS = f"mehdb-peers.{DOMAIN}"
IMPATIENT_S = 2.0  # a loop that waits for a resolver answers nothing meanwhile
SEARCHED_S = 5.0  # in which it would have been found
THREADS_MAX = 40  # those of a node that is at work, and one for each name that it looks up at once


@pytest.fixture
def them(tmp_path: Path) -> Iterator[Pods]:
    with pods(tmp_path) as them:
        yield them


def started(them: Pods, count: int) -> list[Pod]:
    """Return *count* pods that are ready, in one position, with a value in them."""
    all_of_them = [them.add(ordinal) for ordinal in range(count)]
    for pod in all_of_them:
        pod.start()
    all_of_them[0].put("k", b"v")
    them.cluster.converge()
    return all_of_them


def follows(follower: Pod, leader: Pod, value: bytes) -> None:
    """Expect what is written to *leader* on *follower*."""
    assert leader.put("k", value).is_success

    def arrived() -> bool:
        return follower.get("/get/k").content == value

    try:
        eventually(arrived, f"{follower.name} to follow")
    except AssertionError as error:
        error.add_note(f"its log:\n{follower.log}")
        raise


def test_a_leader_that_lost_its_volume_recovers_from_followers_that_have_no_name(them: Pods) -> None:
    leader, *followers = started(them, 3)
    history = leader.status().history
    them.cluster.stop()
    shutil.rmtree(leader.volume)
    for follower in followers:
        follower.start(ready=False)
    assert not any(follower.ready() for follower in followers)
    leader.start()
    assert leader.get("/get/k").content == b"v"
    assert leader.status().history == history
    assert leader.log.count("leading epoch") == 2, f"it has led with nothing:\n{leader.log}"
    follows(followers[0], leader, b"w")
    follows(followers[1], leader, b"x")


def test_a_follower_is_ready_before_its_leader_has_a_name(them: Pods) -> None:
    them.hidden.add(LEADER)
    leader = them.add(0).start()
    leader.put("k", b"v")
    follower = them.add(1).start()
    assert follower.get("/get/k").content == b"v"
    assert follower.put("k", b"w", params={"forward": "true"}).is_success, "what it passes on does not find the leader"
    follows(follower, leader, b"x")
    assert LEADER not in them.dns.records
    elsewhere = follower.put("k", b"y")
    assert elsewhere.headers["Location"] == f"http://{LEADER}:{PORT}/set/k", (
        "clients are sent to a name, never elsewhere"
    )
    them.hidden.clear()
    follows(follower, leader, b"z")


def test_a_leader_that_is_not_ready_is_found_and_takes_what_its_follower_holds(them: Pods) -> None:
    """Neither is ready, so neither has a name: each finds the other."""
    leader, follower = started(them, 2)
    them.cluster.stop()
    shutil.rmtree(leader.volume)
    with deaf("10.77.0.99"):
        them.stale.append("10.77.0.99")  # it waits for this one, and so is not ready
        leader.start(ready=False)
        follower.start(ready=False)
        eventually(lambda: "http://10.77.0.99" in (leader.status().reason or ""), "the leader to say for whom it waits")
        assert not leader.ready()
        eventually(lambda: f"found node=http://{LEADER}:{PORT}" in follower.log, "the follower to find the leader")
        them.stale.clear()
        eventually(leader.ready, "the leader to take what the follower holds")
    assert leader.get("/get/k").content == b"v"
    follows(follower, leader, b"w")


@contextlib.contextmanager
def old_address(them: Pods, what: str, address: str) -> Iterator[None]:
    """Have *what* at the *address* that a leader had, and DNS go on naming it for the leader."""
    them.frozen[LEADER] = [address]
    if what == "silent":
        with deaf(address):
            yield
    elif what == "a follower":
        them.add(2, address).start()
        yield
    else:
        yield


@pytest.mark.parametrize("what", ["gone", "silent", "a follower"])
@pytest.mark.parametrize("cached", ["the old address", "no such name"])
def test_followers_find_a_leader_that_moved(them: Pods, what: str, cached: str) -> None:
    leader, follower = started(them, 2)
    leader.kill()
    moved = them.add(0, "10.77.0.20")
    if what == "a follower":
        moved.start()  # whoever takes its address shall find it at its new one
    with old_address(them, what, leader.address):
        if cached == "no such name":
            them.frozen.clear()
            them.hidden.add(LEADER)
        if not moved.process:
            moved.start()
        assert follower.ready()
        follows(follower, moved, b"w")
        assert follower.put("k", b"x", params={"forward": "true"}).is_success
        assert moved.get("/get/k").content == b"x"
        if what == "a follower":
            other = them.cluster.nodes[2]
            assert isinstance(other, Pod)
            follows(other, moved, b"y")
        them.frozen.clear()
        them.hidden.clear()
        follows(follower, moved, b"z")


def test_an_address_that_is_listed_and_silent_delays_no_follower_for_long(them: Pods) -> None:
    them.hidden.add(LEADER)
    leader = them.add(0).start()
    with deaf("10.77.0.99"):
        them.stale += ["10.77.0.98", "10.77.0.99"]  # nobody listens at the first
        eventually(lambda: "10.77.0.99" in them.dns.records[PEERS], "them to be listed")
        follower = them.add(1).start()
        follows(follower, leader, b"v")


def test_a_silent_resolver_holds_up_no_read_and_no_stop(them: Pods) -> None:
    them.resolver = "timeout:30 attempts:3"  # longer than a stop may take
    leader, follower = started(them, 2)
    them.dns.mood = Mood.SILENT
    follower.stop()
    leader.kill()
    follower.start(ready=False)
    leader.start(ready=False)
    with httpx.Client(trust_env=False, timeout=IMPATIENT_S) as client:

        def leads() -> bool:
            for pod in (leader, follower):
                assert client.get(f"{pod.url}/get/k").content == b"v"
                assert pod.process
                threads = len(list(Path(f"/proc/{pod.process.pid}/task").iterdir()))
                assert threads <= THREADS_MAX, f"{pod.name} has {threads} threads"
            return leader.ready()

        eventually(leads, "a leader with data to lead without asking anybody", 40)
    follower.stop()
    leader.stop()


def test_who_starts_beside_a_silent_resolver_goes_on_when_it_answers(them: Pods) -> None:
    leader, follower = started(them, 2)
    them.cluster.stop()
    them.dns.mood = Mood.SILENT
    leader.start(ready=False)
    follower.start(ready=False)
    eventually(lambda: "was not found out" in (follower.status().reason or ""), "the follower to say what it lacks")
    them.dns.mood = Mood.WELL
    eventually(leader.ready, "the leader to find out that its peers agree")
    follows(follower, leader, b"w")


def test_a_resolver_that_fails_is_not_taken_for_an_answer(them: Pods) -> None:
    """A leader that has lost its volume would otherwise take its followers for absent, and begin anew."""
    leader, follower = started(them, 2)
    history = leader.status().history
    them.cluster.stop()
    shutil.rmtree(leader.volume)
    them.dns.mood = Mood.FAILING
    follower.start(ready=False)
    leader.start(ready=False)
    eventually(lambda: PEERS in (leader.status().reason or ""), "the leader to say what it cannot find out")
    assert not leader.ready()
    them.dns.mood = Mood.WELL
    eventually(leader.ready, "the leader to find its follower")
    assert leader.status().history == history
    follows(follower, leader, b"w")


def test_a_wildcard_elsewhere_is_nobody(them: Pods) -> None:
    """A resolver that does not find a name tries it in other domains, and in one of them anything may be found."""
    for name in (LEADER, f"mehdb-1.mehdb.{DOMAIN}", PEERS):
        them.frozen[f"{name}.cluster.local"] = ["10.77.0.99"]
    them.hidden.add(PEERS)
    with deaf("10.77.0.99"):
        leader = them.add(0).start()
        leader.put("k", b"v")
        assert leader.get("/get/k", params={"consistency": "leader"}).content == b"v"


def test_slow_answers_are_answers(them: Pods) -> None:
    """They take longer than anybody waits for them."""
    them.hidden.add(LEADER)
    leader = them.add(0).start()
    leader.put("k", b"v")
    them.dns.delay_s = 3.0
    follower = them.add(1).start()
    follows(follower, leader, b"w")


def test_pods_that_show_certificates_find_each_other_without_names(them: Pods, tmp_path: Path) -> None:
    """Who is asked at an address must have the certificate of its name."""
    authority, tokens = Authority(tmp_path), Tokens(tmp_path / "tokens")
    tokens.give("node", "replicate")
    tokens.give("operator", "admin")
    certificate = authority.issue("nodes", f"*.mehdb.{DOMAIN}")
    them.cluster.scheme = "https"
    # The test asks at addresses.
    them.cluster.client = authority.client(certificate, tokens.headers("operator"), any_name=True)
    guards = {
        "MEHDB_OPEN": "", "MEHDB_TOKENS_FILE": str(tokens.path), "MEHDB_TOKEN_FILE": str(tokens.file("node")),
        "MEHDB_TLS_CERT": str(certificate.cert), "MEHDB_TLS_KEY": str(certificate.key),
        "MEHDB_TLS_CA": str(authority.ca), "MEHDB_TLS_VERIFY_CLIENTS": "yes",
    }  # fmt: skip
    them.hidden.add(LEADER)
    leader = them.add(0, **guards).start()
    follower = them.add(1, **guards).start()
    follows(follower, leader, b"v")
    before = leader.status().history
    leader.kill()
    follower.stop()
    shutil.rmtree(leader.volume)
    follower.start(ready=False)
    leader.start()
    assert (leader.status().history, leader.get("/get/k").content) == (before, b"v")
    follows(follower, leader, b"w")


def test_a_pod_of_another_authority_is_not_taken_for_the_leader(them: Pods, tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    them.cluster.scheme = "https"
    for ordinal, signer in enumerate((authority, other)):
        certificate = signer.issue(f"node-{ordinal}", f"*.mehdb.{DOMAIN}")
        them.cluster.client = signer.client(any_name=True)
        pod = them.add(
            ordinal, MEHDB_TLS_CERT=str(certificate.cert), MEHDB_TLS_KEY=str(certificate.key),
            MEHDB_TLS_CA=str(signer.ca),
        )  # fmt: skip
        pod.start(ready=ordinal == 0)
    assert "CERTIFICATE_VERIFY_FAILED" in (pod.status().reason or "")
    them.hidden.add(LEADER)
    with pytest.raises(AssertionError, match="to be ready"):
        eventually(pod.ready, "it to be ready", deadline_s=SEARCHED_S)
