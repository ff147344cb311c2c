"""How far a long command has come: a bar on the terminal. Only commands show it; a node logs."""

import contextlib
from collections.abc import Callable, Iterator

OnStep = Callable[[str, int, int], None]
"""Told what is being done, how much of it has been, and how much there is."""


@contextlib.contextmanager
def progress_bar() -> Iterator[OnStep]:
    """Have a progress bar on the terminal, or nothing where there is none."""
    from rich.console import Console  # only here: most commands are over before it would be loaded
    from rich.progress import Progress, TaskID

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def on_step(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step)
            bar.update(tasks[step], completed=done, total=total)

        yield on_step
