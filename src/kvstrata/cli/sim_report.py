"""`kvstrata sim report`: results of runs as one page, pictures and tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kvstrata.cli.output import JSON_OPTION, ProgressBar, one_line, print_json, print_line
from kvstrata.config import format_size

if TYPE_CHECKING:
    from kvstrata.sim.metrics import RunResult

PARTS = ((".html", "page"), (".md", "text"), (".csv", "tables"), (".png", "pictures"))


def report(
    results: list[Path] = typer.Argument(
        metavar="RESULTS...",
        readable=False,
        help="Parquet files, or folders of them, from sim sweep and sim tune.",
    ),
    output: Path = typer.Option(
        ..., "-o", "--output", metavar="DIR", readable=False, help="Folder for the report; made if missing."
    ),
    title: str | None = typer.Option(None, "--title", metavar="TEXT", help="Heading of the page."),
    curves: list[Path] | None = typer.Option(
        None, "--curve", metavar="FILE", readable=False, help="JSON from sim curve: draws lru's miss ratio."
    ),
    force: bool = typer.Option(False, "--force", help="Replace files of an earlier report."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Turn results into one HTML page, pictures and tables.

    The page is one file that needs no network. Beside it lie its pictures as PNG, and its tables as
    Markdown and CSV.

    \b
    Examples:
      kvstrata sim report results/ -o report/
      kvstrata sim report sweep/ tune/ -o report/ --title "Chat, week 31"
      kvstrata sim report results/ -o report/ --curve chat.json --curve agents.json
      kvstrata sim report results/ -o report/ --force --json | jq -r .page
    """
    from kvstrata.sim.report.page import TITLE, read_curve, write_report

    runs, asked = _read(results)
    misses = [read_curve(path) for path in curves or ()]
    with ProgressBar("drawing", "pictures") as progress:
        files = write_report(
            runs,
            output,
            asked=asked,
            title=title or TITLE,
            force=force,
            curves=misses,
            progress=progress,
        )
    if as_json:
        print_json({"page": str(files[0]), "runs": len(runs), "files": [str(file) for file in files]})
        return
    print_line(f"{one_line(output)}: {len(runs)} runs")
    for ending, what in PARTS:
        found = [file for file in files if file.suffix == ending]
        size = format_size(sum(file.stat().st_size for file in found))
        print_line(f"  {what:<9}{size:>10}  {', '.join(file.name for file in found)}")


def _read(paths: list[Path]) -> tuple[list[RunResult], list[str]]:
    """All runs, each once, and the capacity of each as it was written."""
    from kvstrata.sim.results import read_runs

    runs = {run.key: run for path in paths for run in read_runs(path)}.values()
    return [run.result for run in runs], [run.capacity_asked for run in runs]
