"""The lock files, held against pyproject.toml and each other."""

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sources import ROOT, lock, requirements

RUNTIME, DEVELOPMENT, BUILD = "requirements.lock", "requirements-dev.lock", "requirements-build.lock"
LOCKS = (RUNTIME, DEVELOPMENT, BUILD)
DIRECT = [
    *((RUNTIME, one) for one in requirements("project", "dependencies")),
    *((DEVELOPMENT, one) for one in requirements("project", "dependencies")),
    *((DEVELOPMENT, one) for one in requirements("project", "optional-dependencies", "dev")),
    *((BUILD, one) for one in requirements("build-system", "requires")),
]


@pytest.mark.parametrize(("name", "requirement"), DIRECT, ids=str)
def test_what_pyproject_asks_for_is_locked_within_its_bounds(name: str, requirement: Requirement) -> None:
    assert lock(name)[canonicalize_name(requirement.name)].version in requirement.specifier


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_hashes(name: str) -> None:
    """Without one, pip would refuse the whole file under --require-hashes."""
    packages = lock(name)
    assert [package for package, locked in packages.items() if not locked.hashes] == []


def test_the_tests_run_with_what_the_image_runs() -> None:
    runtime, development = lock(RUNTIME), lock(DEVELOPMENT)
    assert {name: development.get(name) for name in runtime} == runtime


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_names_no_index(name: str) -> None:
    """Where packages come from is each machine's own matter."""
    text = (ROOT / name).read_text()
    assert [word for word in ("://", "--index", "--extra", "--find-links", "--trusted") if word in text] == []


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_says_how_it_is_made_again(name: str) -> None:
    assert "make lock" in "".join((ROOT / name).read_text().splitlines(keepends=True)[:3])
