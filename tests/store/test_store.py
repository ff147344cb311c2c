"""The store as the rest of mehdb sees it: values, listings, histories, pages and waiting."""

import asyncio
from pathlib import Path
from typing import Final

import pytest

from mehdb.errors import Diverged, KeyNotFound, PeerAnswerInvalid, StaleEpoch
from mehdb.model import (
    GENESIS,
    KEY_BYTES_MAX,
    ORIGIN,
    PAGE_BYTES,
    Change,
    Epoch,
    History,
    Page,
    Position,
    Revision,
    decode_page,
    encode_page,
)
from mehdb.store import Store, Write
from mehdb.store.reader import Reader
from stores import (
    catch_up,
    chain_anew,
    child,
    elsewhere,
    enqueue,
    fill,
    keys_of,
    leading,
    next_page,
    opened,
    outcomes,
    put,
)

OTHER_HISTORY: Final = History("f" * 32)


# Values.


@pytest.mark.parametrize("key", [b"a", b"a/b", b"a%2Fb", "clé/🔑".encode(), b"k" * KEY_BYTES_MAX, b"\n"])
@pytest.mark.parametrize("value", [b"", b"\0", b"hello", bytes(range(256)) * 4096])
async def test_a_value_is_read_as_it_was_written(leader: Store, key: bytes, value: bytes) -> None:
    assert await put(leader, key, value, "text/plain; charset=utf-8") == 1
    assert await leader.get(key) == Change(Revision(1), key, value, "text/plain; charset=utf-8")
    assert await keys_of(leader) == [key]


async def test_an_empty_value_is_not_a_deletion(leader: Store, follower: Store) -> None:
    await put(leader, b"empty", b"")
    await put(leader, b"gone", b"x")
    await put(leader, b"gone", None)
    await catch_up(follower, leader)
    for store in (leader, follower):
        assert await store.get(b"empty") == Change(Revision(1), b"empty", b"")
        assert await store.get(b"gone") is None
        assert (await keys_of(store), store.meta.keys) == ([b"empty"], 1)


@pytest.mark.parametrize("content_type", [None, "", "image/png"])
async def test_the_content_type_is_kept(leader: Store, follower: Store, content_type: str | None) -> None:
    await put(leader, b"k", b"v", content_type)
    await catch_up(follower, leader)
    for store in (leader, follower):
        change = await store.get(b"k")
        assert change is not None
        assert change.content_type == content_type


async def test_a_content_type_does_not_outlive_its_value(leader: Store) -> None:
    await put(leader, b"k", b"v", "image/png")
    await put(leader, b"k", b"w")
    change = await leader.get(b"k")
    assert change is not None
    assert change.content_type is None


async def test_to_delete_what_is_not_there_changes_nothing(leader: Store) -> None:
    await put(leader, b"k", b"v")
    await put(leader, b"k", None)
    before = leader.meta
    for key in (b"k", b"never"):
        with pytest.raises(KeyNotFound):
            await put(leader, key, None)
    assert leader.meta == before


async def test_keys_that_differ_in_their_bytes_are_different_keys(leader: Store) -> None:
    keys = [b"a/b", b"a%2Fb", b"a%2fb", b"A/b", b"a//b", b"a/b/", b" a/b", "é".encode(), "e\u0301".encode()]
    for key in keys:
        await put(leader, key, b"value of " + key)
    assert leader.meta.keys == len(keys)
    for key in keys:
        change = await leader.get(key)
        assert change is not None
        assert change.value == b"value of " + key


# Listings.


async def test_keys_are_listed_in_byte_order_and_pages(leader: Store) -> None:
    keys = sorted({b"a", b"a/", b"a/1", b"a/10", b"a/2", b"b", "ü".encode(), "🔑".encode(), b"A", b"a0"})
    for key in reversed(keys):
        await put(leader, key, b"")
    assert await keys_of(leader) == keys
    listed: list[bytes] = []
    while page := await keys_of(leader, after=listed[-1] if listed else b"", limit=3):
        assert len(page) <= 3
        listed += page
    assert listed == keys


