"""Bytes and lines of a trace file, whether it is plain, gzip or zstd; and what happens to broken records.

No format is known here: a reader asks for lines and makes of them what its format says. Packing is told
by the magic bytes and never by the name. Memory stays bounded by `MAX_LINE_BYTES`, whatever the file holds.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

from kvstrata.errors import ConfigError, TraceFormatError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_LINE_BYTES = 256 << 20
"""A longer line is no record of any format that we read."""

FIRST_BYTES = 64 << 10
"""What the recognisers look at."""

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # the bytes 2 to 4 of a skippable frame, after 0x50 to 0x5f
_PACKED_CHUNK_BYTES = 64 << 10
_GZIP_WINDOW = 31  # zlib's code for 32 KiB of window, gzip header and checksum


class _Unpacker(Protocol):
    """The part of the decompressobj of zlib and zstandard that we use: one member or frame."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


class _Unpacked(io.RawIOBase):
    """The content of a packed file. Members (frames) may follow one another, zeros after them are padding.

    Reading raises TraceFormatError, naming the file, where the packed bytes are damaged or end early.
    """

    def __init__(
        self,
        path: Path,
        packed: io.BufferedReader,
        kind: str,
        unpacker: Callable[[], _Unpacker],
        damage: type[Exception],
    ) -> None:
        self._path = path
        self._packed = packed
        self._kind = kind
        self._new = unpacker
        self._damage = damage
        self._member: _Unpacker | None = None
        self._rest = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        while not self._ready:
            if not self._more():
                return 0
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._packed.close()
        super().close()

    def _more(self) -> bool:
        data = self._rest or self._packed.read(_PACKED_CHUNK_BYTES)
        self._rest = b""
        if self._member is None:
            data = data.lstrip(b"\0")
            if not data:
                return bool(self._packed.peek(1))
            self._member = self._new()
        elif not data:
            raise TraceFormatError(f"{self._path}: the {self._kind} data is cut off")
        try:
            self._ready = memoryview(self._member.decompress(data))
        except self._damage as why:
            raise TraceFormatError(f"{self._path}: the {self._kind} data is damaged ({why})") from why
        if self._member.eof:
            self._rest = self._member.unused_data
            self._member = None
        return True


def open_bytes(path: Path | str) -> BinaryIO:
    """The file's content as bytes, unpacked if it starts as gzip or zstd data do.

    Reading raises TraceFormatError where packed data is damaged or cut off. Opening raises OSError as
    `open` does, and ConfigError for a zstd file where the package `zstandard` is not installed.
    """
    path = Path(path)
    file = open(path, "rb")  # noqa: SIM115 (handed to the caller)
    try:
        magic = file.peek(4)[:4]
        if magic[:2] == _GZIP:
            raw = _Unpacked(path, file, "gzip", lambda: zlib.decompressobj(_GZIP_WINDOW), zlib.error)
        elif magic == _ZSTD or (magic[1:4] == _ZSTD_SKIPPABLE and 0x50 <= magic[0] <= 0x5F):
            raw = _zstd(path, file)
        else:
            return file
    except BaseException:
        file.close()
        raise
    return io.BufferedReader(raw, _PACKED_CHUNK_BYTES)


def _zstd(path: Path, file: io.BufferedReader) -> _Unpacked:
    try:
        import zstandard  # noqa: PLC0415 (an extra)
    except ImportError as missing:
        raise ConfigError(
            f"{path} is packed with zstd and the package zstandard is not installed: "
            "pip install 'kvstrata[traces]'"
        ) from missing
    frames = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return _Unpacked(
        path, file, "zstd", lambda: cast(_Unpacker, frames.decompressobj()), zstandard.ZstdError
    )


def lines(path: Path | str) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, the line without its line end), for every line of the file.

    Raises TraceFormatError, naming the file and the line reached, where packed data is damaged or cut off
    or a line is longer than MAX_LINE_BYTES.
    """
    number = 0
    with open_bytes(path) as file:
        while True:
            try:
                line = file.readline(MAX_LINE_BYTES + 1)
            except TraceFormatError as why:
                raise TraceFormatError(f"{why}, in line {number + 1}") from why
            if not line:
                return
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise TraceFormatError(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes")
            yield number, line.rstrip(b"\r\n")


class BadRecords:
    """What a reader does about a broken record: stop there, or count it and go on.

    count: the broken records passed over so far.
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.count = 0

    def bad(self, path: Path | str, line: int, why: str, unit: str = "line") -> None:
        """Record number `line` (from 1; a record of a binary file has another unit) cannot be read.

        Raises TraceFormatError naming the place, unless broken records are skipped.
        """
        if not self.skip:
            raise TraceFormatError(f"{path}, {unit} {line}: {why}; --skip-bad passes over broken records")
        self.count += 1
