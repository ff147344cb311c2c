"""import and export: folders in and out, whole and again."""

import fcntl
import itertools
import os
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from client_command import arguments, environment, mehdb
from client_keys import KEYS
from cluster import DEADLINE_S, Cluster, Node, eventually
from commands import at_terminal
from mehdb.client.http import Client
from mehdb.client.lines import list_entries
from mehdb.client.tree import Carried, export_tree, import_tree

NUMBERS = itertools.count()
FILES = 4000  # four batches: enough to be interrupted between two


def quiet(_step: str, _done: int, _total: int) -> None:
    """Show no progress."""


def put(node: Node, values: dict[str, bytes]) -> None:
    """Write keys whose values are UTF-8."""
    lines = [{"op": "set", "key": key, "value": value.decode()} for key, value in values.items()]
    assert node.request("POST", "/batch", content=msgspec.json.Encoder().encode_lines(lines)).is_success


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def held(node: Node, prefix: str) -> dict[str, bytes | None]:
    with Client((node.url,)) as client:
        return {entry.key.removeprefix(prefix): entry.data for entry in list_entries(client, prefix)}


def export(node: Node, folder: Path, prefix: str) -> Carried:
    carried = Carried(pytest.fail)
    with Client((node.url,)) as client:
        export_tree(client, folder, prefix, carried, quiet)
    return carried


def import_(node: Node, folder: Path, prefix: str) -> Carried:
    carried = Carried(pytest.fail)
    with Client((node.url,)) as client:
        import_tree(client, folder, prefix, carried, quiet)
    return carried


SOME_KEYS = st.dictionaries(KEYS.filter(lambda key: len(key.encode()) < 1000), st.text().map(str.encode), min_size=1)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])  # each has folders of its own
@given(SOME_KEYS)
@example(dict.fromkeys(["a", "a!", "a/b", "a/b/c", "a//", "a/", "/a", "..", "../x", ".", "%self", "a/%self"], b"v"))
@example({"a" * 900: b"1", "a" * 240: b"2", "a" * 240 + "/b": b"3", "/" * 900: b"4", "a" * 480 + "/x": b"5"})
def test_what_was_exported_is_imported_as_it_was(leader: Node, tmp_path: Path, values: dict[str, bytes]) -> None:
    number = next(NUMBERS)
    there, back, folder = f"there/{number}/", f"back/{number}/", tmp_path / str(number)
    put(leader, {there + key: value for key, value in values.items()})
    assert export(leader, folder, there).written == len(values)
    again = export(leader, folder, there)
    assert (again.written, again.equal) == (0, len(values))
    assert import_(leader, folder, back).written == len(values)
    assert held(leader, back) == values
    again = import_(leader, folder, back)
    assert (again.written, again.equal) == (0, len(values))


def make(folder: Path) -> dict[str, bytes]:
    """Make files of all kinds; return what they hold."""
    values = {
        "index.html": b"<html>", "notes/a.txt": "ü".encode(), "notes/deep/b.bin": bytes(range(256)), "empty": b"",
        "large.bin": os.urandom(3 << 20), "100%": b"percent", "a%20b": b"literal", ".hidden": b"h", "new\nline": b"n",
        "controls": bytes(range(32)) * 2048,
    }  # fmt: skip
    for name, value in values.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(value)
    return values


def test_a_folder_becomes_keys_and_keys_a_folder(leader: Node, follower: Node, tmp_path: Path) -> None:
    """Through a follower, as the commands do it."""
    values = make(tmp_path / "in")
    done = mehdb(follower, "import", tmp_path / "in", "--prefix", "site/")
    assert (done.code, done.said) == (0, f"{len(values)} written, 0 there and equal, 0 left behind\n")
    assert held(leader, "site/") == values
    types = {name: leader.get(f"/get/site/{name}").headers["Content-Type"] for name in ("index.html", "notes/a.txt")}
    assert types == {"index.html": "text/html", "notes/a.txt": "text/plain"}
    (tmp_path / "in" / "empty").write_bytes(b"no more")
    done = mehdb(leader, "import", tmp_path / "in", "--prefix", "site/")
    assert (done.code, done.said) == (0, f"1 written, {len(values) - 1} there and equal, 0 left behind\n")
    done = mehdb(leader, "export", tmp_path / "out", "--prefix", "site/")
    assert (done.code, done.said) == (0, f"{len(values)} written, 0 there and equal, 0 left behind\n")
    plain = {name.replace("%", "%25"): value for name, value in values.items()} | {"empty": b"no more"}
    assert files(tmp_path / "out") == plain
    assert import_(leader, tmp_path / "out", "site/").equal == len(values)


