"""Whether services of a Ray cluster still answer, asked once a second by a thread."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping

from moe_dist.runtime.blame import STOPPED, STOPPED_S

PROBE_EVERY_S, PROBE_TIMEOUT_S, PROBES = 1.0, 1.0, 2
LOOK_EVERY_S = 0.25  # at a service that is stopped


class Greeter:
    """`causes`: why a service, by its name, is taken for gone: it refused, or could not be reached, PROBES times in a
    row, was silent for too long, or is stopped."""

    def __init__(
        self,
        addresses: Mapping[str, str],
        silence_timeout_s: float,
        stopped: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`addresses`: host:port of each service. `stopped`: which of them is seen to be, where its process can be
        seen; a busy one only looks silent."""
        self._places = {name: _endpoint(address) for name, address in addresses.items()}
        self._misses = dict.fromkeys(self._places, 0)
        self._answered = dict.fromkeys(self._places, time.monotonic())
        self._silence_s, self._stopped = silence_timeout_s, stopped
        self.causes: dict[str, str] = {}
        self._stop = threading.Event()
        if self._places:
            threading.Thread(target=self._look, name="moe-dist-cluster-watch", daemon=True).start()

    def ask(self, misses: int = 1) -> None:
        """Greet all of them now. `misses`: how many in a row are enough; 1 where something else speaks against one."""
        for name, place in self._places.items():
            if name in self.causes:
                continue
            try:
                _greet(place)
                self._misses[name], self._answered[name] = 0, time.monotonic()
            except TimeoutError:  # busy, or stopped
                if (silent := time.monotonic() - self._answered[name]) > self._silence_s:
                    self.causes[name] = f"was silent for {silent:.0f} s"
            except OSError as error:
                self._misses[name] += 1
                if self._misses[name] >= misses:
                    self.causes[name] = f"does not answer: {error.strerror or error}"

    def close(self) -> None:
        self._stop.set()

    def _look(self) -> None:
        halted = None
        while not self._stop.wait(LOOK_EVERY_S if halted else PROBE_EVERY_S):
            halted = self._stopped()
            if halted is None:
                self.ask(PROBES)
                continue
            silent = time.monotonic() - min(self._answered.values())
            if halted not in self.causes and silent > min(STOPPED_S, self._silence_s):
                self.causes[halted] = f"was silent for {silent:.0f} s: {STOPPED}"


def _endpoint(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _greet(place: tuple[str, int]) -> None:
    """Open HTTP/2, which gRPC is spoken over: a living server answers with its settings, a stopped one does not.

    Raises OSError where nobody listens or no machine answers, TimeoutError where somebody listens who says nothing: the
    kernel takes connections for a process that is busy or stopped, and no other machine does.
    """
    try:
        connection = socket.create_connection(place, timeout=PROBE_TIMEOUT_S)
    except TimeoutError:
        raise ConnectionError(f"no machine answers at {place[0]}") from None
    with connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4" + bytes(5))  # preface, empty settings
        if not connection.recv(9):
            raise ConnectionResetError("the connection was closed")
