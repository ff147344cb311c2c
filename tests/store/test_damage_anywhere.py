"""Whatever happens to a bit, a page or the end of a store's files: an answer is right, or it is an error.

`damages` has the cases. They run in processes of their own, as SQLite maps memory that a damage may take away.
"""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

import damages
from damages import BASES, FRAME_BYTES, WAL_HEADER_BYTES
from disk import WAL
from stores import RAM

# How many cases of each base: 5,300. The closed one's first 900 are each page and each bit of the header.
CASES: Final = {"closed": 1800, "compacted": 800, "killed": 800, "backfilled": 800, "restarted": 1100}


@dataclass
class Findings:
    """What came of many cases."""

    cases: int = 0
    refused: int = 0
    errors: int = 0
    wrong: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    signals: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable["Findings"]) -> "Findings":
        """Return all that is in *parts*."""
        total = cls()
        for part in parts:
            for name, found in vars(part).items():
                setattr(total, name, getattr(total, name) + found)
        return total

    def take(self, base: str, line: dict[str, Any]) -> None:
        """Add one case."""
        self.cases += 1
        self.refused += "refused" in line
        self.errors += line.get("errors", 0)
        for kind in ("wrong", "unexpected"):
            if found := line.get(kind):
                getattr(self, kind).append(f"{base}, case {line['case']}, {line['damage']}: {found[0]}")


@pytest.fixture(scope="module")
def bases() -> Iterator[Path]:
    """A folder with a store of each kind, undamaged."""
    with tempfile.TemporaryDirectory(dir=RAM if RAM.is_dir() else None, prefix="mehdb-damages-") as folder:
        for kind in BASES:
            made = subprocess.run([sys.executable, damages.__file__, "make", kind, Path(folder, kind)], timeout=60)
            assert made.returncode in (0, -signal.SIGKILL)
        yield Path(folder)


def examined(base: Path, sort: str, last: int, mark: str = "with mark") -> Findings:
    """Return what came of the cases up to *last*. A process that a signal ended goes on in another, behind the case."""
    findings, following = Findings(), 0
    while following < last:
        command = [sys.executable, damages.__file__, "work", base, sort, str(following), str(last), mark]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            for line in process.stdout:
                findings.take(base.name, json.loads(line))
                following = json.loads(line)["case"] + 1
        assert process.returncode <= 0, f"{base.name}, behind case {following - 1}: see the traceback above"
        if process.returncode < 0:
            findings.signals.append(f"{base.name}, case {following}: {signal.Signals(-process.returncode).name}")
            following += 1
    return findings


@pytest.mark.parametrize(
    "part", [0.2, pytest.param(1, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])], ids=["short", "soak"]
)
def test_a_damage_anywhere_is_never_served(bases: Path, part: float) -> None:
    cases = {kind: round(CASES[kind] * part) for kind in BASES}
    with ThreadPoolExecutor(2) as pool:
        found = Findings.of(pool.map(lambda kind: examined(bases / kind, "anywhere", cases[kind]), BASES))
    print(
        f"damage: {found.cases} damages, {found.refused} refused at opening, {found.errors} errors in reads, "
        f"{len(found.wrong)} wrong values, {len(found.signals)} signals"
    )
    assert (found.wrong, found.signals, found.unexpected) == ([], [], [])
    assert found.cases == sum(cases.values())
    assert found.refused < found.cases * 0.9, "most of a damaged store can still be read"
    assert found.errors > 1000


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(("backfilled",), id="short"),
        pytest.param(
            ("killed", "backfilled", "restarted"), marks=[pytest.mark.soak, pytest.mark.timeout(1800)], id="soak"
        ),
    ],
)
def test_a_damage_to_any_frame_of_the_wal_is_never_served(bases: Path, kinds: tuple[str, ...]) -> None:
    """Each frame zeroed, the WAL cut in front of it and within it; and flips in the -shm, which is made anew."""
    cases, refused = {}, 0
    for kind in kinds:
        files = {path.name: path.read_bytes() for path in (bases / kind).iterdir()}
        cases[kind] = sum(1 for _ in damages.frame_by_frame(kind, files))
        refused += 3 * frames_in_use(files[WAL])
    with ThreadPoolExecutor(2) as pool:
        found = Findings.of(pool.map(lambda kind: examined(bases / kind, "frame by frame", cases[kind]), kinds))
    print(
        f"damage to the WAL, frame by frame: {found.cases} damages, {found.refused} refused at opening, "
        f"{len(found.wrong)} wrong values, {len(found.signals)} signals"
    )
    assert (found.wrong, found.signals, found.unexpected) == ([], [], [])
    assert found.cases == sum(cases.values())
    assert (found.refused, found.errors) == (refused, 0), "what is lost is noticed, and nothing else is refused"


def frames_in_use(wal: bytes) -> int:
    """Return how many frames are of this WAL, and not left over from the one before."""
    salts = [wal[start + 8 : start + 16] for start in range(WAL_HEADER_BYTES, len(wal), FRAME_BYTES)]
    return salts.count(wal[16:24])  # https://sqlite.org/fileformat2.html#the_write_ahead_log


def test_what_is_left_of_a_file_that_is_cut_under_an_open_store_is_served_right(bases: Path) -> None:
    found = examined(bases / "closed", "live", 60)
    print(
        f"cut while open: {found.cases} cuts, {found.errors} errors, {found.refused} refused at the next opening, "
        f"{len(found.wrong)} wrong values, {len(found.signals)} signals"
    )
    assert (found.wrong, found.signals, found.unexpected) == ([], [], [])
    assert found.errors > 1000


# SQLite maps the -shm into memory: who cuts it takes memory away from the process.


def cut_shm_live(base: Path, directory: Path, sixteenths: int) -> "subprocess.CompletedProcess[str]":
    """Cut the -shm of a store in *directory* that another process has open."""
    shutil.copytree(base, directory)
    command = [sys.executable, damages.__file__, "live", directory, str(sixteenths)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=False)


@pytest.mark.parametrize("sixteenths", [0, 1, 2, 8])
def test_a_process_whose_shm_is_cut_ends_as_if_killed_and_has_lost_nothing(
    bases: Path, directory: Path, sixteenths: int
) -> None:
    assert cut_shm_live(bases / "closed", directory, sixteenths).returncode == -signal.SIGBUS
    found = asyncio.run(damages.examine(directory, "live", partial(damages.truth, live=True)))
    assert found == {"wrong": [], "unexpected": [], "errors": 0}


@pytest.mark.xfail(reason="SQLite verifies nothing of the -shm but its header", raises=AssertionError)
def test_a_store_whose_shm_is_cut_within_its_last_page_serves_no_old_value(bases: Path, directory: Path) -> None:
    """It finds no frame that is listed there, so that it reads what was before, until it is opened again."""
    process = cut_shm_live(bases / "closed", directory, 15)
    process.check_returncode()
    assert json.loads(process.stdout)["wrong"] == []


def test_without_the_mark_a_damaged_wal_would_be_served(bases: Path) -> None:
    """The control: these very cases show that the mark is what keeps rolled back values from being served."""
    with_mark = examined(bases / "killed", "frames", 100)
    assert (with_mark.wrong, with_mark.signals) == ([], [])
    assert with_mark.refused > 90
    without = examined(bases / "killed", "frames", 100, "without mark")
    assert len(without.wrong) > 90


def test_without_page_checksums_a_damaged_page_would_be_served(bases: Path) -> None:
    """The control: flips in the index whose page's checksum is right again hide keys, and show others."""
    without = examined(bases / "closed", "pages", 200)
    assert without.signals == []
    assert len(without.wrong) > 5
