"""Making files and their names durable."""

import os
from pathlib import Path


def sync_directory(directory: Path) -> None:
    """Make the names in *directory* durable, not only what the files hold."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Make what the file at *path* holds durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
