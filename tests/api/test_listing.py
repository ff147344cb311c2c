"""/keys: byte order, prefixes, and pages that are followed to the end."""

import json
import re
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import Cluster
from keys import in_url
from wire import Connection, Reply

PREFIX = "listing/"
NAMES = [
    "", "a", "a b", "a%2Fb", "a&after=z", "a+b", "a/", "a/b", "a\"b", "a\nb", "a\\b",
    "aa", "b?", "b#", "é", "ÿ", "\x7f", "Z", "z", "ﬀ", "🗝", "\U0010ffff",
]  # fmt: skip
KEYS = sorted((PREFIX + name for name in NAMES), key=str.encode)


@pytest.fixture(scope="module")
def listed(pair: Cluster) -> Cluster:
    """The pair, with `KEYS` and neighbours of theirs on both."""
    with Connection(pair.leader) as connection:
        for key in (*reversed(KEYS), "listing", "listing.", "listing0"):
            assert connection.ask("PUT", f"/set/{in_url(key.encode())}", b"1").status == 200
    pair.converge()
    return pair


@pytest.fixture(params=["leader", "follower"])
def lister(listed: Cluster, request: pytest.FixtureRequest) -> Connection:
    """A connection to a node that has all of them."""
    node = listed.leader if request.param == "leader" else listed.followers[0]
    with Connection(node) as connection:
        yield connection


def next_of(reply: Reply) -> str | None:
    """Return the target of the next page, None at the end."""
    link = reply.headers["Link"]
    if link is None:
        return None
    match = re.fullmatch(r'<(/keys\?[!-;=?-~]+)>; rel="next"', link)
    assert match, f"{link} is no link to the next page"
    return match[1]


def pages(connection: Connection, target: str) -> list[list[str]]:
    """Return all pages from *target* on."""
    found = []
    following: str | None = target
    while following:
        reply = connection.ask("GET", following)
        assert reply.status == 200
        found.append(reply.json)
        following = next_of(reply)
    return found


def test_keys_are_listed_in_byte_order(lister: Connection) -> None:
    reply = lister.ask("GET", f"/keys?prefix={PREFIX}")
    assert reply.json == KEYS
    assert reply.headers["Content-Type"] == "application/json"
    assert next_of(reply) is None


@pytest.mark.parametrize("limit", [1, 2, 7, len(KEYS) - 1, len(KEYS), len(KEYS) + 1])
def test_following_the_links_gives_every_key_once(lister: Connection, limit: int) -> None:
    found = pages(lister, f"/keys?prefix={PREFIX}&limit={limit}")
    assert [key for page in found for key in page] == KEYS
    assert all(len(page) == limit for page in found[:-1])
    assert 0 < len(found[-1]) <= limit


def folded(keys: list[str], prefix: str, delimiter: str) -> list[str]:
    """Return *keys*, which start with *prefix*, with a folder in place of those that have *delimiter* behind it."""
    names = []
    for key in keys:
        end = key.find(delimiter, len(prefix)) if delimiter else -1
        name = key if end < 0 else key[: end + len(delimiter)]
        if not names or names[-1] != name:
            names.append(name)
    return names


BOUNDS = st.just("") | st.sampled_from(KEYS) | st.text(max_size=3)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.sampled_from(["", PREFIX, *KEYS]), after=BOUNDS, before=BOUNDS, limit=st.integers(1, 30),
    delimiter=st.sampled_from(["", "", "/", "b", "//", "a/"]),
)  # fmt: skip
def test_a_listing_selects_and_folds_as_on_a_sorted_list(
    listed: Cluster, prefix: str, after: str, before: str, limit: int, delimiter: str
) -> None:
    with Connection(listed.leader) as connection:
        everything = connection.ask("GET", "/keys?limit=10000").json
        assert everything == sorted(everything, key=str.encode)
        within = [
            key for key in everything if key.startswith(prefix) and not (before and key.encode() >= before.encode())
        ]
        # A cursor that is a folder has been listed, with all that is in it; one within a folder has not.
        passed = after if folded([after], prefix, delimiter) == [after] and delimiter in after[len(prefix) :] else None
        is_folder = bool(delimiter and passed and passed.startswith(prefix))
        within = [key for key in within if key.encode() > after.encode() and not (is_folder and key.startswith(after))]
        wanted = folded(within, prefix, delimiter)
        # With quote_via, as a client's library would: %20 or +, both are a space in a query.
        query = {"limit": str(limit), "after": after, "before": before, "delimiter": delimiter}
        target = "/keys?" + "&".join(f"{name}={quote(text, safe='')}" for name, text in query.items())
        target += f"&prefix={quote(prefix).replace('%20', '+')}"
        reply = connection.ask("GET", target)
        assert reply.json == wanted[:limit]
        assert (next_of(reply) is None) == (len(wanted) <= limit)
        assert [name for page in pages(connection, target) for name in page] == wanted


