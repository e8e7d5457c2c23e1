"""PoolClient: Mooncake's Python client with the system's errors and with bounds; no other file knows it.

What is known of the installed client (0.3.13), and shapes this file: `setup` and `close` keep the GIL while
they wait, so nothing is set up before the master takes connections, and its waits are cut short by
environment variables; the other calls give the GIL up. A master that restarts is found again by the client
itself. A call that waits for a member that hangs comes back when the transfer's time is over, not before; a
client that is inside one must not be closed.
"""

from __future__ import annotations

import errno
import importlib.util
import math
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from kvstrata.config import PoolTierConfig
from kvstrata.errors import ConfigError
from kvstrata.transfer.engine_kernels import GONE
from kvstrata.transfer.slot_header import WRONG_LENGTH

NO_REQUEST_BYTES = 32
"""Zeros that are longer than any header and no valid one."""
NO_ROOM, WRONG_PARAMETERS, NOT_READY, NOT_FOUND, LEASE_EXPIRED, TRANSFER_FAILED, RPC_FAILED, RPC_LATE = (
    -200, -600, -703, -704, -707, -800, -900, -901,
)  # fmt: skip
"""Codes of Mooncake."""
_ERRNO = {
    NO_ROOM: errno.ENOSPC,
    WRONG_PARAMETERS: errno.EINVAL,
    TRANSFER_FAILED: errno.EIO,
    RPC_FAILED: errno.ECONNREFUSED,
    RPC_LATE: errno.ETIMEDOUT,
}
_MISSING = (NOT_READY, NOT_FOUND, LEASE_EXPIRED)
"""A value that left while it was read is not there either."""


def require_package() -> None:
    """Raises ConfigError where Mooncake's client is not installed."""
    if importlib.util.find_spec("mooncake") is None:
        raise ConfigError(
            "the pool tier needs Mooncake's client, which is not installed: pip install 'kvstrata[pool]'"
        )


