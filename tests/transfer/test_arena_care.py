"""Large arenas are touched once, placed and pinned where that is possible, and end without waiting."""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstrata.telemetry import Telemetry
from kvstrata.transfer import arena_care, cuda, numa
from kvstrata.transfer.arena_care import ArenaCare
from kvstrata.transfer.buffers import HUGE_PAGE, Arena, address_of
from store_kit import eventually

SIZE = 2 * arena_care.LEAST_BYTES + 4096


def resident_bytes(arena: Arena) -> int:
    """Of an arena's pages, those that are in memory."""
    pages = len(arena.view) // 4096
    seen = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(address_of(arena.view))
    assert libc.mincore(address, ctypes.c_size_t(len(arena.view)), seen) == 0
    return sum(byte & 1 for byte in seen) * 4096


def care(arena: Arena, touch: str, telemetry: Telemetry | None = None, numa_wish: str = "off") -> ArenaCare:
    return ArenaCare(
        arena,
        "memory",
        telemetry or Telemetry(),
        touch=touch,  # type: ignore[arg-type]
        numa_wish=numa_wish,
        pin=False,
    )


def events(telemetry: Telemetry) -> dict[str, str]:
    return {event.kind: event.detail for event in telemetry.events()}


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(SIZE)
    yield arena
    arena.close()  # BufferError if anything still held it


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    eventually(lambda: "touch" not in str(threading.enumerate()), "the thread does not end")


def test_now_means_before_it_returns(arena: Arena) -> None:
    telemetry = Telemetry()
    worker = care(arena, "now", telemetry)
    assert resident_bytes(arena) == len(arena.view)
    assert not worker.working
    assert telemetry.value("touched_bytes_total", "memory") == len(arena.view)
    assert "memory touched" in events(telemetry)
    worker.close()


