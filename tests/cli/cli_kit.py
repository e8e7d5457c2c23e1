"""Real folders to look at, and the program in a process of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typer.testing import Result

from kvstrata.config import Config, MemoryTierConfig, NvmeTierConfig, StoreConfig
from kvstrata.hashing import chain_keys, namespace_digest
from kvstrata.store import BlockStore
from kvstrata.types import BlockKey, BlockLayout, Namespace, Outcome

PROGRAM = Path(sys.executable).parent / "kvstrata"
BLOCK_BYTES = 20_000
BLOCK_TOKENS = 16
MIB = 2**20


def namespace_of(**fields: object) -> Namespace:
    return Namespace(namespace_digest(fields), fields)


TINY = namespace_of(model="tiny", dtype="float16", rank=0)


@dataclass(frozen=True)
class Folder:
    """An nvme folder and what was saved in it."""

    path: Path
    namespace: Namespace
    keys: list[BlockKey]
    blocks: list[bytes]

    @property
    def segments(self) -> list[Path]:
        return sorted(self.path.glob("seg-*.kv"))

    def readable(self) -> list[bool]:
        """Which of the blocks a store that opens the folder serves; asserts that none is wrong."""
        with open_store(self.path, self.namespace) as store:
            match = store.lookup(self.keys)
            targets = [bytearray(BLOCK_BYTES) for _ in self.keys]
            transfer = store.load(match, targets)
            assert transfer.wait(20)
            good = [outcome is Outcome.LOADED for outcome in transfer.outcomes]
            assert all(bytes(t) == b for t, b, ok in zip(targets, self.blocks, good, strict=True) if ok)
            return good


def open_store(
    path: Path,
    namespace: Namespace = TINY,
    *,
    memory: bool = False,
    ttl: float = 0.0,
    block_bytes: int = BLOCK_BYTES,
) -> BlockStore:
    nvme = NvmeTierConfig(str(path), capacity_bytes=4 * MIB, segment_bytes=MIB, ttl_seconds=ttl)
    tiers = (MemoryTierConfig(capacity_bytes=MIB), nvme) if memory else (nvme,)
    config = Config(store=StoreConfig(io_threads=2, io_store_threads=1), tiers=tiers)
    return BlockStore(config, BlockLayout(block_bytes, BLOCK_TOKENS), namespace)


def save_blocks(store: BlockStore, count: int, *, seed: int = 0) -> tuple[list[BlockKey], list[bytes]]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 32_000, count * BLOCK_TOKENS)
    keys = chain_keys(store.namespace.digest, tokens, BLOCK_TOKENS)
    blocks = [rng.bytes(store.layout.block_bytes) for _ in keys]
    transfer = store.save(keys, blocks)
    assert transfer.wait(20)
    assert set(transfer.outcomes) == {Outcome.SAVED}
    assert store.flush()
    return keys, blocks


def make_folder(path: Path, count: int = 40, *, namespace: Namespace = TINY, ttl: float = 0.0) -> Folder:
    with open_store(path, namespace, ttl=ttl) as store:
        keys, blocks = save_blocks(store, count)
    return Folder(path, namespace, keys, blocks)


def run_program(
    *arguments: object, cwd: Path | None = None, unprivileged: bool = False
) -> subprocess.CompletedProcess[str]:
    """The installed program. unprivileged: file permissions count, also for root."""
    return subprocess.run(
        [str(PROGRAM), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        check=False,
        preexec_fn=_drop_privileges if unprivileged and os.geteuid() == 0 else None,
    )


def _drop_privileges() -> None:
    """Root without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, from the next exec on."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):
        if libc.prctl(24, capability, 0, 0, 0):
            os.kill(os.getpid(), signal.SIGKILL)


def assert_one_error(result: Result, *words: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that holds the words."""
    assert_error_line(result.exit_code, result.stdout, result.stderr, words)


def assert_program_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert_error_line(result.returncode, result.stdout, result.stderr, words)


def assert_error_line(code: int, stdout: str, stderr: str, words: Sequence[str]) -> None:
    assert code == 2, (code, stdout, stderr)
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    for word in words:
        assert word in stderr, stderr
