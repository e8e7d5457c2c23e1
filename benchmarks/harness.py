"""What the benchmarks share: sides timed in turn, a description of the machine, JSON and a table.

Speeds are shown and never asserted: machines differ, and shared ones differ from minute to minute.
A ratio is the median of the ratios of neighbours in time, which a slow drift of the machine leaves alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"

Seconds = dict[str, list[float]]


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_turn(sides: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> Seconds:
    """Run every side once per round (A B C, A B C, ...). A side returns the seconds it took."""
    seconds: Seconds = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name, side in sides.items():
            took = side()
            if number >= warm_up:
                seconds[name].append(took)
    return seconds


def pair_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over the rounds of over / under, each taken in the same round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, best, and the quarter points of a series."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "low_quarter": low, "high_quarter": high, "best": min(values)}


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Where and with what a benchmark ran; None for a package that is not installed."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _proc_field("/proc/cpuinfo", "model name") or platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": _proc_field("/proc/meminfo", "MemTotal"),
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def version(package: str) -> str | None:
    """The installed version of a distribution, None without one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _proc_field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """A command line with --json, by default results/<name>.json beside the benchmarks."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument(
        "--json", type=Path, default=RESULTS / f"{name}.json", help="where the figures go"
    )
    return arguments


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write the figures, with the load at the end beside the one at the start."""
    ended = {"load_average_at_end": [round(load, 2) for load in os.getloadavg()]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(result) | ended, indent=1) + "\n")
    Console(stderr=True).print(f"figures written to {path}")


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people; the first column is words, the others are figures."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
