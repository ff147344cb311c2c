"""What nodes ask each other, row by row of the design's table, asked by hand."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from time import monotonic
from typing import Any

import pytest

from cluster import Cluster, Node, eventually
from mehdb.api.replicate import FOLLOWERS_MAX, Followers
from mehdb.model import GENESIS, PAGE_BYTES, History, Page, Revision, decode_page
from mehdb.store.seal import seal
from wire import Connection, Reply, ask, request

HISTORY = History("aa" * 16)

SOON_S = 5.0  # far below the waits that are asked for


@pytest.fixture(autouse=True)
def written(leader: Node) -> dict[str, Any]:
    """Let there be a change, and return the position behind it."""
    ask(leader, "PUT", "/set/replicated", b"1")
    return leader.position()


def replicate_target(**parameters: object) -> str:
    return "/replicate?" + "&".join(f"{name}={value}" for name, value in parameters.items())


def replicate(asked: Node, /, **parameters: object) -> Reply:
    return ask(asked, "GET", replicate_target(**parameters))


def at(position: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that say *position*."""
    return {"history": position["history"], "after": position["revision"], "chain": position["chain"]}


def long_poll(position: dict[str, Any], node: str) -> bytes:
    """Return the request of a follower that waits for what comes after *position*."""
    return request("GET", replicate_target(**at(position), node=node, wait=60))


def page_of(reply: Reply) -> Page:
    assert (reply.status, reply.headers["Content-Type"]) == (200, "application/vnd.msgpack")
    return decode_page(reply.body)


def everything(node: Node) -> Iterator[tuple[Page, int]]:
    """Yield all pages of *node*, as a follower asks for them, and how many bytes each had."""
    position: dict[str, Any] = {"snapshot": "no"}
    while (reply := replicate(node, **position)).status != 204:
        page = page_of(reply)
        yield page, len(reply.body)
        position = {"history": page.history, "after": page.end.revision, "chain": page.chain.hex()}


# The table.


def test_an_empty_follower_is_sent_for_the_snapshot(leader: Node) -> None:
    for parameters in ({}, {"after": 0}, {"after": 0, "chain": GENESIS.hex()}):
        started_s = monotonic()
        reply = replicate(leader, **parameters, wait=60)
        assert monotonic() - started_s < SOON_S
        assert (reply.status, reply.error) == (410, "compacted")
        assert "GET /snapshot" in reply.json["message"]


def test_an_empty_follower_that_can_do_without_the_snapshot_gets_the_first_page(
    leader: Node, written: dict[str, Any]
) -> None:
    for parameters in (
        {"snapshot": "no"},
        {"snapshot": "no", "after": 0},
        {"snapshot": "no", "after": 0, "chain": GENESIS.hex()},
        {"after": 0, "history": written["history"]},
        {"after": 0, "history": "0123456789abcdef" * 2},  # one without changes: nothing is lost with it
    ):
        page = page_of(replicate(leader, **parameters))
        assert (page.history, page.epoch, page.after) == (written["history"], 1, 0)
        assert page.changes[0].revision == 1


def test_a_follower_behind_gets_what_it_lacks_and_does_not_wait(leader: Node, written: dict[str, Any]) -> None:
    ask(leader, "PUT", "/set/replicated/value", b"2", {"Content-Type": "text/plain"})
    ask(leader, "DELETE", "/delete/replicated/value")
    started_s = monotonic()
    reply = replicate(leader, **at(written), wait=60)
    assert monotonic() - started_s < SOON_S
    page = page_of(reply)
    assert page.after == written["revision"]
    assert [(change.key, change.value, change.content_type) for change in page.changes] == [
        (b"replicated/value", b"2", "text/plain"),
        (b"replicated/value", None, None),
    ]
    assert (reply.headers["Mehdb-Epoch"], reply.headers["Mehdb-Revision"]) == ("1", str(written["revision"] + 2))
    now = leader.position()
    assert (page.end.history, page.end.revision, page.end.chain.hex()) == tuple(now.values())


@pytest.mark.parametrize("wait_s", [0, 0.3])
def test_a_follower_at_the_head_gets_nothing_after_its_wait(
    leader: Node, written: dict[str, Any], wait_s: float
) -> None:
    started_s = monotonic()
    reply = replicate(leader, **at(written), wait=wait_s)
    assert wait_s <= monotonic() - started_s < wait_s + SOON_S
    assert (reply.status, reply.body, reply.headers["Content-Length"]) == (204, b"", None)
    assert {name: reply.headers[f"Mehdb-{name}"] for name in ("Epoch", "Revision", "History")} == {
        "Epoch": "1", "Revision": str(written["revision"]), "History": written["history"]
    }  # fmt: skip