@pytest.mark.parametrize(
    ("prefix", "after", "expected"),
    [
        (b"a/", b"", [b"a/", b"a/1", b"a/2"]),
        (b"a/", b"a/", [b"a/1", b"a/2"]),
        (b"a/", b"a/1", [b"a/2"]),
        (b"a/", b"a/15", [b"a/2"]),
        (b"a/", b"a/2", []),
        (b"a/", b"b", []),
        (b"a/", b"A", [b"a/", b"a/1", b"a/2"]),
        (b"a", b"", [b"a", b"a/", b"a/1", b"a/2", b"a0"]),
        (b"", b"a/2", [b"a0", b"b"]),
        (b"c", b"", []),
    ],
)
async def test_a_listing_starts_after_a_key_and_within_a_prefix(
    leader: Store, prefix: bytes, after: bytes, expected: list[bytes]
) -> None:
    for key in (b"a", b"a/", b"a/1", b"a/2", b"a0", b"b"):
        await put(leader, key, b"")
    assert await keys_of(leader, prefix, after) == expected


async def test_a_deleted_key_is_not_listed(leader: Store) -> None:
    for key in (b"a", b"b", b"c"):
        await put(leader, key, b"")
    await put(leader, b"b", None)
    assert await keys_of(leader) == [b"a", b"c"]


NO_FILES_LEFT = """
import asyncio, os, resource, sys
from pathlib import Path
from mehdb.store import Query, Store, Write, list_page

async def main():
    store = await Store.open(Path(sys.argv[1]))
    await store.lead(1)
    await store.write(Write(b"k", b"v"))
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (len(os.listdir("/proc/self/fd")) - 1, usual):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
        for _ in range(6):
            try:
                print((await store.scan(lambda reader: list_page(reader, Query()))).items[0].decode())
            except Exception as error:
                print(type(error).__name__)
    await store.close()

asyncio.run(main())
"""


def test_a_moment_without_file_descriptors_ends_no_later_listing(directory: Path) -> None:
    """Connections use them up, and give them back."""
    with child(NO_FILES_LEFT, directory) as process:
        output, _ = process.communicate(timeout=60)
    lines = output.split()
    assert len(lines) == 12
    assert "k" not in lines[:6]
    assert lines[6:] == ["k"] * 6


# History and epoch.


async def test_the_first_leader_makes_a_history_and_later_ones_keep_it(directory: Path, tmp_path: Path) -> None:
    async with opened(directory) as store:
        assert store.position == Position(None, ORIGIN, GENESIS)
        await store.lead(Epoch(1))
        history = store.meta.history
    async with opened(directory) as store:
        assert (store.meta.history, store.meta.epoch) == (history, 1)
        await store.lead(Epoch(2))
        with pytest.raises(StaleEpoch):
            await store.lead(Epoch(1))
    async with opened(directory) as store:
        assert (store.meta.history, store.meta.epoch) == (history, 2)
    async with leading(tmp_path / "another") as other:
        assert other.meta.history
        assert len(bytes.fromhex(other.meta.history)) == 16
        assert other.meta.history != history


async def test_a_follower_takes_history_and_epoch_from_its_first_page(leader: Store, tmp_path: Path) -> None:
    await leader.lead(Epoch(4))
    await put(leader, b"k", b"v")
    async with opened(tmp_path / "follower") as follower:
        await follower.apply(await next_page(leader, follower))
        assert follower.meta == leader.meta
    async with opened(tmp_path / "follower") as follower:
        assert follower.meta == leader.meta
        with pytest.raises(Diverged):
            await follower.adopt(OTHER_HISTORY, Epoch(9))
        assert follower.meta == leader.meta


