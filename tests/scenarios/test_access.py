"""Who may do what: each right at each route, keys by prefixes; and that it holds through redirects and reloads."""

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from cluster import ADDRESS, CLIENT, DEADLINE_S, Cluster, Node, curl, eventually, running
from guards import Tokens, recovers_without_its_volume, swap
from watching import watching

TOKENS = {
    "reader": ("read",), "writer": ("write",), "node": ("replicate",), "operator": ("admin",), "prometheus": ("none",),
    "app": ("read,write", "app/", "shared/"),
}  # fmt: skip
READ, WRITE, REPLICATE, ADMIN = "reader", "writer", "node", "operator"
EVERYBODY = frozenset({*TOKENS, None, "wrong"})

BATCH_OF_OTHERS = b'{"op":"set","key":"app/b","value":"v"}\n{"op":"delete","key":"o"}'
# method, target, body, who is let in
ROUTES = [
    ("GET", "/livez", b"", EVERYBODY),
    ("GET", "/readyz", b"", EVERYBODY),
    ("GET", "/status", b"", EVERYBODY),
    ("GET", "/status?level=full", b"", EVERYBODY),
    ("GET", "/metrics", b"", {*TOKENS}),
    ("GET", "/get/app/there", b"", {READ, ADMIN, "app"}),
    ("HEAD", "/get/app/there", b"", {READ, ADMIN, "app"}),
    ("GET", "/get/other", b"", {READ, ADMIN}),
    ("GET", "/get/app%2Fthere", b"", {READ, ADMIN, "app"}),
    ("GET", "/get/ap", b"", {READ, ADMIN}),
    ("PUT", "/set/app/new", b"v", {WRITE, ADMIN, "app"}),
    ("PUT", "/set/other", b"v", {WRITE, ADMIN}),
    ("PUT", "/set/app/%2E%2E/other", b"v", {WRITE, ADMIN, "app"}),  # a key like any other: no path is resolved
    ("DELETE", "/delete/app/new", b"", {WRITE, ADMIN, "app"}),
    ("DELETE", "/delete/other", b"", {WRITE, ADMIN}),
    ("GET", "/history/app/there", b"", {READ, ADMIN, "app"}),
    ("GET", "/history/other", b"", {READ, ADMIN}),
    ("GET", "/keys", b"", {READ, ADMIN}),
    ("GET", "/keys?prefix=app/", b"", {READ, ADMIN, "app"}),
    ("GET", "/keys?prefix=app/t&values=true", b"", {READ, ADMIN, "app"}),
    ("GET", "/keys?prefix=app", b"", {READ, ADMIN}),
    ("GET", "/keys?after=app/", b"", {READ, ADMIN}),
    ("POST", "/get", b'["app/there","shared/x"]', {READ, ADMIN, "app"}),
    ("POST", "/get", b'["app/there","other"]', {READ, ADMIN}),
    ("POST", "/batch", b'{"op":"set","key":"app/b","value":"v"}', {WRITE, ADMIN, "app"}),
    ("POST", "/batch", BATCH_OF_OTHERS, {WRITE, ADMIN}),
    ("POST", "/batch", b'{"op":"check","key":"other","revision":0}', {WRITE, ADMIN}),
    ("GET", "/watch?wait=0&after=0&prefix=app/", b"", {READ, ADMIN, "app"}),
    ("GET", "/watch?wait=0&after=0", b"", {READ, ADMIN}),
    ("GET", "/position", b"", {REPLICATE, ADMIN}),
    ("GET", "/replicate", b"", {REPLICATE, ADMIN}),
    ("GET", "/snapshot", b"", {REPLICATE, ADMIN}),
    ("GET", "/debug/tasks", b"", {ADMIN}),
    ("GET", "/debug/threads", b"", {ADMIN}),
]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    tokens = Tokens(tmp_path_factory.mktemp("tokens") / "tokens")
    for name, (rights, *prefixes) in TOKENS.items():
        tokens.give(name, rights, *prefixes)
    tokens.given["wrong"] = "x" * 43
    return tokens