class PoolClient:
    """transfer_seconds: after so long without a byte a transfer fails. Calls may come from many threads.

    Every method but `connect` and `close` raises OSError when the master does not answer.
    """

    def __init__(self, config: PoolTierConfig, transfer_seconds: float) -> None:
        self._config = config
        self._replicas = config.replicas
        rpc_ms = str(math.ceil(config.rpc_seconds * 1000))
        self._environment = {
            "MC_STORE_CLIENT_SETUP_RETRIES": "1",
            "MC_RPC_CONNECT_TIMEOUT_MS": rpc_ms,
            "MC_RPC_TIMEOUT_MS": rpc_ms,
            "MC_TCP_PROGRESS_TIMEOUT_SEC": str(math.ceil(transfer_seconds)),
            "MC_LOG_LEVEL": "ERROR",
            "GLOG_minloglevel": "2",
        }
        self._lock = threading.Lock()
        self._inside = 0
        self._store: Any = None
        self._replicate: Any = None

    @property
    def connected(self) -> bool:
        return self._store is not None

    @property
    def busy(self) -> bool:
        """Is a thread inside a call?"""
        return self._inside > 0

    def connect(self) -> None:
        """Set the client up. Raises OSError if the master does not take connections, or refuses."""
        config = self._config
        here = self._ask_master()
        for name, value in self._environment.items():
            os.environ.setdefault(name, value)
        from mooncake.store import MooncakeDistributedStore, ReplicateConfig  # noqa: PLC0415

        store = MooncakeDistributedStore()
        code = store.setup(
            config.hostname or here,
            config.metadata,
            config.segment_bytes,
            config.buffer_bytes,
            config.protocol,
            config.devices,
            config.master,
        )
        if code != 0:
            raise OSError(errno.ECONNABORTED, f"Mooncake's setup at {config.master} answered {code}")
        replicate = ReplicateConfig()
        replicate.replica_num = self._replicas
        self._replicate, self._store = replicate, store

    def _ask_master(self) -> str:
        """Raises OSError unless the master answers; the address that it sees this process at.

        What is sent is no request: a master that is well hangs up at once. One that is stopped still takes
        connections, but says nothing, and `setup` would keep the GIL for as long.
        """
        master = self._config.master
        host, _, port = master.rpartition(":")
        if "://" in master or not port.isdecimal():
            return socket.gethostname()  # several masters behind a directory: only the client knows it
        seconds = self._config.rpc_seconds
        with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds) as probe:
            with suppress(ConnectionError):
                probe.sendall(bytes(NO_REQUEST_BYTES))
                probe.recv(1)
            address: str = probe.getsockname()[0]
            return address

    @contextmanager
    def _using(self) -> Iterator[Any]:
        with self._lock:
            store = self._store
            self._inside += 1
        try:
            if store is None:
                raise OSError(errno.ENOTCONN, "no client is set up")
            yield store
        finally:
            with self._lock:
                self._inside -= 1

    # Values

    def register(self, address: int, size: int) -> None:
        """Memory that devices may read and write directly. Raises OSError."""
        with self._using() as store:
            code = store.register_buffer(address, size)
        if code != 0:
            raise OSError(errno.EINVAL, f"Mooncake cannot register {size} bytes: {code}")

    def exist(self, names: list[str]) -> list[bool]:
        """Is there a whole value under each name?"""
        with self._using() as store:
            codes = _per_name(names, store.batch_is_exist(names))
        failed = [code for code in codes if code < 0]
        if failed:
            raise _error(failed[0])
        return [code == 1 for code in codes]

    def put(self, names: list[str], addresses: list[list[int]], sizes: list[list[int]]) -> list[int]:
        """Store values, each joined from pieces of memory; what is there already stays as it is.

        Per value 0 or -errno: -ENOSPC for a pool that is full.
        """
        with self._using() as store:
            answer = store.batch_put_from_multi_buffers(names, addresses, sizes, self._replicate)
            codes = _per_name(names, answer)
            return [0 if code == 0 else -_ERRNO.get(code, errno.EIO) for code in codes]

    def get(self, names: list[str], addresses: list[list[int]], sizes: list[list[int]]) -> list[int]:
        """Read values into pieces of memory. Per value 0, GONE, WRONG_LENGTH or -errno."""
        with self._using() as store:
            codes = _per_name(names, store.batch_get_into_multi_buffers(names, addresses, sizes))
            results = []
            for name, code, wanted in zip(names, codes, map(sum, sizes), strict=True):
                if code in (WRONG_PARAMETERS, TRANSFER_FAILED):
                    # A value of another length gives one of these, and so does a member that is not there.
                    there = store.get_size(name)
                    results.append(WRONG_LENGTH if 0 <= there != wanted else _result(code))
                else:
                    results.append(0 if code == wanted else _result(code))
            return results

    def remove(self, names: Sequence[str]) -> None:
        """Remove values, also while somebody reads them."""
        with self._using() as store:
            codes = _per_name(names, store.batch_remove(list(names), True))
        for code in codes:
            if code in (RPC_FAILED, RPC_LATE):
                raise _error(code)

    def close(self) -> None:
        """Give back what is lent. Only while no thread is inside a call; else the client is left behind."""
        with self._lock:
            store, self._store = self._store, None
            idle = self._inside == 0
        if store is not None and idle:
            store.close()
        elif store is not None:
            _left_behind.append(store)


_left_behind: list[Any] = []
"""Clients with a thread inside: to destroy one would pull its memory from under the call."""


def _per_name(names: Sequence[str], codes: Sequence[int]) -> list[int]:
    """Raises OSError for a client that is not set up any more: it answers nothing at all."""
    if len(codes) != len(names):
        raise OSError(errno.ENOTCONN, "Mooncake's client is not set up")
    return list(codes)


def _result(code: int) -> int:
    if code in _MISSING:
        return GONE
    return WRONG_LENGTH if code >= 0 else -_ERRNO.get(code, errno.EIO)


def _error(code: int) -> OSError:
    number = _ERRNO.get(code, errno.EIO)
    return OSError(number, f"Mooncake answered {code} ({os.strerror(number)})")