def test_a_follower_at_the_head_gets_the_next_change_at_once(leader: Node, written: dict[str, Any]) -> None:
    with Connection(leader) as waiting:
        waiting.send(long_poll(written, "waiter"))
        # It is listed once its request is being answered.
        eventually(lambda: any(one.node == "waiter" for one in leader.status().followers), "the long poll to be open")
        started_s = monotonic()
        ask(leader, "PUT", "/set/replicated/next", b"next")
        page = page_of(waiting.reply())
        assert monotonic() - started_s < SOON_S
    assert [(change.key, change.value) for change in page.changes] == [(b"replicated/next", b"next")]


def test_many_followers_wait_for_the_same_change(leader: Node, written: dict[str, Any]) -> None:
    with ExitStack() as stack:
        waiting = [stack.enter_context(Connection(leader)) for _ in range(20)]
        for number, connection in enumerate(waiting):
            connection.send(long_poll(written, f"crowd-{number}"))
        eventually(lambda: sum(one.node.startswith("crowd-") for one in leader.status().followers) == 20, "all to wait")
        ask(leader, "PUT", "/set/replicated/next", b"next")
        pages = [page_of(connection.reply()) for connection in waiting]
    assert pages[0].after == written["revision"]
    assert all(page == pages[0] for page in pages)


def test_a_follower_of_another_sequence_is_diverged(leader: Node, written: dict[str, Any]) -> None:
    other = "0123456789abcdef" * 2
    ask(leader, "PUT", "/set/replicated", b"2")
    for name, parameters in {
        "another history": at(written) | {"history": other},
        "ahead": at(written) | {"after": written["revision"] + 2},
        "far ahead": at(written) | {"after": 2**63 - 1},
        "another chain at the head": at(leader.position()) | {"chain": other},
        "another chain behind the head": at(written) | {"chain": other},
        "the chain of another revision": at(written) | {"after": written["revision"] - 1},
        "another chain at the origin": {"after": 0, "chain": other},
        "no chain": {"history": written["history"], "after": 1},
    }.items():
        started_s = monotonic()
        reply = replicate(leader, **parameters, wait=60)
        assert monotonic() - started_s < SOON_S
        assert (reply.status, reply.error) == (409, "diverged"), name


@pytest.mark.parametrize(
    "query",
    [
        "history=", "history=xyz", "history=" + "A" * 32, "history=" + "a" * 33,
        "chain=", "chain=" + "0" * 31, "chain=" + "g" * 32,
        "after=", "after=-1", "after=1.0", "after=9223372036854775808", "after=" + "9" * 5000,
        "durable=x", "durable=" + "0" * 20 + "9" * 50,
        "wait=-1", "wait=61", "wait=nan", "wait=1e1",
        "node=", "node=a%20b", "node=a/b", "node=%C3%A9", "node=" + "a" * 254,
        "snapshot=", "snapshot=yes", "limit=1", "after=0&after=0",
    ],
)  # fmt: skip
def test_bad_parameters_are_refused(pair: Cluster, query: str) -> None:
    for node in pair.nodes:
        reply = ask(node, "GET", f"/replicate?{query}")
        assert (reply.status, reply.error) == (400, "bad_parameter")


# Pages.


def test_pages_put_end_to_end_are_the_whole_history(leader: Node) -> None:
    for number in range(7):
        ask(leader, "PUT", f"/set/replicated/large/{number}", bytes(400_000))
    pages, sizes = zip(*everything(leader), strict=True)
    chain, revision = GENESIS, Revision(0)
    for page in pages:
        assert page.after == revision
        for change in page.changes:
            revision = Revision(revision + 1)
            assert change.revision == revision
            _, chain = seal(chain, change)
        assert page.chain == chain
    assert {"history": pages[-1].history, "revision": revision, "chain": chain.hex()} == leader.position()
    assert len(pages) >= 3
    assert all(size > 0.9 * PAGE_BYTES for size in sizes[:-1])
    for page, size in zip(pages, sizes, strict=True):
        assert size - len(page.changes[-1].value or b"") < 1.1 * PAGE_BYTES, "it ends with the change that fills it"


