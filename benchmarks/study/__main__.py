"""`make study`: every policy on the real traces, beside the figures of the study that started this one.

Runs the grid (what was run before is not run again) and writes docs/study: a README with tables and
pictures, the report as one HTML page, CSV files. What it writes depends on traces and code alone, so a
second run changes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from page import MARK, PAGE, PICTURES, TABLES, make_files
from runs import CAPACITIES, run_study

from kvstrata.config import format_size
from kvstrata.errors import ConfigError, KVStrataError
from kvstrata.sim.replay import SIMULATED

ROOT = Path(__file__).parents[2]
TRACES = ROOT.parent / "shared" / "traces" / "open"
CAPTURE, RESULTS = ROOT / ".demo" / "capture", ROOT / ".demo" / "study"
OUT = ROOT / "docs" / "study"


def names(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--traces", type=Path, default=TRACES, metavar="DIR",
        help="folder with mooncake/*.jsonl.gz and agentic/*.json.gz (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--capture", type=Path, default=CAPTURE, metavar="DIR",
        help="folder that a live store captured to (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR",
        help="folder that keeps the runs (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="DIR", help="folder for the study (%(default)s)"
    )
    parser.add_argument(
        "--policies", type=names, default=list(SIMULATED), metavar="LIST", help="fewer policies, for a try"
    )
    parser.add_argument(
        "--capacities", type=names, default=list(CAPACITIES), metavar="LIST", help="other capacities"
    )
    parser.add_argument(
        "-j", "--jobs", type=int, metavar="N", help="processes (as many as there are cores)"
    )
    return parser.parse_args()


def check_folder(out: Path) -> None:
    """Nothing is replaced but a study. Raises ConfigError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    page = out / PAGE
    if not page.is_file() or not page.read_text(encoding="utf-8").startswith(MARK):
        raise ConfigError(f"{out} is there and holds no study; give another folder with --out")


def write(out: Path, files: dict[str, bytes]) -> None:
    """Also removes what an earlier study wrote and this one does not."""
    stale = [*(out / TABLES).glob("*.csv"), *(out / PICTURES).glob("*.png"), *out.glob("report.html")]
    for path in stale:
        if str(path.relative_to(out)) not in files:
            path.unlink()
    for name, content in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def study(options: argparse.Namespace) -> None:
    started = time.monotonic()
    check_folder(options.out)
    runs = run_study(
        options.traces,
        options.capture,
        options.results,
        policies=options.policies,
        capacities=options.capacities,
        jobs=options.jobs,
    )
    replayed = time.monotonic()
    files = make_files(runs)
    write(options.out, files)
    size = format_size(sum(map(len, files.values())))
    print(
        f"{options.out / PAGE} and {len(files) - 1} files beside it, {size}; "
        f"{replayed - started:.0f} s of runs, {time.monotonic() - replayed:.0f} s of tables and pictures"
    )


def main() -> int:
    try:
        study(read_arguments())
    except (KVStrataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was run is kept, and the next run goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
