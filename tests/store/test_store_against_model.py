"""Whatever is done to a store, in any order, it holds what a dict and a list would.

Hypothesis drives a leader and a follower, on real files and a real event loop, through random lives, and compares them
at each step with the model: the changes so far, and the revision that each key is live with.
"""

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mehdb.errors import Diverged, KeyNotFound, PeerAnswerInvalid
from mehdb.model import GENESIS, KEY_BYTES_MAX, Chain, Change, Epoch, Page, Position, Revision, decode_page, encode_page
from mehdb.store import Store, Write
from mehdb.store.reader import Reader
from stores import chain_anew, changes_of, enqueue, keys_of, outcomes, problems_of, seal_anew, until

T = TypeVar("T")

FEW_KEYS: Final = [b"a", b"a/", b"a/b", b"a0", b"b", "ü".encode(), "🔑".encode(), b"k" * KEY_BYTES_MAX]
KEYS = st.sampled_from(FEW_KEYS) | st.text(
    st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=3
).map(str.encode)
VALUES = st.sampled_from([b"", b"\0", b"v" * 5000]) | st.binary(max_size=40)
CONTENT_TYPES = st.sampled_from([None, "", "text/plain"])
SETS = st.builds(Write, KEYS, VALUES, CONTENT_TYPES)
DELETES = st.builds(Write, st.sampled_from(FEW_KEYS), st.none())
WRITES = SETS | DELETES
PREFIXES = st.sampled_from([b"", b"a", b"a/", b"k", "ü".encode()[:1], b"zz"])


class Lives(RuleBasedStateMachine):
    """A leader that takes writes, a follower that copies it, and what both must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp(prefix="mehdb-model-"))
        self.changes: list[Change] = []
        self.chains: list[Chain] = [GENESIS]  # by revision
        self.live: dict[bytes, Change] = {}
        self.copied = 0  # the follower's revision
        self.epoch = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run *work* on this life's event loop."""
        return self.runner.run(asyncio.wait_for(work, 60))

    def expect(self, write: Write) -> Revision | type:
        """Do *write* to the model and return what must become of it."""
        if write.value is None and write.key not in self.live:
            return KeyNotFound
        change = Change(Revision(len(self.changes) + 1), write.key, write.value, write.content_type)
        self.changes.append(change)
        self.chains.append(seal_anew(self.chains[-1], change)[1])
        if write.value is None:
            del self.live[write.key]
        else:
            self.live[write.key] = change
        return change.revision

    def position(self, revision: int) -> Position:
        """Return the leader's position at *revision*."""
        return Position(self.leader.meta.history, Revision(revision), self.chains[revision])

    # Lives.

    @initialize(writes=st.lists(WRITES, min_size=10, max_size=40))
    def begin(self, writes: list[Write]) -> None:
        """Start both nodes on empty volumes, and write a little."""
        self.leader = self.run(Store.open(self.directory / "leader"))
        self.follower = self.run(Store.open(self.directory / "follower"))
        self.restart_leader()
        self.write_many(writes)

    @rule()
    def restart_leader(self) -> None:
        """Close the leader and start its next epoch."""
        self.run(self.leader.close())
        self.leader = self.run(Store.open(self.directory / "leader"))
        assert self.leader.meta.epoch == self.epoch
        self.epoch += 1
        self.run(self.leader.lead(Epoch(self.epoch)))

    @rule()
    def restart_follower(self) -> None:
        """Close the follower and open it again."""
        before = self.follower.meta
        self.run(self.follower.close())
        self.follower = self.run(Store.open(self.directory / "follower"))
        assert self.follower.meta == before

    # Writes.

    @rule(write=WRITES)
    def write_one(self, write: Write) -> None:
        """Write alone."""
        expected = self.expect(write)
        try:
            assert self.run(self.leader.write(write)) == expected
        except KeyNotFound:
            assert expected is KeyNotFound

    @rule(writes=st.lists(WRITES, min_size=2, max_size=40))
    def write_many(self, writes: list[Write]) -> None:
        """Write all at once: in which batches they end up is the writer's affair, their outcomes are not."""

        async def together() -> list[Revision | type]:
            return await outcomes(await enqueue(self.leader, writes))

        assert self.run(together()) == [self.expect(write) for write in writes]

    @rule(write=SETS)
    def write_and_leave(self, write: Write) -> None:
        """Write without waiting for the outcome: the write happens all the same."""

        async def leave() -> None:
            [task] = await enqueue(self.leader, [write])
            task.cancel()
            await until(lambda: task.done() and not self.leader.queue_bytes)

        self.run(leave())
        self.expect(write)

    # Replication.

    def take(self, page: Page) -> None:
        """Apply *page* to the follower, as it comes off the wire."""
        assert list(page.changes) == self.changes[self.copied : self.copied + len(page.changes)]
        assert page.end == self.position(self.copied + len(page.changes))
        self.run(self.follower.apply(decode_page(encode_page(page))))
        self.copied += len(page.changes)

    @rule()
    def pull(self) -> None:
        """Let the follower have the leader's next page, or learn that there is none."""
        page = self.run(self.leader.page_after(self.follower.position))
        assert (page is None) == (self.copied == len(self.changes))
        if page is not None:
            self.take(page)

    @precondition(lambda self: self.copied < len(self.changes))
    @rule(bytes_max=st.integers(1, 500))
    def pull_little(self, bytes_max: int) -> None:
        """Let the follower have a page that ends early."""
        reader = Reader(self.directory / "leader")
        page = reader.page(self.follower.head, self.leader.meta, bytes_max)
        reader.close()
        assert page is not None
        self.take(page)

    @precondition(lambda self: self.copied)
    @rule(data=st.data())
    def pull_what_is_there_already(self, data: st.DataObject) -> None:
        """Offer the follower a page that it is beyond: it must change nothing."""
        after = data.draw(st.integers(0, self.copied - 1))
        page = self.run(self.leader.page_after(self.position(after)))
        assert page is not None
        try:
            self.run(self.follower.apply(page))
        except PeerAnswerInvalid:
            return
        raise AssertionError("a page was applied twice")

    @precondition(lambda self: self.copied < len(self.changes))
    @rule(data=st.data())
    def pull_what_was_altered(self, data: st.DataObject) -> None:
        """Offer the follower the right page with one wrong value in it: it must change nothing."""
        page = self.run(self.leader.page_after(self.follower.position))
        assert page is not None
        n = data.draw(st.integers(0, len(page.changes) - 1))
        good = page.changes[n]
        altered = Change(good.revision, good.key, (good.value or b"") + b"!", good.content_type)
        changes = (*page.changes[:n], altered, *page.changes[n + 1 :])
        try:
            self.run(self.follower.apply(Page(page.history, page.epoch, page.after, page.chain, changes)))
        except Diverged:
            return
        raise AssertionError("an altered page was applied")

    @rule(data=st.data())
    def answer_any_position(self, data: st.DataObject) -> None:
        """Ask the leader for what follows any revision, with the right chain and with a wrong one."""
        after = data.draw(st.integers(0, len(self.changes)))
        page = self.run(self.leader.page_after(self.position(after)))
        assert list(page.changes if page else ()) == self.changes[after:]
        for wrong in (Chain(b"\xff" * 16), self.chains[after - 1] if after else Chain(b"\1" * 16)):
            try:
                self.run(self.leader.page_after(Position(self.leader.meta.history, Revision(after), wrong)))
            except Diverged:
                continue
            raise AssertionError("another chain was recognised")

    # Reads.

    @rule(key=KEYS)
    def get(self, key: bytes) -> None:
        """Read a key on both nodes."""
        assert self.run(self.leader.get(key)) == self.live.get(key)
        copied = [change for change in self.changes[: self.copied] if change.key == key]
        newest = copied[-1] if copied and copied[-1].value is not None else None
        assert self.run(self.follower.get(key)) == newest

    @rule(prefix=PREFIXES, after=PREFIXES | KEYS, limit=st.integers(1, 6))
    def keys(self, prefix: bytes, after: bytes, limit: int) -> None:
        """List keys on the leader."""
        expected = [key for key in sorted(self.live) if key.startswith(prefix) and key > after]
        assert self.run(keys_of(self.leader, prefix, after, limit)) == expected[:limit]

    # What always holds.

    @invariant()
    def the_stores_are_at_the_models_positions(self) -> None:
        """Head, chain, number of keys and queue."""
        assert self.leader.position == self.position(len(self.changes))
        assert self.leader.meta.keys == len(self.live)
        assert (self.leader.queue_bytes, self.follower.queue_bytes) == (0, 0)
        if self.follower.meta.history is not None:
            assert self.follower.position == self.position(self.copied)
        else:
            assert (self.copied, self.follower.position) == (0, Position())

    def teardown(self) -> None:
        """Let the follower catch up, then look at every row of both."""
        try:
            if hasattr(self, "follower"):
                self.compare_in_the_end()
        finally:
            self.runner.close()
            shutil.rmtree(self.directory)

    def compare_in_the_end(self) -> None:
        """Hold both stores against the model, as nothing but their files."""
        while self.copied < len(self.changes):
            self.pull()
        assert self.run(keys_of(self.leader)) == self.run(keys_of(self.follower)) == sorted(self.live)
        for key, change in self.live.items():
            assert self.run(self.leader.get(key)) == self.run(self.follower.get(key)) == change
        self.run(self.leader.close())
        self.run(self.follower.close())
        for name in ("leader", "follower"):
            assert problems_of(self.directory / name) == ()
            assert changes_of(self.directory / name) == self.changes
        assert self.chains[-1] == chain_anew(self.changes)


@pytest.mark.timeout(420)  # Hypothesis spends up to five minutes on making a failure short
def test_a_store_holds_what_a_dict_and_a_list_would() -> None:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        Lives, settings=settings(max_examples=50, stateful_step_count=50, suppress_health_check=slow)
    )
