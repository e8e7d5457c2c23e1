"""`kvstrata inspect`: what is in a folder of the nvme tier. Reads only, also while a process uses it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvstrata.cli.output import (
    JSON_OPTION,
    ProgressBar,
    format_age,
    one_line,
    print_json,
    print_line,
    print_table,
)
from kvstrata.config import format_size

if TYPE_CHECKING:
    from kvstrata.tiers.nvme_audit import FolderSummary, NamespaceSummary

SHOWN_FIELDS = ("model", "dtype", "engine", "tp", "rank")
"""Fields of a namespace that people look for first; --json has all of them."""


def inspect(
    folder: Path = typer.Argument(metavar="DIR", readable=False, help="Folder of an nvme tier."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Show what an nvme folder holds.

    Segments, slots, namespaces, blocks, bytes and ages. Reads the header of every slot, changes
    nothing, and does not need the folder to be free.

    \b
    Examples:
      kvstrata inspect /mnt/nvme/kv
      kvstrata inspect /mnt/nvme/kv --json | jq .blocks
    """
    from kvstrata.tiers.nvme_audit import summarize_folder

    with ProgressBar("reading headers") as progress:
        summary = summarize_folder(folder, progress)
    if as_json:
        print_json(_to_json(folder, summary))
    else:
        _show(folder, summary)


def _to_json(folder: Path, summary: FolderSummary) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "format": summary.format,
        "version": summary.version,
        "in_use": summary.in_use,
        "holder": summary.holder,
        "figures_may_be_moving": summary.in_use,
        "counted_from": "slot_headers",
        "index": summary.index.value,
        "index_blocks": summary.index_blocks,
        "bytes_on_disk": summary.bytes_on_disk,
        "slot_payload_bytes": _capacity(summary),
        "slots": _states(summary.states),
        "blocks": sum(namespace.blocks for namespace in summary.namespaces),
        "payload_bytes": sum(namespace.payload_bytes for namespace in summary.namespaces),
        "expired_blocks": sum(namespace.expired_blocks for namespace in summary.namespaces),
        "unreadable_segments": summary.unreadable,
        "segments": [
            {
                "file": segment.name,
                "file_bytes": segment.file_bytes,
                "full_bytes": segment.full_bytes,
                "slot_payload_bytes": segment.slot_bytes,
                "slots": _states(segment.states),
            }
            for segment in summary.segments
        ],
        "namespaces": [
            {
                "digest": namespace.digest,
                "fields": namespace.fields,
                "blocks": namespace.blocks,
                "payload_bytes": namespace.payload_bytes,
                "expired_blocks": namespace.expired_blocks,
                "oldest_unix_seconds": namespace.oldest_ms / 1000 if namespace.blocks else None,
                "newest_unix_seconds": namespace.newest_ms / 1000 if namespace.blocks else None,
            }
            for namespace in summary.namespaces
        ],
        "seconds": round(summary.seconds, 3),
    }


def _states(states: Any) -> dict[str, int]:
    from kvstrata.tiers.nvme_scan import SlotState

    return {state.value: states[state] for state in SlotState}


def _capacity(summary: FolderSummary) -> int:
    return sum(segment.slots * segment.slot_bytes for segment in summary.segments)


def _show(folder: Path, summary: FolderSummary) -> None:
    states = _states(summary.states)
    slots = sum(states.values())
    blocks = sum(namespace.blocks for namespace in summary.namespaces)
    payload = sum(namespace.payload_bytes for namespace in summary.namespaces)
    expired = sum(namespace.expired_blocks for namespace in summary.namespaces)
    print_line(f"{one_line(folder)}: {summary.format} version {summary.version}")
    if summary.in_use:
        holder = one_line(summary.holder or "a process that left no name")
        print_line(f"in use by {holder}: the figures may be moving while they are read")
    else:
        print_line("not in use")
    print_line(f"on disk   {format_size(summary.bytes_on_disk)} ({summary.bytes_on_disk} bytes)")
    print_line(
        f"segments  {len(summary.segments)} with {slots} slots for {format_size(_capacity(summary))}"
    )
    print_line(f"slots     {', '.join(f'{count} {name}' for name, count in states.items())}")
    print_line(f"blocks    {blocks} with {format_size(payload)}, {expired} of them expired")
    print_line(f"index     {_index_line(summary)}")
    for name in summary.unreadable:
        print_line(f"warning: {one_line(name)} has no intact segment header; `kvstrata verify` tells more")
    print_line()
    print_table(
        "namespaces",
        ["digest", "made from", "blocks>", "payload>", "expired>", "oldest>", "newest>"],
        [_namespace_row(namespace, summary.unix_ms) for namespace in summary.namespaces],
    )
    print_table(
        "segments",
        ["file", "slot payload>", "size>", *(f"{name}>" for name in states), "note"],
        [
            (
                segment.name,
                format_size(segment.slot_bytes),
                format_size(segment.file_bytes),
                *_states(segment.states).values(),
                "truncated" if segment.file_bytes < segment.full_bytes else "",
            )
            for segment in summary.segments
        ],
    )


def _index_line(summary: FolderSummary) -> str:
    return {
        "absent": "absent, as always while a process uses the folder and after a crash",
        "intact": f"of a clean close, with {summary.index_blocks} blocks",
        "damaged": "damaged: the next open scans the segments",
    }[summary.index.value] + "; the figures here are from slot headers"


def _namespace_row(namespace: NamespaceSummary, now_ms: int) -> tuple[object, ...]:
    shown = [f"{name} {namespace.fields[name]}" for name in SHOWN_FIELDS if name in namespace.fields]
    others = [f"{name} {value}" for name, value in namespace.fields.items() if isinstance(value, str | int)]
    ages = ["-", "-"]
    if namespace.blocks:
        ages = [format_age((now_ms - ms) / 1000) for ms in (namespace.oldest_ms, namespace.newest_ms)]
    return (
        namespace.digest[:16],
        ", ".join(shown or others[: len(SHOWN_FIELDS)]) or "not written down",
        namespace.blocks,
        format_size(namespace.payload_bytes),
        namespace.expired_blocks,
        *ages,
    )
