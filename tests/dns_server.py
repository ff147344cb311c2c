"""A DNS server that answers as a cluster's does: what is in its records, with a TTL of 5 s, and that there is no more.

It answers over UDP, in threads of its own, and can be late, fail, or say nothing at all.
"""

import enum
import socket
import threading
from types import TracebackType
from typing import Final, Self

from dnslib import QTYPE, RCODE, RR, SOA, A, DNSRecord

TTL_S: Final = 5  # CoreDNS's, in a cluster's zone
ZONE: Final = "cluster.local"
DATAGRAM_BYTES: Final = 4096
LOOK_EVERY_S: Final = 0.05  # for the end


class Mood(enum.Enum):
    """How a server answers."""

    WELL = "well"
    FAILING = "failing"  # SERVFAIL: it has lost the API that it asks
    SILENT = "silent"


class DnsServer:
    """Answers at *address* and *port* from `records`: names to their IPv4 addresses. A context manager."""

    def __init__(self, address: str = "127.0.0.1", port: int = 53) -> None:
        self.address = address
        self.port = port
        self.records: dict[str, list[str]] = {}
        """May be changed at any time. Names are in lower case, without a dot at their end."""
        self.mood = Mood.WELL
        self.delay_s = 0.0
        """How long each answer takes."""
        self.asked: list[str] = []
        """The names of all questions, in order."""
        self._over = threading.Event()
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((self.address, self.port))
        self.port = self._socket.getsockname()[1]
        self._socket.settimeout(LOOK_EVERY_S)
        self._thread = threading.Thread(target=self._serve, args=(self._socket,), name="dns server")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        assert self._thread is not None
        assert self._socket is not None
        self._thread.join()
        self._socket.close()

    def _serve(self, server: socket.socket) -> None:
        while not self._over.is_set():
            try:
                question, client = server.recvfrom(DATAGRAM_BYTES)
            except TimeoutError:
                continue
            record = DNSRecord.parse(question)
            self.asked.append(str(record.q.qname).rstrip(".").lower())
            if self.mood is not Mood.SILENT:
                answer = threading.Thread(target=self._answer, args=(server, record, client), daemon=True)
                answer.start()

    def _answer(self, server: socket.socket, question: DNSRecord, client: tuple[str, int]) -> None:
        if self._over.wait(self.delay_s):
            return
        reply = self.reply(question)
        try:
            server.sendto(reply.pack(), client)
        except OSError:  # the test is over
            return

    def reply(self, question: DNSRecord) -> DNSRecord:
        """Return what is answered to *question* now."""
        reply = question.reply()
        name = str(question.q.qname).rstrip(".").lower()
        addresses = self.records.get(name)
        if self.mood is Mood.FAILING:
            reply.header.rcode = RCODE.SERVFAIL
        elif addresses is not None and question.q.qtype == QTYPE.A:
            for address in addresses:
                reply.add_answer(RR(question.q.qname, QTYPE.A, rdata=A(address), ttl=TTL_S))
        else:  # no such name, or none with such addresses: until when that may be held is in the zone's record
            reply.header.rcode = RCODE.NOERROR if addresses else RCODE.NXDOMAIN
            authority = SOA(f"ns.dns.{ZONE}", f"hostmaster.{ZONE}", (1, 7200, 1800, 86400, TTL_S))
            reply.add_auth(RR(ZONE, QTYPE.SOA, rdata=authority, ttl=TTL_S))
        return reply
