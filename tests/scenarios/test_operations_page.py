"""docs/OPERATIONS.md: its commands do what it shows, and what it says for pods and logs is what there is."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from mehdb import cli
from walk import ROOT, Shell, local_cluster, steps

PAGE = (ROOT / "docs" / "OPERATIONS.md").read_text()
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]  a group's
IN_PODS = re.findall(r"kubectl [^`\n]*?exec [^`\n]*?-- (mehdb [^`|&<>\n]*)", PAGE)


def test_every_command_of_the_page_does_what_it_shows(tmp_path: Path) -> None:
    """Scenario by scenario, in one shell beside one local cluster; only the ports and the folder are others."""
    walk = steps(PAGE)
    with local_cluster(tmp_path) as port, Shell(tmp_path, port) as shell:
        for step in walk:
            shell.take(step)
    print(f"commands of docs/OPERATIONS.md that were run: {len(walk)}")


def options(words: list[str]) -> set[str]:
    """Return the options of a command line of mehdb. Fails if the command would refuse it."""
    program, name, *arguments = words
    assert program == "mehdb"
    COMMANDS[name].make_context(name, arguments)
    return {word for word in arguments if word.startswith("--")}


@pytest.mark.parametrize("command", sorted(set(IN_PODS)))
def test_what_is_typed_in_a_pod_exists_and_is_run_here(command: str) -> None:
    """Without `--data-dir`, which the pod's environment gives."""
    words = shlex.split(command)
    assert "--data-dir" not in options(words)
    here = [shlex.split(step.command) for step in steps(PAGE) if step.command.startswith(f"mehdb {words[1]} ")]
    assert any(options(words) <= set(line) for line in here), f"no console block runs the like of `{command}`"


def test_the_table_of_commands_has_them_all() -> None:
    assert {shlex.split(command)[1] for command in IN_PODS} == set(COMMANDS) - {"serve", "local"}


def test_every_warning_and_error_of_the_log_is_explained() -> None:
    """The code's messages, up to the first thing that is filled in."""
    code = "".join(path.read_text() for path in sorted((ROOT / "mehdb").rglob("*.py")))
    calls = re.findall(r"log\.(?:warning|error|exception|log)\(\s*(?:level, )?['\"]([^'\"%]*)", code)
    said = {re.sub(r"[ ,:]*(\w+=.*)?$", "", text) for text in calls}
    assert len(said) > 10
    table = PAGE.partition("## Warnings and errors in the log")[2]
    for text in said:
        assert f"`{text}" in table, f"no word about {text!r}"


def test_every_place_that_the_page_points_to_is_there() -> None:
    headings = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", text.lower()).replace(" ", "-") for text in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors
