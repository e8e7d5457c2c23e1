"""One connection of a client to `kvstrata serve`: calls and their answers, transfers and their ends.

No thread of its own: whoever waits for something reads the socket, for everybody. A connection that fails
is lost for good; its client makes another. What the server may still be writing to is known by the
*lifeline*, a pipe whose other end the server keeps open until nothing of it touches this client's memory
any more. The system closes it for a server that dies.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from kvstrata.serving.protocol import (
    RELEASED_TOO,
    VERSION,
    Frame,
    FrameDecoder,
    Kind,
    ProtocolError,
    pack,
    pack_json,
    unpack_json,
)

READ_BYTES = 256 * 1024


class AwayError(Exception):
    """Nobody answers at the socket. The reason is for the log."""


class RefusedError(Exception):
    """The server answered that it does not serve this client; says what to do."""


Ended = Callable[[bytes, bool], None]
"""Hears the outcomes of a transfer, and whether its buffers are released too; b"" and True if only that."""

_open: weakref.WeakSet[Connection] = weakref.WeakSet()


def _drop_all() -> None:
    for connection in list(_open):
        connection._drop()


# A forked child must not read what is meant for its parent, nor keep the server waiting for a dead one.
os.register_at_fork(after_in_child=_drop_all)


class Connection:
    """Connects and says who is there. welcome: the server's answer.

    call_seconds: longest wait for an answer; a server that takes longer counts as hung, and is lost.
    open_seconds: longest wait for the first one, which may take a look through a whole folder.
    Raises AwayError and RefusedError.
    """

    def __init__(self, path: str, hello: dict[str, Any], call_seconds: float, open_seconds: float) -> None:
        self.lost = ""
        self.call_seconds = call_seconds
        self._decoder = FrameDecoder()
        self._sending = threading.Lock()
        self._news = threading.Condition()
        self._reading = False
        self._next = 1
        self._answers: dict[int, Frame | None] = {}
        self._transfers: dict[int, Ended] = {}
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lifeline, theirs = os.pipe2(os.O_CLOEXEC)
        _open.add(self)
        try:
            self._sock.settimeout(call_seconds)
            self._sock.connect(path)
            greeting = pack(Kind.HELLO, VERSION, pack_json(hello))
            socket.send_fds(self._sock, [greeting], [theirs])
            self._sock.settimeout(open_seconds)
            self.welcome = self._greeted()
            self._sock.setblocking(False)
        except (OSError, ProtocolError) as error:
            self._drop()
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            raise AwayError(reason or type(error).__name__) from None
        except BaseException:
            self._drop()
            raise
        finally:
            os.close(theirs)

    def _greeted(self) -> dict[str, Any]:
        while True:
            data = self._sock.recv(READ_BYTES)
            if not data:
                raise AwayError("the server closed the connection")
            for frame in self._decoder.feed(data):
                if frame.kind is Kind.REFUSED:
                    raise RefusedError(str(unpack_json(frame.payload).get("why", "no reason given")))
                if frame.kind is not Kind.WELCOME:
                    raise ProtocolError("an answer before the welcome")
                return unpack_json(frame.payload)

    # Asking

    def call(
        self, kind: Kind, payload: bytes = b"", *, flags: int = 0, fd: int = -1, seconds: float = 0.0
    ) -> bytes | None:
        """The payload of the answer; None if the connection is, or was just, lost.

        seconds: more than call_seconds, for what may take longer.
        """
        until = time.monotonic() + self.call_seconds + seconds
        with self._news:
            number = self._number()
            self._answers[number] = None
        try:
            if not self._send(pack(kind, number, payload, flags), fd):
                return None
            if not self.read_until(lambda: self._answers[number] is not None, until):
                self.lose("late")
                return None
            answer = self._answers[number]
            return None if answer is None else answer.payload
        finally:
            with self._news:
                del self._answers[number]

    def tell(self, kind: Kind, payload: bytes) -> bool:
        """Say something that has no answer. False if the connection is lost."""
        return self._send(pack(kind, 0, payload))

    def start(self, kind: Kind, payload: bytes, ended: Ended) -> int:
        """Begin a transfer; `ended` hears of it from whoever reads. Its number, 0 if it was never begun.

        Of what could not be sent whole, the lifeline says when it is certain to be over.
        """
        with self._news:
            if self.lost:
                return 0
            number = self._number()
            self._transfers[number] = ended
        self._send(pack(kind, number, payload))
        return number

    def forget(self, number: int) -> bool:
        """Of a transfer that the loss of the connection cut off; true for one caller only."""
        with self._news:
            return self._transfers.pop(number, None) is not None

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _send(self, data: bytes, fd: int = -1) -> bool:
        until = time.monotonic() + self.call_seconds
        with self._sending:
            if self.lost:
                return False
            try:
                view = memoryview(data)
                if fd >= 0:
                    view = view[socket.send_fds(self._sock, [view], [fd]) :]
                while view:
                    try:
                        view = view[self._sock.send(view) :]
                    except BlockingIOError:
                        left = until - time.monotonic()
                        if left <= 0 or not _ready(self._sock.fileno(), select.POLLOUT, left):
                            self.lose("late")
                            return False
                return True
            except OSError:
                self.lose("closed")
                return False

    # Hearing

    def take_in(self) -> None:
        """Hand out what has come, if nobody else is at it. Never waits."""
        if self._begin_reading():
            try:
                self._read(0.0)
            finally:
                self._end_reading()

    def read_until(self, ready: Callable[[], bool], until: float) -> bool:
        """Read until something is so, to a moment of time.monotonic; False if that or a loss came first."""
        while True:
            with self._news:
                while True:
                    if ready():
                        return True
                    left = until - time.monotonic()
                    if self.lost or left <= 0:
                        return False
                    if not self._reading:
                        self._reading = True
                        break
                    self._news.wait(left)
            try:
                self._read(left)
            finally:
                self._end_reading()

    def _begin_reading(self) -> bool:
        with self._news:
            if self._reading or self.lost:
                return False
            self._reading = True
            return True

    def _end_reading(self) -> None:
        with self._news:
            self._reading = False
            self._news.notify_all()

    def _read(self, seconds: float) -> None:
        """Take in what is there, once something is. Only by the one who reads."""
        try:
            try:
                data = self._sock.recv(READ_BYTES)
            except BlockingIOError:
                if seconds <= 0 or not _ready(self._sock.fileno(), select.POLLIN, seconds):
                    return
                data = self._sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self.lose("closed")
            return
        if not data:
            self.lose("closed")
            return
        try:
            for frame in self._decoder.feed(data):
                self._take(frame)
        except ProtocolError:
            self.lose("protocol")

    def _take(self, frame: Frame) -> None:
        if frame.kind in (Kind.DONE, Kind.RELEASED):
            released = frame.kind is Kind.RELEASED or bool(frame.flags & RELEASED_TOO)
            with self._news:
                ended = self._transfers.get(frame.number)
                if released:
                    self._transfers.pop(frame.number, None)
            if ended is None:
                raise ProtocolError("news of a transfer that is over")
            ended(frame.payload, released)
            return
        with self._news:
            if frame.number in self._answers:
                self._answers[frame.number] = frame

    # The end

    def lose(self, reason: str) -> None:
        """Give it up: every call answers None from now on. May be called again."""
        with self._news:
            if self.lost:
                return
            self.lost = reason
            self._news.notify_all()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # whoever waits in it wakes; the server hears of it

    def gone(self, seconds: float = 0.0) -> bool:
        """Once lost: does nobody touch this client's memory any more? Waits so long for it."""
        if self._lifeline < 0:
            return True
        return _ready(self._lifeline, 0, seconds)  # a hang-up is always reported

    def bury(self) -> None:
        """Close what is left of a lost connection, once nobody of this process is inside."""
        with self._sending, self._news:
            while self._reading:
                self._news.wait()
            self._drop()

    def _drop(self) -> None:
        self.lost = self.lost or "dropped"
        self._sock.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        _open.discard(self)


def _ready(fd: int, events: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(max(0.0, seconds) * 1000))
