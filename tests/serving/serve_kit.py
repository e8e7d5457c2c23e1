"""What the tests of serving share: servers and clients in processes of their own, and shared memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvstrata.config import Config, ServeConfig, StoreConfig
from kvstrata.serving import RemoteStore
from kvstrata.transfer.buffers import Buffers, Region
from kvstrata.types import BlockKey, BlockLayout, Namespace, Outcome
from store_kit import (
    LAYOUT,
    NAMESPACE,
    WAIT_SECONDS,
    content,
    eventually,
    finished,
)

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent

MAIN = "from kvstrata.cli.app import main; main()"
TOML = """\
[serve]
socket = "{socket}"
connect = "{socket}"
call_seconds = {call_seconds}
reconnect_seconds = 0.1
[store]
io_deadline_seconds = {deadline}
[[tier]]
type = "memory"
capacity_bytes = "{memory}"
[[tier]]
type = "nvme"
path = "{folder}"
capacity_bytes = "{nvme}"
segment_bytes = "1MiB"
prepare = "no"
"""


def write_toml(
    folder: Path,
    memory: str = "1MiB",
    nvme: str = "16MiB",
    call_seconds: float = 30.0,
    deadline: float = 30.0,
) -> Path:
    path = folder / "kvstrata.toml"
    path.write_text(
        TOML.format(
            socket=folder / "socket",
            folder=folder / "nvme",
            memory=memory,
            nvme=nvme,
            call_seconds=call_seconds,
            deadline=deadline,
        )
    )
    return path


class ServerProcess:
    """`kvstrata serve` as a user starts it."""

    def __init__(self, toml: Path) -> None:
        self.socket = toml.parent / "socket"
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "serve", str(toml)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        assert self.said.startswith("serving "), self.said + self.process.stdout.read()
        assert self.process.stdout.readline().startswith("clients: connect = ")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_SECONDS)

    def stop(self) -> str:
        """SIGTERM; what it said from then on."""
        self.process.terminate()
        rest, _ = self.process.communicate(timeout=WAIT_SECONDS)
        assert self.process.returncode == 0, rest
        return rest

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def hang(self) -> None:
        """Stop every thread of it, wherever it is."""
        self.send(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")

        def stopped() -> bool:
            stats = [(task / "stat").read_text() for task in tasks.iterdir()]
            return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)

        eventually(stopped, "the server does not stop")

    def close(self) -> None:
        if self.process.poll() is None:
            self.send(signal.SIGCONT)
            self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def server_process(toml: Path) -> Iterator[ServerProcess]:
    server = ServerProcess(toml)
    try:
        yield server
    finally:
        server.close()


def client_config(socket: Path, **fields: Any) -> Config:
    """Of an engine: no tiers of its own."""
    serve = ServeConfig(connect=str(socket), reconnect_seconds=0.1, call_seconds=30.0)
    return Config(store=StoreConfig(), serve=replace(serve, **fields))


def client(
    socket: Path, *, layout: BlockLayout = LAYOUT, namespace: Namespace = NAMESPACE, memory: Any = (),
    **fields: Any,
) -> RemoteStore:  # fmt: skip
    return RemoteStore(client_config(socket, **fields), layout, namespace, memory=memory)


class SharedRows:
    """Rows of blocks in a shared mapping of a file without a name, as an engine's host memory is."""

    def __init__(self, rows: int, row_bytes: int = LAYOUT.block_bytes) -> None:
        fd = os.memfd_create("rows", os.MFD_CLOEXEC)
        os.ftruncate(fd, rows * row_bytes)
        self.map = mmap.mmap(fd, rows * row_bytes)
        os.close(fd)
        self.row_bytes = row_bytes
        self._region = Region(self.map, row_bytes)

    def rows(self, numbers: Any, length: int | None = None) -> Buffers:
        return self._region.rows(list(numbers), length)

    def put(self, row: int, data: bytes) -> None:
        self.map[row * self.row_bytes : row * self.row_bytes + len(data)] = data

    def get(self, row: int) -> bytes:
        return self.map[row * self.row_bytes : (row + 1) * self.row_bytes]

    def close(self) -> None:
        del self._region
        self.map.close()


def save_rows(store: RemoteStore, rows: SharedRows, keys: list[BlockKey]) -> list[Outcome]:
    """Save blocks with the content of their keys from the first rows."""
    for row, key in enumerate(keys):
        rows.put(row, content(key, rows.row_bytes))
    return finished(store.save(keys, rows.rows(range(len(keys)))))


def load_rows(store: RemoteStore, rows: SharedRows, keys: list[BlockKey]) -> list[Outcome]:
    """Load into the first rows; what is LOADED has exactly the right bytes, or the test fails."""
    for row in range(len(keys)):
        rows.put(row, b"\xa5" * rows.row_bytes)
    outcomes = finished(store.load(store.lookup(keys), rows.rows(range(len(keys)))))
    for row, (key, outcome) in enumerate(zip(keys, outcomes, strict=True)):
        if outcome is Outcome.LOADED:
            assert rows.get(row) == content(key, rows.row_bytes), f"wrong bytes in row {row}"
    return outcomes


def comes_back(store: RemoteStore) -> None:
    """Until the client has found its server again; that it lost it, it finds out by asking."""
    eventually(lambda: bool(store.status()), "the client did not come back")


@contextlib.contextmanager
def python(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process that runs a script with these tests' folders on its path; killed at the end."""
    path = f"import sys; sys.path[:0] = {[str(HERE), str(TESTS)]!r}\n"
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", path + script, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait(WAIT_SECONDS)
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def hears(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line == word, f"{line!r} instead of {word!r}"


def until(seconds: float = WAIT_SECONDS) -> float:
    return time.monotonic() + seconds
