"""Members of one folder write and read while some are killed, stopped and restarted, and one collects.

`benchmarks/members.py` is the same at full size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from member_crowd import Crowd, Monitor, Nursery, Remains, make_orders, nursery, read_everything, remains

from backends.gluster import GlusterMount, GlusterVolume
from kvstrata.config import MIB
from store_kit import eventually

CAPACITY = 16 * MIB
TIER = {
    "capacity_bytes": CAPACITY,
    "extent_bytes": MIB,
    "lease_seconds": 1.0,
    "refresh_seconds": 0.1,
    "publish_seconds": 0.2,
    "access_seconds": 0.3,
}
STORE = {"io_threads": 2, "io_store_threads": 1}
HARM = (0.8, 2.0)
LEAST_HARMED = 4
SECONDS = 120.0


@pytest.fixture(scope="module")
def home() -> Iterator[Nursery]:
    with nursery() as opened:
        yield opened


def clean(left: Remains) -> bool:
    """Nobody's file lies there, and no journal promises what does not."""
    return not (left.parts or left.unreferenced or left.missing or left.temporary)


def check_crowd(
    home: Nursery, mounts: list[Path], real: Path, tmp_path: Path, members: int, blocks: int
) -> None:
    """real: where the folder lies without any member's mount."""
    orders = make_orders(mounts, tmp_path, members, blocks, 5, tier=TIER, store=STORE)
    with ExitStack() as stack:
        monitor = stack.enter_context(Monitor(real, CAPACITY))
        crowd = Crowd(home, orders, monitor, 7)
        stack.callback(crowd.close, kill=True)
        assert crowd.run(SECONDS, HARM, least=LEAST_HARMED), crowd.totals()
        # Whoever is left has removed what the others left behind, once they are known to be dead.
        eventually(lambda: clean(remains(real)), f"orphans stay: {remains(real)}")
        crowd.close()
    lines, totals = crowd.lines(), crowd.totals()
    assert [line for line in lines if "wrong" in line] == []
    assert [line["end"] for line in lines if line.get("end")] == []
    assert totals["load_loaded"] > 0
    assert totals["given_up"] == 0

    sight = monitor.sight
    assert sight.samples > 10
    assert sight.most_bytes <= CAPACITY
    acted, acts = crowd.acts()
    assert acts["shared_adopted_extents_total"] > 0
    for epoch, words in sight.collectors.items():
        assert len(words | acted.get(epoch, set())) == 1, f"two collectors in epoch {epoch}"
    assert len(sight.collectors) > 1, "nobody had to take over"

    left = remains(real)
    assert clean(left), left
    assert left.damaged == []
    found = read_everything(orders[0])
    assert found["wrong"] == 0
    assert found["loaded"] == found["indexed"] > 0, found


def test_a_crowd_in_a_local_folder(home: Nursery, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    check_crowd(home, [folder], folder, tmp_path, members=6, blocks=3_000)


def test_a_crowd_on_two_mounts_of_a_volume(
    home: Nursery,
    gluster: tuple[GlusterVolume, list[GlusterMount]],
    shared_folders: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    real = gluster[0].bricks[0] / shared_folders[0].name
    check_crowd(home, list(shared_folders), real, tmp_path, members=4, blocks=1_200)
