"""What runs beside real vLLM engines, in a process of its own. `test_vllm.py` starts it and judges.

python engine_process.py NAME ARGUMENTS.json RESULT.json
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import kvstrata.policies  # loads Numba before vLLM on purpose: that must not break the engine
import kvstrata.store
from inprocess import ask, engine, store_of
from kvstrata.tiers.nvme import NvmeTier
from kvstrata.tiers.nvme_folder import SegmentFile, segment_files
from kvstrata.tiers.nvme_format import SlotHeader, slot_offset
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import PAGE
from kvstrata.transfer.engine import OnDone, Rows
from kvstrata.transfer.file_io import FileIO

KV_BYTES = 64 << 20
CONTEXT = 2048


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Replies of vLLM without kvstrata and without any cache."""
    with engine(Path(arguments["model"]), None, kv_bytes=KV_BYTES, context=CONTEXT) as llm:
        return {"answers": [asdict(ask(llm, prompt)) for prompt in arguments["prompts"]]}


def served(arguments: dict[str, Any]) -> dict[str, Any]:
    """Replies of one engine on a kvstrata folder, and what the store counted."""
    toml = Path(arguments["toml"])
    with engine(Path(arguments["model"]), toml, kv_bytes=KV_BYTES, context=CONTEXT) as llm:
        return _replay(llm, arguments["prompts"])