def test_in_the_background_beside_writers(arena: Arena) -> None:
    """Touching changes nothing: what is written at the same time is there afterwards."""
    telemetry = Telemetry()
    numbers = np.frombuffer(arena.view, np.uint64)
    worker = care(arena, "background", telemetry)
    numbers[:: 4096 // 8] = np.arange(len(numbers) // 512)
    eventually(lambda: not worker.working, "it does not end")
    assert resident_bytes(arena) == len(arena.view)
    assert telemetry.value("touched_bytes_total", "memory") == len(arena.view)
    assert np.array_equal(numbers[:: 4096 // 8], np.arange(len(numbers) // 512))
    assert np.count_nonzero(numbers) == len(numbers) // 512 - 1
    del numbers
    worker.close()
    worker.close()


def test_no_means_no(arena: Arena) -> None:
    worker = care(arena, "no")
    assert not worker.working
    assert resident_bytes(arena) == 0
    worker.close()


def test_a_small_arena_is_left_to_its_first_use() -> None:
    arena = Arena(HUGE_PAGE)
    worker = care(arena, "background")
    assert not worker.working and resident_bytes(arena) == 0
    worker.close()
    arena.close()


def test_closing_stops_it_before_it_is_done(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread keeps the memory for as long as it is in a call, and begins no other one."""
    entered, go = threading.Event(), threading.Event()

    def held(address: int, size: int, part: int, stop: np.ndarray) -> int:
        entered.set()
        assert go.wait(60)
        return 0

    monkeypatch.setattr(arena_care, "STRETCH_BYTES", HUGE_PAGE)
    monkeypatch.setattr(arena_care, "STOP_SECONDS", 0.01)
    worker = care(arena, "no")
    monkeypatch.setattr(arena_care, "_populate", held)
    thread = threading.Thread(target=worker._touch, name="touch", daemon=True)
    thread.start()
    assert entered.wait(60)
    worker.close()
    go.set()
    thread.join(60)
    assert worker._telemetry.value("touched_bytes_total", "memory") == 0
    assert resident_bytes(arena) == 0


def test_the_stop_word_stops_the_kernel(arena: Arena) -> None:
    stop = np.ones(1, np.int64)
    assert arena_care._populate(address_of(arena.view), SIZE, arena_care.PART_BYTES, stop) == 0
    assert resident_bytes(arena) == 0


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOMEM])
def test_a_kernel_that_cannot(arena: Arena, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_care, "_populate", lambda *arguments: code)
    telemetry = Telemetry()
    care(arena, "now", telemetry).close()
    assert "0 B" in events(telemetry)["memory not touched"]
    assert telemetry.value("touched_bytes_total") == 0


def test_memory_that_is_not_there_is_an_errno() -> None:
    stop = np.zeros(1, np.int64)
    assert arena_care._populate(4096, 8192, 4096, stop) == errno.ENOMEM


# NUMA


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("", []), ("\n", []), ("0", [0]), ("0-2,5\n", [0, 1, 2, 5]), ("7,1-1", [1, 7]), ("3-4,4", [3, 4])],
)
def test_lists_of_the_kernel(text: str, numbers: list[int]) -> None:
    assert numa.parse_list(text) == numbers


@pytest.mark.parametrize("text", ["a", "3-1", "-1", "1-", "0-99999999", "1;2"])
def test_lists_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        numa.parse_list(text)


def make_nodes(folder: Path, cpus: dict[int, str], memory: str) -> Path:
    for node, text in cpus.items():
        (folder / f"node{node}").mkdir()
        (folder / f"node{node}" / "cpulist").write_text(text + "\n")
    (folder / "has_memory").write_text(memory + "\n")
    return folder


def test_the_nodes_of_the_allowed_cpus(tmp_path: Path) -> None:
    """Node 2 has no memory, node 3 no CPU."""
    sysfs = make_nodes(tmp_path, {0: "0-3,8", 1: "4-7", 2: "9", 3: ""}, "0-1,3")
    assert numa.nodes_of({0, 5, 9}, sysfs) == [0, 1]
    assert numa.nodes_of({8}, sysfs) == [0]
    assert numa.nodes_of({9}, sysfs) == []
    assert numa.nodes_of({0}, tmp_path / "none") == []
    (tmp_path / "has_memory").write_text("what\n")
    assert numa.nodes_of({0}, sysfs) == []


@pytest.mark.parametrize(
    ("wish", "cpus", "policy"),
    [
        ("auto", {0, 4}, numa.NumaPolicy(numa.INTERLEAVE, (0, 1))),
        ("auto", {4, 5}, None),
        ("interleave", {4, 5}, numa.NumaPolicy(numa.INTERLEAVE, (1,))),
        ("interleave", {99}, None),
        ("off", {0, 4}, None),
        ("1", {0, 4}, numa.NumaPolicy(numa.PREFERRED, (1,))),
    ],
)
def test_what_is_wished_for(
    wish: str, cpus: set[int], policy: numa.NumaPolicy | None, tmp_path: Path
) -> None:
    sysfs = make_nodes(tmp_path, {0: "0-3", 1: "4-7"}, "0-1")
    assert numa.choose(wish, cpus, sysfs) == policy


@pytest.mark.parametrize("wish", ["0", "interleave"])
def test_a_place_is_had_or_an_event_says_why_not(arena: Arena, wish: str) -> None:
    telemetry = Telemetry()
    care(arena, "now", telemetry, wish).close()
    seen = events(telemetry)
    assert "memory placed" in seen or "memory not placed" in seen or not numa.SYSFS.exists()
    arena.view[:] = bytes(len(arena.view))  # whatever was said of its place, it is memory


def test_a_node_that_is_not_there(arena: Arena) -> None:
    telemetry = Telemetry()
    care(arena, "now", telemetry, "999").close()
    assert "on node 999" in events(telemetry)["memory not placed"]
    assert resident_bytes(arena) == len(arena.view)


def test_a_machine_whose_call_is_not_known(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa.platform, "machine", lambda: "vax")
    with pytest.raises(OSError, match="vax") as caught:
        numa.apply(numa.NumaPolicy(numa.PREFERRED, (0,)), address_of(arena.view), SIZE)
    assert caught.value.errno == errno.ENOSYS


# CUDA: only what there is without it


def test_no_driver() -> None:
    with pytest.raises(cuda.PinError, match=r"no CUDA driver: libnone\.so\.1"):
        cuda.load_driver("libnone.so.1")


def test_a_library_that_is_no_driver() -> None:
    with pytest.raises(cuda.PinError, match="has no cuGetErrorName"):
        cuda.load_driver("libc.so.6")


def test_without_a_driver_everything_else_happens(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> ctypes.CDLL:
        return load("libnone.so.1")

    load = cuda.load_driver
    monkeypatch.setattr(cuda, "load_driver", absent)
    telemetry = Telemetry()
    worker = ArenaCare(arena, "memory", telemetry, touch="background", numa_wish="off", pin=True)
    eventually(lambda: not worker.working, "it does not end")
    worker.close()
    assert "no CUDA driver" in events(telemetry)["memory not pinned"]
    assert resident_bytes(arena) == len(arena.view)
