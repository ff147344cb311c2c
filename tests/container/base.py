"""The image that the Dockerfile stands on: the one that it names, or where no registry can be reached a Debian.

That has `python3` and `venv`, is made by debootstrap from the mirror that this machine installs from, and lacks the
manual pages and translations that slim images come without. It is made once and kept in a cache.
"""

import configparser
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

from engine import Engine, run
from sources import DOCKERFILE

SUITE: Final = "bookworm"  # Python 3.11: the oldest that mehdb supports
RECIPE: Final = 1  # raised when what is made below changes
MAKE_DEADLINE_S: Final = 400
PULL_DEADLINE_S: Final = 120
STAND_IN: Final = "localhost/mehdb-base"
UNUSED: Final = (
    "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/cache/apt", "var/lib/apt/lists",
)  # fmt: skip
MIRROR: Final = re.compile(r"^(?:URIs:|deb(?:\s+\[[^]]*\])?)\s+(https?://\S*debian/?)(?:\s|$)", re.MULTILINE)
CACHE: Final = Path(os.environ.get("MEHDB_TEST_CACHE") or Path.home() / ".cache" / "mehdb")


def base(engine: Engine) -> str:
    """Return an image to stand on: `BASE` of the environment, the Dockerfile's, or the one that stands in for it."""
    given = os.environ.get("BASE")
    wanted = given or DOCKERFILE.all("ARG")[0].partition("=")[2]
    if engine.pull(wanted if "/" in wanted else f"docker.io/library/{wanted}", PULL_DEADLINE_S):
        return wanted
    assert not given, f"no image {given} here, and none can be pulled"
    engine.load(STAND_IN, _archive())
    return STAND_IN


def _archive() -> Path:
    """Return the files of the image that stands in, made if the cache holds none."""
    kept = CACHE / f"base-{SUITE}-{RECIPE}.tar"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="mehdb-base-") as directory:
            root = Path(directory, "root")
            run(
                "debootstrap", "--variant=minbase", "--include=python3,python3-venv", SUITE, root, _mirror(),
                deadline_s=MAKE_DEADLINE_S,
            )  # fmt: skip
            for unused in UNUSED:
                shutil.rmtree(root / unused, ignore_errors=True)
            made = kept.with_suffix(f".{os.getpid()}")
            run("tar", "--create", "--file", made, "--directory", root, "--exclude=./dev/*", ".")
            made.rename(kept)
    return kept


def _mirror() -> str:
    """Return the mirror of Debian that this machine installs from."""
    files = sorted(Path("/etc/apt").glob("sources.list*")) + sorted(Path("/etc/apt/sources.list.d").glob("*"))
    found = [mirror for file in files if file.is_file() for mirror in MIRROR.findall(file.read_text())]
    assert found, "no mirror of Debian in /etc/apt: name an image to stand on with BASE"
    return str(found[0])


def pip_mounts(directory: Path) -> dict[Path, str]:
    """Return what has pip install in a build as it does here: from the same index, trusting the same certificates.

    It lies in root's home, which each base has, so that no image keeps a trace of it.
    """
    settings = run(sys.executable, "-m", "pip", "config", "list")
    passed = dict(re.findall(r"^(?::env:|global)\.([\w-]+)='(.*)'$", settings, re.MULTILINE))
    passed.pop("find-links", None)  # a folder of this machine's, as a rule: wheels come from the index
    if certificates := passed.get("cert"):
        shutil.copy(certificates, directory / "certificates.pem")
        passed["cert"] = "/root/certificates.pem"
    config = configparser.RawConfigParser()
    config["global"] = passed
    file = directory / ".config" / "pip" / "pip.conf"
    file.parent.mkdir(parents=True)
    with file.open("w") as out:
        config.write(out)
    return {directory: "/root"}