def test_a_value_of_another_type_or_one_that_will_expire_is_written_anew(leader: Node, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_bytes(b"v")
    assert import_(leader, tmp_path, "type/").written == 3
    leader.put("type/a.txt", b"v", headers={"Content-Type": "text/css"})
    leader.put("type/b.txt?ttl=600", b"v", headers={"Content-Type": "text/plain"})
    done = import_(leader, tmp_path, "type/")
    assert (done.written, done.equal) == (2, 1)
    assert "Mehdb-TTL" not in leader.get("/get/type/b.txt").headers


def test_what_cannot_be_imported_is_named_and_the_rest_is(leader: Node, tmp_path: Path) -> None:
    (tmp_path / "good").write_text("good")
    (tmp_path / "link").symlink_to("good")
    (tmp_path / "linked").symlink_to("/etc")
    os.mkfifo(tmp_path / "fifo")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).write_text("no UTF-8")
    deep = tmp_path.joinpath(*["d" * 200] * 6)
    deep.mkdir(parents=True)
    (deep / "too long").write_text("too long")
    (tmp_path / "%part").write_text("half")
    (tmp_path / "a%20b").write_text("one")
    (tmp_path / "a%2520b").write_text("two")
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 9 << 20)
    done = mehdb(leader, "import", tmp_path, "--prefix", "some/")
    assert done.code == 1
    assert done.said.splitlines()[-1] == "2 written, 0 there and equal, 8 left behind"
    for name, why in (
        ("/link:", "symbolic link"), ("/linked:", "symbolic link"), ("/fifo:", "no regular file"), ("/\\xff:", "UTF-8"),
        ("/too long:", "1024"), ("/%part:", "interrupted export"), ("/a%20b:", "same key"), ("/sparse:", "--max-value"),
    ):  # fmt: skip
        assert any(name in line and why in line for line in done.said.splitlines()), (name, done.said)
    assert held(leader, "some/") == {"good": b"good", "a%20b": b"two"}


def test_values_that_a_node_does_not_take_are_named_one_by_one(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.add(MEHDB_MAX_VALUE="10").start()
    folder = tmp_path / "in"
    folder.mkdir()
    for name, size in (("a", 5), ("b", 11), ("c", 10)):
        (folder / name).write_bytes(b"v" * size)
    done = mehdb(node, "import", folder)
    assert (done.code, done.said.splitlines()[-1]) == (1, "2 written, 0 there and equal, 1 left behind")
    assert f"{folder}/b: a value may have 10 bytes" in done.said


def test_an_export_writes_through_no_link_and_over_nobodys_file(leader: Node, tmp_path: Path) -> None:
    folder, outside = tmp_path / "out", tmp_path / "outside"
    itself = str(outside / "e").encode()  # a link's size is the length of the path in it
    put(leader, {f"link/{key}": itself for key in ("a/b", "c/d", "e", "f/%part")})
    folder.mkdir()
    outside.mkdir()
    (outside / "e").write_bytes(itself)
    (folder / "a").symlink_to(outside)
    (folder / "c").write_text("somebody's")
    (folder / "e").symlink_to(outside / "e")
    (folder / "%part").symlink_to(outside / "new")
    done = mehdb(leader, "export", folder, "--prefix", "link/")
    assert done.code == 1
    assert done.said.splitlines()[-1] == "2 written, 0 there and equal, 2 left behind"
    assert files(outside) == {"e": itself}
    assert (folder / "c").read_text() == "somebody's"
    assert not (folder / "e").is_symlink()
    assert (folder / "f" / "%25part").read_bytes() == itself


def interrupted(node: Node, command: list[object], begun: str, folder: Path) -> None:
    """Run a command, and kill it as soon as it has done something."""
    with subprocess.Popen(arguments(*command), env=environment(node), stderr=subprocess.DEVNULL) as process:
        eventually(
            lambda: process.poll() is not None or (files(folder) if begun == "files" else held(node, begun)),
            "the command to do something",
        )
        process.send_signal(signal.SIGKILL)
        assert process.wait(DEADLINE_S) == -signal.SIGKILL, "it was over too soon to be interrupted"


def test_after_a_kill_the_same_command_does_the_rest(leader: Node, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for number in range(FILES):
        path = folder / str(number % 20) / str(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    interrupted(leader, ["import", folder, "--prefix", "kill/"], "kill/", folder)
    done = import_(leader, folder, "kill/")
    assert done.written + done.equal == FILES
    assert min(done.written, done.equal) > 0
    assert held(leader, "kill/") == files(folder)
    interrupted(leader, ["export", out, "--prefix", "kill/"], "files", out)
    done = export(leader, out, "kill/")
    assert done.written + done.equal == FILES
    assert min(done.written, done.equal) > 0
    assert files(out) == files(folder), "nothing unfinished is left"


def test_what_stops_in_the_middle_says_how_to_go_on(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.start(1).leader
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("a")
    node.stop()
    done = mehdb(node, "import", tmp_path / "in", "--timeout", "0.3")
    assert "Run the same command again" in done.failed()


def test_a_terminal_sees_how_far_it_has_come(leader: Node, tmp_path: Path) -> None:
    make(tmp_path / "in")
    done = at_terminal("import", tmp_path / "in", "--prefix", "bar/", "--url", leader.url)
    assert done.code == 0
    assert "import ━" in done.shown
    done = at_terminal("export", tmp_path / "out", "--prefix", "bar/", "--url", leader.url)
    assert "export ━" in done.shown


def test_two_exports_do_not_share_a_folder(leader: Node, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert "another export" in mehdb(leader, "export", tmp_path).failed()
    finally:
        os.close(fd)
