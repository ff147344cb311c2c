"""Keys, positions and pages, and the wire form of pages."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mehdb.errors import BadKey, PeerAnswerInvalid
from mehdb.model import (
    GENESIS,
    KEY_BYTES_MAX,
    ORIGIN,
    Chain,
    Change,
    Epoch,
    History,
    Page,
    Position,
    Revision,
    checked_key,
    decode_drain_report,
    decode_page,
    decode_position,
    decode_status,
    encode_page,
    error_message,
)

INT64_MAX = 2**63 - 1
REVISIONS = st.integers(0, INT64_MAX).map(Revision)
CHAINS = st.binary(min_size=16, max_size=16).map(Chain)
HISTORIES = st.binary(min_size=16, max_size=16).map(lambda data: History(data.hex()))
CHANGES = st.builds(
    Change,
    REVISIONS,
    st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=20).map(str.encode),
    st.none() | st.binary(max_size=50),
    st.none() | st.text(max_size=20),
    st.none() | st.integers(0, INT64_MAX),
)
PAGES = st.builds(
    Page, HISTORIES, st.integers(0, INT64_MAX).map(Epoch), REVISIONS, CHAINS, st.lists(CHANGES, max_size=5).map(tuple)
)

GOLDEN_PAGE = Page(
    History("00112233445566778899aabbccddeeff"),
    Epoch(7),
    ORIGIN,
    Chain(bytes.fromhex("2e9cf45dad42e71680885c51cd14880c")),
    (
        Change(Revision(1), b"test", b"hello"),
        Change(Revision(2), "clé/ü".encode(), b"", "text/plain; charset=utf-8", 1_700_000_000),
        Change(Revision(3), b"test", None),
    ),
)
GOLDEN_BYTES = bytes.fromhex(
    "95d920" + b"00112233445566778899aabbccddeeff".hex() + "0700"  # history, epoch, after
    "c4102e9cf45dad42e71680885c51cd14880c"  # chain
    "93"
    "9501c40474657374c40568656c6c6fc0c0"
    "9502c407636cc3a92fc3bcc400b9746578742f706c61696e3b20636861727365743d7574662d38ce6553f100"
    "9503c40474657374c0c0c0"
)


def page_with(**fields: object) -> bytes:
    """Return msgpack of a page with one change, and one field of either replaced."""
    page = {"history": "aa" * 16, "epoch": 1, "after": 0, "chain": bytes(16)}
    change = {"revision": 1, "key": b"k", "value": b"v", "content_type": None, "expires_at": None}
    changes = [[fields.get(name, value) for name, value in change.items()]]
    return msgspec.msgpack.encode([*(fields.get(name, value) for name, value in page.items()), changes])


# Keys.


@pytest.mark.parametrize(
    "key",
    [
        b"a",
        b"/",
        b"a//b/",
        b"../..",
        b" ",
        b"\n\x7f\x01",
        b"%2f",
        "clé/ключ/鍵/🔑".encode(),
        "\ufeff\ufffe\uffff\U0010ffff".encode(),
        b"k" * KEY_BYTES_MAX,
        "é".encode() * (KEY_BYTES_MAX // 2),
    ],
)
def test_a_good_key_is_returned_as_it_is(key: bytes) -> None:
    assert checked_key(key) == key


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b"k" * 1025, "1025 bytes", id="too long"),
        pytest.param("é".encode() * 513, "1026 bytes", id="513 characters of two bytes"),
        pytest.param(b"a\0b", "NUL", id="NUL inside"),
        pytest.param(b"\0", "NUL", id="NUL alone"),
        pytest.param("é\0".encode(), "NUL", id="NUL after a letter that is not ASCII"),
        pytest.param(b"\xff", "UTF-8 at byte 0", id="a byte that UTF-8 never has"),
        pytest.param(b"ab\xc3", "UTF-8 at byte 2", id="a cut letter"),
        pytest.param(b"a\x80", "UTF-8 at byte 1", id="a continuation without a start"),
        pytest.param(b"\xc0\xaf", "UTF-8 at byte 0", id="an overlong slash"),
        pytest.param(b"\xc0\x80", "UTF-8 at byte 0", id="an overlong NUL"),
        pytest.param(b"\xed\xa0\x80", "UTF-8 at byte 0", id="a surrogate"),
        pytest.param(b"\xf4\x90\x80\x80", "UTF-8 at byte 0", id="above U+10FFFF"),
        pytest.param("ü".encode("latin-1"), "UTF-8 at byte 0", id="Latin-1"),
    ],
)
def test_a_bad_key_is_refused_with_what_is_wrong_with_it(key: bytes, reason: str) -> None:
    with pytest.raises(BadKey, match=reason):
        checked_key(key)


@given(st.binary(max_size=8) | st.text(max_size=8).map(lambda text: text.encode(errors="surrogatepass")))
def test_a_key_is_good_exactly_if_it_is_text_without_nul(key: bytes) -> None:
    try:
        good = len(key.decode()) > 0 and b"\0" not in key
    except UnicodeDecodeError:
        good = False
    if good:
        assert checked_key(key) == key
    else:
        with pytest.raises(BadKey):
            checked_key(key)


# Pages.


def test_the_form_of_a_page_never_changes() -> None:
    assert encode_page(GOLDEN_PAGE) == GOLDEN_BYTES
    assert decode_page(GOLDEN_BYTES) == GOLDEN_PAGE


@given(PAGES)
def test_a_page_round_trips(page: Page) -> None:
    assert decode_page(encode_page(page)) == page


@given(PAGES)
def test_a_page_ends_at_the_position_that_it_leads_to(page: Page) -> None:
    assert page.end == Position(page.history, Revision(page.after + len(page.changes)), page.chain)


def test_an_empty_value_is_not_a_deletion_on_the_wire() -> None:
    changes = decode_page(GOLDEN_BYTES).changes
    assert (changes[1].value, changes[2].value) == (b"", None)


def test_what_a_newer_node_adds_at_the_end_is_passed_over() -> None:
    *page, changes = msgspec.msgpack.decode(GOLDEN_BYTES)
    longer = [*page, [[*change, {"new": 1}] for change in changes], "new"]
    assert decode_page(msgspec.msgpack.encode(longer)) == GOLDEN_PAGE


@pytest.mark.parametrize("length", range(len(GOLDEN_BYTES)))
def test_a_truncated_page_is_refused(length: int) -> None:
    with pytest.raises(PeerAnswerInvalid):
        decode_page(GOLDEN_BYTES[:length])


def test_what_follows_a_page_is_refused() -> None:
    with pytest.raises(PeerAnswerInvalid):
        decode_page(GOLDEN_BYTES + b"\xc0")


@given(st.binary(max_size=64))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(PeerAnswerInvalid):
        decode_page(data)


@given(st.integers(0, len(GOLDEN_BYTES) * 8 - 1))
def test_a_page_with_a_flipped_bit_is_another_page_or_refused(bit: int) -> None:
    """Never another error: whatever a peer sends is that peer's fault."""
    flipped = (int.from_bytes(GOLDEN_BYTES, "big") ^ 1 << bit).to_bytes(len(GOLDEN_BYTES), "big")
    try:
        page = decode_page(flipped)
    except PeerAnswerInvalid:
        return
    assert page != GOLDEN_PAGE


