"""A client's way to `kvstrata serve`: connects, notices that a server is lost, and comes back by itself.

Knows which memory to register after every reconnection, and which transfers the old server may still be
at: until it certainly is not, there is no new connection. Asks nothing of the server itself.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from kvstrata.config import Config
from kvstrata.errors import StoreClosedError
from kvstrata.serving.attachment import Attachment
from kvstrata.serving.connection import AwayError, Connection, RefusedError
from kvstrata.serving.protocol import Kind, ProtocolError
from kvstrata.serving.remote_transfer import RemoteTransfer
from kvstrata.telemetry import Telemetry
from kvstrata.transfer.buffers import PAGE, Buffers
from kvstrata.types import BlockLayout, Namespace

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.05
"""Before the second attempt to come back; doubled up to serve.reconnect_seconds."""


class ServerLink:
    """config: `serve.connect` names the socket. Not connected before `connect` or `live` is called."""

    def __init__(
        self, config: Config, layout: BlockLayout, namespace: Namespace, telemetry: Telemetry
    ) -> None:
        self.path = str(Path(config.serve.connect).expanduser().absolute())
        self.closed = False
        self._config = config
        self._layout = layout
        self._namespace = namespace
        self._telemetry = telemetry
        self._lock = threading.Lock()
        self._comes_back: threading.Thread | None = None
        self._wake = threading.Event()
        self._attached: Attachment | None = None
        self._pid = os.getpid()
        self._memory: list[tuple[Any, int, int]] = []
        self._running: set[RemoteTransfer] = set()

    def connect(self) -> None:
        """The first attempt, here and now; a server that is away is tried again later.

        Raises RefusedError.
        """
        try:
            self._attached = self._attach()
        except AwayError as error:
            log.warning("kvstrata: no server at %s yet (%s): every look-up is a miss", self.path, error)
            self._telemetry.event("server away", f"{self.path}: {error}")
            self._come_back()

    def _hello(self) -> dict[str, Any]:
        return {
            "role": "engine",
            "namespace": self._namespace.digest.hex(),
            "fields": dict(self._namespace.fields),
            "block_bytes": self._layout.block_bytes,
            "block_tokens": self._layout.block_tokens,
            "command": " ".join(sys.argv)[:200],
        }

    def _attach(self) -> Attachment:
        serve = self._config.serve
        try:
            connection = Connection(self.path, self._hello(), serve.call_seconds, serve.open_seconds)
        except AwayError:
            self._telemetry.count("serve_connects_total", "away")
            raise
        except RefusedError:
            self._telemetry.count("serve_connects_total", "refused")
            raise
        attached = Attachment(connection, self._layout.block_bytes, serve.arena_bytes)
        with self._lock:
            memory = list(self._memory)
        for _, address, size in memory:
            attached.register(address, size)
        self._telemetry.count("serve_connects_total", "good")
        return attached

    def live(self) -> Attachment | None:
        """The connection, if there is one that works."""
        if self.closed:
            raise StoreClosedError("this store was closed; open a new one")
        attached = self._attached
        if attached is not None and not attached.connection.lost:
            return attached
        self._come_back()
        return None

    def _come_back(self) -> None:
        """See to it that a thread is at it; also in a forked child, which has no threads."""
        if self._pid != os.getpid():
            self._pid, self._lock, self._comes_back = os.getpid(), threading.Lock(), None
            self._wake, self._running = threading.Event(), set()
        with self._lock:
            if self.closed or self._comes_back is not None or self.connected:
                return
            lost, self._attached = self._attached, None
            self._comes_back = threading.Thread(
                target=self._try_again, args=(lost,), name="kvstrata-connect", daemon=True
            )
            self._comes_back.start()

    def _try_again(self, lost: Attachment | None) -> None:
        """Wait until the old server has let go of this process's memory, then knock until one opens."""
        if lost is not None:
            connection = lost.connection
            self._telemetry.count("serve_lost_total", connection.lost)
            self._telemetry.event("server lost", f"{self.path}: {connection.lost}")
            log.warning("kvstrata: lost the server at %s (%s)", self.path, connection.lost)
            while not connection.gone(FIRST_PAUSE_SECONDS) and not self.closed:
                continue
            with self._lock:
                running = list(self._running)
            for transfer in running:
                transfer.poll()
            if connection.gone():
                connection.bury()
        pause = FIRST_PAUSE_SECONDS
        found: Attachment | None = None
        said = ""
        while not self.closed:
            try:
                found = self._attach()
                break
            except (AwayError, RefusedError) as error:
                if str(error) != said:
                    said = str(error)
                    self._telemetry.event("server away", f"{self.path}: {said}")
            except (OSError, ProtocolError) as error:
                self._telemetry.event("server away", f"{self.path}: {error}")
            self._wake.wait(pause)
            pause = min(2 * pause, self._config.serve.reconnect_seconds)
        with self._lock:
            self._attached = found
            self._comes_back = None
            closed = self.closed
        if found is not None and closed:
            found.connection.lose("closed")
            found.connection.bury()
        elif found is not None:
            log.info("kvstrata: the server at %s is back", self.path)
            self._telemetry.event("server back", self.path)

    def call(
        self,
        attached: Attachment,
        kind: Kind,
        payload: bytes = b"",
        *,
        flags: int = 0,
        seconds: float = 0.0,
    ) -> bytes | None:
        """As `Connection.call`; without an answer, the way back begins."""
        answer = attached.connection.call(kind, payload, flags=flags, seconds=seconds)
        if answer is None:
            self._come_back()
        return answer

    @property
    def connected(self) -> bool:
        """Is there a server that answers, as far as this process knows?"""
        attached = self._attached
        return attached is not None and not attached.connection.lost

    # What the server may touch

    def register(self, buffer: Any) -> bool:
        """As `RemoteStore.register`."""
        address, size = self.remember(buffer)
        attached = self.live()
        return attached is not None and attached.register(address, size)

    def remember(self, buffer: Any) -> tuple[int, int]:
        """To register it with every connection from now on: the address and size of the pages that it lies
        in, because a server can only map whole ones.
        """
        borrowed = Buffers.of([buffer], writable=True)
        address, size = int(borrowed.addresses[0]), int(borrowed.lengths[0])
        first = address // PAGE * PAGE
        size = -(-(address + size) // PAGE) * PAGE - first
        with self._lock:
            self._memory.append((borrowed, first, size))
        return first, size

    def begin(self, transfer: RemoteTransfer) -> None:
        """From now on the server may touch its buffers."""
        with self._lock:
            self._running.add(transfer)

    def release(self, transfer: RemoteTransfer) -> None:
        """It certainly does not any more."""
        with self._lock:
            self._running.discard(transfer)

    @property
    def running(self) -> list[RemoteTransfer]:
        """Transfers between `begin` and `release`."""
        with self._lock:
            return list(self._running)

    def close(self, seconds: float) -> None:
        """Wait for what was begun, at most so long, and hang up. May be called again."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            running = list(self._running)
        self._wake.set()
        until = time.monotonic() + seconds
        for transfer in running:
            transfer.wait(max(0.0, until - time.monotonic()))
            transfer.wait_released(max(0.0, until - time.monotonic()))
        attached = self._attached
        if attached is not None:
            attached.connection.lose("closed")
            if attached.connection.gone(max(0.0, until - time.monotonic())):
                attached.connection.bury()
        with self._lock:
            self._attached = None
            self._memory.clear()
