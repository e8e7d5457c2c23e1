"""StoreServer: owns one BlockStore and lets several processes of this machine use it, over a Unix socket.

The store is opened for the first client that says which blocks it has. Further clients must have blocks
of the same size; their namespaces may differ where all tiers are local, because keys already tell them
apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import logging
import os
import select
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric

from kvstrata.config import Config, format_size
from kvstrata.errors import ConfigError, KVStrataError
from kvstrata.metrics import PREFIX, MetricsServer
from kvstrata.serving.protocol import VERSION
from kvstrata.serving.session import RefusalError, Session
from kvstrata.store import BlockStore
from kvstrata.telemetry import Telemetry
from kvstrata.transfer.file_io import FileIO
from kvstrata.types import BlockLayout, Namespace

log = logging.getLogger(__name__)

PATH_BYTES = 107
"""Of a Unix socket's name, by the system."""
BACKLOG = 64
DIGEST_BYTES = 32
OBSERVERS = 8
"""Connections beside the clients: who asks for the status, or has not said who it is."""
NAMESPACES = 256
"""Remembered for the status; more are served all the same."""


class StoreServer:
    """config: `serve.socket` and the tiers. Raises ConfigError if the socket cannot be had.

    Clients are served from here on until close(). file_io: as for BlockStore.
    """

    def __init__(self, config: Config, *, file_io: FileIO | None = None) -> None:
        if not config.serve.socket:
            raise ConfigError("serve.socket: is missing; name the socket's path")
        if not config.tiers:
            raise ConfigError("no tier is configured; add a [[tier]] table")
        self.config = config
        self._file_io = file_io
        self.telemetry = Telemetry(config.store.events)
        self.path = Path(config.serve.socket).expanduser().absolute()
        self.store: BlockStore | None = None
        self.metrics: MetricsServer | None = None
        self._namespaces: dict[str, dict[str, Any]] = {}
        self._since = time.time()
        self._opening = threading.Lock()
        self._lock = threading.Lock()
        self._sessions: set[Session] = set()
        self._numbers = itertools.count(1)
        self._closing = False
        self._claim = SocketClaim(self.path)
        try:
            self._listener = self._claim.listen(0o666 if config.serve.other_users else 0o600)
        except BaseException:
            self._claim.release()
            raise
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._accepting = threading.Thread(target=self._accept, name="kvstrata-serve", daemon=True)
        self._accepting.start()

    # Clients

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._closing:
            poll.poll()
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:  # out of descriptors: the next attempt may have one
                if not self._closing:
                    log.warning("kvstrata: a client could not be let in: %s", error)
                    time.sleep(0.1)
                continue
            sock.setblocking(True)
            session = Session(self, sock, next(self._numbers))
            with self._lock:
                self._sessions.add(session)
            session.start()

    def admit(self, session: Session) -> None:
        """Raises RefusalError for a client that may not be served at all."""
        serve = self.config.serve
        if not serve.other_users and session.uid not in (os.getuid(), 0):
            raise RefusalError(
                f"the server belongs to user {os.getuid()} and this client to user {session.uid}; run both "
                "as one user, or set serve.other_users"
            )
        with self._lock:
            count = len(self._sessions)
        if count > serve.max_clients + OBSERVERS:
            raise RefusalError("too many connections at a time; try again")

    def enter(self, session: Session) -> None:
        """One more client that holds something. Raises RefusalError at the bound."""
        most = self.config.serve.max_clients
        with self._lock:
            if sum(other.engine for other in self._sessions) < most:
                session.engine = True
                return
        raise RefusalError(f"the server has its {most} clients; raise serve.max_clients")

    def leave(self, session: Session, end: str) -> None:
        """The session is cleared up."""
        self.telemetry.count("serve_clients_total", end)
        with self._lock:
            self._sessions.discard(session)

    def store_for(self, about: dict[str, Any]) -> BlockStore:
        """The store, opened for the first who asks. Raises RefusalError."""
        try:
            layout = BlockLayout(int(about["block_bytes"]), int(about["block_tokens"]))
            namespace = Namespace(bytes.fromhex(about["namespace"]), dict(about["fields"]))
        except (KeyError, TypeError, ValueError) as error:
            raise RefusalError(f"a hello without the shape of its blocks: {error!r}") from None
        if len(namespace.digest) != DIGEST_BYTES:
            raise RefusalError(f"a namespace of {len(namespace.digest)} bytes; {DIGEST_BYTES} are due")
        with self._opening:
            if self._closing:
                raise RefusalError("the server is stopping")
            if self.store is None:
                self._open(layout, namespace)
            assert self.store is not None
            self._check_shape(self.store, layout, namespace)
            if len(self._namespaces) < NAMESPACES:
                self._namespaces.setdefault(namespace.digest.hex(), dict(namespace.fields))
            return self.store

    def _open(self, layout: BlockLayout, namespace: Namespace) -> None:
        try:
            store = BlockStore(
                self.config, layout, namespace, file_io=self._file_io, telemetry=self.telemetry
            )
        except (KVStrataError, OSError) as error:
            raise RefusalError(f"the server cannot open its tiers: {error}") from error
        if self._closing:
            store.close()
            raise RefusalError("the server is stopping")
        if self.config.metrics.port:
            try:
                self.metrics = MetricsServer(store, self.config.metrics, self._gauges)
            except ConfigError as error:
                log.warning("kvstrata: no metrics: %s", error)
        self.store = store
        log.info("kvstrata: serving blocks of %s", format_size(layout.block_bytes))

    def _check_shape(self, store: BlockStore, layout: BlockLayout, namespace: Namespace) -> None:
        if layout.block_bytes != store.layout.block_bytes:
            raise RefusalError(
                f"the server has blocks of {store.layout.block_bytes} bytes and this client of "
                f"{layout.block_bytes}; start another `kvstrata serve` with a socket and folders of its "
                "own, or restart this one"
            )
        shared = any(tier.shared for tier in store.tiers)
        if namespace.digest != store.namespace.digest and shared:
            raise RefusalError(
                f"the server has the namespace {store.namespace.digest.hex()[:16]} and this client "
                f"{namespace.digest.hex()[:16]}, and a shared tier keeps namespaces apart; start another "
                "`kvstrata serve` with a socket and an nvme folder of its own"
            )

    def welcome(self) -> dict[str, Any]:
        """What a client has to know."""
        store = self.config.store
        return {
            "version": VERSION,
            "pid": os.getpid(),
            "io_deadline_seconds": store.io_deadline_seconds,
            "batch_blocks": store.batch_blocks,
        }

    # For operators

    def state(self) -> dict[str, Any]:
        """Everything that `kvstrata serve --status` shows."""
        store = self.store
        with self._lock:
            sessions = list(self._sessions)
        return {
            "socket": str(self.path),
            "pid": os.getpid(),
            "up_seconds": round(time.time() - self._since, 3),
            "block_bytes": store.layout.block_bytes if store else None,
            "namespaces": [
                {"digest": digest, "fields": fields} for digest, fields in list(self._namespaces.items())
            ],
            "metrics_port": self.metrics.port if self.metrics else None,
            "tiers": [dataclasses.asdict(tier) for tier in store.status()] if store else [],
            "clients": [session.describe() for session in sessions],
            "max_clients": self.config.serve.max_clients,
        }

    def _gauges(self) -> Iterator[Metric]:
        with self._lock:
            held = [session.held for session in self._sessions if session.engine]
        for name, text, value in (
            ("serve_clients", "Connections of clients", len(held)),
            ("serve_transfers", "Loads and saves that run for clients", sum(count for count, _ in held)),
            ("serve_held_bytes", "Bytes that these move", sum(size for _, size in held)),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        serve = self.config.serve
        family = GaugeMetricFamily(PREFIX + "serve_bound", "Configured bounds of serving", labels=["name"])
        for field in ("max_clients", "client_bytes", "client_transfers", "client_regions"):
            family.add_metric([field], float(getattr(serve, field)))
        yield family

    # The end

    def close(self) -> None:
        """Hang up on every client, finish what they began, close the tiers, remove the socket."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        os.eventfd_write(self._wake, 1)
        self._accepting.join()
        self._claim.remove()
        self._listener.close()
        os.close(self._wake)
        until = time.monotonic() + self.config.store.close_seconds
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.stop()
        for session in sessions:
            session.join(max(0.0, until - time.monotonic()))
        if self.metrics is not None:
            self.metrics.close()
        # Whoever is still opening it finds out when it is done.
        if self._opening.acquire(timeout=max(0.0, until - time.monotonic())):
            if self.store is not None:
                self.store.close()
            self._opening.release()
        self._claim.release()

    def __enter__(self) -> StoreServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class SocketClaim:
    """The right to serve at a path, kept by a lock beside the socket: the system drops it for the dead.

    Raises ConfigError naming who serves there already.
    """

    def __init__(self, path: Path) -> None:
        if len(os.fsencode(path)) > PATH_BYTES:
            raise ConfigError(
                f"serve.socket: {path} is longer than {PATH_BYTES} bytes; choose a shorter path"
            )
        self._path = path
        self._lock_path = path.with_name(path.name + ".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"serve.socket: {path} cannot be had: {error}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise ConfigError(
                f"serve.socket: {path} is served by {_holder(self._lock_path)}; stop it, or choose another "
                "path"
            ) from None
        me = {"pid": os.getpid(), "command": " ".join(sys.argv)[:200]}
        with contextlib.suppress(OSError):  # the lock holds without its name
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps(me).encode(), 0)

    def listen(self, mode: int) -> socket.socket:
        """A socket at the path; one that a dead server left is taken over."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISSOCK(self._path.lstat().st_mode):
                    raise ConfigError(
                        f"serve.socket: {self._path} is there and no socket; choose another path"
                    )
                self._path.unlink()
            before = os.umask(0o777 & ~mode)
            try:
                listener.bind(str(self._path))
            finally:
                os.umask(before)
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            raise ConfigError(f"serve.socket: cannot listen at {self._path}: {error}") from error
        except BaseException:
            listener.close()
            raise
        return listener

    def remove(self) -> None:
        """Nobody can come in any more."""
        self._path.unlink(missing_ok=True)

    def release(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1


def _holder(lock: Path) -> str:
    try:
        holder = json.loads(lock.read_text())
        return f"process {holder['pid']} ({holder['command'] or 'python'})"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that left no name"
