"""One version, in one place, everywhere the same; and a changelog in which it has a section."""

import re
from datetime import date
from typing import Final

import pytest

from mehdb import __version__
from sources import PYPROJECT, ROOT

SECTION: Final = re.compile(r"^## \[(?P<version>[^]]+)\](?: - (?P<date>\d{4}-\d\d-\d\d))?$", re.MULTILINE)
KINDS: Final = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
CHANGELOG: Final = (ROOT / "CHANGELOG.md").read_text()
TAGGED: Final = [ROOT / "README.md", ROOT / "Dockerfile", ROOT / "deploy" / "app.yaml"]


def parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_the_package_takes_its_version_from_the_code() -> None:
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "mehdb/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


@pytest.mark.parametrize("path", TAGGED, ids=lambda path: str(path.relative_to(ROOT)))
def test_images_are_tagged_with_it(path: object) -> None:
    text = path.read_text()  # type: ignore[attr-defined]
    tags = re.findall(r"\bmehdb:(\d+\.\d[\w.-]*\w)", text) + re.findall(r"^ARG VERSION=(\S+)", text, re.MULTILINE)
    assert set(tags) == {__version__}


def test_no_other_manifest_names_an_image() -> None:
    """There is one place to put a registry's name."""
    others = [path for path in (ROOT / "deploy").rglob("*.yaml") if path.name != "app.yaml"]
    assert not [path for path in others if re.search(r"^\s*image:", path.read_text(), re.MULTILINE)]


def test_the_changelog_begins_with_what_is_unreleased_and_goes_back_from_this_version() -> None:
    sections = [(match["version"], match["date"]) for match in SECTION.finditer(CHANGELOG)]
    assert len(sections) == CHANGELOG.count("\n## "), "a heading of another form"
    assert sections[0] == ("Unreleased", None)
    released = sections[1:]
    assert released[0][0] == __version__
    assert [parts(version) for version, _ in released] == sorted((parts(v) for v, _ in released), reverse=True)
    dates = [date.fromisoformat(day or "") for _, day in released]
    assert dates == sorted(dates, reverse=True)


def test_changes_are_of_the_kinds_that_keep_a_changelog_has() -> None:
    assert set(re.findall(r"^### (.*)$", CHANGELOG, re.MULTILINE)) <= KINDS
