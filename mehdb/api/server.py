"""aiohttp's server, but what its parser refuses is answered like every other error: JSON, with the node's headers."""

from typing import Any

from aiohttp import web

from mehdb.api.app import Api


class ApiServer(web.Server):
    """A server whose requests, well-formed or not, are answered by *api*. *options* are those of a connection."""

    def __init__(self, api: Api, **options: Any) -> None:
        super().__init__(api, **options)
        self._api = api

    def __call__(self) -> web.RequestHandler:
        """Return the protocol of a new connection."""
        connection = _Connection(self, loop=self._loop, **self._kwargs)
        connection.api = self._api
        return connection


class _Connection(web.RequestHandler):
    __slots__ = ("api",)
    api: Api

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,  # noqa: ARG002  aiohttp's signature
        exc: BaseException | None = None,  # noqa: ARG002
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what could not be parsed. What a handler raises never comes here."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer is under way: only the end of the connection can tell")
        return self.api.refuse(request, message or "it cannot be read")
