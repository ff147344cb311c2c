"""The `mehdb` command."""

import logging
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

from mehdb import __version__, logs
from mehdb.client.commands import register
from mehdb.client.flags import ShownToNode, with_flags
from mehdb.errors import MehdbError, Refused, SettingsError
from mehdb.model import NodeStatus, Role, State
from mehdb.parsing import base_url
from mehdb.progress import progress_bar
from mehdb.settings import SETTINGS, flag, is_switch, load

T = TypeVar("T")

log = logging.getLogger("mehdb.cli")

EXIT_FAILED: Final = 1
DATA_DIR: Final = Path("data")  # as `mehdb serve` has it
EXIT_USAGE: Final = 2  # as the shell's own: settings are as wrong as a flag that does not exist

app = typer.Typer(
    name="mehdb",
    help="A replicated key-value store on a Kubernetes StatefulSet that you talk to with curl.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # what goes wrong on purpose is told in one line, the rest as Python tells it
)

register(app)

# What a command works with is imported when it is called: `mehdb get` needs no server, and is up in half the time.


def _option(name: str) -> Any:
    """Return the option for the setting *name*, which says its environment variable and its default."""
    setting = next(setting for setting in SETTINGS if setting.name == name)
    about = setting.metadata
    default = about["shown"] or about["default"]
    return typer.Option(
        flag(name),
        help=f"{about['help']} (env {about['variable']}, default {default})",
        metavar=None if is_switch(setting) else "VALUE",
        show_default=False,
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mehdb {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Hold what all commands have."""


@app.command()
def serve(
    context: typer.Context,
    host: Annotated[str | None, _option("host")] = None,
    port: Annotated[str | None, _option("port")] = None,
    listen: Annotated[str | None, _option("listen")] = None,
    health_port: Annotated[str | None, _option("health_port")] = None,
    tokens_file: Annotated[str | None, _option("tokens_file")] = None,
    token_file: Annotated[str | None, _option("token_file")] = None,
    open: Annotated[bool, _option("open")] = False,  # noqa: A002  a flag's name
    tls_cert: Annotated[str | None, _option("tls_cert")] = None,
    tls_key: Annotated[str | None, _option("tls_key")] = None,
    tls_ca: Annotated[str | None, _option("tls_ca")] = None,
    tls_verify_clients: Annotated[bool, _option("tls_verify_clients")] = False,
    data_dir: Annotated[str | None, _option("data_dir")] = None,
    peers: Annotated[str | None, _option("peers")] = None,
    namespace: Annotated[str | None, _option("namespace")] = None,
    service: Annotated[str | None, _option("service")] = None,
    peers_service: Annotated[str | None, _option("peers_service")] = None,
    local: Annotated[bool, _option("local")] = False,
    leader_ordinal: Annotated[str | None, _option("leader_ordinal")] = None,
    advertise_url: Annotated[str | None, _option("advertise_url")] = None,
    max_value: Annotated[str | None, _option("max_value")] = None,
    queue_size: Annotated[str | None, _option("queue_size")] = None,
    body_timeout: Annotated[str | None, _option("body_timeout")] = None,
    keepalive_timeout: Annotated[str | None, _option("keepalive_timeout")] = None,
    header_timeout: Annotated[str | None, _option("header_timeout")] = None,
    max_connections: Annotated[str | None, _option("max_connections")] = None,
    stop_timeout: Annotated[str | None, _option("stop_timeout")] = None,
    drain_timeout: Annotated[str | None, _option("drain_timeout")] = None,
    lame_duck: Annotated[str | None, _option("lame_duck")] = None,
    grace_period: Annotated[str | None, _option("grace_period")] = None,
    disk_reserve: Annotated[str | None, _option("disk_reserve")] = None,
    retain_changes: Annotated[str | None, _option("retain_changes")] = None,
    snapshot_lag: Annotated[str | None, _option("snapshot_lag")] = None,
    acks: Annotated[str | None, _option("acks")] = None,
    acks_timeout: Annotated[str | None, _option("acks_timeout")] = None,
    forward_writes: Annotated[bool, _option("forward_writes")] = False,
    log_level: Annotated[str | None, _option("log_level")] = None,
    log_format: Annotated[str | None, _option("log_format")] = None,
) -> None:
    """Run one node. SIGTERM and SIGINT finish what is queued, close the store and exit 0."""
    given = context.params.items()
    settings = load({name: ("yes" if one else None) if isinstance(one, bool) else one for name, one in given})
    logs.set_up(settings.log_level, settings.log_format)
    import uvloop

    from mehdb import life

    try:
        uvloop.run(life.run(settings))
    except MehdbError as error:
        if settings.log_format == "text":
            raise
        log.error('failed code=%s reason="%s"', error.code, error)  # noqa: TRY400  the reason says it all
        raise typer.Exit(EXIT_USAGE if isinstance(error, SettingsError) else EXIT_FAILED) from error


@app.command()
def version(
    in_json: Annotated[bool, typer.Option("--json", help="With that of Python, of SQLite, and of the schema.")] = False,
) -> None:
    """Print the version."""
    if not in_json:
        typer.echo(f"mehdb {__version__}")
        return
    import platform

    import msgspec

    from mehdb.store import SCHEMA_VERSION, sqlite_version

    python, sqlite = platform.python_version(), sqlite_version()
    versions = {"version": __version__, "python": python, "sqlite": sqlite, "schema": SCHEMA_VERSION}
    typer.echo(msgspec.json.encode(versions).decode())


@app.command()
def local(
    replicas: Annotated[int, typer.Option(min=1, max=64, help="How many nodes.")] = 3,
    port: Annotated[int, typer.Option(min=1, max=65000, help="Node I listens on 127.0.0.1, this port plus I.")] = 9876,
    data_dir: Annotated[Path, typer.Option(help="Node I has its volume in DIR/mehdb-I.")] = Path("data"),
) -> None:
    """Run a cluster on this machine as a StatefulSet would. Ctrl-C and SIGTERM stop it in reverse order."""
    from mehdb.local import LocalCluster

    _run(LocalCluster(replicas, port, data_dir).run())


DataDir = Annotated[
    Path, typer.Option("--data-dir", envvar="MEHDB_DATADIR", help="The data directory of the node.", show_default=True)
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
File = Annotated[Path, typer.Argument(help='A file; "-" is standard input or output.', allow_dash=True)]


@app.command()
def check(
    data_dir: DataDir = DATA_DIR,
    file: Annotated[Path | None, typer.Argument(help="A backup to verify, in place of a data directory.")] = None,
) -> None:
    """Verify every change, index and checksum of a store, live or not, or of a backup."""
    from mehdb import operations

    if file is not None:
        with progress_bar() as on_step:
            meta = operations.check_file(file, on_step)
        typer.echo(f"{file}: sound, history {meta.history}, revision {meta.head}, {meta.keys} keys")
        return
    with progress_bar() as on_step:
        found = operations.check(data_dir, on_step)
    report = found.report
    for problem in report.problems:
        typer.echo(problem)
    if found.missing:
        typer.echo(f"{found.missing} acknowledged changes are missing at the end")
    sound = not (report.problems or found.missing)
    typer.echo(
        f"{data_dir}: {'sound' if sound else 'DAMAGED'}, history {report.position.history}, revision "
        f"{report.position.revision}, {report.keys} keys, {report.changes} changes"
    )
    if not sound:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def backup(file: File, data_dir: DataDir = DATA_DIR, yes: Yes = False) -> None:
    """Copy a store, live or not, to one file."""
    from mehdb import operations

    operations.require_elsewhere(file)
    if file.exists() and file != operations.STANDARD:
        _confirm(f"{file} exists and will be replaced.", yes=yes)
    with progress_bar() as on_step:
        meta = operations.backup(data_dir, file, on_step)
    typer.echo(f"{file}: history {meta.history}, revision {meta.head}, {meta.keys} keys", err=True)


@app.command()
def restore(
    file: File,
    data_dir: DataDir = DATA_DIR,
    replace: Annotated[bool, typer.Option("--replace", help="Keep the store that is there aside.")] = False,
    yes: Yes = False,
) -> None:
    """Put a backup into an empty data directory, in a new history: on the leader, or before its first start."""
    from mehdb import operations

    if replace and operations.holds_data(data_dir):
        _confirm(f"The store in {data_dir} will be kept aside; followers will be diverged until they rejoin.", yes=yes)
    with progress_bar() as on_step:
        meta, kept = _run(operations.restore(data_dir, file, replace=replace, on_step=on_step))
    _report(data_dir, f"restored {meta.keys} keys at revision {meta.head}, history {meta.history}", kept)


@app.command()
@with_flags(ShownToNode)
def rejoin(
    shown: ShownToNode,
    data_dir: DataDir = DATA_DIR,
    leader: Annotated[
        str | None, typer.Option("--from", metavar="URL", help="The leader, if the node does not run.")
    ] = None,
    yes: Yes = False,
) -> None:
    """Have a follower drop its data for the leader's. What it had is kept aside."""
    from mehdb import operations

    status = _run(operations.status_of(data_dir))
    if status and status.role is Role.LEADER:
        raise Refused(f"{status.node} leads: `mehdb adopt --from URL` takes a follower's data")
    url = leader or (status.leader.url if status and status.leader else None)
    if url is None:
        who = f"{status.node} has no leader just now" if status else "no node runs here that would know its leader"
        raise Refused(f"{who}: name it with --from URL")
    _take(data_dir, url, shown, "rejoined", status, yes=yes)


@app.command()
@with_flags(ShownToNode)
def adopt(
    shown: ShownToNode,
    peer: Annotated[str, typer.Option("--from", metavar="URL", help="The node whose data is taken.")],
    data_dir: DataDir = DATA_DIR,
    yes: Yes = False,
) -> None:
    """Have the leader take a peer's history in place of its own. What it had is kept aside."""
    from mehdb import operations

    status = _run(operations.status_of(data_dir))
    if status and status.role is Role.FOLLOWER:
        raise Refused(f"{status.node} follows: `mehdb rejoin` takes the leader's data")
    _take(data_dir, peer, shown, "adopted", status, yes=yes)


def _take(data_dir: Path, text: str, shown: ShownToNode, keep: str, status: NodeStatus | None, *, yes: bool) -> None:
    from mehdb import operations

    try:
        url = base_url(text)
    except ValueError as error:
        raise Refused(f"--from: {error}") from error
    position = _run(operations.position_of(shown.peer(url)))
    if status and (status.node, status.history) == (position.node, position.history):
        raise Refused(f"{url} is {status.node} itself: name another node")
    follows = status and status.leader and status.leader.problem is None and status.damage is None
    if status and follows and status.history == position.history:
        raise Refused(f"{status.node} holds its leader's history, and follows: nothing to do")
    own = operations.meta_of(data_dir)
    holds = f"history {own.history}, revision {own.head}" if own else "none, or damaged"
    _confirm(
        f"The store in {data_dir} ({holds}) will be kept aside, and that of {position.node} ({url}) put in its place: "
        f"history {position.history}, revision {position.revision}.",
        yes=yes,
    )
    with progress_bar() as on_step:
        meta, kept = _run(operations.take(data_dir, shown.peer(url), keep, on_step))
    _report(data_dir, f"took {meta.keys} keys at revision {meta.head}, history {meta.history}", kept)


@app.command("accept-loss")
def accept_loss(
    data_dir: DataDir = DATA_DIR,
    start_empty: Annotated[
        bool, typer.Option("--start-empty", help="If more is broken than the end: keep it aside, begin with nothing.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Have a node start whose store lacks acknowledged changes that are nowhere else."""
    from mehdb import operations

    with progress_bar() as on_step:
        lost = operations.loss(data_dir, start_empty=start_empty, on_step=on_step)
    _confirm(f"{lost}. It will be given up.", yes=yes)
    with progress_bar() as on_step:
        kept = _run(operations.accept_loss(data_dir, start_empty=start_empty, on_step=on_step))
    _report(data_dir, "accepted: the store begins empty" if kept else "accepted: the store is trusted as it is", kept)


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="Who bears it: letters, digits, '.', '_' and '-'.")],
    rights: Annotated[str, typer.Argument(help="Of read, write, replicate, admin, with commas between; or none.")],
    prefixes: Annotated[list[str] | None, typer.Argument(help="What its keys begin with: all keys without.")] = None,
    into: Annotated[
        Path | None, typer.Option("--into", help="The tokens file that gets its line, in place of standard error.")
    ] = None,
) -> None:
    """Make a token: print it, once and for all, and the line for the tokens file, which holds only its hash."""
    from mehdb import tokens

    try:
        secret, grant = tokens.make(name, rights, prefixes or ())
    except ValueError as error:
        raise SettingsError([str(error)]) from error
    if into is None:
        typer.echo(grant.line, err=True)
    else:
        tokens.add(into, grant)
    typer.echo(secret)


@app.command()
def drain(
    data_dir: DataDir = DATA_DIR,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it is done.")] = False,
    timeout: Annotated[float, typer.Option(min=0, help="How many seconds to wait.")] = 20.0,
) -> None:
    """Have the node here take no more writes, as SIGUSR1 does. It reads on, and takes them again after a restart."""
    from mehdb import operations

    report = _run(operations.drain(data_dir, timeout if wait else 0))
    if report.done:
        typer.echo("drained: all writes are durable here and on the followers that are connected")
        return
    missing = f"; behind the head: {', '.join(report.missing)}" if report.missing else ""
    typer.echo(f"draining: {report.queue_bytes} bytes and {report.writes} requests under way{missing}", err=wait)
    if wait:
        raise typer.Exit(EXIT_FAILED)


def _confirm(what: str, *, yes: bool) -> None:
    """Ask before *what* is done. Without a terminal to ask at, `--yes` must say it."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refused(f"{what} Say --yes to do it")
    typer.confirm(f"{what} Go on?", abort=True, err=True)


def _report(data_dir: Path, done: str, kept: Path | None) -> None:
    """Say what was done, and what has become of the node that runs there."""
    from mehdb import operations

    typer.echo(done)
    if kept:
        typer.echo(f"what was there is kept in {kept}")
    status = _run(operations.until_settled(data_dir))
    if status is None:
        typer.echo("no node runs here: start it")
    else:
        typer.echo(f"{status.node} is {status.state} at revision {status.revision}: {status.reason or 'ready'}")
        if status.state is State.FAILED:
            raise typer.Exit(EXIT_FAILED)


def _run(work: Coroutine[Any, Any, T]) -> T:
    import asyncio

    return asyncio.run(work)


def main() -> None:
    """Run the command line. What mehdb raises on purpose becomes lines on stderr and an exit code."""
    try:
        app()
    except SettingsError as error:
        for problem in error.problems:
            typer.echo(f"mehdb: {problem}", err=True)
        sys.exit(EXIT_USAGE)
    except MehdbError as error:
        typer.echo(f"mehdb: {error}", err=True)
        sys.exit(EXIT_FAILED)