def _replay(llm: Any, prompts: Sequence[list[int]]) -> dict[str, Any]:
    store = store_of(llm)
    answers, loaded = [], []
    for prompt in prompts:
        llm.reset_prefix_cache(reset_connector=True)
        before = store.telemetry.value("read_bytes_total", "nvme")
        answers.append(asdict(ask(llm, prompt)))
        read = store.telemetry.value("read_bytes_total", "nvme") - before
        loaded.append(read // store.layout.block_bytes)
    llm.reset_prefix_cache(reset_connector=True)
    store.check_integrity()
    return {
        "answers": answers,
        "loaded_chunks": loaded,
        "chunk_tokens": store.layout.block_tokens,
        "blocks": store.status()[-1].blocks,
        "pinned": store.status()[-1].pinned_blocks,
        "misses": _flat(store.telemetry.counters().get("misses_total", {})),
        "dropped": _flat(store.telemetry.counters().get("restore_dropped_total", {})),
        "quarantined": store.telemetry.value("quarantined_rows_total"),
        "events": [event.kind for event in store.telemetry.events()],
    }


def _flat(values: dict[tuple[str, ...], int]) -> dict[str, int]:
    return {",".join(labels): value for labels, value in values.items()}


def both(arguments: dict[str, Any]) -> dict[str, Any]:
    """Plain vLLM, then an engine on an empty folder: two engines in one process."""
    return {"plain": plain(arguments), "filled": served(arguments)}


# Damage


def _slots(folder: Path) -> list[tuple[Path, int, int, SlotHeader]]:
    """(file, offset, stride, header) of every used slot."""
    found = []
    for segment in segment_files(folder):
        assert isinstance(segment, SegmentFile)
        data = segment.path.read_bytes()
        for number in range(segment.header.slots):
            start = slot_offset(number, segment.header.stride)
            header = SlotHeader.unpack(memoryview(data)[start : start + PAGE])
            if header is not None:
                found.append((segment.path, start, segment.header.stride, header))
    return found


def _patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def zeroed(folder: Path) -> None:
    for path, start, stride, _ in _slots(folder)[1::3]:
        _patch(path, start + PAGE, bytes(stride - PAGE))


def flipped_payload(folder: Path) -> None:
    for path, start, _, header in _slots(folder)[1::3]:
        place = start + PAGE + header.length // 3
        _patch(path, place, bytes([path.read_bytes()[place] ^ 0x40]))


def flipped_header(folder: Path) -> None:
    for path, start, _, _ in _slots(folder)[1::3]:
        _patch(path, start + 20, bytes([path.read_bytes()[start + 20] ^ 1]))


def truncated(folder: Path) -> None:
    path, start, stride, _ = _slots(folder)[2]
    with path.open("r+b") as file:
        file.truncate(start + stride // 2)


def swapped(folder: Path) -> None:
    slots = _slots(folder)
    (path_a, a, stride, _), (path_b, b, _, _) = slots[1], slots[-1]
    slot_a = path_a.read_bytes()[a : a + stride]
    slot_b = path_b.read_bytes()[b : b + stride]
    _patch(path_a, a, slot_b)
    _patch(path_b, b, slot_a)


def missing_segment(folder: Path) -> None:
    _slots(folder)[0][0].unlink()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "zeroed": zeroed,
    "flipped_payload": flipped_payload,
    "flipped_header": flipped_header,
    "truncated": truncated,
    "swapped": swapped,
    "missing_segment": missing_segment,
}


def damage(arguments: dict[str, Any]) -> dict[str, Any]:
    """One engine for each kind of damage, each on its own damaged copy of the folder."""
    pristine, toml = Path(arguments["pristine"]), Path(arguments["toml"])
    results: dict[str, Any] = {}
    for kind, spoil in DAMAGE.items():
        copy = pristine.with_name(f"{pristine.name}-{kind}")
        shutil.copytree(pristine, copy)
        spoil(copy)
        its_toml = toml.with_name(f"{kind}.toml")
        its_toml.write_text(toml.read_text().replace(str(pristine), str(copy)))
        results[kind] = served(arguments | {"toml": str(its_toml)})
    # Negative control: with the check switched off, zeroed bytes must show in the replies.
    copy = pristine.with_name(f"{pristine.name}-control")
    shutil.copytree(pristine, copy)
    zeroed(copy)
    its_toml = toml.with_name("control.toml")
    its_toml.write_text(toml.read_text().replace(str(pristine), str(copy)))
    take_in = NvmeTier._loaded

    def believe(tier: NvmeTier, on_done: OnDone, owner: object, rows: Rows) -> None:
        rows[rows[:, k.RESULT] > 0, k.RESULT] = 0  # what a verdict says against a block
        take_in(tier, on_done, owner, rows)

    NvmeTier._loaded = believe  # type: ignore[method-assign]
    try:
        results["control"] = served(arguments | {"toml": str(its_toml)})
    finally:
        NvmeTier._loaded = take_in  # type: ignore[method-assign]
    return results


# A disk that misbehaves


class MoodyIO(FileIO):
    """Reads of block data fail or hang while a mood lasts."""

    def __init__(self) -> None:
        self.mood = "well"
        self.awake = threading.Event()
        self.hung = 0

    def read(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        if len(views) > 1 and self.mood == "broken":
            raise OSError(5, "injected")
        if len(views) > 1 and self.mood == "hung":
            self.hung += 1
            self.awake.wait()
            # What a disk does that comes back: it still writes to where it was told.
        return super().read(fd, views, offset)


def misbehaving(arguments: dict[str, Any]) -> dict[str, Any]:
    """Errors, then a hang that outlasts the deadline, then a disk that is well again, in one engine."""
    io = MoodyIO()
    kvstrata.store.FileIO = lambda: io  # type: ignore[assignment, misc]
    results: dict[str, Any] = {}
    toml = Path(arguments["toml"])
    with engine(Path(arguments["model"]), toml, kv_bytes=KV_BYTES, context=CONTEXT) as llm:
        store = store_of(llm)
        results["filled"] = _replay(llm, arguments["prompts"])
        io.mood = "broken"
        results["broken"] = _replay(llm, arguments["prompts"])
        io.mood = "well"
        _wait_for(lambda: _probed(store))
        results["healed"] = _replay(llm, arguments["prompts"])
        llm.reset_prefix_cache(reset_connector=True)
        io.mood = "hung"
        answers = [asdict(ask(llm, prompt)) for prompt in arguments["prompts"]]
        results["hung"] = {
            "answers": answers,
            "readable": store.status()[-1].readable,
            "quarantined": store.telemetry.value("quarantined_rows_total"),
            "reads_that_hung": io.hung,
        }
        # Work on while the reads are still stuck, so that their rows would be reused if they could be.
        results["while_hung"] = {"answers": [asdict(ask(llm, p)) for p in arguments["others"]]}
        io.mood = "well"
        io.awake.set()
        _wait_for(lambda: _probed(store))
        results["back"] = _replay(llm, arguments["prompts"])
    return results


def _probed(store: Any) -> bool:
    store.lookup([])  # whoever looks up makes the store probe
    return bool(store.status()[-1].readable)


def _wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "waited for 30 s in vain"
        time.sleep(0.05)


def main() -> None:
    name, arguments, result = sys.argv[1:]
    scenario = {"both": both, "served": served, "damage": damage, "misbehaving": misbehaving}[name]
    Path(result).write_text(json.dumps(scenario(json.loads(Path(arguments).read_text()))))


if __name__ == "__main__":
    assert kvstrata.policies.POLICIES
    main()
