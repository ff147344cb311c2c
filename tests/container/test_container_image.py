"""The image itself: what is in it, what is not, and how soon a container of it is ready."""

import http.client
import importlib.metadata
import json
import os
import re
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest
from packaging.utils import canonicalize_name

from conftest import Image, World, revision
from kubelet import Pod
from mehdb import __version__
from sources import CONTAINER, ROOT, lock, quantity

pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]

ADDED_BYTES_MAX = 80_000_000  # for what stands on the base: 66 MB when this was written
START_S_MAX = 10.0  # it takes about one; a busy machine may take its time
RUNS = 3
TOOLS = {
    "cc", "gcc", "g++", "c++", "clang", "cpp", "ld", "as", "make", "cmake", "rustc", "cargo", "pip", "pip3", "uv",
    "git", "curl", "wget",
}  # fmt: skip


def files(image: Image) -> Iterator[Path]:
    """Yield each file and folder in the image."""
    for directory, folders, names in os.walk(image.files):
        for name in [*folders, *names]:
            yield Path(directory, name)


def in_image(image: Image, path: Path) -> str:
    return f"/{path.relative_to(image.files)}"


def test_it_is_small(image: Image) -> None:
    whole, base = image.engine.size_bytes(image.name), image.engine.size_bytes(image.base)
    print(f"\nimage: {whole / 1e6:.0f} MB, of which {(whole - base) / 1e6:.0f} MB on top of {image.base}")
    assert whole - base < ADDED_BYTES_MAX


def test_it_says_what_it_is(image: Image) -> None:
    labels = json.loads(image.engine.podman("image", "inspect", "--format", "{{json .Labels}}", image.name))
    told = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert told["version"] == __version__
    assert told["revision"] == revision()
    assert told["licenses"] == importlib.metadata.metadata("mehdb")["License-Expression"]
    assert told["base.name"] == image.base
    assert told["title"] == "mehdb"
    assert told["description"]


def test_it_holds_nothing_that_builds_or_installs_anything(image: Image) -> None:
    programs = {path.name for path in files(image) if path.parent.name in ("bin", "sbin")}
    assert not {name for name in programs if re.sub(r"[-.0-9]+$", "", name) in TOOLS or name in TOOLS}
    names = {in_image(image, path) for path in files(image)}
    assert not [name for name in names if re.search(r"-packages/(pip|setuptools|wheel|hatchling)(-|$)", name)]
    assert not [name for name in names if name.endswith(("/ensurepip", ".whl"))]
    assert not [name for name in names if name.startswith("/opt/") and re.search(r"/tests$|\.(pyx|pxd|pyi|c|h)$", name)]


def test_nobody_but_root_may_change_a_file_of_it(image: Image) -> None:
    for path in files(image):
        mode = path.lstat().st_mode
        if not stat.S_ISLNK(mode) and not (stat.S_ISDIR(mode) and mode & stat.S_ISVTX):
            assert not mode & stat.S_IWOTH, in_image(image, path)
    owners = {path.lstat().st_uid for path in files(image) if in_image(image, path).startswith("/opt")}
    assert owners == {0}


def test_each_package_of_the_lock_can_be_found_in_it_with_its_licence(image: Image) -> None:
    """Tools that list what is in an image read `dist-info`."""
    (site,) = image.files.glob("opt/mehdb/lib/python3*/site-packages")
    installed = importlib.metadata.distributions(path=[str(site)])
    found = {canonicalize_name(one.name): one.version for one in installed}
    locked = {name: one.version for name, one in lock("requirements.lock").items()}
    assert found.pop("mehdb") == __version__
    assert set(found) <= set(locked), "nothing else is installed"
    assert all(locked[name] == version for name, version in found.items())
    assert {"aiohttp", "apsw", "httpx", "msgspec", "uvloop"} <= set(found)
    (licence,) = site.glob("mehdb-*.dist-info/licenses/LICENSE")
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_all_bytecode_is_there_and_is_never_made_again(image: Image) -> None:
    """The root file system is read-only: what is missing is compiled at each start."""
    for source in image.files.glob("opt/mehdb/lib/python3*/site-packages/mehdb/**/*.py"):
        (compiled,) = (source.parent / "__pycache__").glob(f"{source.stem}.*.pyc")
        assert compiled.read_bytes()[4:8] == b"\1\0\0\0", f"{compiled} is checked against its source"


def test_nothing_of_the_machine_that_built_it_is_left(image: Image) -> None:
    assert not list(image.files.glob("root/.config")), "pip's settings"
    assert not (image.files / "source").exists()
    assert not (image.files / "build").exists()
    assert not list(image.files.glob("root/.cache"))


def ready_s(pod: Pod, port: int) -> float:
    """Return how long after its start a pod is ready, asked again and again."""
    end_s = monotonic() + START_S_MAX
    while monotonic() < end_s:
        connection = http.client.HTTPConnection(pod.address, port, timeout=START_S_MAX)
        try:
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                assert pod.container
                return monotonic() - pod.container.started_s
        except OSError:
            pass
        finally:
            connection.close()
        sleep(0.01)  # between two looks
    raise AssertionError(f"{pod.name} is not ready after {START_S_MAX:g} s; {pod.events} {pod.log}")


def test_it_is_ready_soon(world: World) -> None:
    """Measured from before the container is made, the leader alone, and a follower of it."""
    pods = world.stateful_set
    took: dict[str, list[float]] = {"leader": [], "follower": []}
    for _ in range(RUNS):
        for ordinal, role in enumerate(took):
            pod = pods.pods[ordinal] = pods.kubelet.start(f"mehdb-{ordinal}", pods.service)
            pods.publish()
            took[role].append(ready_s(pod, pods.kubelet.port))
            pods.wait(ordinal)
        for ordinal in (1, 0):
            pods.kubelet.lose(pods.pods.pop(ordinal), volume=True)
    told = [f"{role} {sorted(times)[RUNS // 2]:.1f} s (at most {max(times):.1f} s)" for role, times in took.items()]
    print(f"\nfrom start to ready: {', '.join(told)}")


def test_its_first_process_is_mehdb_with_no_rights_and_it_heeds_sigterm(world: World) -> None:
    pods = world.stateful_set
    pod = pods.pods[0] = pods.kubelet.start("mehdb-0", pods.service)
    pods.wait(0)
    assert pod.container
    inside = "cat /proc/1/status /proc/1/cmdline; ! touch /a 2>/dev/null && touch /tmp/a && touch $MEHDB_DATADIR/a"
    said = world.image.engine.podman("exec", pod.container.name, "sh", "-c", inside)
    assert "mehdb\0serve" in said
    assert re.search(r"^Uid:(\t10001){4}$", said, re.MULTILINE)
    assert re.search(r"^Gid:(\t10001){4}$", said, re.MULTILINE)
    assert set(re.findall(r"^Cap(?:Prm|Eff|Bnd|Amb):\t(\w+)$", said, re.MULTILINE)) == {"0" * 16}
    assert re.search(r"^NoNewPrivs:\t1$", said, re.MULTILINE)
    assert re.search(r"^Seccomp:\t2$", said, re.MULTILINE)
    if world.image.limits:
        files = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max"
        limit = world.image.engine.podman("exec", pod.container.name, "sh", "-c", files)
        assert int(limit) == quantity(CONTAINER["resources"]["limits"]["memory"])
    pod.deleted.set()  # so that it is not started again
    pod.container.signal(signal.SIGTERM)
    assert pod.gone.wait(pods.kubelet.grace_s)
    assert pod.container.exit_code == 0
    assert "stopped node=mehdb-0" in pod.log
