"""Stores and disks for the tests of this folder."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from disk import Disk
from mehdb.store import Store
from stores import RAM, leading, opened


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the leader's store is, or will be."""
    return tmp_path / "leader"


@pytest.fixture
def volume(directory: Path) -> Path:
    """The same, made already."""
    directory.mkdir()
    return directory


@pytest.fixture
async def leader(directory: Path) -> AsyncIterator[Store]:
    """An open store in its first epoch."""
    async with leading(directory) as store:
        yield store


@pytest.fixture
async def follower(tmp_path: Path) -> AsyncIterator[Store]:
    """An open store that has seen no leader."""
    async with opened(tmp_path / "follower") as store:
        yield store


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder that no disk slows down, for thousands of stores that nobody needs for longer than a moment."""
    with tempfile.TemporaryDirectory(dir=RAM if RAM.is_dir() else None, prefix="mehdb-") as folder:
        yield Path(folder)


@pytest.fixture
def disk() -> Iterator[Disk]:
    """The disk under every store opened after it."""
    with Disk() as disk:
        yield disk