def entries(reply: Reply) -> list[dict[str, Any]]:
    assert reply.headers["Content-Type"] == "application/x-ndjson"
    return [json.loads(line) for line in reply.body.splitlines()]


def test_values_are_listed_with_all_that_is_known_of_them(listed: Cluster, connection: Connection) -> None:
    first = connection.ask("PUT", "/set/values/a?ttl=1000", "é".encode(), {"Content-Type": "text/plain"}).revision
    connection.ask("PUT", "/set/values/b/c", b"\xff\x00")
    connection.ask("PUT", "/set/values/b/d", b"")
    connection.ask("PUT", "/set/values/e", b"")
    position = listed.converge()
    for node in listed.nodes:
        with Connection(node) as lister:
            reply = lister.ask("GET", "/keys?prefix=values/&values=true")
            a, c, d, e = entries(reply)
            assert 900 < a.pop("ttl") <= 1000
            assert a == {"key": "values/a", "revision": first, "size": 2, "content_type": "text/plain", "value": "é"}
            assert c == {"key": "values/b/c", "revision": first + 1, "size": 2, "content_type": None, "base64": "/wA="}
            assert (d["value"], d["size"], e["revision"]) == ("", 0, first + 3)
            assert reply.revision == position["revision"]
            folders = entries(lister.ask("GET", "/keys?prefix=values/&values=true&delimiter=/"))
            assert [line.get("key", line.get("prefix")) for line in folders] == ["values/a", "values/b/", "values/e"]


def test_a_page_of_large_values_ends_early_and_is_followed(listed: Cluster, connection: Connection) -> None:
    for number in range(5):
        connection.ask("PUT", f"/set/large/{number}", bytes(700_000))
    listed.converge()
    found, target = [], "/keys?prefix=large/&values=true"
    while target:
        reply = connection.ask("GET", target)
        found.append([line["key"] for line in entries(reply)])
        target = next_of(reply) or ""
    assert [key for page in found for key in page] == [f"large/{number}" for number in range(5)]
    assert [len(page) for page in found] == [2, 2, 1]
    for number in range(5):
        connection.ask("DELETE", f"/delete/large/{number}")


def test_a_page_is_one_state_of_the_store(listed: Cluster, connection: Connection) -> None:
    """Two keys are only ever changed together: no listing sees one change without the other, or an older revision."""
    with Connection(listed.leader) as writer:
        for number in range(60):
            body = "".join(f'{{"op":"set","key":"both/{side}","value":"{number}"}}\n' for side in "lr").encode()
            writer.send(b"POST /batch HTTP/1.1\r\nHost: n\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            reply = connection.ask("GET", "/keys?prefix=both/&values=true")
            left, right = entries(reply) or [{"value": None, "revision": 0}] * 2
            assert left["value"] == right["value"]
            assert reply.revision >= right["revision"]
            assert writer.reply().status == 200


@pytest.mark.parametrize("query", ["values=yes", "values=", "limit=10001", "before=%ff", "prefix=a&prefix=b"])
def test_a_listing_that_cannot_be_understood_is_refused(connection: Connection, query: str) -> None:
    reply = connection.ask("GET", f"/keys?{query}")
    assert (reply.status, reply.error) == (400, "bad_parameter")


def test_a_deleted_key_is_not_listed_and_a_cursor_need_not_exist(listed: Cluster) -> None:
    with Connection(listed.leader) as connection:
        for key in ("gone/a", "gone/b", "gone/c"):
            connection.ask("PUT", f"/set/{key}", b"1")
        first = connection.ask("GET", "/keys?prefix=gone/&limit=2")
        connection.ask("DELETE", "/delete/gone/b")
        assert connection.ask("GET", next_of(first) or "").json == ["gone/c"]
        assert connection.ask("GET", "/keys?prefix=gone/").json == ["gone/a", "gone/c"]


def test_a_prefix_that_nothing_has_lists_nothing(lister: Connection) -> None:
    assert lister.ask("GET", "/keys?prefix=nothing/has/this").body == b"[]\n"


def test_a_listing_has_an_end_even_without_a_limit(listed: Cluster) -> None:
    with Connection(listed.leader) as connection:
        for number in range(1001):
            connection.send(b"PUT /set/many/%d HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" % number)
        assert {connection.reply().status for _ in range(1001)} == {200}
        first, second = pages(connection, "/keys?prefix=many/")
        assert (len(first), len(second)) == (1000, 1)
