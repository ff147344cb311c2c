"""The commands that a page shows in its `console` blocks, and the shell that runs them beside a local cluster."""

import asyncio
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import httpx

from cluster import check_volume, clean_environment, eventually, free_ports
from mehdb.store import lock_holder

ROOT = Path(__file__).parents[1]
STEP_DEADLINE_S = 60
ANSWER_DEADLINE_S = 20
LOOK_EVERY_S = 0.1
FIRST_PORT = 9876
PORTS = 4
MARK = "-- end of the answer --"
LOOKS = re.compile(r"curl (?!.*-X)|grep |ls ")  # changes nothing: may be asked again until the answer is as shown


class Step(NamedTuple):
    """A command, and what the page shows as its answer. `…` stands for anything."""

    command: str
    answer: str


def steps(page: str) -> list[Step]:
    """Return the commands of the `console` blocks, each with the lines below it."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for text in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, answer = text.partition("\n")
            found.append(Step(command, answer.strip()))
    return found


@contextmanager
def local_cluster(directory: Path) -> Iterator[int]:
    """Have `make up` run, on ports of its own, the first of which is given, and with its volumes in DIRECTORY/data."""
    first = free_ports(PORTS)
    output = directory / "output"
    with output.open("wb") as out:
        up = subprocess.Popen(
            ["make", "-s", "up", f"PORT={first}", f"DATA={directory / 'data'}"],
            cwd=ROOT, env=clean_environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip

    def last_is_ready() -> bool:
        assert up.poll() is None, output.read_text()
        try:
            return httpx.get(f"http://127.0.0.1:{first + 2}/readyz", trust_env=False).is_success
        except httpx.TransportError:
            return False

    try:
        eventually(last_is_ready, "`make up`", STEP_DEADLINE_S)
        yield first
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait(STEP_DEADLINE_S)
    for volume in (directory / "data").iterdir():
        if volume.is_dir():
            eventually(lambda: lock_holder(volume) is None, f"{volume} to be let go")  # noqa: B023
            asyncio.run(check_volume(volume))


class Shell:
    """One shell in *directory*, whose `data` is the cluster's at *port*. Its commands have nobody to ask."""

    def __init__(self, directory: Path, port: int) -> None:
        self._directory = directory
        self._port = port
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        (directory / ".venv").symlink_to(ROOT / ".venv")
        environment = clean_environment()
        environment["PATH"] = f"{ROOT / '.venv' / 'bin'}:{environment['PATH']}"  # as `. .venv/bin/activate` does
        self._process = subprocess.Popen(
            ["bash"], cwd=directory, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # with whatever it runs in the background
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def moved(self, text: str) -> str:
        """Return a text of the page with the test's own ports and folder."""
        for ordinal in reversed(range(PORTS)):
            text = text.replace(f":{FIRST_PORT + ordinal}", f":{self._port + ordinal}")
            text = text.replace(f"--port {FIRST_PORT + ordinal}", f"--port {self._port + ordinal}")
        return text.replace("/tmp/", f"{self._directory}/")  # noqa: S108  the page's, replaced by the test's own

    def take(self, step: Step) -> None:
        """Run the command. It must answer what the page shows; one that only looks may be asked until it does."""
        pattern = ".*".join(re.escape(part) for part in self.moved(step.answer).split("…"))
        end_s = time.monotonic() + ANSWER_DEADLINE_S
        answer = self._run(step)
        while not re.fullmatch(pattern, answer) and LOOKS.match(step.command) and time.monotonic() < end_s:
            time.sleep(LOOK_EVERY_S)  # between two looks
            answer = self._run(step)
        assert re.fullmatch(pattern, answer), f"`{step.command}` is to answer\n{step.answer}\nand answered\n{answer}"

    def _run(self, step: Step) -> str:
        assert self._process.stdin is not None
        # Disowned, or the shell would report a node's end when it comes to hear of it: beside any answer.
        aside = "disown" if step.command.endswith("&") else "true"
        self._process.stdin.write(f"{{ {self.moved(step.command)}\n{aside}\n}} < /dev/null; echo; echo '{MARK}'\n")
        self._process.stdin.flush()
        said = ""
        try:
            while (line := self._lines.get(timeout=STEP_DEADLINE_S)) != f"{MARK}\n":
                said += line
        except queue.Empty:
            raise AssertionError(f"`{step.command}` takes too long, and said {said!r}") from None
        return said.strip()
