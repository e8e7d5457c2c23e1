"""How commands print: tables for people, one JSON object for machines. Knows nothing of what it prints."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PIPE_COLUMNS = 160
PROGRESS_AFTER_SECONDS = 2.0

JSON_OPTION = typer.Option(False, "--json", help="Print one JSON object instead of tables.")


def one_line(text: object) -> str:
    """Text from outside, safe to print: no line breaks, no control characters."""
    return "".join(
        c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in str(text)
    )


def print_json(value: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2))


def print_line(text: str = "") -> None:
    typer.echo(text)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table with a title; a column whose name ends in '>' is aligned to the right. Nothing if no rows."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        right = column.endswith(">")
        table.add_column(
            column.rstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=number == 0
        )
    for row in rows:
        table.add_row(*(one_line(cell) for cell in row))
    if table.row_count:
        console = _console()
        with console.capture() as capture:
            console.print(table)
        lines = (line.rstrip() for line in capture.get().splitlines())
        typer.echo("\n".join([title, *(f"  {line}" for line in lines), ""]))


def _console() -> Console:
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(markup=False, highlight=False, emoji=False, width=PIPE_COLUMNS if piped else None)


def format_age(seconds: float) -> str:
    """For people, in the two largest units: 4000 -> '1 h 6 min'."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for name, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts or size == 1:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])


class ProgressBar:
    """A progress bar on stderr for what takes longer than two seconds; only where a person watches."""

    def __init__(self, title: str, unit: str = "slots") -> None:
        self._title = title
        self._unit = unit
        self._show_at = time.monotonic() + PROGRESS_AFTER_SECONDS
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            if time.monotonic() < self._show_at or not sys.stderr.isatty():
                return
            self._bar = self._start(total)
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def _start(self, total: int) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(self._unit),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        bar.add_task(self._title, total=total)
        bar.start()
        return bar
