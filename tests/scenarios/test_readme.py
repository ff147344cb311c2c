"""The README's walk on this machine: its commands, read out of it, do what it shows."""

import re
from pathlib import Path

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


def test_every_setting_is_in_the_readme() -> None:
    for setting in SETTINGS:
        assert f"`{flag(setting.name)}`" in README
        assert f"`{setting.metadata['variable']}`" in README


def test_every_file_that_the_readme_links_to_exists() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