@pytest.mark.parametrize("answer", [b"", b"<html>502 Bad Gateway</html>", b'{"error": "diverged"}', b"\x91" * 100_000])
def test_an_answer_that_is_no_page_is_refused(answer: bytes) -> None:
    with pytest.raises(PeerAnswerInvalid, match="not a page"):
        decode_page(answer)


def test_an_answer_nested_without_end_is_refused() -> None:
    """What is passed over at the end of a page is walked through: it must not exhaust the stack."""
    deep = b"\x96" + GOLDEN_BYTES[1:] + b"\x91" * 100_000
    with pytest.raises(PeerAnswerInvalid):
        decode_page(deep)


@pytest.mark.parametrize("decode", [decode_position, decode_status, decode_drain_report])
def test_json_nested_without_end_is_refused(decode: Callable[[bytes], object]) -> None:
    """Also in a field that only newer nodes have: it is passed over, but walked through."""
    deep = b'{"new": ' + b"[" * 100_000
    with pytest.raises(PeerAnswerInvalid):
        decode(deep)
    assert error_message(deep) == deep.decode()


def test_a_page_that_claims_more_changes_than_memory_holds_is_refused() -> None:
    claim = page_with()[: -len(msgspec.msgpack.encode([[1, b"k", b"v", None, None]]))] + b"\xdd\xff\xff\xff\xff"
    with pytest.raises(PeerAnswerInvalid):
        decode_page(claim)


@pytest.mark.parametrize("field", ["epoch", "after", "revision", "expires_at"])
@pytest.mark.parametrize("number", [-1, 2**63, 2**64 - 1, 1.0, True, "1"])
def test_a_page_with_a_number_that_no_store_can_hold_is_refused(field: str, number: object) -> None:
    with pytest.raises(PeerAnswerInvalid, match="not a page"):
        decode_page(page_with(**{field: number}))


@pytest.mark.parametrize(
    "field",
    [
        {"history": b"\0"},
        {"chain": "text"},
        {"key": "text"},
        {"key": None},
        {"value": "text"},
        {"content_type": b"bytes"},
    ],
    ids=lambda field: "-".join(field),
)
def test_a_page_with_a_field_of_another_type_is_refused(field: dict[str, object]) -> None:
    with pytest.raises(PeerAnswerInvalid, match="not a page"):
        decode_page(page_with(**field))


def test_a_store_without_a_history_is_at_the_origin() -> None:
    assert Position() == Position(None, ORIGIN, GENESIS) == Position(None, Revision(0), Chain(bytes(16)))
