"""Lives that end with kill -9: what was acknowledged is there in the next one."""

from pathlib import Path

from mehdb.model import Revision, encode_page
from mehdb.store import Store
from mehdb.store.reader import Reader
from stores import catch_up, changes_of, child, fill, opened

WRITER = """
import asyncio, itertools, sys
from pathlib import Path
from mehdb.errors import KeyNotFound
from mehdb.store import Store, Write

async def main():
    store = await Store.open(Path(sys.argv[1]))
    epoch = store.meta.epoch + 1
    await store.lead(epoch)

    async def client(name):
        for n in itertools.count():
            key = f"{name}-{n % 5}"
            value = None if n % 7 == 6 else f"{epoch}-{n}" * (n % 300)
            revision = await store.write(Write(key.encode(), value if value is None else value.encode()))
            print(revision, key, "deleted" if value is None else "=" + value, flush=True)

    await asyncio.gather(*[client(name) for name in range(8)])

asyncio.run(main())
"""


async def test_what_was_acknowledged_before_a_kill_is_there_after_it(directory: Path) -> None:
    acknowledged: dict[int, tuple[bytes, bytes | None]] = {}
    for life, lines_before_the_kill in enumerate((1, 400, 150), start=1):
        with child(WRITER, directory) as writer:
            assert writer.stdout
            lines = [writer.stdout.readline() for _ in range(lines_before_the_kill)]
            writer.kill()
            lines += writer.stdout.readlines()
        for line in lines:
            if line.endswith("\n"):
                revision, key, value = line.split()
                acknowledged[int(revision)] = key.encode(), None if value == "deleted" else value[1:].encode()
        async with opened(directory) as store:
            assert store.head >= max(acknowledged)
            assert store.meta.epoch == life
            assert (await store.check()).problems == ()
        changes = {change.revision: (change.key, change.value) for change in changes_of(directory)}
        assert list(changes) == list(range(1, len(changes) + 1))
        assert {revision: changes[Revision(revision)] for revision in acknowledged} == acknowledged
    assert len(acknowledged) >= 551


FOLLOWER = """
import asyncio, sys
from pathlib import Path
from mehdb.model import decode_page
from mehdb.store import Store

async def main():
    store = await Store.open(Path(sys.argv[1]))
    pages = [decode_page(path.read_bytes()) for path in sorted(Path(sys.argv[2]).iterdir())]
    for page in pages:
        if page.after >= store.head:
            await store.apply(page)
            print(store.head, flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


async def test_a_follower_killed_among_its_pages_goes_on_where_its_disk_says(leader: Store, tmp_path: Path) -> None:
    await fill(leader, 60)
    folder, reader = tmp_path / "pages", Reader(tmp_path / "leader")
    folder.mkdir()
    for n in range(20):
        page = reader.page(Revision(3 * n), leader.meta, 100)
        assert page is not None
        assert len(page.changes) == 3
        (folder / f"{n:02}").write_bytes(encode_page(page))
    reader.close()
    for pages_before_the_kill in (1, 4, 3):
        with child(FOLLOWER, tmp_path / "follower", folder) as process:
            assert process.stdout
            applied = [int(process.stdout.readline()) for _ in range(pages_before_the_kill)]
            process.kill()
        async with opened(tmp_path / "follower") as follower:
            assert follower.head >= applied[-1]
            assert follower.head % 3 == 0  # whole pages only
            assert (await follower.check()).problems == ()
    async with opened(tmp_path / "follower") as follower:
        await catch_up(follower, leader)
        assert follower.position == leader.position
