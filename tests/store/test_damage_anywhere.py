"""Whatever happens to a bit, a page or the end of a store's files: an answer is right, or it is an error.

`damages` has the cases. They run in processes of their own, as SQLite maps memory that a damage may take away.
"""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

import damages
from damages import BASES

RAM: Final = Path("/dev/shm")  # noqa: S108  no file of these is worth a disk
# How many cases of each base. The closed one's first 900 are each page and each bit of the header.
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
    "times", [1, pytest.param(2, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])], ids=["once", "soak"]
)
def test_a_damage_anywhere_is_never_served(bases: Path, times: int) -> None:
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda kind: examined(bases / kind, "anywhere", CASES[kind] * times), BASES))
    cases, refused, errors = (sum(getattr(part, name) for part in parts) for name in ("cases", "refused", "errors"))
    wrong = [line for part in parts for line in part.wrong]
    signals = [line for part in parts for line in part.signals]
    print(
        f"damage: {cases} damages, {refused} refused at opening, {errors} errors in reads, {len(wrong)} wrong values, "
        f"{len(signals)} signals"
    )
    assert (wrong, signals) == ([], [])
    assert [line for part in parts for line in part.unexpected] == []
    assert cases + len(signals) >= 5000
    assert refused < cases * 0.9, "most of a damaged store can still be read"
    assert errors > 1000


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
