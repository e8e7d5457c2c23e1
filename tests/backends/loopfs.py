"""A small ext4 file system in a file: one that is really full, read-only or gone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from backends import BackendMissing, require_command
from backends.workplace import CommandError, Workplace, detach


class LoopFs:
    """An ext4 image of `size_bytes`, mounted. Part of it, about a tenth of a small one, is ext4's own."""

    def __init__(self, place: Workplace, size_bytes: int) -> None:
        """Raises BackendMissing where the kernel has no loop devices left or no ext4."""
        self._mount = require_command("mount", "mount")
        self._place = place
        self._image = place.folder / "image"
        self.path = place.folder / "mount"
        self.path.mkdir()
        with self._image.open("wb") as file:
            file.truncate(size_bytes)
        make = require_command("mkfs.ext4", "e2fsprogs")
        # Without reserved blocks and a journal: what is free is what a test can fill.
        place.run([make, "-q", "-F", "-m", "0", "-O", "^has_journal", str(self._image)])
        try:
            self.mount()
        except CommandError as e:
            raise BackendMissing(f"no ext4 image can be mounted here: {e}") from e

    def mount(self, *, read_only: bool = False) -> None:
        """Again after `unmount`."""
        detach(self.path)
        options = "loop,ro" if read_only else "loop"
        self._place.run([self._mount, "-t", "ext4", "-o", options, str(self._image), str(self.path)])

    def remount(self, *, read_only: bool) -> None:
        """While it is in use: what the kernel itself does after a disk error."""
        self._place.run([self._mount, "-o", f"remount,{'ro' if read_only else 'rw'}", str(self.path)])

    def unmount(self) -> None:
        """At once; files that are open stay usable until they are closed."""
        detach(self.path)


@contextlib.contextmanager
def loop_fs(size_bytes: int) -> Iterator[LoopFs]:
    """A mounted file system of that size. Raises BackendMissing where it cannot be."""
    with Workplace("loopfs") as place:
        yield LoopFs(place, size_bytes)
