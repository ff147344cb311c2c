"""The reference: the least that an aiohttp server can do, so that ratios say what mehdb adds to it.

Usage: `python bench/reference.py application|low-level PORT`, on 127.0.0.1, until SIGTERM.

    application   `web.Application`, the server that one writes with aiohttp: GET answers a constant, PUT reads the body
    low-level     `web.Server`, which mehdb is built on, without any routes: GET answers the constant

The routes are mehdb's and the constant is as long as the benchmark's values, so that both answer the same requests.
"""

import argparse
import asyncio
from typing import Final

import uvloop
from aiohttp import web

from dataset import VALUE_BYTES

CONSTANT: Final = b"v" * VALUE_BYTES


async def get(_request: web.Request) -> web.Response:
    """Answer the constant, whatever the key."""
    return web.Response(body=CONSTANT)


async def put(request: web.Request) -> web.Response:
    """Read the body and forget it."""
    await request.read()
    return web.Response(text="WRITE completed")


async def get_low_level(_request: web.BaseRequest) -> web.Response:
    """Answer the constant, whatever the request."""
    return web.Response(body=CONSTANT)


async def serve(kind: str, port: int) -> None:
    """Listen on *port* until cancelled."""
    runner: web.AppRunner | web.ServerRunner
    if kind == "application":
        app = web.Application()
        app.router.add_get("/get/{key:.+}", get)
        app.router.add_put("/set/{key:.+}", put)
        runner = web.AppRunner(app, access_log=None)
    else:
        runner = web.ServerRunner(web.Server(get_low_level, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


def main() -> None:
    """Serve what the command line asks for."""
    parser = argparse.ArgumentParser(description="The least that an aiohttp server can do.")
    parser.add_argument("kind", choices=["application", "low-level"])
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    uvloop.run(serve(options.kind, options.port))


if __name__ == "__main__":
    main()