def guarded(nodes: Cluster, tokens: Tokens, count: int) -> Cluster:
    """Start *count* nodes behind *tokens*; they are asked with that of an operator."""
    nodes.client = httpx.Client(timeout=DEADLINE_S, trust_env=False, headers=tokens.headers("operator"))
    guards = {"MEHDB_TOKENS_FILE": str(tokens.path), "MEHDB_TOKEN_FILE": str(tokens.file("node"))}
    return nodes.start(count, **guards)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tokens: Tokens) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("guarded")) as nodes:
        yield guarded(nodes, tokens, 2)


def ask(node: Node, method: str, target: str, headers: dict[str, str], body: bytes = b"") -> httpx.Response:
    return CLIENT.request(method, node.url + target, content=body, headers=headers)


def test_every_route_is_tried_here(pair: Cluster) -> None:
    there = set(re.findall(r"/[a-z/]*", pair.leader.get("/no/such/route").json()["message"]))
    tried = {f"/{target.split('?')[0].split('/')[1]}" for _, target, _, _ in ROUTES}
    assert {f"/{route.split('/')[1]}" for route in there} == tried


@pytest.mark.parametrize(("method", "target", "body", "let_in"), ROUTES, ids=[f"{one[0]} {one[1]}" for one in ROUTES])
def test_a_route_is_for_those_who_have_its_right(
    pair: Cluster, tokens: Tokens, method: str, target: str, body: bytes, let_in: set[str | None]
) -> None:
    pair.leader.put("app/there", b"v")
    for node in pair.nodes:
        for name in sorted(EVERYBODY, key=str):
            before = pair.leader.status().revision
            answer = ask(node, method, target, tokens.headers(name), body)
            who = f"{name} at {node.name}"
            if name in let_in:
                assert answer.status_code in (200, 204, 307, 404, 410), f"{who}: {answer.text}"
                continue
            if target == "/batch" and name == "app" and node is not pair.leader:
                assert answer.status_code == 307, "which keys it is about, the leader sees"
                continue
            assert answer.status_code == (403 if name in TOKENS else 401), f"{who}: {answer.text}"
            assert ("WWW-Authenticate" in answer.headers) == (answer.status_code == 401)
            assert pair.leader.status().revision == before, f"{who} has written"


def test_a_status_as_json_is_for_those_who_are_known(pair: Cluster, tokens: Tokens) -> None:
    as_json = {"Accept": "application/json"}
    assert ask(pair.leader, "GET", "/status", as_json | tokens.headers("prometheus")).json()["ready"] is True
    for name in (None, "wrong"):
        assert ask(pair.leader, "GET", "/status", as_json | tokens.headers(name)).status_code == 401


def test_an_answer_says_which_right_is_missing(pair: Cluster, tokens: Tokens) -> None:
    def told(name: str | None, method: str, target: str) -> tuple[str, str]:
        answer = ask(pair.leader, method, target, tokens.headers(name)).json()
        return answer["needs"], answer["message"]

    assert told("reader", "PUT", "/set/k") == (
        "write",
        "the token 'reader' lacks the right write: use one that has it, or add it to its line in the tokens file",
    )  # fmt: skip
    needs, message = told("app", "GET", "/get/other")
    assert (needs, "may read only app/, shared/" in message) == ("read", True)
    needs, message = told(None, "GET", "/get/k")
    assert (needs, "Authorization: Bearer TOKEN" in message) == ("read", True)
    assert told("wrong", "GET", "/metrics")[0] == "any"


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Basic {}", "{}", "bearer  {}x", "Bearer {} {}", "Bearer\t{}"],
)
def test_what_is_no_bearer_token_is_none(pair: Cluster, tokens: Tokens, header: str) -> None:
    shown = header.format(*[tokens.given["operator"]] * header.count("{}"))
    assert ask(pair.leader, "GET", "/keys", {"Authorization": shown}).status_code == 401


