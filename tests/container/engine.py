"""Images and containers, by buildah, podman and runc, as root, in a folder of the test's own.

Nothing of the machine's containers is used or changed: storage, state, locks and settings are all in that folder.
"""

import os
import re
import resource
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

COMMAND_DEADLINE_S: Final = 120
BUILD_DEADLINE_S: Final = 400
FILES_MAX: Final = 1 << 20  # what container runtimes on Kubernetes nodes give
COMMANDS: Final = ("buildah", "podman", "runc", "ip", "nsenter", "unshare", "curl")


class CommandFailed(AssertionError):
    """A command that had to succeed has not."""


def run(*command: "str | Path", deadline_s: float = COMMAND_DEADLINE_S, **options: Any) -> str:
    """Return what *command* prints on standard output. It must succeed."""
    shown = " ".join(map(str, command))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, check=False, **options)
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"`{shown}` takes longer than {deadline_s:g} s") from error
    if done.returncode:
        raise CommandFailed(f"`{shown}` ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout.strip()


def _limit(kind: int, most: int) -> str:
    """Return a limit for containers: no higher than this machine allows, which would keep them from starting."""
    hard = resource.getrlimit(kind)[1]
    value = most if hard == resource.RLIM_INFINITY else min(hard, most)
    return f"{value}:{value}"


class Engine:
    """The engine whose storage is in *directory*. A context manager: leaving it removes all of it."""

    def __init__(self, directory: Path) -> None:
        missing = [command for command in COMMANDS if not shutil.which(command)]
        assert os.geteuid() == 0, "containers need root here"
        assert not missing, f"not installed: {', '.join(missing)}"
        self._directory = directory
        state = directory / "state"
        (directory / "containers.conf").write_text(
            f"""[containers]
default_ulimits = ["nofile={_limit(resource.RLIMIT_NOFILE, FILES_MAX)}",
                   "nproc={_limit(resource.RLIMIT_NPROC, FILES_MAX)}"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
runtime = "runc"
tmp_dir = "{state / "libpod"}"
"""
        )
        (directory / "storage.conf").write_text(
            f"""[storage]
driver = "overlay"
graphroot = "{directory / "storage"}"
runroot = "{state}"
"""
        )
        (directory / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self._environment = os.environ | {
            "CONTAINERS_CONF": str(directory / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(directory / "storage.conf"),
            "TMPDIR": str(directory),
        }
        self._podman = ("podman", "--runtime-flag", f"root={state / 'runc'}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.podman("rm", "--all", "--force", "--time", "0")
        self.buildah("rm", "--all")
        self.podman("umount", "--all", "--force")
        for line in Path("/proc/self/mounts").read_text().splitlines():
            if (mount := line.split()[1]).startswith(f"{self._directory}/"):
                run("umount", "--lazy", mount)
        shutil.rmtree(self._directory)

    def podman(self, *arguments: "str | Path", deadline_s: float = COMMAND_DEADLINE_S) -> str:
        """Return what podman prints. It must succeed."""
        return run(*self._podman, *arguments, deadline_s=deadline_s, env=self._environment)

    def buildah(self, *arguments: "str | Path", deadline_s: float = COMMAND_DEADLINE_S) -> str:
        """Return what buildah prints. It must succeed."""
        return run("buildah", *arguments, deadline_s=deadline_s, env=self._environment)

    def pull(self, name: str, deadline_s: float) -> bool:
        """Return whether the image *name* is here, or could be pulled."""
        try:
            self.podman("pull", "--quiet", name, deadline_s=deadline_s)
        except CommandFailed:
            return False
        return True

    def load(self, name: str, archive: Path) -> None:
        """Make an image of the files in *archive*."""
        self.podman("import", "--quiet", archive, name)

    def build(self, source: Path, name: str, arguments: dict[str, str], mounts: dict[Path, str]) -> None:
        """Build the image *name* from the Dockerfile in *source*, with *mounts* to be read while it builds."""
        options = [f"--build-arg={key}={value}" for key, value in arguments.items()]
        options += [f"--volume={path}:{target}:ro" for path, target in mounts.items()]
        self.buildah(
            "build", "--isolation", "chroot", "--format", "docker", *options, "--tag", name, source,
            deadline_s=BUILD_DEADLINE_S,
        )  # fmt: skip

    def logs(self, container: str) -> str:
        """Return what a container has written, to standard output and standard error."""
        command = [*self._podman, "logs", container]
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self._environment, check=True
        ).stdout

    def size_bytes(self, image: str) -> int:
        """Return how much the files of an image take."""
        return int(self.podman("image", "inspect", "--format", "{{.Size}}", image))

    def limits_memory(self, image: str) -> bool:
        """Return whether containers may be limited here: that needs a cgroup that may have others in it."""
        try:
            self.podman("run", "--rm", "--network", "none", "--memory", "512m", "--cpus", "2", image, "--version")
        except CommandFailed as error:
            if re.search("cgroup", str(error)):
                return False
            raise
        return True
