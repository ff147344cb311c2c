"""What a node, or an operator, shows to others, and how it tells those from impostors: a token, and certificates.

Everything is read from files, and again when they change: Kubernetes swaps the files of a Secret under a running pod.
What cannot be read takes the place of nothing: the last that could goes on being used. Nothing here logs a token.
"""

import contextlib
import logging
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from mehdb.errors import SettingsError

log = logging.getLogger("mehdb.credentials")

TOKEN_BYTES_MAX: Final = 8000  # with its name, as long as a header may be

Signature = tuple[tuple[int, int, int] | None, ...]


class Files:
    """Some files, and whether they have changed since they were last read well. *read* raises `SettingsError`."""

    def __init__(self, paths: tuple[Path, ...], read: Callable[[], None]) -> None:
        """Read them."""
        self._paths = paths
        self._read = read
        self._told = ""
        self._seen: Signature | None = self._signature()
        read()

    def refresh(self) -> None:
        """Read them again if they have changed, and until that succeeds. What is wrong is logged once; the old stay."""
        signature = self._signature()
        if signature == self._seen:
            return
        names = ", ".join(str(path) for path in self._paths)
        try:
            self._read()
        except SettingsError as error:
            self._seen = None  # what is wrong may pass without a trace: permissions, a disk
            if str(error) != self._told:
                log.error('credentials not read, the old ones stay files="%s" reason="%s"', names, error)  # noqa: TRY400
            self._told = str(error)
        else:
            log.info('credentials read files="%s"', names)
            self._seen, self._told = signature, ""

    def _signature(self) -> Signature:
        """Return what tells one version of the files from the next. A change's time is the kernel's: none is kept."""
        found: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                stat = path.stat()
            except OSError:
                found.append(None)
            else:
                found.append((stat.st_ino, stat.st_ctime_ns, stat.st_size))
        return tuple(found)


def read_token(path: Path) -> str:
    """Return the token in the file at *path*. Raises `SettingsError`."""
    try:
        with path.open("rb") as file:
            token = file.read(TOKEN_BYTES_MAX + 1).strip()
    except OSError as error:
        raise SettingsError([f"--token-file: {path}: {error.strerror}"]) from error
    fits = 0 < len(token) <= TOKEN_BYTES_MAX
    if not (fits and token.isascii() and token.decode().isprintable() and b" " not in token):
        raise SettingsError(
            [f"--token-file: {path} must hold one token, of at most {TOKEN_BYTES_MAX} characters of ASCII, no spaces"]
        )
    return token.decode()


class Credentials:
    """What is shown to nodes: the token in *token_file*, the certificate in *cert* and *key*, if given.

    A node is believed if its certificate is of an authority in *ca*, or of the system's. Raises `SettingsError`.
    """

    def __init__(
        self,
        token_file: Path | None = None,
        *,
        ca: Path | None = None,
        cert: Path | None = None,
        key: Path | None = None,
        verify_clients: bool = False,
    ) -> None:
        self.token: str | None = None
        self._token_file, self._ca, self._cert, self._key = token_file, ca, cert, key
        self._verify_clients = verify_clients
        self._client: ssl.SSLContext | None = None
        self.server: ssl.SSLContext | None = None
        """With what connections are answered; None: without TLS."""
        self._files = [
            Files(tuple(path for path in paths if path is not None), read)
            for paths, read in (((token_file,), self._read_token), ((ca, cert, key), self._read_certificates))
            if any(paths)
        ]

    @property
    def client(self) -> ssl.SSLContext:
        """With what others are asked. Made when it is first needed: reading the system's authorities takes long."""
        if self._client is None:
            self._client = self._client_context()
        return self._client

    @property
    def encrypts(self) -> bool:
        """Whether this node talks TLS."""
        return self._cert is not None

    def refresh(self) -> None:
        """Read what has changed."""
        for files in self._files:
            files.refresh()

    def headers(self) -> dict[str, str]:
        """Return the header that shows the token."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    def _read_token(self) -> None:
        if self._token_file is not None:
            self.token = read_token(self._token_file)

    def _read_certificates(self) -> None:
        client = self._client_context()  # all of it, before any of it is used
        if self._cert is not None:
            self.server = self._server_context()
        self._client = client

    def _client_context(self) -> ssl.SSLContext:
        with self._reading_ca():
            context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=self._ca)
        self._show(context)
        return context

    def _server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        self._show(context)
        if self._verify_clients and self._ca is not None:
            with self._reading_ca():
                context.load_verify_locations(self._ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    @contextlib.contextmanager
    def _reading_ca(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ssl.SSLError) as error:
            raise SettingsError([f"--tls-ca: {self._ca} cannot be read: {_reason(error)}"]) from error

    def _show(self, context: ssl.SSLContext) -> None:
        """Have *context* show this node's certificate. Raises `SettingsError`, also where the key is another's."""
        if self._cert is None:
            return
        try:
            # An empty passphrase: OpenSSL would ask for one at the terminal otherwise.
            context.load_cert_chain(self._cert, self._key, password="")
        except (OSError, ssl.SSLError, ValueError) as error:
            raise SettingsError(
                [f"--tls-cert, --tls-key: {self._cert} and {self._key} cannot be read: {_reason(error)}"]
            ) from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients of plain HTTP, which want one: trusts nobody, as reading the system's authorities takes long."""
ANONYMOUS: Final = Credentials()
"""Shows nothing."""
