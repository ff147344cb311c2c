"""Damage on a node's disk is never served: a follower heals itself, a leader says how it is repaired (promise 5)."""

import contextlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import apsw
import pytest

from cluster import Node, eventually
from mehdb.replication import HEAL_RETRY_S
from scenes import DATABASE, Row, copy, flip, grow, kept, mehdb, rows, scene

KEYS: Final = 1000  # several pages of the index, dozens of values
PAGE_BYTES: Final = 4096
HEALED_WITHIN_S: Final = HEAL_RETRY_S + 15.0  # a long poll takes 1.5 s, a snapshot more, and one may fail


def a_byte_of_the_value(volume: Path, row: Row) -> None:
    """Flip a bit in the value of *row*, in the page where it stands and in any where it once stood."""
    data = (volume / DATABASE).read_bytes()
    for found in re.finditer(re.escape(row.value), data):
        flip(volume / DATABASE, found.start())


def an_index_page(volume: Path, row: Row) -> None:
    """Flip a bit in the page of the index that leads to *row*."""
    path = volume / DATABASE
    with contextlib.closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)) as connection:
        pages = connection.execute("SELECT pageno FROM dbstat WHERE name = 'entry' AND pagetype = 'leaf'").fetchall()
    data = path.read_bytes()
    for (number,) in pages:
        if (found := data[(number - 1) * PAGE_BYTES : number * PAGE_BYTES].find(row.key)) >= 0:
            flip(path, (number - 1) * PAGE_BYTES + found)


DAMAGES: Final = (a_byte_of_the_value, an_index_page)


def target(row: Row) -> str:
    return f"/get/{row.key.decode()}"


def refused(node: Node, row: Row) -> str:
    """Expect *node* to say that it cannot serve *row*, and return the message."""
    answer = node.get(target(row))
    assert answer.status_code == 500
    assert row.value not in answer.content
    body = json.loads(answer.content)
    assert body["error"] == "damaged_row"
    return str(body["message"])


def some_row(volume: Path) -> Row:
    """Return one from the middle: the newest change of all is verified when a store is opened."""
    return sorted(rows(volume), key=lambda row: row.key)[KEYS // 2]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_follower_heals_itself(tmp_path: Path, damage: Callable[[Path, Row], None]) -> None:
    with scene(tmp_path) as stage:
        [follower] = stage.followers
        copy(grow(stage.leader.volume, KEYS), follower.volume)
        stage.note()
        row = some_row(follower.volume)
        damage(follower.volume, row)
        for node in stage.cluster.nodes:
            node.start()
        assert "mends itself" in refused(follower, row)
        since_s = time.monotonic()
        eventually(lambda: follower.get(target(row)).content == row.value, "the follower to heal", HEALED_WITHIN_S)
        took_s = time.monotonic() - since_s
        assert stage.equal().revision == KEYS
        assert follower.status().damage is None
        assert len(kept(follower.volume, "damaged")) == 1
    print(f"healing: a follower with damage in {damage.__name__} served the key again after {took_s:.1f} s")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_leader_says_what_is_damaged_and_is_repaired_from_a_follower(
    tmp_path: Path, damage: Callable[[Path, Row], None]
) -> None:
    with scene(tmp_path, 3) as stage:
        leader, sound, new = stage.cluster.nodes
        copy(grow(grow(leader.volume, KEYS), 1, key="hot"), sound.volume)
        stage.note()
        row = some_row(leader.volume)
        damage(leader.volume, row)
        leader.start()
        sound.start()
        for _ in range(3):
            said = refused(leader, row)
        assert repr(row.key.decode()) in said
        assert "`mehdb adopt --from URL`" in said
        named = [line for line in leader.log.splitlines() if repr(row.key.decode()) in line]
        assert len(named) == 1, "damage is logged once, with the key"
        assert leader.status().damage
        # What is not on that page goes on: other keys, and writes.
        by_key = sorted(rows(sound.volume), key=lambda row: row.key)
        for other in (by_key[0], by_key[-1]):
            assert leader.get(target(other)).content == other.value
        assert leader.put("hot", b"written beside the damage").is_success
        stage.until(sound, "serving")
        eventually(lambda: sound.position() == leader.position(), "the write to reach the sound follower")
        # No new follower copies what is damaged.
        new.start(ready=False)
        eventually(lambda: "leader not followed" in new.log, "the new follower to be refused")
        assert not new.get("/readyz").is_success
        assert new.get(target(row)).status_code in (404, 503)
        mehdb("adopt", "--from", sound.url, "--data-dir", str(leader.volume), "--yes")
        assert stage.equal().revision == KEYS + 2
        for node in stage.cluster.nodes:
            assert node.get(target(row)).content == row.value
        assert len(kept(leader.volume, "adopted")) == 1