def test_two_tokens_are_none(pair: Cluster, tokens: Tokens) -> None:
    """Whoever checks one of them before may have checked the other."""
    shown = [("Authorization", f"Bearer {tokens.given[name]}") for name in ("operator", "wrong")]
    with httpx.Client(trust_env=False) as client:
        assert client.get(f"{pair.leader.url}/keys", headers=shown).status_code == 401


def test_curl_takes_its_token_along_only_where_it_is_told_to(pair: Cluster, tokens: Tokens) -> None:
    url = f"http://localhost:{pair.followers[0].port}/set/app/through"
    header = f"Authorization: Bearer {tokens.given['app']}"
    lost = json.loads(curl("-L", "-XPUT", "-d", "v", "-H", header, url))
    assert (lost["error"], "--location-trusted" in lost["message"]) == ("unauthorized", True)
    assert curl("--location-trusted", "-L", "-XPUT", "-d", "v", "-H", header, url) == b"WRITE completed"


def test_what_is_passed_on_has_the_rights_of_who_sent_it(pair: Cluster, tokens: Tokens) -> None:
    """Never those of the node that passes it on."""
    follower = pair.followers[0]
    headers = tokens.headers("app")
    assert ask(follower, "PUT", "/set/app/passed?forward=true", headers, b"v").status_code == 200
    assert ask(follower, "PUT", "/set/other?forward=true", headers, b"v").status_code == 403
    assert ask(follower, "POST", "/batch?forward=true", headers, BATCH_OF_OTHERS).status_code == 403, (
        "found by the leader"
    )
    assert ask(follower, "PUT", "/set/app/passed?forward=true", tokens.headers("node"), b"v").status_code == 403


def test_a_token_that_is_taken_back_is_of_no_use_soon(cluster: Cluster, tokens: Tokens, tmp_path: Path) -> None:
    own = Tokens(tmp_path / "tokens", dict(tokens.given))
    shutil.copy(tokens.path, own.path)
    node = guarded(cluster, own, 1).leader
    with watching(node, headers=tokens.headers("reader")) as watcher:
        own.take_back("reader")
        eventually(
            lambda: ask(node, "GET", "/keys", tokens.headers("reader")).status_code == 401, "the token to be gone"
        )
        assert watcher.change()["error"] == "unauthorized", "who watches is told as well"
    assert "credentials read" in node.log
    late = own.give("late", "read")
    eventually(
        lambda: ask(node, "GET", "/keys", {"Authorization": f"Bearer {late}"}).is_success, "the new one to count"
    )
    swap(own.path, b"not a token at all\n")
    eventually(lambda: "credentials not read, the old ones stay" in node.log, "the wrong file to be noticed")
    assert ask(node, "GET", "/keys", {"Authorization": f"Bearer {late}"}).is_success


@pytest.mark.parametrize(
    ("name", "target", "place"),
    [
        ("app", "/watch?wait=30&prefix=app/", "Watch.wait"),
        ("app", "/get/app/k?min_revision={next}&wait=30", "Reads._reach"),
        ("node", "/replicate?after={head}&history={history}&chain={chain}&wait=30", "ReplicationRoutes.replicate"),
    ],
)
def test_what_waits_gets_nothing_that_came_after_its_token_was_taken_back(
    cluster: Cluster, tokens: Tokens, tmp_path: Path, name: str, target: str, place: str
) -> None:
    own = Tokens(tmp_path / "tokens", dict(tokens.given))
    shutil.copy(tokens.path, own.path)
    node = guarded(cluster, own, 1).leader
    node.put("app/k", b"before")
    at = node.position()
    head = at["revision"]
    target = target.format(next=head + 1, head=head, history=at["history"], chain=at["chain"])
    with ThreadPoolExecutor() as pool:
        waits = pool.submit(ask, node, "GET", target, tokens.headers(name))
        eventually(lambda: place in node.get("/debug/tasks").text, "it to wait")
        own.take_back(name)
        eventually(lambda: ask(node, "GET", "/metrics", tokens.headers(name)).status_code == 401, "it to be gone")
        assert not waits.done(), "it waits for what comes now"
        node.put("app/k", b"after")
        assert waits.result(DEADLINE_S).json()["error"] == "unauthorized"


