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
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvstrata.config import format_size
from kvstrata.tiers.nvme_folder import SegmentFile, segment_files
from kvstrata.tiers.nvme_format import SlotHeader, slot_offset
from kvstrata.transfer.buffers import PAGE
from ttft_picture import ttft_picture

HERE = Path(__file__).parent
LICENSE = HERE.parent / "LICENSE"
BLOCKS_PER_CHUNK, BLOCK_TOKENS = 4, 32
CHUNK_TOKENS = BLOCKS_PER_CHUNK * BLOCK_TOKENS
KILL_AFTER = 2
CAPTURE = "capture"
"""Folder with a trace of what the engines asked for: `kvstrata trace capture .demo/capture -o ...`."""

QUESTIONS = [
    ["Which words of this passage speak of patents?", "And what ends a grant?"],
    ["May I use the name of the licensor?", "Not even to say where it comes from?"],
    ["What must I tell people when I change a file?", "And if there is a NOTICE file?"],
]
SHARED_PART = 0.6


def conversations(text: str) -> tuple[str, list[list[str]]]:
    """A long system prompt that all share, and for each conversation a passage of its own to talk about."""
    shared = int(len(text) * SHARED_PART)
    passage = (len(text) - shared) // len(QUESTIONS)
    talks = []
    for number, (first, *rest) in enumerate(QUESTIONS):
        start = shared + number * passage
        talks.append([f"{text[start : start + passage]}\n\n{first}", *rest])
    return text[:shared], talks


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

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


class DemoError(Exception):
    """Something that the demo shows did not come true."""


class Stage:
    """Files of one run, and how engines are started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.requests_file = folder / "requests.json"
        self.log = folder / "engines.log"
        self.log.write_text("")
        shutil.rmtree(folder / CAPTURE, ignore_errors=True)

    def toml(self, name: str) -> Path:
        """A kvstrata.toml for a fresh folder of that name."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        path = self.folder / f"{name}.toml"
        text = TOML.format(path=self.folder / name, chunk=BLOCKS_PER_CHUNK, capture=self.folder / CAPTURE)
        path.write_text(text)
        return path

    def run(
        self, title: str, configs: list[Path], expect_kill: bool = False, **job: Any
    ) -> list[dict[str, Any]]:
        """Start a process with an engine per config; returns what each measured (none if to be killed)."""
        results, progress = self.folder / "results.json", self.folder / "progress"
        results.unlink(missing_ok=True)
        progress.write_text("0")
        spec = {
            "model": str(self.model),
            "configs": [str(config) for config in configs],
            "requests": str(self.requests_file),
            "results": str(results),
            "progress": str(progress),
            **job,
        }
        job_file = self.folder / "job.json"
        job_file.write_text(json.dumps(spec))
        with self.log.open("a") as log:
            log.write(f"\n=== {title}\n")
            log.flush()
            engine = subprocess.Popen(
                [sys.executable, str(HERE / "demo_engine.py"), str(job_file)], stdout=log, stderr=log
            )
            try:
                self._wait(engine, title, progress)
            finally:
                if engine.poll() is None:
                    engine.kill()
                    engine.wait()
        for leak in Path("/dev/shm").glob("vllm_offload_kvstrata-*.mmap"):
            leak.unlink(missing_ok=True)
        if expect_kill and engine.returncode == -signal.SIGKILL:
            return []
        if engine.returncode != 0 or expect_kill:
            raise DemoError(f"{title}: the engine ended with {engine.returncode}; see {self.log}")
        return list(json.loads(results.read_text()))

    @staticmethod
    def _wait(engine: subprocess.Popen[bytes], title: str, progress: Path) -> None:
        started = time.monotonic()
        with console.status(title) as status:
            while engine.poll() is None:
                done = progress.read_text() or "0"
                seconds = time.monotonic() - started
                status.update(f"{title}: {done} requests, {seconds:.0f} s")
                time.sleep(0.2)
        console.print(f"[green]done[/] {title} ({time.monotonic() - started:.0f} s)")


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
    first, second = stage.toml("nvme"), stage.toml("nvme-killed")
    stage.run(
        "process 1: plain vLLM for comparison, then kvstrata on an empty folder",
        [first], conversations=talks, system=system,
    )  # fmt: skip
    requests = json.loads(stage.requests_file.read_text())

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
    options.folder.mkdir(parents=True, exist_ok=True)
    stage = Stage(options.folder.absolute())
    text = LICENSE.read_text()
    started = time.monotonic()
    try:
        with console.status("making a random Llama and its tokenizer"):
            subprocess.run(
                [sys.executable, str(HERE / "tiny_llama.py"), str(stage.model), str(LICENSE)],
                check=True, capture_output=True,
            )  # fmt: skip
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
