"""Completion in shells: the scripts, the names of commands, and keys, which a node knows."""

import contextlib
import functools
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from client_command import arguments, environment
from cluster import ADDRESS, DEADLINE_S, Node, free_port
from scripted import answer, scripted

NOBODY = "http://127.0.0.1:1"
MEHDB = Path(arguments()[0]).with_name("mehdb")


@functools.cache
def shown(shell: str) -> str:
    """Return the script that sets up *shell*."""
    return run(MEHDB, environment=environment(NOBODY, _MEHDB_COMPLETE=f"source_{shell}"))


def completed(where: Node | str | dict[str, str], *words: str) -> list[str]:
    """Return what bash offers for the last of *words* when the script is loaded, as Tab would have it."""
    script = 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _mehdb_completion "$1"; printf "%s\\n" "${COMPREPLY[@]}"'
    variables = where if isinstance(where, dict) else environment(where)
    return run("bash", "-c", f"{shown('bash')}\n{script}", "bash", MEHDB, *words, environment=variables).split()


def run(*command: str | Path, environment: dict[str, str]) -> str:
    """Return what a command prints. It must succeed, and say nothing else."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_each_shell(shell: str) -> None:
    script = shown(shell)
    assert "_MEHDB_COMPLETE" in script
    assert f"complete_{shell}" in script


def test_the_flags_show_and_install_it(tmp_path: Path) -> None:
    home = environment(NOBODY, HOME=str(tmp_path))
    # Typer looks which shell it was called from: one that has more to do than to become mehdb.
    assert "_mehdb_completion" in run("bash", "-c", f"{MEHDB} --show-completion; exit $?", environment=home)
    run("bash", "-c", f"{MEHDB} --install-completion; exit $?", environment=home)
    assert any("_mehdb_completion" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_bash_completes_commands_and_keys(leader: Node) -> None:
    for key in ("complete/a", "complete/b", "other"):
        leader.put(key, b"v")
    assert completed(leader, "exp") == ["export"]
    assert completed(leader, "get", "compl") == ["complete/a", "complete/b"]
    assert completed(leader, "delete", "oth") == ["other"]


def test_keys_of_a_node_named_by_a_flag_are_completed(leader: Node) -> None:
    leader.put("flagged", b"v")
    assert completed(NOBODY, "get", "--url", leader.url, "flagg") == ["flagged"]


def test_a_node_that_does_not_answer_costs_a_moment_and_no_word() -> None:
    began_s = time.monotonic()
    assert completed(f"http://{ADDRESS}:{free_port()}", "get", "a") == []
    assert time.monotonic() - began_s < 10


def test_a_node_whose_answer_never_ends_costs_a_moment_as_well() -> None:
    """Each byte of it comes in time."""
    over = threading.Event()

    def drip(listener: socket.socket) -> None:
        with listener.accept()[0] as connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nMehdb-Node: ")
            while not over.wait(0.1):
                connection.sendall(b"m")

    with socket.create_server((ADDRESS, 0)) as listener:
        dripping = threading.Thread(target=drip, args=(listener,))
        dripping.start()
        try:
            assert completed(f"http://{ADDRESS}:{listener.getsockname()[1]}", "get", "a") == []
        finally:
            over.set()
            dripping.join(DEADLINE_S)


def test_a_node_is_asked_with_the_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret")
    with scripted(answer(200, b'["found"]')) as server:
        script = environment(server.url, MEHDB_TOKEN_FILE=str(tmp_path / "token"))
        assert completed(script, "get", "f") == ["found"]
        assert b"\r\nAuthorization: Bearer s3cret\r\n" in server.requests[0]
