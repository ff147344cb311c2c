"""Every acknowledged write survives a power loss at any moment, on a leader and on a follower.

A real run of the store is recorded: every write, truncation, sync and deletion, and every acknowledgement in between.
From that every image is built that a power loss may leave, each is opened as a node would, and compared with the past.
What a follower acknowledges are pages: its next request, behind one that it has applied, says that this is durable.
"""

import asyncio
import random
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

import apsw
import pytest

from disk import DATABASE, WAL
from mehdb.errors import KeyNotFound, MehdbError
from mehdb.model import ORIGIN, Change
from mehdb.store import Store, StoreOptions, Write
from mehdb.store.decision import decide
from power import Event, Image, Kind, Recorder, Replay, without_sync_at_commit
from stores import RAM, leading, opened, pages_of, sql, tables_of

WRITERS: Final = 6
KEYS: Final = 25
CHECKPOINTS: Final = 3  # in each life
PAGE_CHANGES: Final = 4
RUNS_MAX: Final = 12  # how a run's writes fall into transactions is chance, and with that how many images it has
OPTIONS: Final = {"retain_changes": 60, "disk_reserve_bytes": 0}
Live = Callable[[Recorder, Path, int, int, int], Awaitable[None]]


def value_from(chance: random.Random, name: int, n: int) -> bytes | None:
    """Return what is written: mostly little, a deletion one time in five."""
    size_bytes = chance.choice([0, 10, 10, 100, 100, 700, 9000])
    return None if chance.random() < 0.2 else (b"%d-%d " % (name, n) * size_bytes)[:size_bytes]


async def write_on(store: Store, recorder: Recorder, name: int, chance: random.Random, count: int) -> None:
    """Write, overwrite and delete, and note each acknowledgement."""
    for n in range(count):
        key, value = b"key-%d" % chance.randrange(KEYS), value_from(chance, name, n)
        try:
            revision = await store.write(Write(key, value))
        except KeyNotFound:
            continue
        # What a client was told, not what the store says of itself.
        recorder.acknowledged(Change(revision, key, value, None))


async def lead(recorder: Recorder, directory: Path, seed: int, lives: int, count: int) -> None:
    """Let a leader live: several writers, group commits, checkpoints, compaction, and one opening after the other."""
    chance = random.Random(seed)
    for _ in range(lives):
        async with leading(directory, **OPTIONS) as store:
            for _ in range(CHECKPOINTS):
                writers = [random.Random(chance.random()) for _ in range(WRITERS)]
                await asyncio.gather(*[write_on(store, recorder, n, w, count) for n, w in enumerate(writers)])
                checkpoint(directory)


async def follow(recorder: Recorder, directory: Path, seed: int, lives: int, count: int) -> None:
    """Let a follower live in the same way: of each page it acknowledges the changes once it has applied it."""
    chance = random.Random(seed)
    numbers = range(lives * CHECKPOINTS * count * PAGE_CHANGES)
    writes = [Write(b"key-%d" % chance.randrange(KEYS), value_from(chance, seed, n)) for n in numbers]
    _, changes = decide(writes, {}, ORIGIN)
    pages = iter(pages_of(changes, PAGE_CHANGES))
    for _ in range(lives):
        async with opened(directory, **OPTIONS) as store:
            for _ in range(CHECKPOINTS):
                for page in islice(pages, count):
                    await store.apply(page)
                    for change in page.changes:
                        recorder.acknowledged(change)
                checkpoint(directory)


def checkpoint(directory: Path) -> None:
    """Checkpoint as the writer does at each 16 MiB, so that images stay small: an operator's sqlite3 may do so too."""
    connection = apsw.Connection(str(directory / DATABASE))
    connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    connection.close()


@dataclass
class Past:
    """All that was acknowledged, by revision."""

    changes: dict[int, Change] = field(default_factory=dict)
    told: list[int] = field(default_factory=list)  # revisions, in the order of the acknowledgements

    @classmethod
    def of(cls, events: Iterable[Event], told: Iterable[int] = (), changes: dict[int, Change] | None = None) -> "Past":
        """Return what *events* acknowledge, after what was *told* before of *changes*, which may be there or not."""
        past = cls(dict(changes or {}), list(told))
        if changes:  # of two lives, the second one's changes are what became of a revision
            shown = max((event.change.revision for event in events if event.change), default=0)
            assert shown >= max(past.told, default=0)
        for event in events:
            if event.change:
                past.changes[event.change.revision] = event.change
                past.told.append(event.change.revision)
        assert set(past.told) >= set(range(1, max(past.told, default=0) + 1))
        return past

    def live_at(self, head: int) -> dict[bytes, int]:
        """Return the revision that each key is live with at *head*."""
        newest = {change.key: change for revision, change in sorted(self.changes.items()) if revision <= head}
        return {key: change.revision for key, change in newest.items() if change.value is not None}


@dataclass
class Verdict:
    """What came of many images."""

    past: Past
    seen: set[int] = field(default_factory=set)  # the images' fingerprints: those that are alike are examined once
    lost: set[int] = field(default_factory=set)  # revisions
    problems: list[str] = field(default_factory=list)

    async def examine_all(self, images: Iterator[Image]) -> None:
        """Examine *images*, one after the other."""
        with tempfile.TemporaryDirectory(dir=RAM if RAM.is_dir() else None, prefix="mehdb-power-") as room:
            for image in images:
                if image.fingerprint in self.seen:
                    continue
                self.seen.add(image.fingerprint)
                with tempfile.TemporaryDirectory(dir=room) as directory:
                    await self.examine(image, Path(directory, "image"))

    async def examine(self, image: Image, directory: Path) -> None:
        """Open *image* in *directory* and compare it with the past."""
        image.write(directory)
        told = self.past.told[: image.acknowledged]
        try:
            store = await Store.open(directory, StoreOptions(**OPTIONS))
        except MehdbError as error:
            self.problems.append(f"{image.label}: {error}")
            self.lost.update(told)
            return
        try:
            head = store.head
            self.lost.update(revision for revision in told if revision > head)
            report = await store.check()
            self.problems += [f"{image.label}: {problem}" for problem in report.problems[:1]]
        finally:
            await store.close()
        self._compare(image.label, tables_of(directory), head)

    def _compare(self, label: str, tables: dict[str, list[tuple[object, ...]]], head: int) -> None:
        """Note where the tables of an image are not the past up to its head."""
        rows = {row[0]: row[1:3] for row in tables["change"]}
        wrong = [r for r, row in rows.items() if (c := self.past.changes.get(r)) is None or row != (c.key, c.value)]
        if wrong:
            self.problems.append(f"{label}: revision {wrong[0]} is not what was written")
        if dict(tables["entry"]) != self.past.live_at(head):
            self.problems.append(f"{label}: other keys are live at {head}")


async def recorded(directory: Path, live: Live, seed: int, lives: int, count: int) -> list[Event]:
    """Return the events of a run."""
    with Recorder(directory) as recorder:
        await live(recorder, directory, seed, lives, count)
    kinds = {(event.kind, event.file) for event in recorder.events}
    assert kinds >= {(Kind.WRITE, DATABASE), (Kind.SYNC, DATABASE), (Kind.TRUNCATE, WAL), (Kind.DELETE, WAL)}
    [(floor,)] = sql(directory, "SELECT floor FROM meta")
    assert floor > 0, "compaction is among it"
    return recorder.events


