"""The tokens file: what its lines may be, what they grant, and that it holds no token."""

import os
import re
import stat
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from cluster import DEADLINE_S, clean_environment
from guards import Tokens as Given
from guards import swap
from mehdb.errors import SettingsError
from mehdb.tokens import TOKENS_MAX, Right, Tokens, add, make

ROOT = Path(__file__).parents[1]
HASH = sha256(b"s3cret").hexdigest()
LINE = f"app sha256:{HASH} read,write app/ shared/"


def read(path: Path, text: str) -> Tokens:
    path.write_text(text)
    return Tokens(path)


def test_a_token_grants_what_its_line_says(tmp_path: Path) -> None:
    tokens = read(tmp_path / "tokens", f"# who may what\n\n  {LINE}\nbackup sha256:{'0' * 64} replicate\n")
    grant = tokens.grant(b"s3cret")
    assert grant is not None
    assert (grant.name, grant.line) == ("app", LINE)
    assert [grant.has(right) for right in Right] == [True, True, False, False]
    keys = (b"app/", b"app/x", b"shared/", b"app", b"apple", b"", b"x/app/")
    assert [grant.covers(key) for key in keys] == [True, True, True, False, False, False, False]


@pytest.mark.parametrize("token", [b"", b"s3cre", b"s3cret ", b"S3cret", HASH.encode(), f"sha256:{HASH}".encode()])
def test_no_other_token_grants_anything(tmp_path: Path, token: bytes) -> None:
    assert read(tmp_path / "tokens", LINE).grant(token) is None


@pytest.mark.parametrize(
    ("rights", "has"), [("admin", list(Right)), ("none", []), ("replicate,read", [Right.READ, Right.REPLICATE])]
)
def test_admin_has_every_right_and_none_has_none(tmp_path: Path, rights: str, has: list[Right]) -> None:
    grant = read(tmp_path / "tokens", f"one sha256:{HASH} {rights}").grant(b"s3cret")
    assert grant is not None
    assert [right for right in Right if grant.has(right)] == has
    assert grant.covers(b"any key")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has 0 tokens"),
        ("# only a comment", "has 0 tokens"),
        ("app", "line 1: must be NAME sha256:HEX RIGHTS"),
        (f"app sha256:{HASH}", "line 1: must be NAME sha256:HEX RIGHTS"),
        ("\napp s3cret read", "line 2: the second word must be sha256:"),
        (f"app sha256:{HASH[1:]} read", "line 1: the second word must be sha256:"),
        (f"app sha256:{HASH.upper()} read", "line 1: the second word must be sha256:"),
        (f"app sha256:{HASH} reed", "line 1: rights must be of read, write, replicate, admin"),
        (f"app sha256:{HASH} read,", "line 1: rights must be of"),
        (f"app sha256:{HASH} read,none", "line 1: rights must be of"),
        (f"a/b sha256:{HASH} read", "line 1: the name must be"),
        (f"app sha256:{HASH} replicate app/", "line 1: replicate is for all keys"),
        (f"app sha256:{HASH} read,admin app/", "line 1: admin is for all keys"),
        (f"app sha256:{HASH} none app/", "line 1: none is for no keys"),
        (f"{LINE}\napp sha256:{'1' * 64} read", "a name is there twice"),
        (f"{LINE}\nother sha256:{HASH} read", "a token is there twice"),
        ("\n".join(f"n{n} sha256:{n:064x} read" for n in range(TOKENS_MAX + 1)), f"has {TOKENS_MAX + 1} tokens"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path / "tokens", text)
    [told] = caught.value.problems
    assert told.startswith(f"--tokens-file: {tmp_path / 'tokens'}")
    assert problem in told
    assert "s3cret" not in told.replace("sha256:", ""), "a token that was put in its hash's place is not told on"


def test_every_wrong_line_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path / "tokens", f"a\n{LINE}\nb\n")
    assert [problem.split(", ")[1].split(":")[0] for problem in caught.value.problems] == ["line 1", "line 3"]


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_bytes(b"\xff sha256:x read")
    with pytest.raises(SettingsError, match="line 1: must be UTF-8"):
        Tokens(tmp_path / "tokens")
    with pytest.raises(SettingsError, match="No such file"):
        Tokens(tmp_path / "nowhere")


def test_a_change_is_seen_and_what_stayed_stays_valid(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    tokens = read(path, f"{LINE}\nother sha256:{sha256(b'o').hexdigest()} read")
    app, other = tokens.grant(b"s3cret"), tokens.grant(b"o")
    assert app is not None
    assert other is not None
    swap(path, f"{LINE}\n".encode())
    tokens.refresh()
    assert tokens.grant(b"o") is None
    assert (app.valid, other.valid) == (True, False)
    assert tokens.grant(b"s3cret") is app
    swap(path, LINE.replace(" read,write", " read").encode())
    tokens.refresh()
    assert not app.valid, "it may do less now"
    assert tokens.grant(b"s3cret") is not app


@pytest.mark.parametrize("wrong", [b"", b"app", None])
def test_a_file_that_has_become_wrong_changes_nothing(
    tmp_path: Path, wrong: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens"
    tokens = read(path, LINE)
    if wrong is None:
        path.unlink()
    else:
        swap(path, wrong)
    tokens.refresh()
    tokens.refresh()
    grant = tokens.grant(b"s3cret")
    assert grant is not None
    assert grant.valid
    assert len([one for one in caplog.records if one.levelname == "ERROR"]) == 1, "told once"
    swap(path, LINE.encode())
    tokens.refresh()
    assert tokens.grant(b"s3cret") is not None


def test_a_made_token_is_in_no_file(tmp_path: Path) -> None:
    given = Given(tmp_path / "tokens")
    token = given.give("app", "read", "app/")
    given.give("backup", "replicate")
    assert len(token) == 43, "256 bits"
    text = given.path.read_text()
    assert [line.split()[0] for line in text.splitlines()] == ["app", "backup"]
    assert token not in text
    assert stat.S_IMODE(given.path.stat().st_mode) == 0o600
    grant = Tokens(given.path).grant(token.encode())
    assert grant is not None
    assert grant.line == text.splitlines()[0]


def test_a_line_is_added_only_where_the_file_stays_right(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(LINE)  # without a newline at its end
    with pytest.raises(SettingsError, match="a name is there twice"):
        add(path, make("app", "read", ())[1])
    assert path.read_text() == LINE
    add(path, make("other", "read", ())[1])
    assert len(path.read_text().splitlines()) == 2


def test_the_commands_of_the_page_make_its_tokens(tmp_path: Path) -> None:
    page = (ROOT / "docs/SECURITY.md").read_text()
    commands = re.findall(r"(?m)^(?:\w+=\$\()?(mehdb token [^#\n)]+)", page)
    assert len(commands) == 5
    for command in commands:
        subprocess.run(
            ["sh", "-ec", command], cwd=tmp_path, check=True, timeout=DEADLINE_S,
            env=clean_environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )  # fmt: skip
    tokens = Tokens(tmp_path / "tokens")
    node = tokens.grant((tmp_path / "node-token").read_bytes().strip())
    assert node is not None
    assert node.rights == {Right.REPLICATE}
    assert len((tmp_path / "tokens").read_text().splitlines()) == 5
