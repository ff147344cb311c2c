"""Small volumes of their own for tests that fill them, or make them read-only. They need root, and mounts.

On a developer's machine without these the tests are skipped. In CI (`CI` is set) they fail: they would prove nothing.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

import pytest

MIB: Final = 1 << 20
MOUNT_TIMEOUT_S: Final = 10
FOREIGN: Final = "foreign"  # a file on the volume that is none of ours


def unavailable(why: str) -> NoReturn:
    """Skip a test for which this machine will not do, but in CI fail it."""
    if os.environ.get("CI"):
        pytest.fail(f"CI needs what only root can have: {why}")
    pytest.skip(why)


def _mount(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(arguments, capture_output=True, text=True, timeout=MOUNT_TIMEOUT_S, check=False)


@contextlib.contextmanager
def tmpfs(path: Path, size_bytes: int) -> Iterator[Path]:
    """Have a file system in memory at *path*. Without the right to mount one, the test is skipped."""
    path.mkdir(parents=True)
    if os.geteuid() != 0:
        unavailable("only root can mount a volume")
    mounted = _mount("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(path))
    if mounted.returncode != 0:
        unavailable(f"no volume can be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        _unmount(path)


@contextlib.contextmanager
def ext4(path: Path, size_bytes: int) -> Iterator[Path]:
    """Have a file system on a loop device at *path*, as on a real disk. Where that cannot be, the test is skipped."""
    path.mkdir(parents=True)
    if os.geteuid() != 0:
        unavailable("only root can mount a volume")
    image = path.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(size_bytes)
    try:
        made = _mount("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
        mounted = _mount("mount", "-o", "loop", str(image), str(path))
    except FileNotFoundError as error:
        unavailable(f"no ext4 can be made here: {error}")
    if made.returncode or mounted.returncode:
        unavailable(f"no ext4 can be mounted here: {made.stderr.strip()} {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        _unmount(path)


def _unmount(path: Path) -> None:
    # Lazily: a node that a failed test leaves is ended after this.
    unmounted = _mount("umount", "--lazy", str(path))
    assert unmounted.returncode == 0, unmounted.stderr


def remount(path: Path, mode: str) -> None:
    """Make the volume at *path* "ro" or "rw"."""
    remounted = _mount("mount", "-o", f"remount,{mode}", str(path))
    assert remounted.returncode == 0, remounted.stderr


def free_bytes(path: Path) -> int:
    volume = os.statvfs(path)
    return volume.f_bavail * volume.f_frsize


def fill(path: Path, leave_bytes: int = 0) -> None:
    """Let a file that is none of ours take all room on the volume at *path*, but for *leave_bytes*."""
    fd = os.open(path / FOREIGN, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        while (room := free_bytes(path) - leave_bytes) > 0:
            try:
                os.write(fd, bytes(min(room, MIB)))
                os.fsync(fd)
            except OSError:
                if room < 1 << 16:
                    return
    finally:
        os.close(fd)


def make_room(path: Path) -> None:
    """Remove what `fill` has put there."""
    (path / FOREIGN).unlink()
