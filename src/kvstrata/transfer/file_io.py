"""The only place where kvstrata calls the file system for block data.

Plain preadv and pwritev, which release the GIL; threads give the queue depth. Measured on virtio-blk,
eight such threads meet fio's io_uring figures at 1 MiB and above. A subclass can answer errors or hang:
that is how the tests make a disk fail.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from kvstrata.transfer.buffers import PAGE, Arena


class FileIO:
    """Stateless. Every method raises OSError as the system answers it."""

    def open(self, path: Path, *, create: bool, direct: bool) -> int:
        """A descriptor for reading and writing. create fails if the file is there."""
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        if not direct:
            return os.open(path, flags, 0o600)
        return os.open(path, flags | os.O_DIRECT, 0o600)

    def open_to_read(self, path: Path, *, direct: bool) -> int:
        """A descriptor for reading alone, as a read-only mount gives it."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))

    def close(self, fd: int) -> None:
        os.close(fd)

    def allocate(self, fd: int, size: int) -> None:
        """Reserve blocks on the medium for the first `size` bytes: ENOSPC comes here, not later."""
        os.posix_fallocate(fd, 0, size)

    def read(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        """Fill the views in order; returns the bytes read, fewer at the end of the file."""
        return self._all(os.preadv, fd, views, offset)

    def write(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        """Write all of the views."""
        wanted = sum(len(view) for view in views)
        written = self._all(os.pwritev, fd, views, offset)
        if written != wanted:
            raise OSError(errno.EIO, f"short write: {written} of {wanted} bytes")
        return written

    @staticmethod
    def _all(
        call: Callable[[int, Sequence[memoryview], int], int],
        fd: int,
        views: Sequence[memoryview],
        offset: int,
    ) -> int:
        """Repeat a vectored call until everything moved or it moves nothing."""
        total = sum(len(view) for view in views)
        done = call(fd, views, offset)
        while 0 < done < total:
            rest, skip = [], done
            for view in views:
                if skip < len(view):
                    rest.append(view[skip:])
                skip = max(0, skip - len(view))
            moved = call(fd, rest, offset + done)
            if moved == 0:
                break
            done += moved
        return done

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def remove(self, path: Path) -> None:
        path.unlink()

    def rename(self, path: Path, to: Path) -> None:
        path.rename(to)

    def write_file(self, path: Path, data: bytes) -> None:
        """Replace a small file at once: whole old or whole new content, also after a crash."""
        temporary = path.with_name(path.name + ".tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(data)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
        self.sync_folder(path.parent)

    def sync_folder(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def is_plain(io: FileIO) -> bool:
    """Does this layer move bytes as FileIO itself does? Then compiled code may call the system itself."""
    return all(getattr(type(io), name) is getattr(FileIO, name) for name in ("read", "write", "sync"))


def supports_direct(io: FileIO, folder: Path) -> bool:
    """Can files in this folder be read and written with O_DIRECT? Asked with a probe file."""
    path = folder / "direct.probe"
    path.unlink(missing_ok=True)
    page = Arena(PAGE)
    try:
        fd = io.open(path, create=True, direct=True)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    try:
        io.write(fd, [page.view], 0)
        return io.read(fd, [page.view], 0) == PAGE
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True  # a full disk took the flag; it just has no room for the probe
        raise
    finally:
        io.close(fd)
        path.unlink(missing_ok=True)
