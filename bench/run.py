"""Measure mehdb against its targets: `make bench`, or `python bench/run.py [--quick] [--keys N] [--only NAME…]`.

Starts real nodes and bare reference servers on loopback, loads them with wrk, prints a table and writes
`bench/results.json`. Takes six minutes, twelve on a busy machine, with --quick two. One core serves, another one loads.

Exit status: 0 if every target is met, 1 if one is missed or could not be measured, 2 if nothing can be measured here.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import httpx
from rich.console import Console

from cluster import BenchError, Cluster
from dataset import fill
from figures import FIGURES
from load import Wrk
from machine import Cores, Disturbance, describe, pin
from measuring import Bench, Plan
from results import Figure, show, write_json
from targets import TARGETS

FULL: Final = Plan(keys=1_000_000, rounds=5, round_s=2, catch_ups=3, lag_s=10, restarts=5, cost_rounds=15)
QUICK: Final = Plan(keys=100_000, rounds=2, round_s=1, catch_ups=1, lag_s=4, restarts=2, cost_rounds=4)
LIMIT_S: Final = 1500  # a run that takes this long hangs
RESULTS: Final = Path(__file__).parent / "results.json"


def options() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description="Measure mehdb against its targets, with a reference in the same run.")
    parser.add_argument("--quick", action="store_true", help="fewer keys, shorter rounds: a trend, not the figures")
    parser.add_argument("--keys", type=int, metavar="N", help="how many keys the store holds [default: 1000000]")
    parser.add_argument("--only", nargs="+", choices=TARGETS, metavar="NAME", help=f"some of: {', '.join(TARGETS)}")
    parser.add_argument(
        "--data-dir", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR",
        help="where the nodes' volumes go, about 2 GB: its disk is part of the measurement [default: %(default)s]",
    )  # fmt: skip
    asked = parser.parse_args()
    if asked.keys is not None and not 1000 <= asked.keys < 10**8:
        parser.error("--keys: from 1000, fewer say nothing, to 99999999, which is what a key's eight digits hold")
    return asked


@contextmanager
def stopped_in_time(cluster: Cluster) -> Iterator[None]:
    """Stop every process of *cluster* at the end, also on SIGTERM, and when `LIMIT_S` is over."""

    def stop(number: int, _frame: object) -> None:
        sys.exit(f"stopped by {signal.Signals(number).name}")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        cluster.stop()


def measure(bench: Bench, names: list[str], console: Console) -> list[Figure]:
    """Return the figures *names*, in the order of `TARGETS`. One that fails does not stop the others."""
    figures = {}
    for name, figure in FIGURES.items():
        if name in names:
            console.print(f"[dim]{time.monotonic() - START:5.0f} s  {name}: {TARGETS[name].title} …")
            try:
                figures[name] = figure(bench)
            except (BenchError, OSError, EOFError, httpx.HTTPError) as error:
                figures[name] = Figure(name, TARGETS[name], None, problem=f"{type(error).__name__}: {error}")
    return [figures[name] for name in TARGETS if name in figures]


def main() -> int:
    """Run, print, write; return the exit status."""
    asked, console = options(), Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    plan = QUICK if asked.quick else FULL
    plan = replace(plan, keys=asked.keys or plan.keys)
    try:
        wrk = Wrk(plan.keys)
    except BenchError as error:
        console.print(f"[bold red]{error}")
        return 2
    cores = Cores.choose()
    with tempfile.TemporaryDirectory(prefix="mehdb-bench-", dir=asked.data_dir) as directory:
        cluster, disturbance = Cluster(Path(directory)), Disturbance()
        machine = describe(cluster.directory, cores)
        console.print(f"[dim]{cores.note}\n    0 s  writing {plan.keys:,} keys into a new store …")
        with stopped_in_time(cluster):
            leader = cluster.leader(cores.server)
            asyncio.run(fill(cluster.data_dir(leader), plan.keys))
            pin(os.getpid(), cores.load)  # from here on this process, and wrk with it, is the load
            figures = measure(Bench(plan, cores, cluster, wrk, leader), asked.only or list(TARGETS), console)
    machine["others"] = disturbance.describe()
    show(figures, machine, console)
    about = {"started_at": STARTED_AT, "duration_s": round(time.monotonic() - START), "machine": machine}
    write_json(RESULTS, figures, {**about, "plan": asdict(plan)})
    console.print(f"[dim]{time.monotonic() - START:.0f} s; written to {RESULTS}")
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    START, STARTED_AT = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    sys.exit(main())
