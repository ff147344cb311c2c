"""The HTTP API of a node: requests in, answers out.

    ports.py      `Ports`: what a node listens with, and all that is behind it
    server.py     `ApiServer`: takes connections, bounds them; what cannot be parsed is answered too
    handshake.py  connections that are to be encrypted
    app.py        `Api`: finds the route, turns errors into answers, adds the headers that every answer bears
    routes.py     which routes there are, who answers them, and what right each needs
    access.py     `Gate`: who is let in
    audit.py      what was denied to whom, and what operators did
    answers.py    `Answer`: a whole answer and its wire form
    requests.py   what a request says: its target, key and parameters
    bodies.py     its body, within bounds
    data.py       /set/, /get/, /delete/: one key
    batch.py      /batch: many writes, all or nothing
    listing.py    /keys, POST /get, /history/
    watch.py      /watch: changes as they come
    conditions.py `If-Match` and `If-None-Match`
    lines.py      entries and changes as lines of JSON
    consistency.py  `Reads`: what a read asks of this node: a revision, the leader, how old it may be
    acks.py       `Acks`: what a write asks of the followers
    forward.py    `ToLeader`: the redirect to the leader, or the leader's answer
    status.py     /status, /livez, /readyz, /metrics
    replicate.py  /position, /replicate, and who pulls from this node
    snapshot.py   /snapshot
    debug.py      /debug/tasks, /debug/threads: where the process stands
    control.py    `ControlApi`: what an operator's commands ask of the node on their machine
    node.py       `NodeView`: what the API must know of the node it speaks for

It decides nothing about data: that is the store's. It never builds a URL from what a client sent but the target's path
and query, byte for byte.
"""

from mehdb.api.control import ControlApi, ControlView
from mehdb.api.node import Check, NodeView
from mehdb.api.ports import Ports
from mehdb.api.replicate import Followers

__all__ = ["Check", "ControlApi", "ControlView", "Followers", "NodeView", "Ports"]
