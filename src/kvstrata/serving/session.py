"""One client of `kvstrata serve`, on the server's side: what it asks, what it may hold, how it leaves.

One thread reads frames and answers; its transfers have one that watches them. A client that leaves, in
whatever way, is cleared up when the last byte of its transfers has been moved: then its memory is unmapped
and its lifeline closed. The store unpins what was loaded by itself.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

from kvstrata.errors import KVStrataError, StoreClosedError
from kvstrata.serving.client_memory import ClientMemory
from kvstrata.serving.client_transfers import ClientTransfers
from kvstrata.serving.protocol import (
    AGAIN,
    FRAME_BYTES,
    HELLO_BYTES,
    VERSION,
    Frame,
    FrameDecoder,
    Kind,
    Move,
    ProtocolError,
    pack,
    pack_count,
    pack_json,
    pack_states,
    unpack_end,
    unpack_json,
    unpack_keys,
    unpack_move,
    unpack_region,
    unpack_seconds,
    unpack_touch,
)
from kvstrata.store import BlockStore

if TYPE_CHECKING:
    from kvstrata.serving.server import StoreServer

log = logging.getLogger(__name__)

READ_BYTES = 256 * 1024
FDS_AT_ONCE = 4
_REQUEST_BITS = 40
_CREDENTIALS = struct.Struct("3i")


class RefusalError(Exception):
    """Why a client is not served; the text goes to it."""


class Session:
    """number: different for every session of a server. sock: connected; the session closes it."""

    def __init__(self, server: StoreServer, sock: socket.socket, number: int) -> None:
        self._server = server
        self._sock = sock
        self._number = number
        self._decoder = FrameDecoder(HELLO_BYTES)
        self._fds: list[int] = []
        self._lifeline = -1
        self._store: BlockStore | None = None
        self.engine = False
        """Does it count as a client? Set by the server, under its lock."""
        self._sending = threading.Lock()
        self._flushing = threading.Lock()
        self._since = time.time()
        self._about: dict[str, Any] = {}
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid, self.uid, _ = _CREDENTIALS.unpack(credentials)
        name = f"kvstrata-serve-{number}"
        serve, telemetry = server.config.serve, server.telemetry
        self._memory = ClientMemory(serve, telemetry, self.pid, f"{name}-pages")
        self._transfers = ClientTransfers(serve, telemetry, self._say, self.stop, self.pid, f"{name}-ends")
        self._reader = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._reader.start()

    def stop(self) -> None:
        """Hang up; the threads end by themselves."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def join(self, seconds: float) -> bool:
        """Wait until everything is cleared up; False if that took longer."""
        self._reader.join(seconds)
        return not self._reader.is_alive()

    @property
    def held(self) -> tuple[int, int]:
        """Transfers that are running, and their bytes."""
        return self._transfers.held

    def describe(self) -> dict[str, Any]:
        """For an operator."""
        transfers, held_bytes = self.held
        return {
            "pid": self.pid,
            "uid": self.uid,
            "command": str(self._about.get("command", ""))[:200],
            "role": str(self._about.get("role", "")),
            "namespace": str(self._about.get("namespace", ""))[:64],
            "connected_seconds": round(time.time() - self._since, 3),
            "transfers": transfers,
            "held_bytes": held_bytes,
            "regions": self._memory.regions,
            "region_bytes": self._memory.size_bytes,
        }

    # The thread that reads

    def _run(self) -> None:
        end = "left"
        try:
            self._greet()
            self._take_all(b"")  # what came with the hello
            while True:
                self._take_all(self._receive())
        except RefusalError as error:
            end = "refused"
            log.warning("kvstrata: process %d is not served: %s", self.pid, error)
            self._say(pack(Kind.REFUSED, 0, pack_json({"why": str(error)})))
        except ProtocolError as error:
            end = "broken"
            log.warning("kvstrata: process %d sent what no client sends: %s", self.pid, error)
        except KVStrataError as error:
            end = "left" if isinstance(error, StoreClosedError) else "broken"
            log.warning("kvstrata: process %d is served no more: %s", self.pid, error)
        except OSError:
            pass
        except Exception:
            end = "broken"
            log.exception("kvstrata: serving process %d failed", self.pid)
        finally:
            self._clear_up()
            self._server.leave(self, end)

    def _greet(self) -> None:
        """Find out who it is, in a bounded time, and let it in. Raises RefusalError."""
        until = time.monotonic() + self._server.config.serve.call_seconds
        frame: Frame | None = None
        while frame is None:
            self._sock.settimeout(max(0.001, until - time.monotonic()))
            frame = next(iter(self._decoder.feed(self._receive())), None)
        self._sock.settimeout(None)
        if frame.kind is not Kind.HELLO:
            raise ProtocolError("no hello")
        # Not before it was read: who is hung up on while it speaks does not hear why.
        self._server.admit(self)
        if frame.number != VERSION:
            raise RefusalError(
                f"the server speaks version {VERSION} of its protocol and this client {frame.number}; "
                "install the same kvstrata on both sides"
            )
        self._about = unpack_json(frame.payload)
        if self._about.get("role") != "observer":
            self._server.enter(self)
            self._store = self._server.store_for(self._about)
            if not self._fds:
                raise ProtocolError("a hello without a lifeline")
            self._lifeline = self._fds.pop(0)
        self._decoder.limit_bytes = FRAME_BYTES
        self._transfers.start()
        self._say(pack(Kind.WELCOME, 0, pack_json(self._server.welcome())))

    def _receive(self) -> bytes:
        data, ancillary, _, _ = self._sock.recvmsg(
            READ_BYTES, socket.CMSG_SPACE(FDS_AT_ONCE * 4), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self._fds += fds
        if not data:
            raise ConnectionResetError("hung up")
        if len(self._fds) > FDS_AT_ONCE:
            raise ProtocolError("descriptors that nobody asked for")
        return data

    def _take_all(self, data: bytes) -> None:
        for frame in self._decoder.feed(data):
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        number = frame.number
        if frame.kind is Kind.STATUS:
            self._say(pack(Kind.STATE, number, pack_json(self._server.state())))
            return
        store = self._store
        if store is None:
            raise ProtocolError("an observer that asks for more than the state")
        if frame.kind is Kind.LOOKUP:
            match = store.lookup(unpack_keys(frame.payload), again=bool(frame.flags & AGAIN))
            self._say(pack(Kind.FOUND, number, pack_states(match.states)))
        elif frame.kind is Kind.LOAD or frame.kind is Kind.SAVE:
            self._move(store, number, unpack_move(frame.payload), loads=frame.kind is Kind.LOAD)
        elif frame.kind is Kind.TOUCH:
            request, keys = unpack_touch(frame.payload)
            store.touch(keys, request=self._request(request))
        elif frame.kind is Kind.END:
            request, input_tokens, output_tokens = unpack_end(frame.payload)
            known = self._request(request)
            if known is not None:
                store.end_request(known, input_tokens=input_tokens, output_tokens=output_tokens)
        elif frame.kind is Kind.DISCARD:
            count = store.discard(unpack_keys(frame.payload))
            self._say(pack(Kind.COUNT, number, pack_count(count)))
        elif frame.kind is Kind.FLUSH:
            self._flush(store, number, unpack_seconds(frame.payload))
        elif frame.kind is Kind.REGION:
            self._say(pack(Kind.COUNT, number, pack_count(self._map(*unpack_region(frame.payload)))))
        else:
            raise ProtocolError(f"{frame.kind.name} from a client")

    def _request(self, request: int) -> int | None:
        """A client's number among those of all clients; None for a call that is a request of its own."""
        if request >> _REQUEST_BITS:
            raise ProtocolError(f"a request of number {request}")
        return self._number << _REQUEST_BITS | request if request else None

    def _map(self, region: int, offset: int, size: int) -> int:
        """1 if this memory is mapped now, 0 if it cannot be."""
        if not self._fds:
            raise ProtocolError("a region without a descriptor")
        fd = self._fds.pop(0)
        try:
            return int(self._memory.map(region, offset, size, fd))
        finally:
            os.close(fd)

    def _flush(self, store: BlockStore, number: int, seconds: float) -> None:
        """On a thread of its own: look-ups of this client go on. One at a time."""

        def work() -> None:
            flushed = 0
            try:
                flushed = int(store.flush(seconds))
            except KVStrataError as error:
                log.warning("kvstrata: a flush failed: %s", error)
            finally:
                self._flushing.release()
                self._say(pack(Kind.COUNT, number, pack_count(flushed)))

        if self._flushing.acquire(blocking=False):
            threading.Thread(target=work, name=f"kvstrata-serve-{self._number}-flush", daemon=True).start()
        else:
            self._say(pack(Kind.COUNT, number, pack_count(0)))

    def _move(self, store: BlockStore, number: int, move: Move, *, loads: bool) -> None:
        buffers = self._memory.buffers(move, loads=loads)
        request = None if loads else self._request(move.request)
        self._transfers.begin(store, number, move, buffers, loads=loads, request=request)

    def _say(self, data: bytes) -> None:
        """To a client that is gone, nothing is said."""
        with self._sending, contextlib.suppress(OSError):
            self._sock.sendall(data)

    # The end

    def _clear_up(self) -> None:
        self.stop()
        self._memory.stop_care()
        over = self._transfers.end()
        self._sock.close()
        fds = self._fds
        if not over:
            # Only if watching failed: the lifeline stays open, because the engine may still be at it.
            log.error("kvstrata: memory of process %d is kept until the server ends", self.pid)
        else:
            fds = [*fds, self._lifeline]
            self._memory.close()
        for fd in fds:
            if fd >= 0:
                os.close(fd)
