"""make demo-shared: two vLLM engines with disks of their own and one shared folder between them.

    1  node A computes prompts; node B, another process with an empty disk, gets them from the shared folder
    2  node B reads them again: now from its own disk, which kept what it read
    3  node A is killed with -9 while it writes; node B goes on meanwhile, and nothing wrong is served
    4  the shared storage is limited to 200 MB/s: first read, second read, and a purely local disk

The shared folder is a real GlusterFS volume, mounted once per node, where glusterfs-server is installed and
this is run by root; otherwise it is a folder of this machine that both use, without a limit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from backends import BackendMissing
from backends.gluster import gluster_volume
from client_cache import HEADERS, LIMIT_BYTES_PER_SECOND, ReadRates, measure
from shared_picture import shared_picture
from stage import BLOCKS_PER_CHUNK, CHUNK_TOKENS, LICENSE, DemoError, Stage, console, conversations

FILLED = 4
"""Requests that node A answers before node B starts; the rest come when A is killed."""
PAYLOAD_BYTES = 256 << 20

TOML = """\
[vllm]
host_memory_bytes = "128MiB"
blocks_per_chunk = {chunk}

[[tier]]
type = "nvme"
path = "{disk}"
capacity_bytes = "256MiB"
attach = "always"

[[tier]]
type = "shared_fs"
path = "{shared}"
capacity_bytes = "1GiB"
publish_seconds = 0.2
refresh_seconds = 0.2
"""


def node(stage: Stage, name: str, shared: Path) -> Path:
    """The configuration of a node: a fresh disk of its own, the shared folder as it is mounted there."""
    text = TOML.format(chunk=BLOCKS_PER_CHUNK, disk=stage.fresh(f"disk-{name}"), shared=shared / "engines")
    return stage.toml(f"node-{name}", text)


def show(title: str, results: list[dict[str, Any]], requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print one scene; returns its rows."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in (
        "talk",
        "turn",
        "prompt",
        "from shared",
        "from own disk",
        "TTFT cold",
        "TTFT",
        "same reply",
    ):
        table.add_column(name, justify="right")
    rows = []
    for request, got in zip(requests, results, strict=True):
        cold, now = request["answer"]["ttft_seconds"] * 1000, got["answer"]["ttft_seconds"] * 1000
        tokens = {tier: blocks * CHUNK_TOKENS for tier, blocks in got["blocks_by_tier"].items()}
        same = request["answer"]["tokens"] == got["answer"]["tokens"]
        row = {
            "conversation": request["conversation"],
            "turn": request["turn"],
            "prompt_tokens": len(request["prompt"]),
            "shared_tokens": tokens.get("shared_fs", 0),
            "nvme_tokens": tokens.get("nvme", 0),
            "ttft_cold_ms": cold,
            "ttft_ms": now,
            "same_reply": same,
        }
        rows.append(row)
        table.add_row(
            str(row["conversation"] + 1), str(row["turn"] + 1), str(row["prompt_tokens"]),
            str(row["shared_tokens"]), str(row["nvme_tokens"]), f"{cold:.0f} ms", f"{now:.0f} ms",
            "yes" if same else "[red]NO[/]",
        )  # fmt: skip
    console.print(table)
    return rows


def check(title: str, rows: list[dict[str, Any]], *tiers: str) -> None:
    """Raise DemoError unless replies are right and, with tiers given, every whole chunk came from those."""
    for row in rows:
        where = f"{title}: conversation {row['conversation'] + 1}, turn {row['turn'] + 1}"
        if not row["same_reply"]:
            raise DemoError(f"{where}: the reply differs from that of plain vLLM")
        # vLLM always computes the last token itself.
        expected = (row["prompt_tokens"] - 1) // CHUNK_TOKENS * CHUNK_TOKENS
        came = sum(row[f"{tier}_tokens"] for tier in tiers)
        if tiers and came < expected:
            raise DemoError(f"{where}: {came} tokens came from {' and '.join(tiers)}, not {expected}")


def engines(stage: Stage, mounts: list[Path]) -> dict[str, Any]:
    """The scenes with vLLM in them; returns what goes into the report."""
    system, talks = conversations(LICENSE.read_text())
    a, b = node(stage, "A", mounts[0]), node(stage, "B", mounts[1])
    stage.run(
        "node A: plain vLLM for comparison, then with kvstrata",
        [a], conversations=talks, system=system, last=FILLED,
    )  # fmt: skip
    requests = stage.requests()
    report: dict[str, Any] = {}

    (result,) = stage.run("node B: an empty disk, the shared folder", [b], last=FILLED, passes=2)
    answers = result["results"]
    title = "Node B, first read: what node A computed comes from the shared folder"
    report["first_read"] = rows = show(title, answers[:FILLED], requests[:FILLED])
    check(title, rows, "shared", "nvme")
    if not any(row["shared_tokens"] for row in rows):
        raise DemoError(f"{title}: nothing did")
    title = "Node B, second read: its own disk has kept it"
    report["second_read"] = rows = show(title, answers[FILLED:], requests[:FILLED])
    check(title, rows, "nvme")

    killed, going_on = stage.run_together(
        [
            ("node A: killed with -9 while it writes", [a], {"first": FILLED, "kill_after": 1}),
            ("node B: goes on", [b], {"passes": 2}),
        ]
    )
    killed.results(expect_kill=True)
    (result,) = going_on.results()
    title = "Node B while node A was killed"
    report["killed"] = rows = show(title, result["results"], requests * 2)
    check(title, rows)
    (result,) = stage.run("node C: a new node, after the kill", [node(stage, "C", mounts[1])])
    title = "Node C, new, after node A was killed"
    report["after"] = rows = show(title, result["results"], requests)
    check(title, rows)
    check(title, rows[:FILLED], "shared", "nvme")
    return report


def storage(stage: Stage, paths: list[Path], limit: Callable[[], None] | None) -> ReadRates:
    """The scene without an engine: how fast blocks come, the first time and the second."""
    folders = [path / "rates" for path in paths]
    folders[0].mkdir()
    with console.status("writing blocks to the shared folder, and reading them twice"):
        rates = measure(
            folders[1],
            stage.fresh("rates"),
            payload_bytes=PAYLOAD_BYTES,
            writer_folder=folders[0],
            limit=limit or (lambda: None),
        )
    title = "Reading 1 MiB blocks"
    if limit:
        title += f", shared storage limited to {LIMIT_BYTES_PER_SECOND / 1e6:.0f} MB/s"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("", "MB/s"):
        table.add_column(name, justify="right")
    table.add_row("first read, from the shared folder", f"{rates.first / 1e6:.0f}")
    table.add_row("second read, from the node's own disk", f"{rates.second / 1e6:.0f}")
    table.add_row("a tier that was only ever local", f"{rates.local / 1e6:.0f}")
    console.print(table)
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".demo/shared"), help="where everything goes")
    stage = Stage(parser.parse_args().folder)
    started = time.monotonic()
    try:
        with ExitStack() as stack:
            stage.make_model()
            limit: Callable[[], None] | None = None
            try:
                _, mounts = stack.enter_context(gluster_volume(2))
                paths = [mount.path for mount in mounts]
                limit = partial(mounts[1].limit, int(LIMIT_BYTES_PER_SECOND * HEADERS))
                console.print("the shared folder: a GlusterFS volume, mounted twice")
            except BackendMissing as missing:
                paths = [stage.fresh("shared")] * 2
                paths[0].mkdir()
                console.print(f"the shared folder: a plain folder, without a limit, because {missing}")
            report = engines(stage, paths)
            rates = storage(stage, paths, limit)
    except DemoError as error:
        console.print(f"[red]failed:[/] {error}")
        return 1
    except subprocess.CalledProcessError as error:
        console.print(f"[red]failed:[/] {error}\n{error.stderr.decode()}")
        return 1
    except KeyboardInterrupt:
        console.print("stopped; no engine is left running")
        return 130
    report["rates"] = {"first": rates.first, "second": rates.second, "local": rates.local}
    (stage.folder / "report.json").write_text(json.dumps(report, indent=1))
    picture = stage.folder / "shared.svg"
    picture.write_text(shared_picture(report, limit=LIMIT_BYTES_PER_SECOND if limit else 0))
    shutil.rmtree(stage.folder / "rates", ignore_errors=True)
    console.print(
        "\n[bold green]All replies equal those of plain vLLM, on every node, while one was killed too.[/]\n"
        f"Report and picture: report.json and shared.svg in {stage.folder}.\n"
        f"{time.monotonic() - started:.0f} s in all."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
