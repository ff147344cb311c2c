"""The operator's commands as real processes: in a pipe, where nobody can be asked, and at a terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from cluster import DEADLINE_S, Node, clean_environment

COMMAND = (sys.executable, "-m", "mehdb")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Done(NamedTuple):
    """A command that has ended. At a terminal, *shown* is all that was drawn there."""

    code: int
    shown: str
    said: str = ""

    @property
    def failed_in_one_line(self) -> str:
        """Return the line on stderr that a command failed with: it must have said nothing else."""
        assert (self.code, self.shown, self.said.count("\n")) == (1, "", 1), self
        assert self.said.startswith("mehdb: "), self
        return self.said


def mehdb(*arguments: object, data_dir: Path | None = None, stdin: bytes = b"") -> Done:
    """Run a command without a terminal. *shown* is stdout, *said* is stderr."""
    done = subprocess.run(
        arguments_of(arguments, data_dir), env=clean_environment() | {"TERM": "dumb"}, input=stdin,
        capture_output=True, timeout=DEADLINE_S * 2, check=False,
    )  # fmt: skip
    return Done(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode())


def started(*arguments: object, data_dir: Path) -> "subprocess.Popen[str]":
    """Start a command without a terminal, and do not wait for it."""
    return subprocess.Popen(
        arguments_of(arguments, data_dir), env=clean_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def at_terminal(*arguments: object, data_dir: Path | None = None, answer: str = "", stdout: int | None = None) -> Done:
    """Run a command at a terminal where *answer* is typed; its stdout goes elsewhere if that is given."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        arguments_of(arguments, data_dir), env=clean_environment() | {"TERM": "xterm", "COLUMNS": "200"},
        stdin=theirs, stdout=theirs if stdout is None else stdout, stderr=theirs, start_new_session=True,
    ) as process:  # fmt: skip
        os.close(theirs)
        os.write(ours, answer.encode())  # the terminal holds it until it is asked for
        drawn, end_s = b"", time.monotonic() + DEADLINE_S * 2
        while True:
            assert select.select([ours], [], [], max(0, end_s - time.monotonic()))[0], f"still running: {drawn!r}"
            try:
                drawn += os.read(ours, 65536)
            except OSError:  # the last process that had the terminal has gone
                break
        os.close(ours)
        code = process.wait(DEADLINE_S)
    return Done(code, ESCAPES.sub("", drawn.decode(errors="replace")).replace("\r\n", "\n"))


def arguments_of(arguments: tuple[object, ...], data_dir: Path | None) -> list[str]:
    """Return the command line."""
    return [*COMMAND, *map(str, arguments), *(["--data-dir", str(data_dir)] if data_dir else [])]


def kept(volume: Path, reason: str) -> list[Path]:
    """Return the folders in which stores are kept aside, the oldest first."""
    return sorted(volume.glob(f"{reason}-*"))


def write(node: Node, keys: int, value: bytes = b"v") -> None:
    for number in range(keys):
        assert node.put(f"k/{number}", value).is_success


def values(node: Node) -> dict[str, bytes]:
    return {key: node.get(f"/get/{key}").content for key in node.get("/keys").json()}


def entries(volume: Path) -> list[str]:
    """Return what is in a volume, but for what a running node has there."""
    return sorted(path.name for path in volume.iterdir() if not path.name.endswith(("-wal", "-shm", "control")))


def refused(done: Done, why: str) -> None:
    assert why in done.failed_in_one_line


def asked_and_answered(*command: object, node: Node, question: str) -> Done:
    """Run a command at a terminal: "n" must change nothing. Return what it did after "y"."""
    before: Any = node.position(), entries(node.volume)
    no = at_terminal(*command, data_dir=node.volume, answer="n\n")
    assert (no.code, "Go on? [y/N]" in no.shown) == (1, True), no
    assert question in no.shown
    assert (node.position(), entries(node.volume)) == before
    return at_terminal(*command, data_dir=node.volume, answer="y\n")