def test_a_follower_hands_on_what_it_has(pair: Cluster) -> None:
    leader, follower = pair.nodes
    position = pair.converge()
    assert [page for page, _ in everything(follower)] == [page for page, _ in everything(leader)]
    assert replicate(follower, **at(position)).status == 204
    assert replicate(follower, **at(position) | {"after": position["revision"] + 1}).status == 409


def test_a_position_is_told_by_every_node(pair: Cluster) -> None:
    position = pair.converge()
    for node, role in zip(pair.nodes, ("leader", "follower"), strict=True):
        reply = ask(node, "GET", "/position")
        assert reply.headers["Content-Type"] == "application/json"
        assert reply.json == {"node": node.name, "role": role, "state": "serving", "epoch": 1} | position
        assert re.fullmatch("[0-9a-f]{32}", reply.json["history"])
        assert re.fullmatch("[0-9a-f]{32}", reply.json["chain"])


def test_a_follower_that_holds_nothing_hands_on_nothing(cluster: Cluster) -> None:
    cluster.add()
    follower = cluster.add().start(ready=False)
    assert replicate(follower).error == "not_synced"
    assert ask(follower, "GET", "/position").json == {
        "node": "mehdb-1", "role": "follower", "state": "syncing", "epoch": 0,
        "history": None, "revision": 0, "chain": "00" * 16,
    }  # fmt: skip


# Who pulls.


def followers(node: Node) -> dict[str, tuple[int, int]]:
    """Return revision and lag of each."""
    return {one.node: (one.revision, one.lag_revisions) for one in node.status().followers}


def test_a_follower_acknowledges_with_its_next_request(leader: Node, written: dict[str, Any]) -> None:
    revision = written["revision"]
    replicate(leader, node="by-hand", snapshot="no")
    assert followers(leader)["by-hand"] == (0, revision)
    replicate(leader, **at(written), durable=revision - 1, node="by-hand")
    assert followers(leader)["by-hand"] == (revision - 1, 1)
    replicate(leader, **at(written), node="by-hand")
    assert followers(leader)["by-hand"] == (revision, 0)
    ask(leader, "PUT", "/set/replicated", b"2")
    assert followers(leader)["by-hand"] == (revision, 1)


def test_one_that_gives_no_name_is_diverged_or_needs_a_snapshot_acknowledges_nothing(
    leader: Node, written: dict[str, Any]
) -> None:
    before = set(followers(leader))
    replicate(leader, **at(written))
    replicate(leader, node="empty")
    replicate(leader, **at(written) | {"chain": "0" * 32}, node="diverged")
    assert set(followers(leader)) <= before


def test_names_that_clients_make_up_are_listed_but_never_without_bound() -> None:
    seen = Followers()
    for number in range(3 * FOLLOWERS_MAX):
        seen.note(f"made-up-{number:03}", Revision(number), HISTORY)
    listed = seen.status(Revision(1000))
    assert [one.node for one in listed] == [
        f"made-up-{number}" for number in range(2 * FOLLOWERS_MAX, 3 * FOLLOWERS_MAX)
    ]
    assert [one.lag_revisions for one in listed] == [1000 - one.revision for one in listed]


def test_who_is_connected_is_missing_until_it_holds_the_head_and_knows_of_the_drain() -> None:
    seen = Followers()
    for node, revision in (("behind", 6), ("unaware", 7), ("fine", 7)):
        seen.note(node, Revision(revision), HISTORY)
    for node in ("behind", "fine", "never heard of"):
        seen.tell(node)
    assert seen.missing(Revision(7)) == ("behind", "unaware")
    seen.note("behind", Revision(7), HISTORY)
    seen.note("unaware", Revision(7), HISTORY)
    assert seen.missing(Revision(7)) == ("unaware",), "who was told stays told"
    seen.tell("unaware")
    assert seen.missing(Revision(7)) == ()
    assert not seen.is_told("never heard of")


# The end.


def test_long_polls_end_at_once_when_the_node_is_told_to_stop(cluster: Cluster) -> None:
    leader = cluster.start(1).leader
    ask(leader, "PUT", "/set/k", b"v")
    with Connection(leader) as waiting, Connection(leader) as idle:
        assert idle.ask("GET", "/livez").status == 200
        waiting.send(long_poll(leader.position(), "waiter"))
        eventually(lambda: leader.status().followers, "the long poll to be open")
        started_s = monotonic()
        leader.stop()
        assert monotonic() - started_s < SOON_S
        assert waiting.reply().status == 204
        assert idle.rest() == b""
