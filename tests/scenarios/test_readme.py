"""The README's walk on this machine: its commands, read out of it, do what it shows."""

import os
import re
import subprocess
from pathlib import Path

from cluster import Cluster
from mehdb.settings import SETTINGS, flag
from walk import ROOT, Shell, local_cluster, steps

README = (ROOT / "README.md").read_text()


def test_the_walk_on_this_machine_shows_what_the_readme_shows(tmp_path: Path) -> None:
    """In one shell, in a folder whose `data` and `.venv` are the cluster's; only the ports are others."""
    walk = steps(README)
    assert len(walk) >= 15
    with local_cluster(tmp_path) as port, Shell(tmp_path, port) as shell:
        for step in walk:
            shell.take(step)


def test_every_line_to_type_of_the_api_does_something_on_a_follower(cluster: Cluster) -> None:
    """In the order of the page, as a reader types them. A watch is ended after a second."""
    page = README[README.index("## The API") : README.index("### What is guaranteed")]
    lines = re.findall(r"`(curl [^`]+)`", page)
    assert len(lines) >= 28
    cluster.start(2)
    statuses = {}
    for line in lines:
        endless = " -N " in line
        command = line.replace("curl", f"curl -s -o {cluster.directory}/answer -w '%{{http_code}}' --noproxy '*'", 1)
        done = subprocess.run(
            ["sh", "-c", f"{command} --max-time 1" if endless else command],
            cwd=ROOT, env=os.environ | {"M": cluster.followers[0].url}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == (28 if endless else 0), (line, done.stderr)
        statuses[line] = int(done.stdout)
        if "-L" in line:
            cluster.converge()  # as somebody who types does
    assert {line: status for line, status in statuses.items() if status not in (200, 304)} == {}
    assert list(statuses.values()).count(304) == 1


def test_every_setting_is_in_the_readme() -> None:
    for setting in SETTINGS:
        assert f"`{flag(setting.name)}`" in README
        assert f"`{setting.metadata['variable']}`" in README


def test_every_file_that_the_readme_links_to_exists() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
