"""One client of `kvstrata serve`, on the server's side: what it asks, what it may hold, how it leaves.

Two threads: one reads frames and answers, one watches the client's transfers and sends their ends. A
client that leaves, in whatever way, is cleared up when the last byte of its transfers has been moved:
then its memory is unmapped and its lifeline closed. The store unpins what was loaded by itself.
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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstrata.errors import KVStrataError, StoreClosedError
from kvstrata.serving.protocol import (
    AGAIN,
    FRAME_BYTES,
    HELLO_BYTES,
    NO_REGION,
    RELEASED_TOO,
    VERSION,
    Frame,
    FrameDecoder,
    Kind,
    Move,
    ProtocolError,
    pack,
    pack_count,
    pack_json,
    pack_outcomes,
    pack_states,
    unpack_end,
    unpack_json,
    unpack_keys,
    unpack_move,
    unpack_region,
    unpack_seconds,
    unpack_touch,
)
from kvstrata.serving.region import Mapping
from kvstrata.store import BlockStore
from kvstrata.transfer.buffers import Buffers
from kvstrata.transfer.handle import Mask, Transfer
from kvstrata.types import Lookup, Outcome, PrefixMatch

if TYPE_CHECKING:
    from kvstrata.serving.server import StoreServer

log = logging.getLogger(__name__)

READ_BYTES = 256 * 1024
FDS_AT_ONCE = 4
WATCH_SECONDS = 0.001
"""How long a transfer that is not the oldest may be over before its client hears of it."""
_REQUEST_BITS = 40
_CREDENTIALS = struct.Struct("3i")


@dataclass(slots=True)
class _Running:
    """A transfer on behalf of the client. refused: positions that were over its bound."""

    number: int
    transfer: Transfer
    size: int
    refused: Mask
    blocks: int
    told: bool = False


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
        self._regions: dict[int, Mapping] = {}
        self._lifeline = -1
        self._store: BlockStore | None = None
        self.engine = False
        """Does it count as a client? Set by the server, under its lock."""
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._running: dict[int, _Running] = {}
        self._held_bytes = 0
        self._ended = False
        self._flushing = threading.Lock()
        self._settling: list[threading.Thread] = []
        self._since = time.time()
        self._about: dict[str, Any] = {}
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid, self.uid, _ = _CREDENTIALS.unpack(credentials)
        self._reader = threading.Thread(target=self._run, name=f"kvstrata-serve-{number}", daemon=True)
        self._watcher = threading.Thread(
            target=self._watch, name=f"kvstrata-serve-{number}-ends", daemon=True
        )

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
        with self._changed:
            return len(self._running), self._held_bytes

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
            "regions": len(self._regions),
            "region_bytes": sum(region.size for region in list(self._regions.values())),
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
        self._watcher.start()
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
            if region in self._regions:
                raise ProtocolError(f"region {region} twice")
            if len(self._regions) >= self._server.config.serve.client_regions:
                self._server.telemetry.count("serve_rejected_total", "client_regions")
                return 0
            mapping = self._regions[region] = Mapping(fd, offset, size)
        except (OSError, ValueError) as error:
            log.warning("kvstrata: memory of process %d cannot be mapped: %s", self.pid, error)
            return 0
        finally:
            os.close(fd)
        if self._server.config.serve.huge_pages:
            self._settling = [thread for thread in self._settling if thread.is_alive()]
            name = f"kvstrata-serve-{self._number}-pages"
            self._settling.append(
                threading.Thread(target=self._settle, args=(mapping,), name=name, daemon=True)
            )
            self._settling[-1].start()
        return 1

    def _settle(self, mapping: Mapping) -> None:
        settled = mapping.use_huge_pages(lambda: not self._ended)
        self._server.telemetry.count("serve_huge_page_bytes_total", by=settled)

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

    # Moving

    def _move(self, store: BlockStore, number: int, move: Move, *, loads: bool) -> None:
        buffers = self._buffers(move, loads=loads)
        refused = self._over_bound(buffers)
        wanted = Buffers(np.where(refused, 0, buffers.addresses), buffers.lengths, buffers.owner)
        size = int(buffers.lengths[~refused & (buffers.addresses != 0)].sum())
        blocks = len(move.keys)
        if loads:
            leading = int(np.argmax(refused)) if refused.any() else blocks
            keys = (*move.keys[:leading], *(move.ahead if leading == blocks else ()))
            match = PrefixMatch(keys, leading, (Lookup.HIT,) * len(keys))
            transfer = store.load(match, wanted.take(np.arange(leading)))
        else:
            transfer = store.save(move.keys, wanted, request=self._request(move.request))
        with self._changed:
            if number in self._running:
                raise ProtocolError(f"transfer {number} twice")
            self._running[number] = _Running(number, transfer, size, refused, blocks)
            self._held_bytes += size
            self._changed.notify_all()

    def _buffers(self, move: Move, *, loads: bool) -> Buffers:
        """The client's memory as this process sees it; it stays mapped for as long as they are used."""
        addresses = np.zeros(len(move.keys), dtype=np.int64)
        lengths = move.lengths.copy()
        used = np.unique(move.regions)
        owners = []
        for region in used.tolist():
            mine = move.regions == region
            if region == NO_REGION and not loads:
                lengths[mine] = 0
                continue
            mapping = self._regions.get(region)
            if mapping is None:
                raise ProtocolError(f"region {region} is not registered")
            offsets, sizes = move.offsets[mine], lengths[mine]
            if (offsets < 0).any() or (sizes < 1).any() or (offsets > mapping.size - sizes).any():
                raise ProtocolError(f"a block outside region {region}")
            addresses[mine] = mapping.address + offsets
            owners.append(mapping)
        return Buffers(addresses, lengths, owners)

    def _over_bound(self, buffers: Buffers) -> Mask:
        """Which blocks pass what this client may have in flight: all behind the first that does."""
        serve = self._server.config.serve
        with self._changed:
            room = serve.client_bytes - self._held_bytes
            if len(self._running) >= serve.client_transfers:
                room = -1
        refused: Mask = (np.cumsum(buffers.lengths) > room) & (buffers.addresses != 0)
        bound = "client_transfers" if room < 0 else "client_bytes"
        self._server.telemetry.count("serve_rejected_total", bound, by=int(refused.sum()))
        return refused

    # The thread that watches

    def _watch(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._running and not self._ended:
                        self._changed.wait()
                    if not self._running:
                        return
                    running = list(self._running.values())
                if not sum(self._look_at(one) for one in running):
                    _wait_for(running)
        except Exception:
            log.exception("kvstrata: watching the transfers of process %d failed", self.pid)
            self.stop()

    def _look_at(self, one: _Running) -> bool:
        """Tell the client what is new. True if something is."""
        transfer = one.transfer
        if not one.told:
            if not transfer.poll():
                return False
            released = transfer.released
            one.told = True
            flags = RELEASED_TOO if released else 0
            self._let_go(one, released)
            self._say(pack(Kind.DONE, one.number, pack_outcomes(_outcomes(one)), flags))
            return True
        if transfer.released:
            self._let_go(one, released=True)
            self._say(pack(Kind.RELEASED, one.number))
            return True
        return False

    def _let_go(self, one: _Running, released: bool) -> None:
        if released:
            with self._changed:
                del self._running[one.number]
                self._held_bytes -= one.size

    def _say(self, data: bytes) -> None:
        """To a client that is gone, nothing is said."""
        with self._sending, contextlib.suppress(OSError):
            self._sock.sendall(data)

    # The end

    def _clear_up(self) -> None:
        self.stop()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._watcher.ident is not None:
            self._watcher.join()
        for thread in self._settling:
            thread.join()
        self._sock.close()
        fds = self._fds
        if self._running:
            # Only if watching failed: the lifeline stays open, because the engine may still be at it.
            log.error("kvstrata: memory of process %d is kept until the server ends", self.pid)
        else:
            fds = [*fds, self._lifeline]
            for region in self._regions.values():
                region.close()  # all is released; what still holds it may be garbage for a while
            self._regions.clear()
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def _outcomes(one: _Running) -> list[Outcome]:
    """In the order of the blocks that the client named."""
    outcomes = one.transfer.outcomes
    outcomes += [Outcome.REJECTED] * (one.blocks - len(outcomes))
    for position in np.flatnonzero(one.refused).tolist():
        if outcomes[position] is Outcome.ABSENT:
            outcomes[position] = Outcome.REJECTED
    return outcomes


def _wait_for(running: list[_Running]) -> None:
    """Until the oldest that is not over is, or for a moment."""
    for one in running:
        if not one.told:
            one.transfer.wait(WATCH_SECONDS)
            return
    running[0].transfer.wait_released(WATCH_SECONDS)
