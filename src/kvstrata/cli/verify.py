"""`kvstrata verify`: reads and checks every block of an nvme folder that no process uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvstrata.cli.output import JSON_OPTION, ProgressBar, one_line, print_json, print_line, print_table
from kvstrata.config import format_size

if TYPE_CHECKING:
    from kvstrata.tiers.nvme_verify import VerifyReport

SHOWN_BAD = 50


def verify(
    folder: Path = typer.Argument(
        metavar="DIR", readable=False, help="Folder of an nvme tier that no process uses."
    ),
    repair: bool = typer.Option(False, "--repair", help="Drop what is bad; the good blocks stay."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Check every block in an nvme folder.

    Reads all of them and compares the checksums of headers and payloads. A bad block is never
    served, whether you repair or not; repairing frees its slot at once.

    Exit code 0: all good, or repaired. 1: bad blocks found and left. 2: could not be checked.

    \b
    Examples:
      kvstrata verify /mnt/nvme/kv
      kvstrata verify /mnt/nvme/kv --repair
      kvstrata verify /mnt/nvme/kv --json | jq .by_reason
    """
    from kvstrata.tiers.nvme_verify import verify_folder

    with ProgressBar("checking blocks") as progress:
        report = verify_folder(folder, progress, repair=repair)
    if as_json:
        print_json(_to_json(folder, report))
    else:
        _show(folder, report)
    if report.bad and not report.repaired:
        raise typer.Exit(1)


def _to_json(folder: Path, report: VerifyReport) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "good": not report.bad,
        "repaired": report.repaired,
        "index": report.index.value,
        "slots": report.slots,
        "empty_slots": report.empty_slots,
        "checked_blocks": report.checked_blocks,
        "good_blocks": report.good_blocks,
        "expired_blocks": report.expired_blocks,
        "lost_blocks": report.lost_blocks,
        "payload_bytes": report.payload_bytes,
        "seconds": round(report.seconds, 3),
        "by_reason": report.by_reason,
        "bad": [
            {
                "file": bad.file,
                "slot": bad.slot,
                "reason": bad.reason,
                "detail": bad.detail,
                "key": bad.key,
                "namespace": bad.namespace,
            }
            for bad in report.bad
        ],
    }


def _show(folder: Path, report: VerifyReport) -> None:
    from kvstrata.tiers.nvme_verify import REASONS

    speed = format_size(report.payload_bytes / report.seconds) if report.seconds else "0 B"
    print_line(
        f"{one_line(folder)}: {report.checked_blocks} blocks with {format_size(report.payload_bytes)} read "
        f"in {report.seconds:.2f} s ({speed}/s), {report.empty_slots} of {report.slots} slots empty"
    )
    print_line(f"good {report.good_blocks}, bad {len(report.bad)}, expired {report.expired_blocks}")
    if not report.bad:
        print_line("all good")
        return
    print_line()
    print_table(
        "bad, by reason",
        ["reason", "count>", "meaning"],
        [(reason, count, REASONS[reason]) for reason, count in report.by_reason.items()],
    )
    print_table(
        "bad",
        ["file", "slot>", "reason", "key", "detail"],
        [
            (bad.file, "" if bad.slot is None else bad.slot, bad.reason, bad.key[:16], bad.detail)
            for bad in report.bad[:SHOWN_BAD]
        ],
    )
    if len(report.bad) > SHOWN_BAD:
        print_line(f"and {len(report.bad) - SHOWN_BAD} more; --json lists all")
    if report.repaired:
        print_line(
            f"dropped {len(report.bad)}; the next open scans the segments and finds good blocks only"
        )
    else:
        print_line(f"nothing was changed; `kvstrata verify {one_line(folder)} --repair` drops what is bad")