async def test_a_refused_page_leaves_the_follower_as_it_was(leader: Store, follower: Store) -> None:
    """Each kind of bad page is in `test_log`; here, that a store goes on after one."""
    await fill(leader, 6)
    page = await next_page(leader, follower)
    await follower.apply(Page(page.history, page.epoch, ORIGIN, chain_anew(list(page.changes[:2])), page.changes[:2]))
    before = follower.meta
    rest = await next_page(leader, follower)
    flipped = (Change(rest.changes[0].revision, rest.changes[0].key, b"flipped"), *rest.changes[1:])
    for bad, error in [
        (page, PeerAnswerInvalid),
        (Page(rest.history, rest.epoch, rest.after, rest.chain, rest.changes[1:]), PeerAnswerInvalid),
        (Page(rest.history, rest.epoch, rest.after, rest.chain, flipped), Diverged),
        (Page(OTHER_HISTORY, rest.epoch, rest.after, rest.chain, rest.changes), Diverged),
        (Page(rest.history, Epoch(0), rest.after, rest.chain, rest.changes), StaleEpoch),
    ]:
        with pytest.raises(error):
            await follower.apply(bad)
        assert follower.meta == before
        assert (await follower.check()).problems == ()
    assert not follower.failure.done()
    await follower.apply(rest)
    assert follower.position == leader.position


# Pages.


async def test_there_is_no_page_at_the_head(leader: Store, follower: Store) -> None:
    assert await leader.page_after(leader.position) is None
    assert await leader.page_after(Position()) is None
    await fill(leader, 5)
    assert await leader.page_after(leader.position) is None
    await catch_up(follower, leader)
    assert await follower.page_after(leader.position) is None  # any node can answer


async def test_a_page_holds_what_follows_a_position(leader: Store) -> None:
    changes, positions = [], [leader.position]
    for n in range(5):
        await put(leader, b"key-%d" % (n % 3), None if n == 3 else b"%d" % n, f"type/{n}")
        changes.append(Change(Revision(n + 1), b"key-%d" % (n % 3), None if n == 3 else b"%d" % n, f"type/{n}"))
        positions.append(leader.position)
    for revision, position in enumerate(positions[:-1]):
        page = await leader.page_after(position)
        assert page == Page(
            leader.meta.history or OTHER_HISTORY, leader.meta.epoch, Revision(revision), chain_anew(changes),
            tuple(changes[revision:]),
        )  # fmt: skip
        assert page.end == leader.position
    assert await leader.page_after(Position()) == await leader.page_after(positions[0])


async def test_a_page_is_about_one_mebibyte(leader: Store, follower: Store) -> None:
    size_bytes = 50_000
    await fill(leader, 60, bytes(size_bytes))
    pages = []
    while (page := await leader.page_after(follower.position)) is not None:
        pages.append(page)
        await follower.apply(decode_page(encode_page(page)))
    lengths = [len(encode_page(page)) for page in pages]
    assert all(PAGE_BYTES <= length <= PAGE_BYTES + size_bytes + 1000 for length in lengths[:-1])
    assert len(pages) == 3
    assert follower.position == leader.position
    assert (await follower.check()).problems == ()


async def test_a_value_larger_than_a_page_travels_alone(leader: Store, follower: Store) -> None:
    for key, size_bytes in [(b"large", 3 * PAGE_BYTES), (b"small", 5), (b"larger", 4 * PAGE_BYTES), (b"end", 5)]:
        await put(leader, key, b"x" * size_bytes)
    keys = []
    while (page := await leader.page_after(follower.position)) is not None:
        keys.append([change.key for change in page.changes])
        await follower.apply(page)
    assert keys == [[b"large"], [b"small", b"larger"], [b"end"]]
    change = await follower.get(b"larger")
    assert change is not None
    assert change.value == b"x" * 4 * PAGE_BYTES


