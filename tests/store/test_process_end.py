"""A process that ends without closing its store ends at once and well, whatever its threads are at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from store_kit import bytes_on_medium, nvme_tier, open_store

HERE = Path(__file__).resolve().parent
CAPACITY_BYTES = 8 * 2**20

START = """
import os, sys, threading, time
from pathlib import Path
sys.path[:0] = {path!r}
from faulty_io import FaultyIO
from store_kit import *
io = FaultyIO() if {faulty} else None
store = open_store(
    memory_tier(64), nvme_tier(Path({folder!r}), {capacity}), file_io=io, io_engine={engine!r},
    io_threads=4, io_store_threads=3,
)
keys = chain(1, 8)
assert set(save(store, keys)) == {{Outcome.SAVED}} and store.flush()
"""

ENDS = {
    "idle": "",
    "busy": """
transfers = [store.save(chain(n, 8), contents(chain(n, 8))) for n in range(2, 40)]
targets = [bytearray(8192) for _ in keys]
store.load(store.lookup(keys), targets)
""",
    "very busy": """
for n in range(2, 150):
    store.save(chain(n, 3), contents(chain(n, 3)))
    store.load(store.lookup(keys), [bytearray(8192) for _ in keys])
""",
    "memory is being touched": """
more = open_store(MemoryTierConfig(capacity_bytes=2**30, touch="background"))
""",
    "closed after everything else": """
import atexit
transfers = [store.save(chain(n, 8), contents(chain(n, 8))) for n in range(2, 40)]
# As if it had been registered first, so that it comes last.
atexit._run_exitfuncs()
store.close()
assert all(transfer.released for transfer in transfers)
""",
    "an exception": "raise SystemExit(0)",
    "forked, the child ends": """
child = os.fork()
if child == 0:
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert set(save(store, chain(2, 8))) == {Outcome.SAVED}
assert load(store, keys) == [Outcome.LOADED] * 8
check_quiet(store)
""",
    "forked while busy, the child ends": """
transfers = [store.save(chain(n, 8), contents(chain(n, 8))) for n in range(2, 30)]
for _ in range(3):
    child = os.fork()
    if child == 0:
        del store, transfers
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
for transfer in transfers:
    finished(transfer)
assert load(store, keys) == [Outcome.LOADED] * 8
check_quiet(store)
""",
}


def run(script: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]


def start(folder: Path, engine: str, *, faulty: bool = False) -> str:
    path = [str(HERE), str(HERE.parent)]
    return START.format(
        path=path, folder=str(folder), capacity=CAPACITY_BYTES, engine=engine, faulty=faulty
    )


@pytest.mark.parametrize("engine", ["auto", "threads"])
@pytest.mark.parametrize("how", ENDS)
def test_a_process_ends_without_closing(how: str, engine: str, tmp_path: Path) -> None:
    run(start(tmp_path, engine) + ENDS[how])
    assert bytes_on_medium(tmp_path) <= CAPACITY_BYTES
    with open_store(nvme_tier(tmp_path, CAPACITY_BYTES)) as store:
        assert store.status()[0].blocks >= 8, "what was flushed is there"


HANGS = {
    "write": "transfer = store.save(chain(2, 4), contents(chain(2, 4)))",
    "read": """
store.tiers[0].table.discard(keys)
transfer = store.load(store.lookup(keys), [bytearray(8192) for _ in keys])
""",
    "sync": """
assert set(save(store, chain(2, 4))) == {Outcome.SAVED}
threading.Thread(target=store.flush, daemon=True).start()
""",
}


@pytest.mark.parametrize("op", HANGS)
def test_a_process_ends_while_the_medium_hangs(op: str, tmp_path: Path) -> None:
    hang = f"io.hang({op!r})\n{HANGS[op]}\nio.wait_hanging({op!r})\n"
    run(start(tmp_path, "auto", faulty=True) + hang)
