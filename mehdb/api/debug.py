"""Where this process stands, for whoever wants to know why it is slow: /debug/tasks and /debug/threads.

Files, lines and functions alone. Never what is in a variable: keys and values are nobody's business here.
"""

import asyncio
import functools
import sys
import threading
from collections.abc import Iterator
from types import CodeType
from typing import Any, Final

import msgspec
from aiohttp import web

from mehdb.api.answers import Answer, json_answer
from mehdb.api.requests import Target, no_parameters

NAMES_MAX: Final = 10  # of tasks that stand in one place: thousands of idle connections do
DEPTH_MAX: Final = 64  # of a stack: deeper, what is innermost tells


class Tasks(msgspec.Struct, frozen=True):
    """Tasks of the event loop that stand in one and the same place: the first of their *names*, and how many."""

    count: int
    names: list[str]
    stack: list[str]


class Thread(msgspec.Struct, frozen=True):
    """A thread, and where it stands."""

    name: str
    stack: list[str]


class DebugRoutes:
    """The routes that show stacks, the outermost call first."""

    async def tasks(self, _request: web.BaseRequest, target: Target, _rest: str) -> Answer:
        """Answer with all tasks of the event loop, those that stand in one place together, the most first."""
        no_parameters(target.query)
        found: dict[tuple[str, ...], list[str]] = {}
        for task in asyncio.all_tasks():
            stack = tuple(_place(code, line) for code, line in _awaited(task.get_coro()))[-DEPTH_MAX:]
            found.setdefault(stack, []).append(task.get_name())
        places = sorted(found.items(), key=lambda place: (-len(place[1]), place[0]))
        return json_answer([Tasks(len(names), sorted(names)[:NAMES_MAX], list(stack)) for stack, names in places])

    async def threads(self, _request: web.BaseRequest, target: Target, _rest: str) -> Answer:
        """Answer with all threads of Python's. That of the event loop is here: it stands in this answer."""
        no_parameters(target.query)
        frames = sys._current_frames()  # noqa: SLF001  documented, and what faulthandler shows without a request
        threads = []
        for thread in sorted(threading.enumerate(), key=lambda one: one.name):
            stack: list[str] = []
            frame = frames.get(thread.ident or 0)
            while frame is not None and len(stack) < DEPTH_MAX:
                stack.append(_place(frame.f_code, frame.f_lineno))
                frame = frame.f_back
            threads.append(Thread(thread.name, stack[::-1]))
        return json_answer(threads)


def _awaited(awaitable: Any) -> Iterator[tuple[CodeType, int]]:
    """Yield where *awaitable* stands, and what it awaits, and so on: of coroutines and generators of either kind."""
    while awaitable is not None:
        for kind in ("cr", "gi", "ag"):
            frame = getattr(awaitable, f"{kind}_frame", None)
            if frame is not None:
                yield frame.f_code, frame.f_lineno
                awaitable = getattr(awaitable, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")
                break
        else:
            return  # a future, or what is written in C: there is no more to see


def _place(code: CodeType, line: int | None) -> str:
    """Return a place in the code, such as `mehdb/api/app.py:90 Api.__call__`."""
    return f"{_module_path(code.co_filename)}:{line} {code.co_qualname}"


@functools.cache  # of as many files as there are
def _module_path(name: str) -> str:
    """Return the path of a module's file below the directory where Python found it."""
    roots = [root for root in sys.path if root and name.startswith(f"{root}/")]
    return name.removeprefix(max(roots, key=len, default="")).lstrip("/")
