"""Any legal key round-trips, and no two keys collide: on the wire, with raw targets (promise 7)."""

import unicodedata
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cluster import Cluster, Node, curl
from keys import KEYS, encodings, in_url
from wire import Connection, ask

# Each example has keys of its own making and deletes them, so that a connection may serve them all.
SHARED = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SHARED
@given(key=KEYS, data=st.data())
def test_any_key_round_trips_however_it_is_written(connection: Connection, key: bytes, data: st.DataObject) -> None:
    # Drawn before the first request: hypothesis may end an example at any draw, and would leave its key behind.
    put, get, delete = (data.draw(encodings(key)) for _ in range(3))
    value = b"value of " + key
    assert connection.ask("PUT", f"/set/{put}", value).status == 200
    assert connection.ask("GET", f"/get/{get}").body == value
    # The first key with a prefix is the prefix itself: other tests may have left longer ones.
    assert connection.ask("GET", f"/keys?prefix={in_url(key)}&limit=1").json == [key.decode()]
    assert connection.ask("DELETE", f"/delete/{delete}").status == 200
    assert connection.ask("GET", f"/get/{get}").status == 404
    assert key.decode() not in connection.ask("GET", f"/keys?prefix={in_url(key)}&limit=1").json


def look_alikes(key: bytes) -> list[bytes]:
    """Return keys that a careless server takes for *key*."""
    text = key.decode()
    others = [
        in_url(key), text + "/", "/" + text, text + " ", text + "?", text + "+",
        f"./{text}", f"x/../{text}", f"{text}/.",
        text.replace("/", "//"), text.replace("+", " "), text.replace("/", "%2F"),
        text.strip(), text.casefold(), text.swapcase(),
        *(unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC")),
    ]  # fmt: skip
    return [other.encode() for other in others if 0 < len(other.encode()) <= 1024]


@SHARED
@given(key=KEYS, data=st.data())
def test_two_keys_never_collide(connection: Connection, key: bytes, data: st.DataObject) -> None:
    other = data.draw(st.sampled_from(look_alikes(key)) | KEYS)
    assume(key != other)
    urls = {one: data.draw(encodings(one)) for one in (key, other)}
    for one in urls:
        assert connection.ask("PUT", f"/set/{in_url(one)}", b"value of " + one).status == 200
    for one, url in urls.items():
        assert connection.ask("GET", f"/get/{url}").body == b"value of " + one
    assert connection.ask("DELETE", f"/delete/{in_url(key)}").status == 200
    assert connection.ask("GET", f"/get/{in_url(other)}").status == 200
    assert connection.ask("DELETE", f"/delete/{in_url(other)}").status == 200


def test_an_escaped_slash_and_a_slash_are_one_key(leader: Node) -> None:
    ask(leader, "PUT", "/set/one%2Fkey", b"1")
    assert ask(leader, "GET", "/get/one/key").body == b"1"
    assert ask(leader, "GET", "/get/one%2fkey").body == b"1"


def test_a_key_is_decoded_once_and_a_byte_that_is_no_utf8_is_refused(leader: Node) -> None:
    assert ask(leader, "PUT", "/set/%25ff", b"percent").status == 200
    assert ask(leader, "GET", "/get/%25ff").body == b"percent"
    assert ask(leader, "GET", "/keys?prefix=%25ff").json == ["%ff"]
    assert ask(leader, "GET", "/get/%ff").error == "bad_key"


@pytest.mark.parametrize("target", ["a//b", "/a", "a/", "a/../b", "../a", "..", ".", "a/./b", "//"])
def test_slashes_and_dots_are_bytes_like_any_other(leader: Node, target: str) -> None:
    key = f"dots/{target}"
    assert ask(leader, "PUT", f"/set/{key}", target.encode()).status == 200
    assert ask(leader, "GET", f"/get/{key}").body == target.encode()
    assert key in ask(leader, "GET", "/keys?prefix=dots/").json


@pytest.mark.parametrize("character", ["a", "%61", "%C3%A9", "%F0%9F%97%9D"])
def test_the_longest_key_fits_however_it_is_written(leader: Node, character: str) -> None:
    """3 KiB of target for 1 KiB of key: still below what servers and proxies take as a request line."""
    longest = character * (1024 // len(unquote_to_bytes(character)))
    assert ask(leader, "PUT", f"/set/{longest}", character.encode()).status == 200
    assert ask(leader, "GET", f"/get/{longest}").body == character.encode()
    assert ask(leader, "PUT", f"/set/{longest}a").error == "bad_key"
    assert ask(leader, "DELETE", f"/delete/{longest}").status == 200


def test_every_node_reads_the_same_key(pair: Cluster) -> None:
    leader, follower = pair.nodes
    ask(leader, "PUT", "/set/%2Fsame%20k%C3%A9y%3F", b"1")
    pair.converge()
    assert ask(follower, "GET", "/get//same%20k%c3%a9y%3f").body == b"1"


def test_curl_reads_what_it_wrote(leader: Node) -> None:
    url = "with%20space/%F0%9F%97%9D/../%23"
    curl("--path-as-is", "-XPUT", "--data-binary", "1", f"{leader.url}/set/{url}")
    assert curl("--path-as-is", f"{leader.url}/get/{url}") == b"1"
    assert ask(leader, "GET", "/keys?prefix=with%20space").json == ["with space/🗝/../#"]
