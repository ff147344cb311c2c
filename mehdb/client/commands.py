"""The commands for whoever uses a cluster: what they take, and what they print. The work is done beside this module.

Exit codes: 0 ok; 1 failed, or not there; 2 a wrong flag or argument.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mehdb.client.flags import Asked, with_flags
from mehdb.errors import KeyNotFound, MehdbError, OutcomeUnknown, PeerUnreachable, SettingsError, StoreFailed
from mehdb.model import VALUE_BYTES_LIMIT
from mehdb.progress import progress_bar

if TYPE_CHECKING:
    from mehdb.client.tree import Carried

EXIT_FAILED: Final = 1
COMPLETIONS_MAX: Final = 100  # more than that nobody reads
COMPLETION_TIMEOUT_S: Final = 1.0  # somebody waits with a finger on the key

# Modules that talk to nodes are imported where they are needed: the help, and the completion of a name, need none.


def _complete_key(context: typer.Context, incomplete: str) -> list[str]:
    """Return keys that begin with what has been typed. What goes wrong is no matter here: then there are none."""
    from mehdb.client.http import Request
    from mehdb.client.lines import decode_keys, query

    found: list[str] = []

    def look() -> None:
        with contextlib.suppress(MehdbError, UnicodeError):
            given = {name: context.params[name] for name in Asked.__dataclass_fields__ if context.params.get(name)}
            target = query("/keys", {"prefix": incomplete, "limit": str(COMPLETIONS_MAX)})
            with Asked(**given).client(COMPLETION_TIMEOUT_S) as client:
                answer = client.ask(Request("GET", target))
            if answer.status == 200:
                found.extend(decode_keys(answer.body))

    # In a thread that may be left behind: the client's limit holds for each wait, not for a name's resolution, say.
    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(COMPLETION_TIMEOUT_S)
    return list(found)


Key = Annotated[str, typer.Argument(help="The key.", autocompletion=_complete_key)]
NewKey = Annotated[str, typer.Argument(help="The key.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
IfMatch = Annotated[str | None, typer.Option("--if-match", help="Only if the key is at this revision (*: at any).")]
IfNoneMatch = Annotated[
    str | None, typer.Option("--if-none-match", help="Only if it is not at this revision (*: if there is none).")
]
Acks = Annotated[int | None, typer.Option("--acks", min=0, max=100, help="How many followers must hold it, too.")]
Prefix = Annotated[str, typer.Option("--prefix", help="What keys begin with, and paths do not.")]


@with_flags(Asked)
def get(
    asked: Asked,
    key: Key,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file to write the value to.")] = None,
    revision: Annotated[int | None, typer.Option(min=1, help="The value as it was at this revision.")] = None,
) -> None:
    """Print a value, byte for byte. Exits with 1 if there is none."""
    from mehdb.client.http import Request, key_in_url
    from mehdb.client.lines import query

    with asked.client() as client:
        target = query(f"/get/{key_in_url(_text(key, 'KEY'))}", {"revision": str(revision or "")})
        answer = client.ask(Request("GET", target))
    if answer.status == 404:
        raise KeyNotFound(f"{key!r} is not there: `mehdb keys` lists what is")
    if answer.status != 200:
        raise answer.refused()
    if output is None:
        _print(answer.body)
    else:
        with _file("--output"):
            output.write_bytes(answer.body)


@with_flags(Asked)
def set_(
    asked: Asked,
    key: NewKey,
    value: Annotated[
        str | None, typer.Argument(help='The value; "-", or nothing in a pipe: what standard input holds.')
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A file that holds the value.")] = None,
    ttl: Annotated[float | None, typer.Option(min=0.001, help="How many seconds it lives.")] = None,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
    content_type: Annotated[str | None, typer.Option(help="What the value is, as in text/plain.")] = None,
    acks: Acks = None,
) -> None:
    """Write a value, and print its revision."""
    from mehdb.client.writes import Conditions, set_key

    data = _value(value, file)
    with asked.client() as client:
        written = set_key(
            client, _text(key, "KEY"), data, conditions=Conditions(if_match, if_none_match),
            ttl=None if ttl is None else f"{ttl:.3f}", content_type=content_type, acks=acks,
        )  # fmt: skip
    _print_written(written.revision, written.note)


@with_flags(Asked)
def delete(
    asked: Asked,
    key: Key,
    if_match: IfMatch = None,
    acks: Acks = None,
) -> None:
    """Delete a key, and print the revision. Exits with 1 if there is none."""
    from mehdb.client.writes import Conditions, delete_key

    with asked.client() as client:
        written = delete_key(client, _text(key, "KEY"), conditions=Conditions(if_match), acks=acks)
    _print_written(written.revision, written.note)


@with_flags(Asked)
def keys(
    asked: Asked,
    prefix: Annotated[str, typer.Argument(help="What the keys begin with.")] = "",
    delimiter: Annotated[str, typer.Option(help='What ends a folder, such as "/": each is then one line.')] = "",
    as_json: Json = False,
) -> None:
    """List keys in byte order, a line each: all that there are. A key may hold a newline: then --json tells."""
    import msgspec

    from mehdb.client.lines import list_keys

    with asked.client() as client:
        found = list_keys(client, _text(prefix, "PREFIX"), _text(delimiter, "--delimiter"))
        between = "["
        for key in found:
            _print(between.encode() + msgspec.json.encode(key) if as_json else f"{key}\n".encode())
            between = ",\n"
    if as_json:
        _print(b"[]\n" if between == "[" else b"]\n")


@with_flags(Asked)
def watch(
    asked: Asked,
    prefix: Annotated[str, typer.Argument(help="What the keys begin with.")] = "",
    after: Annotated[int | None, typer.Option(min=0, help="Begin after this revision, in place of now.")] = None,
) -> None:
    """Print each change as a line of JSON, once and in order, until Ctrl-C. It finds its way back to a node."""
    from mehdb.client.watch import Watch

    with asked.client() as client:
        for line in Watch(client, _text(prefix, "PREFIX"), after).lines():
            _print(line + b"\n")


@with_flags(Asked)
def import_(
    asked: Asked,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Its files become keys.")],
    prefix: Prefix = "",
) -> None:
    """Write each file in a folder to a key. Run again, it skips what is there and equal."""
    from mehdb.client.tree import import_tree

    with asked.client() as client, _carrying() as carried, progress_bar() as on_step:
        import_tree(client, folder, _text(prefix, "--prefix"), carried, on_step)


@with_flags(Asked)
def export(
    asked: Asked,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Is made, if it is not there.")],
    prefix: Prefix = "",
) -> None:
    """Write each key to a file in a folder. Run again, it skips what is there and equal."""
    from mehdb.client.tree import export_tree

    with asked.client() as client, _carrying() as carried, progress_bar() as on_step:
        export_tree(client, folder, _text(prefix, "--prefix"), carried, on_step)


@with_flags(Asked, timeout=3.0)
def status(asked: Asked, as_json: Json = False) -> None:
    """Show the whole cluster. Exits with 0 if all nodes asked are ready and one leads, else with 1."""
    from mehdb.client.overview import COLUMNS, overview

    found = overview(asked.urls(), asked.credentials(), asked.timeout)
    if as_json:
        import msgspec

        _print(msgspec.json.encode(found) + b"\n")
    else:
        from mehdb.client.table import table

        _print(f"{table([COLUMNS, *(row.cells() for row in found.nodes)])}\n".encode())
    for row in found.nodes:
        if row.problem and not as_json:
            typer.echo(f"{row.name}: {row.problem}", err=row.asked)
    if not found.healthy:
        raise typer.Exit(EXIT_FAILED)


def register(app: typer.Typer) -> None:
    """Add the commands to *app*."""
    app.command()(get)
    app.command("set")(set_)
    app.command()(delete)
    app.command()(keys)
    app.command()(watch)
    app.command("import")(import_)
    app.command()(export)
    app.command()(status)


@contextlib.contextmanager
def _carrying() -> Iterator["Carried"]:
    """Say at the end what has been carried, also at an end that comes too early."""
    from mehdb.client.tree import Carried

    carried = Carried(lambda problem: typer.echo(f"mehdb: {problem}", err=True))
    done = False
    try:
        yield carried
        done = True
    except (OutcomeUnknown, PeerUnreachable) as error:
        raise type(error)(f"{error}. Run the same command again: it goes on where it stopped") from error
    finally:
        if done or carried.written or carried.equal or carried.problems:
            what = f"{carried.written} written, {carried.equal} there and equal, {carried.problems} left behind"
            typer.echo(what, err=True)
    if carried.problems:
        raise typer.Exit(EXIT_FAILED)


def _value(value: str | None, file: Path | None) -> bytes:
    """Return what is to be written. Raises `SettingsError`."""
    if value is not None and file is not None:
        raise SettingsError(["give either VALUE or --file"])
    if file is None and value not in (None, "-"):
        return os.fsencode(str(value))  # as it was typed, whatever its encoding
    if file is None and value is None and sys.stdin.isatty():
        raise SettingsError(['the value is missing: give VALUE, --file, or "-" to type it'])
    with _file("standard input" if file is None else "--file"):
        data = sys.stdin.buffer.read(VALUE_BYTES_LIMIT + 1) if file is None else _read(file)
    if len(data) > VALUE_BYTES_LIMIT:
        raise SettingsError([f"no value has more than {VALUE_BYTES_LIMIT} bytes: split it"])
    return data


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(VALUE_BYTES_LIMIT + 1)


def _text(argument: str, name: str) -> str:
    """Return *argument*, if it is Unicode. Raises `SettingsError`."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise SettingsError([f"{name}: {argument!r} is not UTF-8"]) from error
    return argument


@contextlib.contextmanager
def _file(flag: str) -> Iterator[None]:
    """Turn what a file may do into a wrong flag, or, once it is open, into a failure."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise StoreFailed(f"{flag}: {error.strerror}") from error
        raise SettingsError([f"{flag}: {error.filename}: {error.strerror}"]) from error


def _print(data: bytes) -> None:
    """Write to standard output. Raises `StoreFailed`, and `BrokenPipeError` where the reader has gone."""
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is left in the buffer would fail once more when Python exits, in words of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise StoreFailed(f"standard output cannot be written: {error.strerror}") from error


def _print_written(revision: int, note: str) -> None:
    if note:
        typer.echo(f"mehdb: {note}", err=True)
    if revision:
        try:
            _print(f"{revision}\n".encode())
        except StoreFailed as error:
            raise StoreFailed(f"it was written, at revision {revision}, but {error}") from error
