"""Real input: every file of the running Python's standard library, with its path as its key."""

import asyncio
import sysconfig
from pathlib import Path
from urllib.parse import quote

import aiohttp
import pytest
from yarl import URL

from cluster import Cluster, Node

LIBRARY = Path(sysconfig.get_path("stdlib"))
AT_ONCE = 16


def library_files() -> dict[str, Path]:
    """Return the files by their path under the library, without what was installed or compiled beside them."""
    files = (path for path in LIBRARY.rglob("*") if path.is_file())
    return {
        str(path.relative_to(LIBRARY)): path
        for path in files
        if not {"site-packages", "dist-packages", "__pycache__"} & set(path.relative_to(LIBRARY).parts)
    }


@pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")  # which is the simplest here
async def test_every_file_of_the_standard_library_is_on_every_node_byte_for_byte(cluster: Cluster) -> None:
    leader, follower, _ = cluster.start(
        3, MEHDB_MAX_VALUE="64MiB"
    ).nodes  # a build of Python may bring an archive of itself
    files = library_files()
    assert len(files) >= 500, "this Python came without its library"
    values = {key: path.read_bytes() for key, path in files.items()}
    gate = asyncio.Semaphore(AT_ONCE)
    async with aiohttp.ClientSession() as client:

        async def write(key: str) -> None:
            url = URL(f"{follower.url}/set/{quote(key)}", encoded=True)
            async with gate, client.put(url, data=values[key]) as answer:
                assert (answer.status, await answer.read()) == (200, b"WRITE completed")
                assert [step.status for step in answer.history] == [307]

        async def compare(node: Node, key: str) -> None:
            url = URL(f"{node.url}/get/{quote(key)}", encoded=True)
            async with gate, client.get(url) as answer:
                assert await answer.read() == values[key], f"{key} differs on {node.name}"

        await asyncio.gather(*(write(key) for key in values))
        assert cluster.converge()["revision"] == len(values)
        for node in cluster.nodes:
            await asyncio.gather(*(compare(node, key) for key in values))
            assert node.get("/status?level=full").text == str(len(values))
    assert leader.status().keys == len(values)
