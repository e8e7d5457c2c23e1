"""make demo: a real vLLM on the CPU gets its prefixes back from kvstrata.

Four processes, each with a real engine or two:
  1  plain vLLM without any cache (cold times, and the replies that all others must give), then kvstrata on
     an empty folder
  2  restart on the same folder
  3  a new folder, killed with -9 while it saves
  4  on the folder of the killed one, then on the first folder, after bytes in it were flipped
Exits with 1 when a reply differs, a hit is missing, or damage was not noticed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from kvstrata.config import format_size
from kvstrata.tiers.nvme_folder import SegmentFile, segment_files
from kvstrata.tiers.nvme_format import SlotHeader, slot_offset
from kvstrata.transfer.buffers import PAGE
from stage import (
    BLOCKS_PER_CHUNK,
    CHUNK_TOKENS,
    LICENSE,
    DemoError,
    Stage,
    console,
    conversations,
)
from ttft_picture import ttft_picture

KILL_AFTER = 2
CAPTURE = "capture"
"""Folder with a trace of what the engines asked for: `kvstrata trace capture .demo/capture -o ...`."""

TOML = """\
[store]
capture = "{capture}"

[vllm]
host_memory_bytes = "128MiB"
blocks_per_chunk = {chunk}

[[tier]]
type = "nvme"
path = "{path}"
capacity_bytes = "256MiB"
"""


def fresh_toml(stage: Stage, name: str) -> Path:
    """A kvstrata.toml for a fresh folder of that name."""
    path = stage.fresh(name)
    text = TOML.format(path=path, chunk=BLOCKS_PER_CHUNK, capture=stage.folder / CAPTURE)
    return stage.toml(name, text)


def flip_bytes(folder: Path) -> int:
    """Flip one payload byte in every fifth used slot; returns how many slots."""
    used = 0
    flipped = 0
    for segment in segment_files(folder):
        assert isinstance(segment, SegmentFile)
        with segment.path.open("r+b") as file:
            for number in range(segment.header.slots):
                start = slot_offset(number, segment.header.stride)
                file.seek(start)
                header = SlotHeader.unpack(memoryview(bytearray(file.read(PAGE))))
                if header is None:
                    continue
                used += 1
                if used % 5 == 0:
                    place = start + PAGE + header.length // 2
                    file.seek(place)
                    byte = file.read(1)
                    file.seek(place)
                    file.write(bytes([byte[0] ^ 0xFF]))
                    flipped += 1
    return flipped


def show(title: str, result: dict[str, Any], requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print the table of one scene; returns its rows."""
    opened = result["opened"]
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in (
        "talk",
        "turn",
        "prompt",
        "from kvstrata",
        "bad blocks",
        "TTFT cold",
        "TTFT",
        "faster",
        "same reply",
    ):
        table.add_column(name, justify="right")
    rows = []
    for request, got in zip(requests, result["results"], strict=True):
        cold, now = request["answer"]["ttft_seconds"], got["answer"]["ttft_seconds"]
        same = request["answer"]["tokens"] == got["answer"]["tokens"]
        apart = max(
            abs(a - b)
            for a, b in zip(request["answer"]["logprobs"], got["answer"]["logprobs"], strict=True)
        )
        rows.append(
            {
                "conversation": request["conversation"],
                "turn": request["turn"],
                "prompt_tokens": len(request["prompt"]),
                "kvstrata_tokens": got["kvstrata_tokens"],
                "damaged_blocks": got["damaged_blocks"],
                "ttft_cold_ms": cold * 1000,
                "ttft_ms": now * 1000,
                "same_reply": same,
                "logprobs_apart": apart,
            }
        )
        table.add_row(
            str(request["conversation"] + 1), str(request["turn"] + 1), str(len(request["prompt"])),
            str(got["kvstrata_tokens"]), str(got["damaged_blocks"]), f"{cold * 1000:.0f} ms",
            f"{now * 1000:.0f} ms", f"{cold / now:.1f} x", "yes" if same else "[red]NO[/]",
        )  # fmt: skip
    how = "read the index" if opened["index"] else "scanned the slots"
    table.caption = f"the folder opened with {opened['blocks']} blocks in {opened['seconds']:.2f} s ({how})"
    table.caption_justify = "left"
    console.print(table)
    return rows


