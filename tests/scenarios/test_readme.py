"""The README's walk on this machine: its commands, read out of it, do what it shows."""

import asyncio
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from cluster import check_volume, clean_environment, eventually, free_ports
from mehdb.settings import SETTINGS, flag
from mehdb.store import lock_holder

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
STEP_DEADLINE_S = 60
FIRST_PORT = 9876
PORTS = 4
MARK = "-- end of the answer --"


class Step(NamedTuple):
    """A command, and what the README shows as its answer."""

    command: str
    answer: str


def steps() -> list[Step]:
    """Return the commands of the `console` blocks, each with the lines below it."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        for text in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, answer = text.partition("\n")
            found.append(Step(command, answer.strip()))
    return found


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """Run `make up` in this checkout, on ports and volumes of its own, and return its first port."""
    first = free_ports(PORTS)
    output = tmp_path / "output"
    with output.open("wb") as out:
        up = subprocess.Popen(
            ["make", "-s", "up", f"PORT={first}", f"DATA={tmp_path / 'data'}"],
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
    for ordinal in range(PORTS):
        volume = tmp_path / "data" / f"mehdb-{ordinal}"
        eventually(lambda: lock_holder(volume) is None, f"{volume} to be let go")  # noqa: B023
        asyncio.run(check_volume(volume))


def test_the_walk_on_this_machine_shows_what_the_readme_shows(port: int, tmp_path: Path) -> None:
    """In one shell, in a folder whose `data` and `.venv` are the cluster's; only the ports are others."""
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")

    def moved(text: str) -> str:
        for ordinal in reversed(range(PORTS)):
            text = text.replace(f":{FIRST_PORT + ordinal}", f":{port + ordinal}")
            text = text.replace(f"--port {FIRST_PORT + ordinal}", f"--port {port + ordinal}")
        return text.replace("/tmp/", f"{tmp_path}/")  # noqa: S108  the README's, replaced by the test's own

    walk = steps()
    assert len(walk) >= 15
    script = "".join(f"{moved(step.command)}\necho; echo '{MARK}'\n" for step in walk)
    done = subprocess.run(
        ["bash"], input=script, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True,
        timeout=STEP_DEADLINE_S * 2, check=False,
    )  # fmt: skip
    answers = done.stdout.split(MARK)
    for step, answer in zip(walk, answers, strict=False):
        assert answer.strip() == moved(step.answer), f"`{step.command}` answered otherwise; {done.stderr}"
    assert len(answers) == len(walk) + 1, done.stderr


def test_every_setting_is_in_the_readme() -> None:
    for setting in SETTINGS:
        assert f"`{flag(setting.name)}`" in README
        assert f"`{setting.metadata['variable']}`" in README


def test_every_file_that_the_readme_links_to_exists() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