async def test_many_small_changes_fill_a_page(leader: Store) -> None:
    """A bound in values alone would let a page of deletions or empty values grow without end."""
    for _ in range(10):
        await outcomes(await enqueue(leader, [Write(b"%d" % (n % 10), b"") for n in range(4000)]))
    page = await leader.page_after(Position())
    assert page is not None
    assert len(page.changes) < 40_000
    assert len(encode_page(page)) <= PAGE_BYTES * 1.1


async def test_a_page_ends_at_the_head_that_its_reader_was_told(leader: Store, directory: Path) -> None:
    """Commits that come while a page is read are not in it: its history, epoch and changes are of one moment."""
    await fill(leader, 5)
    meta = leader.meta
    await fill(leader, 5)
    reader = Reader(directory)
    page = reader.page(ORIGIN, meta, PAGE_BYTES)
    assert page is not None
    assert page.end == meta.position
    assert reader.page(meta.head, meta, PAGE_BYTES) is None
    reader.close()


async def test_a_position_that_is_no_place_in_the_history_is_diverged(leader: Store) -> None:
    await fill(leader, 5)
    await leader.lead(Epoch(2))
    head = leader.position
    wrong = [
        elsewhere(head, revision=Revision(6)),
        elsewhere(head, chain=GENESIS),
        elsewhere(head, revision=Revision(3)),
        elsewhere(head, revision=ORIGIN),
        elsewhere(head, history=OTHER_HISTORY),
        Position(None, Revision(3), GENESIS),
        Position(None, ORIGIN, head.chain),
    ]
    for position in wrong:
        with pytest.raises(Diverged):
            await leader.page_after(position)


async def test_a_follower_with_changes_of_another_history_is_diverged_from_an_empty_node(follower: Store) -> None:
    with pytest.raises(Diverged):
        await follower.page_after(Position(OTHER_HISTORY, Revision(1), GENESIS))


async def test_a_history_without_changes_is_none_to_diverge_from(leader: Store) -> None:
    """A node that led alone for a moment and accepted nothing takes the history of those that did."""
    await fill(leader, 3)
    page = await leader.page_after(Position(OTHER_HISTORY))
    assert page is not None
    assert page.end == leader.position


# Waiting.


async def test_a_commit_wakes_all_who_wait_for_it(leader: Store) -> None:
    waiters = [asyncio.create_task(leader.wait_beyond(Revision(revision), 30)) for revision in (0, 0, 1, 2)]
    await asyncio.sleep(0)
    assert [waiter.done() for waiter in waiters] == [False] * 4
    await put(leader, b"k", b"1")
    assert await asyncio.wait_for(asyncio.gather(*waiters[:2]), 10) == [True, True]
    assert [waiter.done() for waiter in waiters[2:]] == [False, False]
    await put(leader, b"k", b"2")
    await put(leader, b"k", b"3")
    assert await asyncio.wait_for(asyncio.gather(*waiters[2:]), 10) == [True, True]


async def test_a_page_wakes_who_waits_on_a_follower(leader: Store, follower: Store) -> None:
    waiter = asyncio.create_task(follower.wait_beyond(ORIGIN, 30))
    await put(leader, b"k", b"1")
    await catch_up(follower, leader)
    assert await asyncio.wait_for(waiter, 10)


async def test_a_wait_ends_when_its_time_is_up(leader: Store) -> None:
    await put(leader, b"k", b"1")
    async with asyncio.timeout(10):
        assert await leader.wait_beyond(ORIGIN, 0)
        assert not await leader.wait_beyond(Revision(1), 0)
        assert not await leader.wait_beyond(Revision(1), 0.05)


async def test_nobody_waits_for_a_store_that_closes(leader: Store) -> None:
    waiter = asyncio.create_task(leader.wait_beyond(ORIGIN, 30))
    await asyncio.sleep(0)
    leader.stop_waiting()
    async with asyncio.timeout(10):
        assert not await waiter
        assert not await leader.wait_beyond(ORIGIN, 30)
        assert await put(leader, b"k", b"1") == 1  # only the waiting has ended
        assert await leader.wait_beyond(ORIGIN, 30)
