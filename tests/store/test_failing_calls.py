"""A system call that fails, whichever it is, while a store is written, copied, replaced by another and written again.

`test_failing_disk` has SQLite's own calls fail. Here strace has the kernel refuse those of everything around them as
well: the acknowledged mark, the ballast, the links, renames and syncs by which one store takes the place of another.
Whatever was acknowledged is there when the volume works again, in the store or in what was kept of it.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from mehdb.model import History
from mehdb.store import Store, make_snapshot
from mehdb.store.room import BALLAST_NAME
from stores import fill, keys_of, leading, opened

CALLS: Final = (
    "write", "pwrite64", "fsync", "fdatasync", "ftruncate", "fallocate",
    "rename", "link", "linkat", "unlink", "unlinkat", "mkdir", "rmdir",
)  # fmt: skip
ERRORS: Final = {"EIO": CALLS, "ENOSPC": ("write", "pwrite64", "fallocate", "link", "linkat", "mkdir", "rename")}
OLD_CHANGES: Final = 10
NEW_CHANGES: Final = 15
TIMEOUT_S: Final = 60
WORK: Final = """
import asyncio, os, shutil, sys
from pathlib import Path
from mehdb.store import Store, Write, verify_snapshot

def say(line):
    os.writev(1, [line + b"\\n"])  # a call that nothing else makes, so that none of those is in its place

async def put(store, key):
    await store.write(Write(key, b"acknowledged"))
    say(key)

async def main():
    store = await Store.open(Path(sys.argv[1]))
    for number in range(3):
        await put(store, b"early-%d" % number)
    (await store.snapshot()).path.unlink()
    shutil.copyfile(store.directory / "arrived", store.incoming)
    await store.replace(store.incoming, verify_snapshot(store.incoming), "rejoined")
    say(b"replaced")
    for number in range(6):  # more, as what is the first for one thread strikes in the threads before it
        await put(store, b"late-%d" % number)
    await store.close()
    say(b"closed")

asyncio.run(main())
"""


class Held(NamedTuple):
    """The history and the values of a store."""

    history: History | None
    values: dict[bytes, bytes | None]


class Template(NamedTuple):
    """A closed store in whose directory a copy of another has arrived, and what the two hold."""

    directory: Path
    old: Held
    new: Held

    def copied(self, to: Path) -> Path:
        """Return a copy of the directory, at *to*."""
        return shutil.copytree(self.directory, to)


async def held(store: Store) -> Held:
    """Return what *store* holds."""
    changes = {key: await store.get(key) for key in await keys_of(store)}
    return Held(store.meta.history, {key: change and change.value for key, change in changes.items()})


@pytest.fixture
async def template(tmp_path: Path) -> Template:
    async with leading(tmp_path / "other") as store:
        await fill(store, NEW_CHANGES, b"new")
        new = await held(store)
    async with leading(tmp_path / "template") as store:
        await fill(store, OLD_CHANGES, b"old")
        old = await held(store)
    make_snapshot(tmp_path / "other", tmp_path / "template/arrived", None)
    (tmp_path / "template" / BALLAST_NAME).unlink()  # so that it is taken anew
    return Template(tmp_path / "template", old, new)


def traced(directory: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Do the work in *directory* under strace, which is given *arguments*."""
    return subprocess.run(
        ["strace", "-f", "-qq", *arguments, sys.executable, "-c", WORK, str(directory)],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


def counted(template: Template, tmp_path: Path) -> dict[str, int]:
    """Return how often each call is made, in the thread that makes it most often: strace counts in each."""
    log = tmp_path / "strace.log"
    calls_there_are = ",".join(f"?{call}" for call in CALLS)  # not every processor has all
    done = traced(template.copied(tmp_path / "counted"), "-e", f"trace={calls_there_are}", "-o", str(log))
    assert done.stdout.splitlines()[-1:] == ["closed"], done.stderr
    calls = Counter(re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE))
    return {name: max((count for (_, called), count in calls.items() if called == name), default=0) for name in CALLS}


async def verify(directory: Path, template: Template, said: list[str]) -> None:
    """Expect that what was acknowledged is there, in one whole store or the other."""
    async with opened(directory) as store:
        assert (await store.check()).problems == ()
        there = await held(store)
    if there.history == template.old.history:
        assert "replaced" not in said
        _expect(there, template.old, said, "early")
        return
    _expect(there, template.new, said, "late")
    async with opened(_kept(directory)) as store:
        _expect(await held(store), template.old, said, "early")


def _kept(directory: Path) -> Path:
    [kept] = directory.glob("rejoined-*")
    return kept


def _expect(there: Held, before: Held, said: list[str], written: str) -> None:
    acknowledged = {line.encode(): b"acknowledged" for line in said if line.startswith(written)}
    assert there.history == before.history
    assert there.values.items() >= (before.values | acknowledged).items()


@pytest.fixture
def strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("no strace here")
    if subprocess.run(["strace", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to use strace here")


@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize(
    "step",
    [pytest.param(7, id="short"), pytest.param(1, id="soak", marks=(pytest.mark.soak, pytest.mark.timeout(900)))],
)
async def test_nothing_is_lost_by_a_call_that_fails(template: Template, tmp_path: Path, step: int) -> None:
    counts = counted(template, tmp_path)
    failures = [
        (error, call, number)
        for error, calls in ERRORS.items()
        for call in calls
        for number in range(1, counts[call] + 1)
    ][::step]
    ended: Counter[str] = Counter()
    for error, call, number in failures:
        directory = template.copied(tmp_path / f"{error}-{call}-{number}")
        done = traced(
            directory, "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={number}", "-o", os.devnull
        )
        said = done.stdout.splitlines()
        try:
            await verify(directory, template, said)
        except BaseException as failed:
            failed.add_note(f"{error} of {call} {number}, which said {said}\n{done.stderr}")
            raise
        ended[said[-1] if said else "nothing"] += 1
        shutil.rmtree(directory)
    assert 0 < ended["closed"] < len(failures)  # some do no harm, and some are noticed
    print(f"failing calls: {len(failures)} failures, 0 acknowledged writes lost; the last thing said: {dict(ended)}")
