"""Which host reaches which other one through which network interface, found before any process group is formed: gloo
and NCCL that take an interface which leads nowhere wait until their timeout, and name no interface then."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from moe_dist.machine.interfaces import interfaces
from moe_dist.machine.network import settings

CONNECT_S, ANSWER_S = 2.0, 10.0
PINGS = 5
PAYLOAD = 8 << 20  # bytes that are fetched to see how fast the way is
TOKEN = 16  # bytes


@dataclass(frozen=True)
class Place:
    """Where a member listens: its token, and for each interface (name, address, port)."""

    member: int
    host: str
    token: bytes
    doors: tuple[tuple[str, str, int], ...]
    loopbacks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Way:
    """From one member to an interface of another: milliseconds there and back and MB/s, or what was wrong."""

    source: int
    target: int
    interface: str
    address: str
    milliseconds: float | None = None
    megabytes_s: float | None = None
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem


class Doors:
    """Listens at every IPv4 address of this host, for those who know its token, until it is closed."""

    def __init__(self, member: int) -> None:
        self._token, self._listeners = secrets.token_bytes(TOKEN), list[socket.socket]()
        doors, loopbacks = [], set()
        for each in interfaces():
            for address in (address for address in each.addresses if ipaddress.ip_address(address).version == 4):
                with suppress(OSError):  # an interface that is down
                    listener = socket.create_server((address, 0))
                    self._listeners.append(listener)
                    doors.append((each.name, address, listener.getsockname()[1]))
                    loopbacks |= {each.name} if each.loopback else set()
                    threading.Thread(
                        target=self._serve, args=(listener,), name=f"moe-dist-door-{address}", daemon=True
                    ).start()
        self.place = Place(member, socket.gethostname(), self._token, tuple(doors), frozenset(loopbacks))

    def close(self) -> None:
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # which ends an accept that waits; closing alone does not
            listener.close()

    def __enter__(self) -> Doors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        """Pings back, then the payload; nothing to a stranger."""
        with connection, suppress(OSError):
            connection.settimeout(ANSWER_S)
            if not hmac.compare_digest(_exactly(connection, TOKEN), self._token):
                return
            for _ in range(PINGS):
                connection.sendall(_exactly(connection, 1))
            connection.sendall(bytes(PAYLOAD))


def reach(own: Place, others: Sequence[Place]) -> list[Way]:
    """Each door of each other host, one after the other. A loopback address leads to the same host only, so it is
    tried between members of one host alone."""
    return [
        _tried(own.member, other, door)
        for other in others
        if other.member != own.member
        for door in other.doors
        if other.host == own.host or door[0] not in other.loopbacks
    ]


def _tried(source: int, target: Place, door: tuple[str, str, int]) -> Way:
    name, address, port = door
    try:
        with socket.create_connection((address, port), timeout=CONNECT_S) as connection:
            connection.settimeout(ANSWER_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(target.token)
            rounds = [_ping(connection) for _ in range(PINGS)]
            begin = time.perf_counter()
            _exactly(connection, PAYLOAD)
            seconds = time.perf_counter() - begin
    except ConnectionResetError:  # as of a listener that has heard another's token
        return Way(source, target.member, name, address, problem="another host answers at this address")
    except OSError as error:
        said = f"no answer within {CONNECT_S:g} s" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return Way(source, target.member, name, address, problem=said)
    return Way(source, target.member, name, address, min(rounds) * 1e3, PAYLOAD / seconds / 1e6)


def _ping(connection: socket.socket) -> float:
    begin = time.perf_counter()
    connection.sendall(b"x")
    _exactly(connection, 1)
    return time.perf_counter() - begin


def _exactly(connection: socket.socket, size: int) -> bytes:
    """Raises ConnectionResetError where the other side ends before."""
    found = bytearray()
    while len(found) < size:
        part = connection.recv(min(size - len(found), 1 << 20))
        if not part:
            raise ConnectionResetError("the connection was closed")
        found += part
    return bytes(found)


@dataclass(frozen=True)
class Advice:
    """For one host: the variables to set there, or why there are none."""

    host: str
    variables: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def advise(places: Sequence[Place], ways: Sequence[Way]) -> list[Advice]:
    """For each host the interface through which every other member reaches it, the fastest of them."""
    found = {}
    for place in places:
        if place.host not in found:
            found[place.host] = _advice(place, places, ways)
    return list(found.values())


def _advice(place: Place, places: Sequence[Place], ways: Sequence[Way]) -> Advice:
    rates: dict[str, float] = {}
    sources = [other for other in places if other.member != place.member]
    for name in dict.fromkeys(name for name, _, _ in place.doors):
        here = [way for way in ways if way.target == place.member and way.interface == name and way.ok]
        if sources and {way.source for way in here} == {other.member for other in sources}:
            rates[name] = min(way.megabytes_s or 0.0 for way in here)
    if not rates:
        rule = f"no interface of {place.host} is reached by all others: open its firewall for TCP between these hosts"
        return Advice(place.host, problem=rule if sources else "")
    best = max(rates, key=lambda name: rates[name])
    return Advice(place.host, settings(best, (name for name, _, _ in place.doors)))
