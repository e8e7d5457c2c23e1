"""Ring: an io_uring that leaves nothing behind, and what is said where it cannot be had."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engine_kit import WAIT_SECONDS, Heard, Memory, SlotFile, needs

from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.ring import Ring, ring_refused
from store_kit import descriptors


def test_a_ring_leaves_nothing_behind() -> None:
    needs("ring")
    before = descriptors()
    for depth in (1, 2, 3, 64, 1024):
        ring = Ring(depth)
        assert ring.words is not None
        entries, completions = len(ring.words.entries), len(ring.words.completions)
        assert entries >= depth and entries & (entries - 1) == 0
        assert completions >= entries
        assert not os.get_inheritable(ring.fd) and not os.get_inheritable(ring.wake_fd)
        ring.close()
        assert ring.words is None
        assert descriptors() == before


@pytest.mark.parametrize("depth", [0, 1 << 20])
def test_a_ring_that_the_kernel_refuses(depth: int) -> None:
    needs("ring")
    before = descriptors()
    with pytest.raises(OSError, match="io_uring") as caught:
        Ring(depth)
    assert caught.value.errno == errno.EINVAL
    assert descriptors() == before


def test_why_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Ring, depth: int) -> None:
        raise OSError(errno.EPERM, "io_uring: Operation not permitted")

    monkeypatch.setattr(Ring, "__init__", refuse)
    assert ring_refused() == "io_uring: Operation not permitted"
    monkeypatch.setattr(Ring, "__init__", lambda self, depth: None)
    monkeypatch.setattr(Ring, "close", lambda self: None)
    assert ring_refused() == ""


WITHOUT_DESCRIPTORS = """
import resource
from kvstrata.transfer.ring import ring_refused
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
print(ring_refused())
"""


def test_without_descriptors() -> None:
    needs("ring")
    answer = subprocess.run(
        [sys.executable, "-c", WITHOUT_DESCRIPTORS],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=True,
    )
    assert os.strerror(errno.EMFILE) in answer.stdout


def test_one_thread_serves_all(tmp_path: Path) -> None:
    """More units than may be in flight, submitted one by one: none is lost, none is doubled."""
    kind = needs("ring")
    file = SlotFile(tmp_path / "file", 300, 4096)
    memory = Memory(300, 4096)
    for number in range(300):
        memory.view(number)[:8] = number.to_bytes(8, "little")
    engine = file.engine(kind, workers=2, store_workers=1, merge_bytes=0)
    stores, loads = Heard(), Heard()
    for number in range(300):
        rows = file.rows(k.WRITE, [number], [memory.address(number)])
        rows[:, k.POSITION] = number
        engine.submit(rows, loads=False, on_done=stores)
    sums = stores.wait(300)[:, k.CHECKSUM]
    target = Memory(300, 4096)
    for number in range(300):
        rows = file.rows(k.READ, [number], [target.address(number)], checksums=sums[number])
        rows[:, k.POSITION] = number
        engine.submit(rows, loads=True, on_done=loads)
    assert not loads.wait(300)[:, k.RESULT].any()
    assert sorted(loads.order) == list(range(300))
    assert engine.close(WAIT_SECONDS)
    assert all(target.view(number) == memory.view(number) for number in range(300))
    assert np.array_equal(sums, loads.wait(300)[:, k.CHECKSUM])