@pytest.mark.parametrize(
    ("live", "lives", "count", "images"),
    [
        pytest.param(lead, 3, 5, 1000, id="leader-short"),
        pytest.param(follow, 3, 5, 500, id="follower-short"),
        pytest.param(lead, 3, 5, 6000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)], id="leader-soak"),
        pytest.param(follow, 3, 5, 3000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)], id="follower-soak"),
    ],
)
async def test_all_that_was_acknowledged_survives_a_power_loss(
    tmp_path: Path, live: Live, lives: int, count: int, images: int
) -> None:
    seen: set[int] = set()
    verdicts, normals = [], []
    for seed in range(1, RUNS_MAX + 1):
        events = await recorded(tmp_path / f"{seed}", live, seed, lives, count)
        verdicts.append(Verdict(Past.of(events), seen))
        await verdicts[-1].examine_all(Replay(seed).images(events))
        normals.append(Verdict(Past.of(events)))
        await normals[-1].examine_all(Replay(0).certain(without_sync_at_commit(events)))
        if len(seen) >= images:
            break
    lost, lost_by_normal = (sum(len(verdict.lost) for verdict in some) for some in (verdicts, normals))
    told = sum(len(verdict.past.told) for verdict in verdicts)
    print(
        f"power loss, {live.__name__}: {len(seen):,} different images, {lost} lost of {told} acknowledged; "
        f"without the commit's sync (NORMAL): {lost_by_normal} lost"
    )
    assert [problem for verdict in verdicts for problem in verdict.problems] == []
    assert lost == 0
    assert len(seen) >= images
    assert [problem for normal in normals for problem in normal.problems] == [], "what NORMAL leaves looks sound"
    assert lost_by_normal > told / 10


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_a_power_loss_among_the_writers_own_checkpoints_loses_nothing(directory: Path) -> None:
    """Large values, so that the WAL is checkpointed, and begun anew, when it is as long as it may be."""
    chance = random.Random(7)
    with Recorder(directory) as recorder:
        async with leading(directory, **OPTIONS) as store:
            for n in range(90):
                key, value = b"key-%d" % (n % 4), b"%d" % n + chance.randbytes(512 << 10)
                recorder.acknowledged(Change(await store.write(Write(key, value)), key, value))
    events = recorder.events
    begun_anew = [n for n, event in enumerate(events) if (event.kind, event.file, event.at) == (Kind.WRITE, WAL, 0)]
    assert len(begun_anew) > 1, "the WAL began anew while the store was open"
    around = {n for start in begun_anew[1:] for n in range(start - 60, start + 60)}
    verdict = Verdict(Past.of(events))
    images = (i for i in Replay(8).images(events, 400) if int(i.label.split(",")[0]) in around or chance.random() < 0.3)
    await verdict.examine_all(images)
    print(f"power loss, 16 MiB of WAL: {len(verdict.seen):,} different images, {len(verdict.lost)} lost")
    assert (verdict.problems, verdict.lost) == ([], set())
    assert len(verdict.seen) > 100


@pytest.mark.parametrize(
    "times", [1, pytest.param(5, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])], ids=["short", "soak"]
)
async def test_a_second_power_loss_in_the_recovery_from_the_first_loses_nothing(directory: Path, times: int) -> None:
    """What the first life wrote and did not sync may be there: once it is shown, it must stay."""
    events = await recorded(directory, lead, 2, 3, 6)
    first = list(Replay(5).images(events))
    past, images, chance = Past.of(events), 0, random.Random(6)
    for n, image in enumerate(chance.sample([image for image in first if image.acknowledged], times)):
        again = directory.with_name(f"again-{n}")
        image.write(again)
        with Recorder(again) as recorder:
            async with leading(again, **OPTIONS) as store:
                shown = [past.changes[revision] for revision in range(1, store.head + 1)]
                for change in shown:
                    recorder.acknowledged(change)
                await asyncio.gather(*[write_on(store, recorder, name, random.Random(name), 2) for name in range(3)])
        told = past.told[: image.acknowledged]
        verdict = Verdict(Past.of(recorder.events, told, past.changes))
        await verdict.examine_all(Replay(n, image).images(recorder.events))
        assert (verdict.problems, verdict.lost) == ([], set())
        images += len(verdict.seen)
    print(f"second power loss: {images:,} different images of {times} recoveries, 0 lost")