def test_a_node_with_a_wrong_token_says_so_and_goes_on_when_it_is_right(cluster: Cluster, tokens: Tokens) -> None:
    leader = guarded(cluster, tokens, 1).leader
    leader.put("k", b"v")
    mine = tokens.path.with_name("mine")
    mine.write_text(tokens.given["reader"])
    follower = cluster.add(MEHDB_TOKENS_FILE=str(tokens.path), MEHDB_TOKEN_FILE=str(mine)).start(ready=False)
    eventually(lambda: "lacks the right replicate" in (follower.status().reason or ""), "the reason to be told")
    swap(mine, tokens.given["node"].encode())
    eventually(follower.ready, "the follower to be let in")
    assert follower.get("/get/k").content == b"v"


def test_a_leader_without_its_volume_recovers_behind_tokens(cluster: Cluster, tokens: Tokens) -> None:
    guarded(cluster, tokens, 2)
    recovers_without_its_volume(cluster)


def test_denied_and_administrative_requests_are_written_down(cluster: Cluster, tokens: Tokens) -> None:
    node = guarded(cluster, tokens, 1).leader
    node.put("secret-key", b"secret-value")
    ask(node, "PUT", '/set/a"b%0Ac?ttl=5', tokens.headers("reader"), b"secret-value")
    ask(node, "GET", "/get/secret-key", tokens.headers("wrong"))
    node.get("/snapshot")
    audited = [line for line in node.log.splitlines() if "logger=mehdb.audit" in line]
    denied, unknown, snapshot = (line.partition("logger=mehdb.audit ")[2] for line in audited)
    assert denied == (
        f'denied token=reader from={ADDRESS} certificate=- via=- method=PUT route=/set/ target="/set/a%22b%0Ac?ttl=5" '
        "code=forbidden needs=write suppressed=0"
    )
    assert unknown.startswith("denied token=- ")
    assert snapshot == (
        f"administrative token=operator from={ADDRESS} certificate=- via=- method=GET route=/snapshot target=/snapshot "
        "suppressed=0"
    )
    assert not any(token in node.log for token in tokens.given.values())
    assert "secret-value" not in node.log


def test_who_is_denied_all_the_time_floods_no_log(cluster: Cluster, tokens: Tokens) -> None:
    node = guarded(cluster, tokens, 1).leader
    with httpx.Client(trust_env=False, base_url=node.url) as client:
        for _ in range(400):
            assert client.get("/keys").status_code == 401
    told = node.log.count(" denied token=")
    assert 100 <= told < 300, "a burst of 100, and 10 a second"
    ask(node, "PUT", "/set/k", tokens.headers("reader"), b"v")
    assert node.log.count(" denied token=reader") == 1, "strangers do not hide what those do who are known"
    metrics = node.get("/metrics").text
    assert 'mehdb_denied_total{reason="unauthorized"} 400.0' in metrics


def test_an_operators_command_is_written_down(cluster: Cluster) -> None:
    node = cluster.start(1).leader
    curl("--unix-socket", str(node.volume / "control"), "-XPOST", "http://node/drain")
    assert re.search(
        r"logger=mehdb\.audit administrative from=socket pid=\d+ uid=\d+ method=POST route=/drain", node.log
    )


def test_what_the_leader_denies_is_denied_through_a_follower(cluster: Cluster, tokens: Tokens) -> None:
    """With the header by which a client knows that a token would help."""
    guarded(cluster, tokens, 1)
    follower = cluster.add(MEHDB_TOKEN_FILE=str(tokens.file("node"))).start()
    denied = ask(follower, "PUT", "/set/k?forward=true", {}, b"v")
    assert (denied.status_code, denied.headers["WWW-Authenticate"]) == (401, 'Bearer realm="mehdb"')
    assert ask(follower, "PUT", "/set/k?forward=true", tokens.headers("writer"), b"v").status_code == 200
