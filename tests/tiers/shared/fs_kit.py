"""What the tests of shared_fs share: stores on one folder, and a medium that fails or hangs on demand."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from kvstrata.config import Config, SharedFsTierConfig, StoreConfig
from kvstrata.store import BlockStore
from kvstrata.tiers.shared.medium import PosixMedium, every
from kvstrata.tiers.shared_fs import SharedFsTier
from kvstrata.transfer.file_io import FileIO
from store_kit import LAYOUT, NAMESPACE, eventually

HERE = Path(__file__).parent
TESTS = HERE.parent.parent


def fs_config(folder: Path, **fields: Any) -> SharedFsTierConfig:
    """With times that suit a test."""
    quick: dict[str, Any] = {
        "capacity_bytes": 64 * 2**20,
        "extent_bytes": 2**20,
        "publish_seconds": 0.1,
        "refresh_seconds": 0.05,
        "lease_seconds": 1.0,
        "access_seconds": 0.2,
    }
    return SharedFsTierConfig(path=str(folder), **(quick | fields))


def open_shared(
    folder: Path,
    *,
    file_io: FileIO | None = None,
    medium: PosixMedium | None = None,
    store: Mapping[str, Any] | None = None,
    room: bool = True,
    **fields: Any,
) -> BlockStore:
    """A store with that folder as its only tier; by default it has room when this returns."""
    quick = {"io_deadline_seconds": 2.0, "breaker_retry_seconds": 0.2, "close_seconds": 5.0}
    config = Config(store=StoreConfig(**(quick | dict(store or {}))), tiers=(fs_config(folder, **fields),))
    make = PosixMedium if medium is None else lambda root: medium
    with patch("kvstrata.tiers.shared_fs.PosixMedium", make):
        opened = BlockStore(config, LAYOUT, NAMESPACE, file_io=file_io)
    if room:
        wait_for_room(opened)
    return opened


def tier_of(store: BlockStore) -> SharedFsTier:
    [tier] = store.tiers
    assert isinstance(tier, SharedFsTier)
    return tier


def wait_for_room(store: BlockStore) -> None:
    tier = tier_of(store)
    eventually(lambda: tier.session is not None and tier.session.room.limit_bytes > 0, "no room comes")


def events(store: BlockStore) -> str:
    return "\n".join(f"{event.kind}: {event.detail}" for event in store.telemetry.events())


class FaultyMedium(PosixMedium):
    """A fault is met before the real call. calls: (name of the call, argument)."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls = 0
        self._changed = threading.Condition()
        self._errors: dict[str, int] = {}
        self._hanging = False
        self.hung = 0

    def fail(self, code: int, *calls: str) -> None:
        """These calls answer an errno from here on; all of them if none is named."""
        self._errors = dict.fromkeys(calls or CALLS, code)

    def hang(self) -> None:
        self._hanging = True

    def heal(self) -> None:
        with self._changed:
            self._errors = {}
            self._hanging = False
            self._changed.notify_all()

    def _meet(self, call: str) -> None:
        with self._changed:
            self.calls += 1
            if self._hanging:
                self.hung += 1
                self._changed.wait_for(lambda: not self._hanging)
                self.hung -= 1
        if call in self._errors:
            code = self._errors[call]
            raise OSError(code, os.strerror(code))

    def prepare(self) -> None:
        self._meet("prepare")
        super().prepare()

    def create(self, name: str, data: bytes) -> bool:
        self._meet("create")
        return super().create(name, data)

    def replace(self, name: str, data: bytes) -> None:
        self._meet("replace")
        super().replace(name, data)

    def append(self, name: str, offset: int, data: bytes) -> None:
        self._meet("append")
        super().append(name, offset, data)

    def fetch(self, name: str, offset: int = 0) -> bytes | None:
        self._meet("fetch")
        return super().fetch(name, offset)

    def tails(
        self, known: Mapping[str, int], folder: str, wanted: Callable[[str], bool] = every
    ) -> dict[str, bytes]:
        self._meet("tails")
        return super().tails(known, folder, wanted)

    def names(self, folder: str) -> dict[str, int]:
        self._meet("names")
        return super().names(folder)

    def folders(self, folder: str) -> list[str]:
        self._meet("folders")
        return super().folders(folder)

    def remove(self, name: str) -> None:
        self._meet("remove")
        super().remove(name)

    def remove_folder(self, name: str) -> None:
        self._meet("remove_folder")
        super().remove_folder(name)

    def read_extent(self, name: str, offset: int, size: int) -> bytes | None:
        self._meet("read_extent")
        return super().read_extent(name, offset, size)

    def write_extent(self, name: str, pieces: Iterable[bytes]) -> int:
        self._meet("write_extent")
        return super().write_extent(name, pieces)


CALLS = (
    "prepare", "create", "replace", "append", "fetch", "tails", "names", "folders", "remove",
    "remove_folder", "read_extent", "write_extent",
)  # fmt: skip
WRITES = ("prepare", "create", "replace", "append", "remove", "remove_folder", "write_extent")


def start_writer(folder: Path, number: int, **fields: Any) -> subprocess.Popen[str]:
    """A process that saves and flushes one chain after the other, and says how far it is on its output."""
    path = os.pathsep.join([str(TESTS), str(HERE)])
    options = [f"{name}={value}" for name, value in fields.items()]
    return subprocess.Popen(
        [sys.executable, str(HERE / "writer_process.py"), str(folder), str(number), *options],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the process ended with {process.wait()}"
    return line.strip()
