"""One record, one line, whatever the values in it are: as text, and as JSON."""

import ast
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster import DEADLINE_S
from mehdb.logs import DIRECTIVE, JsonFormatter, TextFormatter

ROOT = Path(__file__).parents[1]
TIME = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
PAIR = re.compile(r'([a-z_]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s"=]*))(?: |$)')
OWN = {"time", "level", "logger", "message", "traceback"}
TEMPLATE = 'leader not followed code=%s revision=%d leader=%s reason="%s"'
HOSTILE = [
    "", " ", '"', "\\", "\\n", 'x" code=fake', "a\nb", "\r\n", "\ntime=now level=ERROR logger=mehdb forged", "\x1b[2J",
    "\x85", "\u2028", "\u2029", "\u202e", "\x00", "\x7f", "é", "🙂", "\udc80", "%s", "%", "a=b", "'", "\t", "a b",
]  # fmt: skip
texts = (
    st.text() | st.sampled_from(HOSTILE) | st.text(st.sampled_from('\n\r"\\= é\x1b\u2028')) | st.text(st.characters())
)


def record(template: str, *arguments: Any, name: str = "mehdb.replication", **fields: Any) -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, "file.py", 1, template, arguments, fields.get("exc_info"))


def as_text(one: logging.LogRecord) -> str:
    line = TextFormatter().format(one)
    assert len(line.splitlines()) == 1
    line.encode()  # half a character could not be written
    return line


def as_json(one: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter().format(one)
    assert len(line.splitlines()) == 1
    assert line.isascii()
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def read(line: str) -> tuple[str, dict[str, str]]:
    """Return the event and the fields of a line of text, as a program that reads logs would."""
    rest = re.sub(r"^time=\S+ level=\w+ logger=\S+ ", "", line)
    first = PAIR.search(rest)
    if first is None:
        return rest, {}
    fields, end = {}, first.start()
    while match := PAIR.match(rest, end):
        fields[match[1]] = match[3] if match[2] is None else match[2]
        end = match.end()
    assert end == len(rest), "all of it are fields"
    return rest[: first.start()].rstrip(), fields


def unescaped(text: str) -> str:
    short = {"n": "\n", "r": "\r", "t": "\t"}

    def character(match: re.Match[str]) -> str:
        code = match[1]
        return chr(int(code[1:], 16)) if code[0] in "xu" else short.get(code, code)

    return re.sub(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|.)", character, text)


@given(texts, st.integers(), texts, texts)
@example(*("\ntime=now level=ERROR", 0, '" code=fake', "\\"))
def test_text_gives_back_every_field_whatever_is_in_it(code: str, revision: int, leader: str, reason: str) -> None:
    message, fields = read(as_text(record(TEMPLATE, code, revision, leader, reason)))
    assert message == "leader not followed"
    assert {name: unescaped(value) if "\\" in value else value for name, value in fields.items()} == {
        "code": code, "revision": str(revision), "leader": leader, "reason": reason,
    }  # fmt: skip


@given(texts, st.integers(), texts, texts)
def test_json_gives_back_every_field_whatever_is_in_it(code: str, revision: int, leader: str, reason: str) -> None:
    found = as_json(record(TEMPLATE, code, revision, leader, reason))
    assert TIME.fullmatch(found.pop("time"))
    assert found == {
        "level": "WARNING", "logger": "mehdb.replication", "message": "leader not followed",
        "code": code, "revision": revision, "leader": leader, "reason": reason,
    }  # fmt: skip


def test_a_usual_line_reads_as_it_always_did() -> None:
    line = as_text(record('follower refused node=%s reason="%s"', "mehdb-1", "it differs at 7"))
    assert re.fullmatch(
        rf"time={TIME.pattern} level=WARNING logger=mehdb\.replication follower refused node=mehdb-1 "
        r'reason="it differs at 7"',
        line,
    )


@given(texts)
def test_what_others_say_is_one_line_as_well(text: str) -> None:
    """Their templates may have anything in them, and no fields."""
    for one in (
        record("%s took %.3f=%s", text, 0.5, text, name="asyncio"),
        record(text.replace("%", ""), name="aiohttp.server"),
        record("%(k)s", {"k": text}, name="asyncio"), record("mehdb took %.3f", 0.5), record("plain"),
    ):  # fmt: skip
        as_text(one)
        assert set(as_json(one)) == {"time", "level", "logger", "message"}


def test_a_traceback_is_one_line_of_json_and_indented_in_text() -> None:
    try:
        int("a\ntime=now level=ERROR logger=mehdb forged\x1b[2J\u2028")
    except ValueError:
        failed = record("unexpected route=%s", "/get/", exc_info=sys.exc_info())
    found = as_json(failed)
    assert found["traceback"].startswith("Traceback (most recent call last):\n")
    assert (found["message"], found["route"]) == ("unexpected", "/get/")
    first, *others = TextFormatter().format(failed).splitlines()
    assert first.endswith("unexpected route=/get/")
    assert others
    assert all(line.startswith("    ") for line in others)
    assert "\x1b" not in "".join(others)


PROGRAM = """
import logging, sys, threading, warnings
from mehdb import logs
logs.set_up("info", sys.argv[1])
warnings.warn("of two\\nlines")
logging.getLogger("asyncio").error("Task exception was never retrieved\\nfuture: x", exc_info=ValueError("a\\nb"))
class Unraisable:
    def __del__(self): raise ValueError("c\\nd")
Unraisable()
def fail(): raise ValueError("e\\nf")
thread = threading.Thread(target=fail); thread.start(); thread.join()
raise ValueError("g\\nh")
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_whatever_ends_or_warns_without_being_caught_is_a_record(form: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", PROGRAM, form], capture_output=True, text=True, timeout=DEADLINE_S,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    if form == "json":
        found = [json.loads(line) for line in lines]
        assert [one["logger"] for one in found] == ["py.warnings", "asyncio", "mehdb", "mehdb", "mehdb"]
        assert ["ValueError" in one.get("traceback", "") for one in found] == [False, True, True, True, True]
        assert [one.get("kind") for one in found[2:]] == ["ValueError"] * 3
    else:
        records = [line for line in lines if not line.startswith("    ")]
        assert len(records) == 5
        assert all(re.match(rf"time={TIME.pattern} level=[A-Z]+ logger=\S+ ", line) for line in records)


# How mehdb writes its own.


LEVELS: Final = ("debug", "info", "warning", "error", "exception", "critical", "log")


def templates() -> Iterator[tuple[str, int, str, int]]:
    """Yield the template of each call of the log in mehdb, with its file, line and number of arguments."""
    for path in sorted((ROOT / "mehdb").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=level)) if level in LEVELS:
                    template, *arguments = node.args[level == "log" :]
                    assert isinstance(template, ast.Constant), f"{path}:{node.lineno} has no constant template"
                    yield path.name, node.lineno, str(template.value), len(arguments)


@pytest.mark.parametrize(("file", "line", "template", "arguments"), list(templates()))
def test_every_template_is_an_event_and_then_its_fields(file: str, line: int, template: str, arguments: int) -> None:
    directives = list(DIRECTIVE.finditer(template))
    names = [directive["name"] for directive in directives]
    assert template.count("%") == len(directives) == arguments, f"{file}:{line}"
    assert None not in names, "a name for each"
    assert len(set(names)) == len(names)
    assert not OWN & set(names)
    assert re.fullmatch(r"[a-zA-Z][a-zA-Z, ]*", DIRECTIVE.sub("", template)), "an event that is always the same"
    assert "".join(directive[0] for directive in directives) == template[len(DIRECTIVE.sub("", template)) :]
