"""docs/OPERATIONS.md: its commands do what it shows, and what it says for pods and logs is what there is."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import typer

from cluster import clean_environment
from mehdb import cli
from scenes import DATABASE, Scene, kept, scene
from walk import ROOT, STEP_DEADLINE_S, Shell, local_cluster, steps

PAGE: Final = (ROOT / "docs" / "OPERATIONS.md").read_text()
COMMANDS: Final = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]  a group's
BLOCK: Final = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINES: Final = [line for language, block in BLOCK.findall(PAGE) if language == "sh" for line in block.splitlines()]
SPANS: Final = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", PAGE))]
EXEC: Final = "kubectl -n mehdb exec "
# What takes a real cluster. All else that is typed for kubectl are commands in pods.
ELSEWHERE: Final = (
    "kubectl taint ", "kubectl -n mehdb describe ", "kubectl -n mehdb get ", "kubectl -n mehdb logs ",
    "kubectl -n mehdb patch ", "kubectl -n mehdb port-forward ", "kubectl -n mehdb rollout ", "kubectl -n mehdb scale ",
)  # fmt: skip
IN_PODS: Final = [match[1] for text in LINES + SPANS if (match := re.match(EXEC + r".*?-- (mehdb [^|&<>]*)", text))]


@pytest.mark.timeout(600)
def test_every_command_of_the_page_does_what_it_shows(tmp_path: Path) -> None:
    """Scenario by scenario, in one shell beside one local cluster; only the ports and the folder are others."""
    walk = steps(PAGE)
    with local_cluster(tmp_path) as port, Shell(tmp_path, port) as shell:
        for step in walk:
            shell.take(step)
    print(f"commands of docs/OPERATIONS.md that were run: {len(walk)}")


# What is typed in pods: each line of the `sh` blocks, in their order, after what the page says has happened.

BACK_UP, INTO_NEW, IN_PLACE, REJOIN, ADOPT, ADOPT_AFTER_STOP, ACCEPT_LOSS, REMOVE = [
    line for line in LINES if not line.startswith(ELSEWHERE)
]
# Does `kubectl -n mehdb exec [-i] mehdb-N -- COMMAND` where that pod's volume is. Input is passed on only with -i.
KUBECTL: Final = """#!/bin/sh
[ "$1 $2 $3" = "-n mehdb exec" ] || exit 2
shift 3
if [ "$1" = -i ]; then shift; else exec < /dev/null; fi
pod=$1
[ "$2" = -- ] || exit 2
shift 2
exec env MEHDB_DATADIR="data/$pod" "$@"
"""


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Scene]:
    """Have three nodes with a value, whose volumes are data/mehdb-N, and a `kubectl` for them."""
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    with scene(tmp_path / "data", 3) as stage:
        for node in stage.cluster.nodes:
            node.start()
        assert stage.leader.put("test", b"test data").is_success
        stage.equal()
        yield stage


def typed(line: str, directory: Path) -> str:
    """Return what *line* answers in *directory*. It must succeed."""
    path = f"{directory}:{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=directory, env=clean_environment() | {"PATH": path}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=STEP_DEADLINE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"`{line}` ended with {done.returncode}: {done.stdout}"
    return done.stdout


def back_up(directory: Path) -> None:
    """Make a backup, under the name that the page gives to one of an earlier day."""
    assert ": sound, " in typed(BACK_UP, directory)
    [backup] = directory.glob("mehdb-*.db")
    backup.rename(directory / INTO_NEW.split()[-1])


def test_a_backup_of_a_pod_begins_a_new_cluster(pods: Scene, tmp_path: Path) -> None:
    back_up(tmp_path)
    pods.cluster.stop()
    for node in pods.cluster.nodes:
        shutil.rmtree(node.volume)
    pods.leader.start()
    typed(INTO_NEW, tmp_path)
    for node in pods.followers:
        node.start()
    pods.equal()
    for node in pods.cluster.nodes:
        assert node.get("/get/test").content == b"test data"


def test_a_restore_in_a_pod_is_taken_back_from_a_follower(pods: Scene, tmp_path: Path) -> None:
    back_up(tmp_path)
    leader, first, second = pods.cluster.nodes
    assert leader.put("test", b"a mistake").is_success
    pods.equal()
    typed(IN_PLACE, tmp_path)
    for node in pods.followers:
        pods.until(node, "diverged")
    typed(REJOIN, tmp_path)
    assert [node.get("/get/test").content for node in pods.cluster.nodes] == [b"test data", b"test data", b"a mistake"]
    typed(ADOPT.replace("http://10.244.2.9:9876", second.url), tmp_path)
    typed(REJOIN, tmp_path)
    pods.equal()
    assert [node.get("/get/test").content for node in pods.cluster.nodes] == [b"a mistake"] * 3
    assert len(kept(first.volume, "rejoined")) == 2
    typed(REMOVE, tmp_path)
    assert kept(first.volume) == []


def test_pods_that_were_all_stopped_get_back_what_a_follower_holds(pods: Scene, tmp_path: Path) -> None:
    leader, first, second = pods.cluster.nodes
    adopt = ADOPT_AFTER_STOP.replace("http://10.244.1.7:9876", first.url)
    # The leader's volume is lost, and somebody writes before a follower shows up.
    pods.cluster.stop()
    shutil.rmtree(leader.volume)
    leader.start()
    assert leader.put("meanwhile", b"1").is_success
    first.start(ready=False)
    pods.until(first, "diverged")
    typed(adopt, tmp_path)
    pods.equal()
    assert leader.get("/get/test").content == b"test data"
    assert len(kept(leader.volume, "adopted")) == 1
    # It is damaged instead.
    pods.cluster.stop()
    os.truncate(leader.volume / DATABASE, 0)
    leader.start(ready=False)
    pods.until(leader, "failed", "no peer holds a copy")
    typed(ACCEPT_LOSS, tmp_path)
    assert leader.ready()
    first.start(ready=False)
    typed(adopt, tmp_path)
    second.start()
    pods.equal()
    assert leader.get("/get/test").content == b"test data"


def test_kubectl_does_little_but_run_commands_in_pods() -> None:
    commands = [text for text in LINES + SPANS if text.startswith("kubectl ")]
    assert [text for text in commands if not text.startswith((EXEC, *ELSEWHERE))] == []
    assert [start for start in ELSEWHERE if not any(text.startswith(start) for text in commands)] == []


# What is named.


def options(words: list[str]) -> set[str]:
    """Return the options of a command line of mehdb. Fails if the command would refuse it."""
    program, name, *arguments = words
    assert program == "mehdb"
    COMMANDS[name].make_context(name, arguments)
    return {word for word in arguments if word.startswith("--")}


@pytest.mark.parametrize("command", sorted({span for span in SPANS if span.startswith("mehdb ")}))
def test_what_the_text_says_to_type_exists(command: str) -> None:
    options(shlex.split(command))


@pytest.mark.parametrize("command", sorted(set(IN_PODS)))
def test_what_is_typed_in_a_pod_exists_and_is_run_here(command: str) -> None:
    """Without `--data-dir`, which the pod's environment gives."""
    words = shlex.split(command)
    assert "--data-dir" not in options(words)
    here = [shlex.split(step.command) for step in steps(PAGE) if step.command.startswith(f"mehdb {words[1]} ")]
    assert any(options(words) <= set(line) for line in here), f"no console block runs the like of `{command}`"


def test_the_table_of_commands_has_all_that_work_on_a_data_directory() -> None:
    operators = {
        name
        for name, command in COMMANDS.items()
        if any("--data-dir" in parameter.opts for parameter in command.params)
    }
    assert {shlex.split(command)[1] for command in IN_PODS} == operators - {"serve", "local"}


def test_every_warning_and_error_of_the_log_is_explained() -> None:
    """The code's messages, up to the first thing that is filled in."""
    code = "".join(path.read_text() for path in sorted((ROOT / "mehdb").rglob("*.py")))
    calls = re.findall(r"log\.(?:warning|error|exception|critical|log)\(\s*(?:level, )?['\"]([^'\"%]*)", code)
    said = {re.sub(r"[ ,:]*(\w+=.*)?$", "", text) for text in calls}
    assert len(said) > 10
    table = PAGE.partition("## Warnings and errors in the log")[2]
    for text in said:
        assert f"`{text}" in table, f"no word about {text!r}"


def test_every_place_that_the_page_points_to_is_there() -> None:
    headings = re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", text.lower()).replace(" ", "-") for text in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors
