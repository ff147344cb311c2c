"""The `mehdb` command."""

import asyncio
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import uvloop

from mehdb import __version__, node
from mehdb.errors import MehdbError, SettingsError
from mehdb.local import LocalCluster
from mehdb.settings import SETTINGS, flag, load

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2  # as the shell's own: settings are as wrong as a flag that does not exist

app = typer.Typer(
    name="mehdb",
    help="A replicated key-value store on a Kubernetes StatefulSet that you talk to with curl.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # what goes wrong on purpose is told in one line, the rest as Python tells it
)


def _option(name: str) -> Any:
    """Return the option for the setting *name*, which says its environment variable and its default."""
    about = next(setting for setting in SETTINGS if setting.name == name).metadata
    default = about["shown"] or about["default"]
    return typer.Option(
        flag(name),
        help=f"{about['help']} (env {about['variable']}, default {default})",
        metavar=None if name == "local" else "VALUE",
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
    data_dir: Annotated[str | None, _option("data_dir")] = None,
    peers: Annotated[str | None, _option("peers")] = None,
    namespace: Annotated[str | None, _option("namespace")] = None,
    service: Annotated[str | None, _option("service")] = None,
    local: Annotated[bool, _option("local")] = False,
    leader_ordinal: Annotated[str | None, _option("leader_ordinal")] = None,
    advertise_url: Annotated[str | None, _option("advertise_url")] = None,
    max_value: Annotated[str | None, _option("max_value")] = None,
    queue_size: Annotated[str | None, _option("queue_size")] = None,
    body_timeout: Annotated[str | None, _option("body_timeout")] = None,
    keepalive_timeout: Annotated[str | None, _option("keepalive_timeout")] = None,
    stop_timeout: Annotated[str | None, _option("stop_timeout")] = None,
    log_level: Annotated[str | None, _option("log_level")] = None,
) -> None:
    """Run one node. SIGTERM and SIGINT finish what is queued, close the store and exit 0."""
    flags = context.params | {"local": "yes" if local else None}
    settings = load(flags)
    logging.basicConfig(
        level=settings.log_level.upper(),
        stream=sys.stderr,
        format="time=%(asctime)s level=%(levelname)s logger=%(name)s %(message)s",
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each request, we log changes of state
    uvloop.run(node.run(settings))


@app.command()
def local(
    replicas: Annotated[int, typer.Option(min=1, max=64, help="How many nodes.")] = 3,
    port: Annotated[int, typer.Option(min=1, max=65000, help="Node I listens on 127.0.0.1, this port plus I.")] = 9876,
    data_dir: Annotated[Path, typer.Option(help="Node I has its volume in DIR/mehdb-I.")] = Path("data"),
) -> None:
    """Run a cluster on this machine as a StatefulSet would. Ctrl-C and SIGTERM stop it in reverse order."""
    asyncio.run(LocalCluster(replicas, port, data_dir).run())


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
