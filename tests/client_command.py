"""`mehdb` as whoever uses a cluster runs it."""

import subprocess
import sys
from dataclasses import dataclass

from cluster import DEADLINE_S, Node, clean_environment

PLAIN = {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "200"}


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: bytes
    said: str

    @property
    def number(self) -> int:
        """What a write prints. It must have succeeded."""
        assert (self.code, self.said) == (0, ""), self
        return int(self.out)

    def failed(self, code: int = 1) -> str:
        """Return the line that it failed with: it must have said nothing else."""
        assert (self.code, self.out, self.said.count("\n")) == (code, b"", 1), self
        assert self.said.startswith("mehdb: "), self
        return self.said


def arguments(*command: object) -> list[str]:
    return [sys.executable, "-m", "mehdb", *map(str, command)]


def environment(where: Node | str, **more: str) -> dict[str, str]:
    url = where if isinstance(where, str) else where.url
    return clean_environment() | PLAIN | {"MEHDB_URL": url} | more


def mehdb(where: Node | str, *command: object, stdin: bytes = b"", **more: str) -> Done:
    """Run a command against the node, or nodes, at *where*."""
    done = subprocess.run(
        arguments(*command), env=environment(where, **more), input=stdin, capture_output=True, timeout=DEADLINE_S,
        check=False,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr.decode())
