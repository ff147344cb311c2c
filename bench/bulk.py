"""Figures of many keys in one request: batches of writes, and questions for several values."""

import statistics

from dataset import MANY
from load import KEYS_EACH, Load, Round
from measuring import BATCH_CONNECTIONS, CONNECTIONS, Bench
from results import Figure
from targets import TARGETS

SEVERAL_CONNECTIONS = 16  # as for batches: the server is never without a question


def batches(bench: Bench) -> Figure:
    """Keys that are written, and acknowledged, in batches."""
    rounds = bench.batches["batches"]
    method = f"{MANY} distinct random keys in each batch, {BATCH_CONNECTIONS} connections, wrk"
    return _figure("batches", rounds, "batch", method)


def batches_to_puts(bench: Bench) -> Figure:
    """Keys written in batches, against single PUTs in the same minute."""
    batched, single = bench.batches["batches"], bench.batches["PUTs"]
    samples = [a / b for a, b in zip(_speeds(batched, "batch"), _speeds(single, "PUT"), strict=True)]
    parts = {
        "keys/s in batches": statistics.median(_speeds(batched, "batch")),
        "PUTs/s": statistics.median(_speeds(single, "PUT")),
        "batches CPU us a key": _processor_us(batched, "batch"),
        "PUTs CPU us a key": _processor_us(single, "PUT"),
    }
    method = f"batches of {MANY} over {BATCH_CONNECTIONS} connections, single PUTs over {CONNECTIONS}, wrk"
    return Figure("batches-to-puts", TARGETS["batches-to-puts"], statistics.median(samples), samples, method, parts)


def several(bench: Bench) -> Figure:
    """Keys that are read by `POST /get`."""
    bench.stop_follower()
    leader = bench.leader(bench.cores.server)
    rounds = bench.compare({"several": lambda: bench.load(leader, "several", SEVERAL_CONNECTIONS)})["several"]
    method = f"{MANY} distinct random keys out of {bench.plan.keys:,} in each, {SEVERAL_CONNECTIONS} connections, wrk"
    return _figure("several", rounds, "several", method)


def _figure(name: str, rounds: list[Round], load: Load, method: str) -> Figure:
    speeds = _speeds(rounds, load)
    parts = {
        "CPU us a key": _processor_us(rounds, load),
        "keys/s by CPU time": 1e6 / _processor_us(rounds, load),  # what a core of its own would do
        "p50 ms": statistics.median(measured.p50_us for measured in rounds) / 1000,
        "p99 ms": statistics.median(measured.p99_us for measured in rounds) / 1000,
    }
    return Figure(name, TARGETS[name], statistics.median(speeds), speeds, method, parts)


def _speeds(rounds: list[Round], load: Load) -> list[float]:
    """Return the keys per second of each round."""
    return [measured.per_second * KEYS_EACH[load] for measured in rounds]


def _processor_us(rounds: list[Round], load: Load) -> float:
    return statistics.median(measured.processor_us_each for measured in rounds) / KEYS_EACH[load]