def check(title: str, rows: list[dict[str, Any]], *, full: bool, damage: bool) -> None:
    """Raise DemoError unless the scene came true."""
    for row in rows:
        where = f"{title}: conversation {row['conversation'] + 1}, turn {row['turn'] + 1}"
        if not row["same_reply"]:
            raise DemoError(f"{where}: the reply differs from that of plain vLLM")
        # vLLM always computes the last token itself.
        expected = (row["prompt_tokens"] - 1) // CHUNK_TOKENS * CHUNK_TOKENS if full else CHUNK_TOKENS
        if not damage and row["kvstrata_tokens"] < expected:
            raise DemoError(f"{where}: {row['kvstrata_tokens']} tokens came back, {expected} should have")
    noticed = sum(row["damaged_blocks"] for row in rows)
    if damage and not noticed:
        raise DemoError(f"{title}: bytes were flipped and nobody noticed")


def play(stage: Stage, text: str) -> dict[str, Any]:
    """All scenes; returns what goes into the report."""
    report: dict[str, Any] = {}
    system, talks = conversations(text)
    first, second = fresh_toml(stage, "nvme"), fresh_toml(stage, "nvme-killed")
    stage.run(
        "process 1: plain vLLM for comparison, then kvstrata on an empty folder",
        [first], conversations=talks, system=system,
    )  # fmt: skip
    requests = stage.requests()

    title = "Restart: a second engine, in a new process, on the same folder"
    (result,) = stage.run("process 2: restart", [first])
    report["restart"] = rows = show(title, result, requests)
    check(title, rows, full=True, damage=False)

    stage.run("process 3: killed with -9 while it saves", [second], expect_kill=True, kill_after=KILL_AFTER)
    flipped = flip_bytes(stage.folder / "nvme")
    crash, damage = stage.run("process 4: after the kill, and after bytes were flipped", [second, first])

    title = "Crash: an engine on the folder of the one that was killed with -9"
    report["crash"] = rows = show(title, crash, requests)
    check(title, rows, full=False, damage=False)

    title = f"Damage: one byte flipped in each of {flipped} slots"
    report["damage"] = rows = show(title, damage, requests)
    check(title, rows, full=False, damage=True)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where everything goes")
    options = parser.parse_args()
    stage = Stage(options.folder)
    shutil.rmtree(stage.folder / CAPTURE, ignore_errors=True)
    text = LICENSE.read_text()
    started = time.monotonic()
    try:
        stage.make_model()
        report = play(stage, text)
    except DemoError as error:
        console.print(f"[red]failed:[/] {error}")
        return 1
    except subprocess.CalledProcessError as error:
        console.print(f"[red]failed:[/] {error}\n{error.stderr.decode()}")
        return 1
    except KeyboardInterrupt:
        console.print("stopped; no engine is left running")
        return 130
    warm = report["restart"]
    ratio = sum(row["ttft_cold_ms"] for row in warm) / sum(row["ttft_ms"] for row in warm)
    (stage.folder / "report.json").write_text(json.dumps(report, indent=1))
    picture = stage.folder / "ttft.svg"
    picture.write_text(ttft_picture(warm))
    size = sum(path.stat().st_blocks * 512 for path in (stage.folder / "nvme").iterdir())
    console.print(
        f"\n[bold green]All replies equal those of plain vLLM.[/] After a restart the first token comes "
        f"{ratio:.1f} times sooner.\nThe folder takes {format_size(size)} of 256.0 MiB allowed. "
        f"Report and picture: report.json and ttft.svg in {stage.folder}.\n"
        f"{time.monotonic() - started:.0f} s in all."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
