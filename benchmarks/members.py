"""Eight members write and read one shared folder, and are killed, stopped and restarted at random.

Nothing here is about speed. Every byte that is read is checked, the folder is measured with `du` all the
time against the capacity that was promised, and at the end the journals are read against what lies there.
Once on GlusterFS, mounted twice, once in a local folder.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import machine, parser, show, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "tiers" / "shared"))

from member_crowd import Crowd, Monitor, make_orders, nursery, read_everything, remains
from member_process import blocks_of

from backends import BackendMissing
from backends.gluster import gluster_volume
from kvstrata.config import MIB

GLUSTER, LOCAL = "GlusterFS, two mounts", "a local folder"
RUN_SECONDS = 900.0
QUIET_LEASES = 3.0
"""After the last harm, members stay as they are for so long: whatever is left over then stays."""


@contextlib.contextmanager
def folders(where: str, base: Path) -> Iterator[tuple[list[Path], Path]]:
    """The folder as members see it, on each mount, and where it really lies."""
    if where == LOCAL:
        yield [base / "shared"], base / "shared"
        return
    with gluster_volume() as (volume, mounts):
        yield [mount.path / "shared" for mount in mounts], volume.bricks[0] / "shared"


def run(where: str, options: Any) -> dict[str, Any]:
    """One place; all figures."""
    capacity = options.capacity_mib * MIB
    tier = {
        "capacity_bytes": capacity,
        "extent_bytes": 4 * MIB,
        "lease_seconds": options.lease_seconds,
        "refresh_seconds": options.lease_seconds / 10,
        "publish_seconds": options.lease_seconds / 5,
        "access_seconds": options.lease_seconds / 4,
        "policy": options.policy,
    }
    store = {"io_threads": 2, "io_store_threads": 1}
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.dir)))
        paths, real = stack.enter_context(folders(where, base))
        home = stack.enter_context(nursery())
        orders = make_orders(
            paths, base, options.members, options.blocks, options.seed, tier=tier, store=store
        )
        monitor = stack.enter_context(Monitor(real, capacity))
        crowd = Crowd(home, orders, monitor, options.seed)
        stack.callback(crowd.close, kill=True)
        started = time.monotonic()
        pause = (0.5 * options.lease_seconds, 1.5 * options.lease_seconds)
        done = crowd.run(RUN_SECONDS, pause, chaos=not options.peace)
        worked_seconds = time.monotonic() - started
        time.sleep(QUIET_LEASES * options.lease_seconds)
        left_parts = remains(real).parts
        crowd.close()
        left = remains(real)
        found = read_everything(orders[0])
        acted, acts = crowd.acts()
        totals, sight, lines = crowd.totals(), monitor.sight, crowd.lines()
        seen = dict(sight.collectors)
        collectors = {epoch: seen.get(epoch, set()) | acted.get(epoch, set()) for epoch in {*seen, *acted}}
        return {
            "where": where,
            "finished": done,
            "seconds": round(worked_seconds, 1),
            "different_blocks": blocks_of(orders[0].requests),
            "lives": sum(len(slot.reports) for slot in crowd.slots),
            "member_ids": len({line["member"] for line in lines if "member" in line}),
            "deeds": dict(crowd.deeds),
            "totals": dict(totals),
            "wrong_bytes_blocks": sum("wrong" in line for line in lines),
            "errors": [line["end"] for line in lines if line.get("end")],
            "capacity_bytes": capacity,
            "most_bytes": sight.most_bytes,
            "measurements": sight.samples,
            "most_files": sight.most_files,
            "epochs": len(collectors),
            "epochs_acted": len(acted),
            "most_collectors_of_an_epoch": max(map(len, collectors.values()), default=0),
            "acts": dict(acts),
            "lease_seconds": options.lease_seconds,
            "orphan_most_seconds": round(sight.orphan_seconds, 2),
            "ownerless_most_seconds": round(sight.ownerless_seconds, 2),
            "left": {
                "parts_of_anybody": len(left_parts) + len(left.parts),
                "extents_of_nobody": len(left.unreferenced),
                "extents_missing": len(left.missing),
                "temporary": len(left.temporary),
                "damaged_journals": len(left.damaged),
                "extents": left.extents,
            },
            "read_at_the_end": dict(found),
        }


def table(rows: list[dict[str, Any]]) -> None:
    def line(title: str, value: Any) -> list[str]:
        return [title, *(str(value(row)) for row in rows)]

    def deeds(row: dict[str, Any], kind: str) -> str:
        collector = row["deeds"].get(f"collector {kind}", 0)
        return f"{row['deeds'].get(kind, 0) + collector} ({collector})"

    def hit(row: dict[str, Any]) -> str:
        return f"{row['totals'].get('hit', 0) / max(1, row['totals'].get('looked_up', 0)):.1%}"

    show(
        "One shared folder, many members",
        ["", *(row["where"] for row in rows)],
        [
            line("seconds", lambda row: row["seconds"]),
            line("different blocks", lambda row: f"{row['different_blocks']:,}"),
            line("blocks written", lambda row: f"{row['totals'].get('save_saved', 0):,}"),
            line("blocks read", lambda row: f"{row['totals'].get('load_loaded', 0):,}"),
            line("hit ratio of look-ups", hit),
            line("blocks with a wrong byte", lambda row: row["wrong_bytes_blocks"]),
            line(
                "most du / capacity",
                lambda row: (
                    f"{row['most_bytes'] / row['capacity_bytes']:.3f} ({row['measurements']:,} times)"
                ),
            ),
            line("killed -9 (collectors)", lambda row: deeds(row, "killed")),
            line("stopped beyond the lease", lambda row: deeds(row, "stopped")),
            line("closed and opened again", lambda row: deeds(row, "closed")),
            line("member ids", lambda row: row["member_ids"]),
            line("epochs", lambda row: row["epochs"]),
            line("most collectors of an epoch", lambda row: row["most_collectors_of_an_epoch"]),
            line("extents collected", lambda row: row["acts"].get("shared_collected_extents_total", 0)),
            line("extents adopted", lambda row: row["acts"].get("shared_adopted_extents_total", 0)),
            line("orphans removed", lambda row: row["acts"].get("shared_orphans_total", 0)),
            line(
                "longest a part outlived its process",
                lambda row: f"{row['orphan_most_seconds'] / row['lease_seconds']:.2f} leases",
            ),
            line(
                "and its member, once declared dead",
                lambda row: f"{row['ownerless_most_seconds'] / row['lease_seconds']:.2f} leases",
            ),
            line(
                "orphans at the end",
                lambda row: row["left"]["parts_of_anybody"] + row["left"]["extents_of_nobody"],
            ),
            line("blocks read by a newcomer", lambda row: f"{row['read_at_the_end'].get('loaded', 0):,}"),
            line("of them wrong", lambda row: row["read_at_the_end"].get("wrong", 0)),
        ],
    )


def main() -> None:
    arguments = parser(__doc__, "members")
    arguments.add_argument("--dir", type=Path, default=None, help="where the local folder and reports go")
    arguments.add_argument("--members", type=int, default=8)
    arguments.add_argument("--blocks", type=int, default=100_000)
    arguments.add_argument("--capacity-mib", type=int, default=256)
    arguments.add_argument("--lease-seconds", type=float, default=2.0)
    arguments.add_argument("--policy", default="lru")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--peace", action="store_true", help="nobody is killed or stopped")
    arguments.add_argument("--only", choices=[GLUSTER, LOCAL], help="one place only")
    options = arguments.parse_args()
    description = machine(["kvstrata", "numpy", "numba"])
    rows: list[dict[str, Any]] = []
    for where in [options.only] if options.only else [LOCAL, GLUSTER]:
        try:
            rows.append(run(where, options))
        except BackendMissing as missing:
            print(f"{where}: {missing}", file=sys.stderr)
    table(rows)
    write_json(options.json, {"benchmark": "members", "machine": description, "series": rows})


if __name__ == "__main__":
    main()
