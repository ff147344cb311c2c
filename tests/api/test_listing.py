"""/keys: byte order, prefixes, and pages that are followed to the end."""

import re
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


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.sampled_from(["", PREFIX, *KEYS]),
    after=st.sampled_from(KEYS) | st.text(max_size=3),
    limit=st.integers(1, 30),
)
def test_prefix_after_and_limit_select_as_on_a_sorted_list(
    listed: Cluster, prefix: str, after: str, limit: int
) -> None:
    with Connection(listed.leader) as connection:
        everything = connection.ask("GET", "/keys?limit=10000").json
        assert everything == sorted(everything, key=str.encode)
        wanted = [key for key in everything if key.startswith(prefix) and key.encode() > after.encode()]
        # With quote_via, as a client's library would: %20 or +, both are a space in a query.
        reply = connection.ask(
            "GET", f"/keys?limit={limit}&after={quote(after)}&prefix={quote(prefix).replace('%20', '+')}"
        )
        assert reply.json == wanted[:limit]
        assert (next_of(reply) is None) == (len(wanted) <= limit)


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
