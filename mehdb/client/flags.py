"""The flags that all commands share which ask a node: where it is, and what is shown to it."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, get_type_hints

import typer

from mehdb.errors import SettingsError
from mehdb.parsing import base_url

if TYPE_CHECKING:
    from mehdb.client.http import Client
    from mehdb.credentials import Credentials
    from mehdb.peers import Peer

URL: Final = "http://localhost:9876"


@dataclass(frozen=True)
class Shown:
    """What is shown to nodes, and what theirs is held against."""

    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", envvar="MEHDB_TOKEN_FILE", help="A file with the token that requests bear."),
    ] = None
    tls_ca: Annotated[
        Path | None,
        typer.Option("--tls-ca", envvar="MEHDB_TLS_CA", help="The authorities of nodes' certificates, if not usual."),
    ] = None
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", envvar="MEHDB_TLS_CERT", help="A certificate to show, with --tls-key.")
    ] = None
    tls_key: Annotated[Path | None, typer.Option("--tls-key", envvar="MEHDB_TLS_KEY", help="Its private key.")] = None

    def credentials(self) -> "Credentials":
        """Return what the files hold. Raises `SettingsError`."""
        from mehdb.credentials import Credentials

        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError(["--tls-cert, --tls-key: give both, or neither"])
        return Credentials(self.token_file, ca=self.tls_ca, cert=self.tls_cert, key=self.tls_key)


@dataclass(frozen=True)
class ShownToNode(Shown):
    """What is shown to one node, which may be at an address: pods that are not ready have no name in DNS."""

    tls_server_name: Annotated[
        str | None,
        typer.Option(
            "--tls-server-name", help="The name that its certificate must be of, where --from has an address."
        ),
    ] = None

    def peer(self, url: str) -> "Peer":
        """Return a client to the node at *url*. Raises `SettingsError`."""
        from mehdb.peers import Peer
        from mehdb.whereabouts import Whereabouts

        return Peer(url, self.credentials(), whereabouts=Whereabouts(url, certified_as=self.tls_server_name))


@dataclass(frozen=True)
class Asked(Shown):
    """Which nodes are asked, and for how long."""

    url: Annotated[
        str,
        typer.Option(
            "--url", envvar="MEHDB_URL", help="Where a node is; several, with commas between: the first that answers."
        ),
    ] = URL
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=0.1, max=3600, help="How many seconds a request may take, with its retries."),
    ] = 10.0

    def urls(self) -> tuple[str, ...]:
        """Return the nodes' base URLs. Raises `SettingsError`."""
        try:
            return tuple(base_url(url.strip()) for url in self.url.split(","))
        except ValueError as error:
            raise SettingsError([f"--url: {error}"]) from error

    def client(self, timeout_s: float | None = None) -> "Client":
        """Return a client of these nodes. Raises `SettingsError`."""
        from mehdb.client.http import Client

        return Client(self.urls(), self.credentials(), timeout_s or self.timeout)


def with_flags(kind: type[Shown], **defaults: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return what gives a command, in place of its first parameter, the flags that the fields of *kind* are.

    *defaults* take the place of theirs.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(kind, include_extras=True)
        flags = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[name],
                default=defaults.get(name, field.default),
            )
            for name, field in kind.__dataclass_fields__.items()
        ]  # fmt: skip
        first, *own = inspect.signature(command).parameters.values()

        @functools.wraps(command)
        def flagged(**values: Any) -> None:
            shown = kind(**{flag.name: values.pop(flag.name) for flag in flags})
            command(**{first.name: shown}, **values)

        # typer reads these two.
        flagged.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]  # any function takes one
        flagged.__annotations__ = {one.name: one.annotation for one in (*own, *flags)} | {"return": None}
        return flagged

    return decorate
