"""The seals: fixed for ever, and different for different changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mehdb.model import GENESIS, Chain, Change, Revision
from mehdb.store.seal import crc, seal
from stores import seal_anew

INT64 = st.integers(0, 2**63 - 1)
BYTES = st.binary(max_size=6)
CHANGES = st.builds(
    Change, INT64.map(Revision), BYTES, st.none() | BYTES, st.none() | st.text(max_size=6), st.none() | INT64
)
CHAINS = st.binary(min_size=16, max_size=16).map(Chain)

GOLDEN = [
    (Change(Revision(1), b"test", b"hello"), 0xB913EC28, "66990a69b7014fa2dd3d42ceca6cd283"),
    (
        Change(Revision(2), "clé/ü".encode(), b"", "text/plain; charset=utf-8", 1_700_000_000),
        0xE60730AA,
        "51d820e0d2681b8f2a23c47a363ed5a3",
    ),
    (Change(Revision(3), b"test", None), 0x501D604E, "2e9cf45dad42e71680885c51cd14880c"),
]


def test_the_format_of_the_seals_never_changes() -> None:
    chain = GENESIS
    for change, golden_crc, golden_chain in GOLDEN:
        row_crc, chain = seal(chain, change)
        assert (row_crc, chain.hex()) == (golden_crc, golden_chain)


@given(CHAINS, CHANGES)
def test_the_seals_are_those_of_the_definition(previous: Chain, change: Change) -> None:
    assert seal(previous, change) == seal_anew(previous, change)


@given(CHAINS, CHANGES)
def test_the_crc_alone_is_that_of_the_seal(previous: Chain, change: Change) -> None:
    assert crc(change) == seal(previous, change)[0]


@given(CHANGES, CHANGES)
def test_different_changes_have_different_chains(one: Change, other: Change) -> None:
    assert (seal(GENESIS, one)[1] == seal(GENESIS, other)[1]) == (one == other)


@given(CHAINS, CHAINS, CHANGES)
def test_the_same_change_after_different_ones_has_another_chain(one: Chain, other: Chain, change: Change) -> None:
    assert (seal(one, change)[1] == seal(other, change)[1]) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param((b"ab", b"c", None), (b"a", b"bc", None), id="key and value"),
        pytest.param((b"a", b"bc", ""), (b"a", b"c", "b"), id="content type and value"),
        pytest.param((b"ab", b"", "c"), (b"a", b"", "bc"), id="key and content type"),
        pytest.param((b"a", b"", None), (b"a", None, None), id="empty and deleted"),
        pytest.param((b"a", b"", ""), (b"a", b"", None), id="empty content type and none"),
    ],
)
def test_changes_whose_bytes_joined_are_alike_are_told_apart(
    one: tuple[bytes, bytes | None, str | None], other: tuple[bytes, bytes | None, str | None]
) -> None:
    crc_of_one, chain_of_one = seal(GENESIS, Change(Revision(1), *one))
    crc_of_other, chain_of_other = seal(GENESIS, Change(Revision(1), *other))
    assert chain_of_one != chain_of_other
    assert crc_of_one != crc_of_other


@given(CHANGES.filter(lambda change: change.key or change.value), st.data())
def test_the_crc_notices_each_flipped_bit(change: Change, data: st.DataObject) -> None:
    field, content = data.draw(
        st.sampled_from([("key", change.key), ("value", change.value or b"")]).filter(lambda f: f[1])
    )
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    flipped = (int.from_bytes(content, "big") ^ 1 << bit).to_bytes(len(content), "big")
    fields = {name: getattr(change, name) for name in Change.__struct_fields__}
    assert crc(Change(**fields | {field: flipped})) != crc(change)
